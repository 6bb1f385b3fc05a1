"""Merge the unfinished work of sessions in memory, to predict conflicts.

The work is committed to a temporary repository, which borrows the hub's objects, so that nothing of it reaches a
landing or another session. Two processes suffice for any number of sessions: `git fast-import` writes only changed
files and their folders, and `git merge-tree --stdin` merges all pairs. Both are sandboxed, because the content is
uninspected.
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
from typing import Final

import anyio
import anyio.to_thread

from orchestrator.repo.git.command import IDENTITY, Git, printable_name
from orchestrator.repo.intake.live_files import FileState
from orchestrator.repo.worktrees.hub import Hub

_TIMEOUT: Final = 60.0
#: Nothing here must survive a crash; the windows on the hub's packs must fit into git's memory limit.
_CONFIG: Final = ("core.fsync=none", "core.compression=0", "core.packedGitWindowSize=32m", "core.packedGitLimit=256m")
#: Git names the file of a file/directory conflict after its side.
_SIDE: Final = re.compile(r"~[0-9a-f]{40,64}(_[0-9]+)?$")


@dataclass(frozen=True, slots=True)
class TrialMerges:
    """Commits and merges in a temporary repository; created by `open`."""

    folder: Path
    git: Git
    """Runs in the temporary repository, without a sandbox."""
    _confined: Git

    @classmethod
    @asynccontextmanager
    async def open(cls, git: Git, hub: Hub, run: str) -> AsyncIterator[TrialMerges]:
        """Provide an empty temporary repository in a hub for the body."""
        parent = Path(
            await anyio.to_thread.run_sync(lambda: tempfile.mkdtemp(prefix=f"{run}.merges-", dir=hub.indexes))
        )
        try:
            folder = parent / "git"
            await anyio.to_thread.run_sync(shutil.copytree, hub.session_template, folder)
            own = replace(git, git_dir=folder, flags=(*git.flags, *(part for item in _CONFIG for part in ("-c", item))))
            yield cls(parent, own, own.confined(readable=(hub.objects,), writable=(folder,)))
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(shutil.rmtree, parent, ignore_errors=True))

    async def commit(self, work: Sequence[tuple[str, Iterable[FileState]]]) -> list[str]:
        """Commit changed files on top of their parents; return the commits. Raises GitError."""
        stream = b"".join(
            part for number, (parent, files) in enumerate(work, 1) for part in _commit(number, parent, files)
        )
        done = await self._confined("fast-import", "--quiet", "--force", input_=stream, limit=_TIMEOUT)
        return done.stdout.decode().split()

    async def merge(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, ...] | None]:
        """Return the conflicting paths of each merge of two commits; None if it is clean. Raises GitError."""
        command = ("merge-tree", "--write-tree", "--stdin", "-z", "--name-only", "--no-messages")
        lines = "".join(f"{one} {other}\n" for one, other in pairs)
        done = await self._confined(*command, input_=lines.encode(), limit=_TIMEOUT)
        return list(_parse(done.stdout.decode(errors="surrogateescape")))


def _commit(number: int, parent: str, files: Iterable[FileState]) -> Iterator[bytes]:
    """Yield a commit in the format of git-fast-import(1)."""
    yield f"commit refs/heads/{number}\nmark :{number}\ncommitter {IDENTITY[0]} <{IDENTITY[1]}> 0 +0000\n".encode()
    yield f"data 0\nfrom {parent}\n".encode()
    # Removals first: a file may have replaced a folder.
    for path, mode, content in sorted(files, key=lambda file: file.mode != ""):
        escaped = path.encode(errors="surrogateescape").replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        quoted = b'"%s"' % escaped.replace(b"\n", b"\\n")
        if mode:
            yield b"M %s inline %s\ndata %d\n%s\n" % (mode.encode(), quoted, len(content), content)
        else:
            yield b"D %s\n" % quoted
    yield f"\nget-mark :{number}\n".encode()


def _parse(output: str) -> Iterator[tuple[str, ...] | None]:
    """Yield the result of each merge: its status, tree and paths, terminated by an empty field."""
    fields = iter(output.split("\0"))
    for status in fields:
        if not status.strip():
            return
        next(fields)
        paths = dict.fromkeys(_SIDE.sub("", printable_name(path)) for path in iter(partial(next, fields), ""))
        yield None if status.strip() == "1" else tuple(paths)
