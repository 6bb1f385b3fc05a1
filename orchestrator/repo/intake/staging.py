"""Stages the files of a checkout in an index of ours, but for secrets and huge files.

Git runs in the trusted repository: no filter, hook or configuration of the agent's applies. It also runs in a sandbox
that lets it read the checkout and write our index and the quarantine, so that whatever it finds there (a repository in
the checkout, say) can't make it run or change anything else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import GitError, is_resource_exhaustion
from orchestrator.repo.git.command import FileChange, Git, join_nul, parse_raw_diff, split_nul
from orchestrator.repo.intake.inspection import IntakeRules, find_rejected_paths
from orchestrator.repo.intake.quarantine import Quarantine
from orchestrator.repo.worktrees.change_detection import TreeDiff

#: Seconds for git to read an agent's tree: it waits for ever where a file to be read is a pipe.
STAGING_TIMEOUT = 120.0

#: Up to so many paths are staged by name.
_MAX_NAMED_PATHS = 100

#: How git is given paths on its standard input.
_NAMED = ("--pathspec-from-file=-", "--pathspec-file-nul")

#: Has git not look at all files of the index in advance, where it is told which ones count.
_NO_MORE = ("-c", "core.preloadIndex=false")

# Git opens these wherever they are, whatever they are.
_READ_BY_GIT = frozenset({".gitignore", ".gitattributes", ".gitmodules"})


@dataclass(frozen=True, slots=True)
class StagingArea:
    """A checkout, the index that it is staged in, and where the new objects wait."""

    tree: Path
    index: Path
    quarantine: Quarantine
    known_diff: TreeDiff | None = None
    """What differs from the checkout that the index was made of, if that is known."""

    def confine(self, git: Git) -> Git:
        """Return git in the sandbox in which it looks at the checkout, and at what was staged of it."""
        readable = (self.tree, self._ignored, self.quarantine.hub)
        return git.confined(readable=readable, writable=(self.index.parent, self.quarantine.objects))

    @property
    def env(self) -> dict[str, str]:
        """What points git at the checkout, our index and the objects."""
        return {"GIT_WORK_TREE": str(self.tree), "GIT_INDEX_FILE": str(self.index), **self.quarantine.write_env}

    @property
    def ignore_option(self) -> tuple[str, str]:
        """The option by which git passes over what `prepare` was told."""
        return "-c", f"core.excludesFile={self._ignored}"

    @property
    def _ignored(self) -> Path:
        return self.quarantine.objects.with_name("ignored")

    def prepare(self, patterns: Iterable[str]) -> None:
        """Empty the quarantine, and write down what is not to be staged where the index does not have it. Blocks.

        The caller is the only one who uses the index: a lock on it was left by a command that was killed.
        """
        self.quarantine.empty()
        self.index.with_name(f"{self.index.name}.lock").unlink(missing_ok=True)
        self._ignored.write_text("".join(f"{pattern}\n" for pattern in patterns))


@dataclass(frozen=True, slots=True)
class StagingResult:
    """`refused`: the paths that were left as the base has them, each with why. `problem`: what else went wrong."""

    refused: Mapping[str, str]
    problem: str | None
    refused_objects: frozenset[str]
    changes: Sequence[FileChange]
    """How the index differs from the base by now."""


async def stage_files(git: Git, staging: StagingArea, base: str, admit: IntakeRules) -> StagingResult:
    """Stage all that differs from `base` and may come in; new objects stay in quarantine.

    Nothing that is refused by its name or its size is even read. Safe to repeat; the index is made anew from
    `base`, with what it knows of the files' times.
    """
    git = staging.confine(git)
    await anyio.to_thread.run_sync(staging.prepare, admit.ignored)
    if staging.known_diff is not None and staging.known_diff.is_small(_MAX_NAMED_PATHS):
        among = staging.known_diff.without(lambda path: admit.find_withheld(path) is not None)
        staged = await _stage(git, staging, base, admit, among)
        if staged is not None:
            return staged
        await anyio.to_thread.run_sync(staging.prepare, admit.ignored)
    # As a rule it is as the checkout left it: making it anew takes many times as long as finding that out.
    if (await git("diff-index", "--cached", "--quiet", base, env=staging.env, ok=(0, 1, 128))).returncode:
        await git("read-tree", "--reset", base, env=staging.env)
    staged = await _stage(git, staging, base, admit, None)
    assert staged is not None, "all was looked at"
    return staged


async def _stage(
    git: Git, staging: StagingArea, base: str, admit: IntakeRules, among: TreeDiff | None
) -> StagingResult | None:
    """Do it in an index as `base` has it; None if it turns out to have been another one.

    That is looked for only where git is to pass over all that is not `among` some.
    """
    try:
        found_at = {path: admit.find_withheld(path) for path in await _differing(git, staging, among, admit)}
        differing = [path for path, withheld in found_at.items() if withheld is None]
        refused = await anyio.to_thread.run_sync(_refused_unread, staging.tree, differing, admit)
        # A .gitignore may say that what we ignore is not to be ignored.
        without = [*refused, *{withheld for withheld in found_at.values() if withheld is not None}]
        problem = await anyio.to_thread.run_sync(_too_much, staging.tree, differing, refused, admit)
        if differing and problem is None:
            problem = await _add(git, staging, differing, without, admit)
        raw = await git("diff-index", "--cached", "--raw", "-z", "--no-renames", base, env=staging.env)
    except GitError as error:
        if among is None or is_resource_exhaustion(error):
            raise
        return None
    changes = parse_raw_diff(raw.stdout)
    # In an index as the base has it nothing else can be changed by now.
    may_differ = {path.rstrip("/") for path in differing} - refused.keys()
    if among is not None and not {one.path for one in changes} <= may_differ:
        return None
    found = await find_rejected_paths(git, changes, admit, staging.env, staging.quarantine.folders)
    rejected = [change for change in changes if change.path in found]
    if rejected:
        lines = "".join(f"{one.old_mode} {one.old_id}\t{one.path}\0" for one in rejected)
        await git("update-index", "-z", "--index-info", env=staging.env, input_=lines.encode(errors="surrogateescape"))
    told = {path: why for path, why in found.items() if admit.find_withheld(path) is None}
    left = [change for change in changes if change.path not in found]
    return StagingResult(refused | told, problem, frozenset(one.new_id for one in rejected), left)


async def _differing(git: Git, staging: StagingArea, among: TreeDiff | None, admit: IntakeRules) -> list[str]:
    """Return the paths where files are not what the index has, or not there any more, and are not ignored.

    Git looks only at what is `among` some; None is all. It is not even asked where all of these may be given to
    `git add`: that finds out itself which of them differ, and which are ignored.
    """
    if among is not None:
        paths = [*among.changed, *among.removed, *among.added]
        if await anyio.to_thread.run_sync(_may_all_be_read, staging.tree, among.added, paths, admit):
            return paths

    async def ask(*command: str, paths: Sequence[str] = (), input_: bytes | None = None) -> bytes:
        those = ("--", *map(_literal, paths)) if paths else ()
        argv = (*staging.ignore_option, *(() if among is None else _NO_MORE), *command, *those)
        done = await git(*argv, env=staging.env, cwd=staging.tree, ok=(0, 1), input_=input_, limit=STAGING_TIMEOUT)
        return done.stdout

    if among is not None and among.changed:  # what is gone may lead behind a link by now, and git takes no such name
        try:
            await ask("add", "--refresh", *_NAMED, input_=join_nul(map(_literal, among.changed)))
        except GitError:  # one of them was there, but is not tracked
            among = None
    if among is None:
        await ask("update-index", "-q", "--refresh")
    changed, others = b"", b""
    tracked = [] if among is None else [*among.changed, *among.removed]
    if among is None or tracked:
        changed = await ask("diff-files", "--raw", "-z", "--no-renames", paths=tracked)
    if among is None or among.added:
        named = [] if among is None else among.added
        others = await ask("ls-files", "--others", "--exclude-standard", "-z", paths=named)
    return [*(one.path for one in parse_raw_diff(changed)), *split_nul(others)]


def _literal(path: str) -> str:
    return f":(top,literal){path}"


def _may_all_be_read(tree: Path, added: Iterable[str], paths: Iterable[str], admit: IntakeRules) -> bool:
    """Whether none of the paths is refused unread, and none that was added is a folder."""
    folders = (path for path in added if (tree / path).is_dir() and not (tree / path).is_symlink())
    return not any(folders) and not _refused_unread(tree, paths, admit)


def _refused_unread(tree: Path, paths: Iterable[str], admit: IntakeRules) -> dict[str, str]:
    refused = {}
    for path in paths:
        try:
            status = os.lstat(tree / path)
        except OSError:  # gone meanwhile, or not to be reached: git will say so
            continue
        if not stat.S_ISDIR(status.st_mode) and (why := admit.check_file(path, status.st_size)):
            refused[path] = why
    return refused


def _too_much(tree: Path, paths: Iterable[str], refused: Mapping[str, str], admit: IntakeRules) -> str | None:
    """Return why git is not even to begin, None if it may."""
    files = size = 0
    for path in paths:
        with suppress(OSError):
            if path not in refused:
                size += os.lstat(tree / path).st_size
                files += 1
    return admit.check_total(files, size)


async def _add(
    git: Git, staging: StagingArea, paths: Sequence[str], without: Collection[str], admit: IntakeRules
) -> str | None:
    """Add the files at `paths`, which are all that differ, but for some; return why not all could be, or None."""
    excluded = [f":(top,exclude,literal){path}" for path in without]
    if len(paths) <= _MAX_NAMED_PATHS:
        # By name git need not look through the checkout once more. It won't have names that lead behind a link, which
        # is where the files of a folder are that became one.
        with suppress(GitError):
            await _add_matching(git, staging, [*map(_literal, paths), *excluded], admit, _NO_MORE)
            return None
    try:
        await _add_matching(git, staging, [":(top)", *excluded], admit)
    except GitError as error:
        if is_resource_exhaustion(error):
            raise
        return error.stderr
    return None


async def _add_matching(
    git: Git, staging: StagingArea, patterns: Sequence[str], admit: IntakeRules, options: Sequence[str] = ()
) -> None:
    # Above this size git would write packs, of which no object can be left behind.
    limit = f"core.bigFileThreshold={admit.max_file + 1}"
    command = [*options, "-c", limit, "add", "--sparse", "--all", "--ignore-errors", *_NAMED]
    given = join_nul(patterns)
    await git(*staging.ignore_option, *command, env=staging.env, cwd=staging.tree, input_=given, limit=STAGING_TIMEOUT)


def remove_blocking_files(tree: Path, diff: TreeDiff | None = None) -> list[str]:
    """Remove the pipes, sockets and devices that git would open and wait for. Blocks.

    Returns the folders that can't be opened: git passes over them with a warning. With `diff`, which says what
    differs from a checkout, nothing else is looked at.

    It opens each file that is called `.gitignore` and the like, and what is in a folder called `.git`, or in whatever
    folder something called `.git` names: so all pipes go, which can't be committed anyway.
    """
    unread: list[str] = []
    begin = [""] if diff is None else [*diff.changed, *diff.added, *diff.replaced]
    for path in [path for one in begin for path in find_blocking_files(tree / one, unread, anywhere=True)]:
        path.unlink(missing_ok=True)
    return unread


def find_blocking_files(tree: Path, unread: list[str] | None = None, *, anywhere: bool = False) -> Iterator[Path]:
    """Find what git would wait for in a checkout; the folders that can't be opened go to `unread`. Blocks."""
    waiting = [(str(tree), False)]
    if not tree.is_dir() or tree.is_symlink():
        waiting.clear()
        # Of the links in a checkout git follows this one only.
        if anywhere and _would_block(tree, follow=tree.name == ".gitmodules"):
            yield tree
    while waiting:
        folder, in_git = waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError:  # closed to us, or deeper than paths can be: git does not get there either
            if unread is not None:
                unread.append(folder)
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, in_git or entry.name == ".git"))
            elif (anywhere or in_git or entry.name in _READ_BY_GIT) and _blocks(entry, in_git=in_git):
                yield Path(entry.path)


def _blocks(entry: os.DirEntry[str], *, in_git: bool) -> bool:
    # What a folder says of its entries spares looking at each of them.
    if entry.is_file(follow_symlinks=False):
        return False
    follow = in_git or entry.name == ".gitmodules"
    return _would_block(Path(entry.path), follow=follow)


def _would_block(path: Path, *, follow: bool = False) -> bool:
    """Whether whoever reads a file may have to wait for somebody who writes."""
    try:
        mode = path.stat(follow_symlinks=follow).st_mode
    except OSError:  # a link to nowhere
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))
