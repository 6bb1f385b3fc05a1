"""Stages the files of a checkout in an index of ours, but for secrets and huge files.

Git runs in the trusted repository: no filter, hook or configuration of the agent's applies.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import GitError
from orchestrator.repo.git import Git, parse_raw
from orchestrator.repo.inspection import Admission, inspect
from orchestrator.repo.quarantine import Quarantine

#: Seconds for git to read an agent's tree: it waits for ever where a file to be read is a pipe.
STAGING_LIMIT = 120.0

# Git opens these wherever they are, whatever they are.
_READ_BY_GIT = frozenset({".gitignore", ".gitattributes", ".gitmodules"})


@dataclass(frozen=True, slots=True)
class Staging:
    """A checkout, the index that it is staged in, and where the new objects wait."""

    tree: Path
    index: Path
    quarantine: Quarantine

    @property
    def env(self) -> dict[str, str]:
        """What points git at the checkout, our index and the objects."""
        return {"GIT_WORK_TREE": str(self.tree), "GIT_INDEX_FILE": str(self.index), **self.quarantine.writing}


@dataclass(frozen=True, slots=True)
class Staged:
    """`refused`: the paths that were left as the base has them, each with why. `problem`: what else went wrong."""

    refused: Mapping[str, str]
    problem: str | None
    refused_objects: frozenset[str]


async def stage(git: Git, staging: Staging, base: str, admit: Admission) -> Staged:
    """Stage all that differs from `base` and may come in; new objects stay in quarantine.

    Nothing that is refused by its name or its size is even read. Safe to repeat; the index is made anew from
    `base`, with what it knows of the files' times.
    """
    await anyio.to_thread.run_sync(staging.quarantine.empty)
    await git("read-tree", "--reset", base, env=staging.env)
    differing = await _differing(git, staging)
    refused = await anyio.to_thread.run_sync(_refused_unread, staging.tree, differing, admit)
    problem = await _add(git, staging, refused, admit)
    raw = await git("diff-index", "--cached", "--raw", "-z", "--no-renames", base, env=staging.env)
    changes = parse_raw(raw.stdout)
    found = await inspect(git, changes, admit, staging.env)
    rejected = [change for change in changes if change.path in found]
    lines = "".join(f"{one.old_mode} {one.old_id}\t{one.path}\0" for one in rejected)
    await git("update-index", "-z", "--index-info", env=staging.env, input_=lines.encode(errors="surrogateescape"))
    return Staged(refused | found, problem, frozenset(one.new_id for one in rejected))


async def _differing(git: Git, staging: Staging) -> list[str]:
    """Return the paths of files that are not what the index has, and are not ignored."""

    async def ask(*command: str) -> bytes:
        done = await git(*command, env=staging.env, cwd=staging.tree, ok=(0, 1), limit=STAGING_LIMIT)
        return done.stdout

    await ask("update-index", "-q", "--refresh")
    changed = parse_raw(await ask("diff-files", "--raw", "-z", "--no-renames"))
    others = (await ask("ls-files", "--others", "--exclude-standard", "-z")).decode(errors="surrogateescape")
    return [one.path for one in changed if int(one.new_mode, 8)] + others.split("\0")[:-1]


def _refused_unread(tree: Path, paths: Iterable[str], admit: Admission) -> dict[str, str]:
    refused = {}
    for path in paths:
        try:
            status = os.lstat(tree / path)
        except OSError:  # gone meanwhile, or not to be reached: git will say so
            continue
        if not stat.S_ISDIR(status.st_mode) and (why := admit.of_file(path, status.st_size)):
            refused[path] = why
    return refused


async def _add(git: Git, staging: Staging, without: Iterable[str], admit: Admission) -> str | None:
    """Add the files but for some; return why not all the others could be added, or None."""
    # Above this size git would write packs, of which no object can be left behind.
    command = ["-c", f"core.bigFileThreshold={admit.max_file + 1}", "add", "--all", "--ignore-errors"]
    excluded = "".join(f":(top,exclude,literal){path}\0" for path in without).encode(errors="surrogateescape")
    if excluded:
        command += ["--pathspec-from-file=-", "--pathspec-file-nul"]
    try:
        await git(*command, env=staging.env, cwd=staging.tree, input_=excluded or None, limit=STAGING_LIMIT)
    except GitError as error:
        return error.stderr
    return None


def remove_blocking(tree: Path) -> list[str]:
    """Remove the pipes, sockets and devices that git would open and wait for. Blocks.

    Returns the folders that can't be opened: git passes over them with a warning.

    It opens each file that is called `.gitignore` and the like, and what is in a folder called `.git`, or in whatever
    folder something called `.git` names: so all pipes go, which can't be committed anyway.
    """
    unread: list[str] = []
    for path in blocking(tree, unread, anywhere=True):
        path.unlink(missing_ok=True)
    return unread


def blocking(tree: Path, unread: list[str] | None = None, *, anywhere: bool = False) -> Iterator[Path]:
    """Find what git would wait for in a checkout; the folders that can't be opened go to `unread`. Blocks."""
    waiting = [(str(tree), False)]
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
    # Of the links in a checkout git follows this one only.
    follow = in_git or entry.name == ".gitmodules"
    try:
        mode = entry.stat(follow_symlinks=follow).st_mode
    except OSError:  # a link to nowhere
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))
