"""Stage the files of a checkout in our index, except secrets and huge files.

Git runs in the trusted repository, so that the agent's filters, hooks and configuration don't apply. It is also
sandboxed: it can read the checkout and write our index and the quarantine, but nothing in the checkout (a nested
repository, for example) can make it run or change anything else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import GitError, is_resource_exhaustion
from orchestrator.repo.git.command import FileChange, Git, join_nul, parse_raw_diff, split_nul
from orchestrator.repo.intake.inspection import IntakeRules, find_rejected_paths
from orchestrator.repo.intake.quarantine import Quarantine
from orchestrator.repo.worktrees.files.change_detection import TreeDiff
from orchestrator.repo.worktrees.files.file_trees import grant_access, is_folder, walk_folders

#: Time limit in seconds for git to read an agent's tree: it would block forever on a pipe.
STAGING_TIMEOUT = 120.0

#: Up to this many paths are staged by name.
_MAX_PATHS_ON_STDIN_PATHS = 100

#: Options to pass paths on standard input.
_PATHS_ON_STDIN = ("--pathspec-from-file=-", "--pathspec-file-nul")

#: Keeps git from checking all files in the index when it is given paths.
_NO_PRELOAD = ("-c", "core.preloadIndex=false")

# Git opens files with these names in any folder, regardless of their type.
_READ_BY_GIT = frozenset({".gitignore", ".gitattributes", ".gitmodules"})

#: Git can't open longer paths (bytes, with a final NUL).
_PATH_MAX = 4096


@dataclass(frozen=True, slots=True)
class StagingArea:
    """A checkout, the index that stages it, and the quarantine of new objects."""

    tree: Path
    index: Path
    quarantine: Quarantine
    known_diff: TreeDiff | None = None
    """The changes since the index was created, if known."""

    def confine(self, git: Git) -> Git:
        """Return sandboxed git that reads the checkout and its staged files."""
        readable = (self.tree, self._ignored, self.quarantine.hub)
        return git.confined(readable=readable, writable=(self.index.parent, self.quarantine.objects))

    @property
    def env(self) -> dict[str, str]:
        """The environment that points git at the checkout, our index and the objects."""
        return {"GIT_WORK_TREE": str(self.tree), "GIT_INDEX_FILE": str(self.index), **self.quarantine.write_env}

    @property
    def ignore_option(self) -> tuple[str, str]:
        """The option that makes git ignore the patterns passed to `prepare`."""
        return "-c", f"core.excludesFile={self._ignored}"

    @property
    def _ignored(self) -> Path:
        return self.quarantine.objects.with_name("ignored")

    def prepare(self, patterns: Iterable[str]) -> None:
        """Empty the quarantine, and write the patterns of files not to stage. Blocks.

        Only the caller may use the index: an existing lock is a killed command's leftover.
        """
        self.quarantine.empty()
        self.index.with_name(f"{self.index.name}.lock").unlink(missing_ok=True)
        self._ignored.write_text("".join(f"{pattern}\n" for pattern in patterns))


@dataclass(frozen=True, slots=True)
class StagingResult:
    """The paths left as in the base, with reasons (`refused`), and any other problem."""

    refused: Mapping[str, str]
    problem: str | None
    refused_objects: frozenset[str]
    changes: Sequence[FileChange]
    """The changes from the base to the index."""


async def stage_files(git: Git, staging: StagingArea, base: str, rules: IntakeRules) -> StagingResult:
    """Stage all allowed changes since `base`; new objects stay in quarantine.

    Files rejected by name or size are not read. Safe to repeat: the index is rebuilt from `base` and keeps its cached
    mtimes.
    """
    git = staging.confine(git)
    await anyio.to_thread.run_sync(staging.prepare, rules.ignored)
    if staging.known_diff is not None and staging.known_diff.is_small(_MAX_PATHS_ON_STDIN_PATHS):
        among = staging.known_diff.without(lambda path: rules.find_withheld(path) is not None)
        staged = await _stage(git, staging, base, rules, among)
        if staged is not None:
            return staged
        await anyio.to_thread.run_sync(staging.prepare, rules.ignored)
    # Usually the index still matches `base`, and checking that is many times faster than rebuilding it.
    if (await git("diff-index", "--cached", "--quiet", base, env=staging.env, ok=(0, 1, 128))).returncode:
        await git("read-tree", "--reset", base, env=staging.env)
    staged = await _stage(git, staging, base, rules, None)
    assert staged is not None, "without `among` there is always a result"  # noqa: S101
    return staged


async def _stage(
    git: Git, staging: StagingArea, base: str, rules: IntakeRules, among: TreeDiff | None
) -> StagingResult | None:
    """Stage into an index that matches the base; return None if it does not match.

    A mismatch is detected only if git looks only at files `among` a diff.
    """
    try:
        withheld_at = {path: rules.find_withheld(path) for path in await _differing(git, staging, among, rules)}
        differing = [path for path, withheld in withheld_at.items() if withheld is None]
        refused, problem = await anyio.to_thread.run_sync(_check_unread, staging.tree, differing, rules)
        # A .gitignore may re-include files that we ignore.
        without = [*refused, *{withheld for withheld in withheld_at.values() if withheld is not None}]
        if differing and problem is None:
            problem = await _add(git, staging, differing, without, rules)
        raw = await git("diff-index", "--cached", "--raw", "-z", "--no-renames", base, env=staging.env)
    except GitError as error:
        if among is None or is_resource_exhaustion(error):
            raise
        return None
    changes = parse_raw_diff(raw.stdout)
    # If the index matched the base, no other path can be changed.
    may_differ = {path.rstrip("/") for path in differing} - refused.keys()
    if among is not None and not {change.path for change in changes} <= may_differ:
        return None
    reasons = await find_rejected_paths(git, changes, rules, staging.env, staging.quarantine.folders)
    rejected = [change for change in changes if change.path in reasons]
    if rejected:
        lines = "".join(f"{change.old_mode} {change.old_id}\t{change.path}\0" for change in rejected)
        await git("update-index", "-z", "--index-info", env=staging.env, input_=lines.encode(errors="surrogateescape"))
    refused |= {path: reason for path, reason in reasons.items() if rules.find_withheld(path) is None}
    remaining = [change for change in changes if change.path not in reasons]
    return StagingResult(refused, problem, frozenset(change.new_id for change in rejected), remaining)


async def _differing(git: Git, staging: StagingArea, among: TreeDiff | None, rules: IntakeRules) -> list[str]:
    """Return files that differ from the index or are missing, and are not ignored.

    If `among` is given, git examines only the files of that diff. Git is not run if every path may be passed to `git
    add`, which itself detects changed and ignored files.
    """
    if among is not None:
        paths = [*among.changed, *among.removed, *among.added]
        if await anyio.to_thread.run_sync(_may_all_be_read, staging.tree, among.added, paths, rules):
            return paths

    async def ask(*command: str, paths: Sequence[str] = (), input_: bytes | None = None) -> bytes:
        pathspecs = ("--", *map(_literal, paths)) if paths else ()
        argv = (*staging.ignore_option, *(() if among is None else _NO_PRELOAD), *command, *pathspecs)
        done = await git(*argv, env=staging.env, cwd=staging.tree, ok=(0, 1), input_=input_, limit=STAGING_TIMEOUT)
        return done.stdout

    if among is not None and among.changed:  # not removed files: they may now be behind a link, which git rejects
        try:
            await ask("add", "--refresh", *_PATHS_ON_STDIN, input_=join_nul(map(_literal, among.changed)))
        except GitError:  # one of the paths is not tracked
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
    return [*(change.path for change in parse_raw_diff(changed)), *split_nul(others)]


def _literal(path: str) -> str:
    return f":(top,literal){path}"


def _may_all_be_read(tree: Path, added: Iterable[str], paths: Iterable[str], rules: IntakeRules) -> bool:
    """Return whether no path is rejected, and no added path is a folder."""
    folders = (path for path in added if is_folder(tree / path))
    return not any(folders) and not _check_unread(tree, paths, rules)[0]


def _check_unread(tree: Path, paths: Iterable[str], rules: IntakeRules) -> tuple[dict[str, str], str | None]:
    """Return files rejected by name or size, and the limit that the rest exceeds."""
    refused, files, total = dict[str, str](), 0, 0
    for path in paths:
        with suppress(OSError):  # removed in the meantime, or unreachable: git reports it
            status = os.lstat(tree / path)
            if not stat.S_ISDIR(status.st_mode) and (reason := rules.check_file(path, status.st_size)):
                refused[path] = reason
            else:
                files, total = files + 1, total + status.st_size
    return refused, rules.check_total(files, total)


async def _add(
    git: Git, staging: StagingArea, paths: Sequence[str], without: Collection[str], rules: IntakeRules
) -> str | None:
    """Add the changed files `paths`; return the reason for a failure, or None."""
    excluded = [f":(top,exclude,literal){path}" for path in without]
    if len(paths) <= _MAX_PATHS_ON_STDIN_PATHS:
        # Given names, git need not scan the checkout again. It rejects names behind a link: these are files of a folder
        # that was replaced by a link.
        with suppress(GitError):
            await _add_matching(git, staging, [*map(_literal, paths), *excluded], rules, _NO_PRELOAD)
            return None
    try:
        await _add_matching(git, staging, [":(top)", *excluded], rules)
    except GitError as error:
        if is_resource_exhaustion(error):
            raise
        return error.stderr
    return None


async def _add_matching(
    git: Git, staging: StagingArea, patterns: Sequence[str], rules: IntakeRules, options: Sequence[str] = ()
) -> None:
    # Above this size git would write packs, from which single objects can't be excluded.
    limit = f"core.bigFileThreshold={rules.max_file + 1}"
    command = [*options, "-c", limit, "add", "--sparse", "--all", "--ignore-errors", *_PATHS_ON_STDIN]
    pathspecs = join_nul(patterns)
    await git(
        *staging.ignore_option, *command, env=staging.env, cwd=staging.tree, input_=pathspecs, limit=STAGING_TIMEOUT
    )


def make_readable(tree: Path, diff: TreeDiff | None = None) -> list[str]:
    """Make files readable and remove those that git would block on. Blocks.

    Git opens every file with a name such as `.gitignore`, and the contents of a `.git` folder or of any folder that a
    `.git` file points to. So all pipes, sockets and devices are removed; they can't be committed anyway. With `diff`
    (the changes in a checkout), only changed paths are examined. Returns the folders that git can't open, which it
    skips with a warning. No process of the session may be running.
    """
    unread: list[str] = []
    for folder in () if diff is None else sorted(diff.touched_folders):
        grant_access(tree / folder.strip("/"))
    for start in [""] if diff is None else sorted((*diff.changed, *diff.added, *diff.replaced)):
        top = tree / start
        if _would_block(top, follow=top.name == ".gitmodules"):  # git follows no other links in a checkout
            top.unlink(missing_ok=True)
        else:
            walk_folders(top, partial(_make_entries_readable, top, unread), unread)
    return unread


def _make_entries_readable(top: Path, unread: list[str], folder: int, names: list[str]) -> list[str]:
    """Make the files of a folder readable for git; return its subfolders."""
    path = "/".join((str(top), *names))
    if len(os.fsencode(path)) >= _PATH_MAX:
        unread.append(path)
        return []
    in_git = ".git" in names
    below = []
    with os.scandir(folder) as scan:
        entries = list(scan)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            below.append(entry.name)
        elif entry.is_file(follow_symlinks=False):
            grant_access(entry.name, folder)
        elif _would_block(entry.name, folder, follow=in_git or entry.name == ".gitmodules"):
            os.unlink(entry.name, dir_fd=folder)
    return below


def find_blocking_files(tree: Path) -> Iterator[Path]:
    """Find files in a checkout that git would block on. Blocks."""
    waiting = [(str(tree), False)]
    while waiting:
        folder, in_git = waiting.pop()
        try:
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError:  # unreadable, or longer than the path limit: git can't read it either
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, in_git or entry.name == ".git"))
                continue
            follow = in_git or entry.name == ".gitmodules"
            if (follow or entry.name in _READ_BY_GIT) and _would_block(entry.path, follow=follow):
                yield Path(entry.path)


def _would_block(path: str | Path, folder: int | None = None, *, follow: bool = False) -> bool:
    """Return whether reading a file may block until there is a writer."""
    try:
        mode = os.stat(path, dir_fd=folder, follow_symlinks=follow).st_mode
    except OSError:  # a dangling link
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))
