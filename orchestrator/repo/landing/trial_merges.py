"""Merge the unfinished work of sessions in memory, to predict conflicts.

The work is committed to a temporary repository, which borrows the hub's objects, so that nothing of it reaches a
landing or another session. Two processes suffice for any number of sessions: `git fast-import` writes only changed
files and their folders, and `git merge-tree --stdin` merges all pairs. Both are sandboxed, because the content is
uninspected.

The cost of a merge must not grow with the number of earlier ones: each commit replaces the previous one of its session
instead of following it, and replaced commits and the results of merges are deleted regularly.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import anyio
import anyio.to_thread

from orchestrator.repo.git.command import IDENTITY, Git, is_at_least, printable_name, read_version, split_nul
from orchestrator.repo.intake.live_files import FileState
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.system.files import copy_folder

_TIMEOUT: Final = 60.0
#: The number of packs, one for each `git fast-import`, after which they are replaced by one.
_MAX_PACKS: Final = 32
_BATCH_VERSION: Final = (2, 39)  # the first version with `merge-tree --stdin`
#: Nothing here must survive a crash; the windows on the hub's packs must fit into git's memory limit.
_CONFIG: Final = (
    "core.fsync=none",
    "core.compression=0",
    "core.packedGitWindowSize=32m",
    "core.packedGitLimit=256m",
    "fastimport.unpackLimit=1",
)
#: The temporary repository, and the objects that merges create.
_REPOSITORY, _RESULTS = "git", "results"
#: Git names the file of a file/directory conflict after its side.
_SIDE: Final = re.compile(r"~[0-9a-f]{40,64}(_[0-9]+)?$")


class TrialCommit(NamedTuple):
    """The commit of a session's changes."""

    start: str
    """Its parent: the commit that the session started from."""
    id: str
    tree: str = ""
    """Its tree; empty if it is that of the parent."""


@dataclass(slots=True)
class TrialMerges:
    """Commits and merges in a temporary repository; created by `open`."""

    folder: Path
    git: Git
    """Runs in the temporary repository, without a sandbox."""
    _confined: Git
    _merges_batches: bool
    _packs: int = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, git: Git, hub: Hub, run: str) -> AsyncIterator[TrialMerges]:
        """Provide an empty temporary repository in a hub for the body."""
        parent = Path(
            await anyio.to_thread.run_sync(lambda: tempfile.mkdtemp(prefix=f"{run}.merges-", dir=hub.indexes))
        )
        try:
            folder = parent / _REPOSITORY
            await anyio.to_thread.run_sync(copy_folder, hub.session_template, folder)
            await anyio.to_thread.run_sync(_empty_results, parent)
            own = replace(git, git_dir=folder, flags=(*git.flags, *(part for item in _CONFIG for part in ("-c", item))))
            confined = own.confined(readable=(hub.objects,), writable=(folder, parent / _RESULTS))
            yield cls(parent, own, confined, is_at_least(await read_version(git.environ) or "", _BATCH_VERSION))
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(shutil.rmtree, parent, ignore_errors=True))

    async def commit(self, work: Sequence[tuple[int, TrialCommit, Iterable[FileState]]]) -> list[TrialCommit]:
        """Add changed files to the commits of sessions, which have different numbers. Raises GitError."""
        if self._packs >= _MAX_PACKS:
            await self._confined("repack", "-a", "-d", "-l", "-q", "--window=0", limit=_TIMEOUT)
            await anyio.to_thread.run_sync(_empty_results, self.folder)
            self._packs = 0
        self._packs += 1
        stream = b"".join(part for number, commit, files in work for part in _commit(number, commit, files))
        done = await self._confined("fast-import", "--quiet", "--force", "--depth=0", input_=stream, limit=_TIMEOUT)
        lines = iter(done.stdout.decode().splitlines())
        return [TrialCommit(commit.start, next(lines), next(lines).split()[2]) for _, commit, _ in work]

    async def merge(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, ...] | None]:
        """Return the conflicting paths of each merge of two commits; None if it is clean. Raises GitError."""
        env = {"GIT_OBJECT_DIRECTORY": str(self.folder / _RESULTS)}
        command = ("merge-tree", "--write-tree", "-z", "--name-only", "--no-messages")
        if self._merges_batches:
            lines = "".join(f"{one} {other}\n" for one, other in pairs)
            done = await self._confined(*command, "--stdin", env=env, input_=lines.encode(), limit=_TIMEOUT)
            return list(_parse(done.stdout.decode(errors="surrogateescape")))
        found: list[tuple[str, ...] | None] = []
        for pair in pairs:
            done = await self._confined(*command, *pair, env=env, ok=(0, 1), limit=_TIMEOUT)
            _, *paths = split_nul(done.stdout)
            found.append(_printable(paths) if done.returncode else None)
        return found


def _empty_results(folder: Path) -> None:
    """Make the folder for the objects of merges, without earlier ones. Blocks."""
    results = folder / _RESULTS
    shutil.rmtree(results, ignore_errors=True)
    (results / "info").mkdir(parents=True)
    (results / "info" / "alternates").write_text(f"../{_REPOSITORY}/objects\n")


def _commit(number: int, commit: TrialCommit, files: Iterable[FileState]) -> Iterator[bytes]:
    """Yield the next commit of a session, in the format of git-fast-import(1)."""
    yield f"commit refs/heads/{number}\nmark :{number}\ncommitter {IDENTITY[0]} <{IDENTITY[1]}> 0 +0000\n".encode()
    yield f"data 0\nfrom {commit.start}\n".encode()
    if commit.tree:
        yield f'M 040000 {commit.tree} ""\n'.encode()
    # Removals first: a file may have replaced a folder.
    for path, mode, content in sorted(files, key=lambda file: file.mode != ""):
        escaped = path.encode(errors="surrogateescape").replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        quoted = b'"%s"' % escaped.replace(b"\n", b"\\n")
        if mode:
            yield b"M %s inline %s\ndata %d\n%s\n" % (mode.encode(), quoted, len(content), content)
        else:
            yield b"D %s\n" % quoted
    yield f'\nget-mark :{number}\nls :{number} ""\n'.encode()


def _parse(output: str) -> Iterator[tuple[str, ...] | None]:
    """Yield the result of each merge: its status, tree and paths, terminated by an empty field."""
    fields = iter(output.split("\0"))
    for status in fields:
        if not status.strip():
            return
        next(fields)
        paths = _printable(iter(partial(next, fields), ""))
        yield None if status.strip() == "1" else paths


def _printable(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_SIDE.sub("", printable_name(path)) for path in paths))
