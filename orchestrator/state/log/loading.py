"""Load a copied log: check its commits, and install them atomically.

The segments are written to the folder `loading`. Renaming it to `loaded` commits the load: every process that opens the
store, or commits, first moves the segments to their final location. A kill before the rename leaves an empty store and
a folder that the next load removes. All methods of `Staging` block.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import IO, Final

from orchestrator.errors import RefusedError
from orchestrator.protocols import Dump, VerificationReport
from orchestrator.state.log.codec import LogLine, encode_line, from_dumped
from orchestrator.state.log.packing import Packer
from orchestrator.state.log.segments import Segment, create_segment
from orchestrator.system.failpoints import failpoint
from orchestrator.system.files import make_durable, open_private, sync_folder

_LOADING: Final = "loading"
_LOADED: Final = "loaded"
PART_BYTES: Final = 1 << 20
"""Bytes to read or write per call."""
_REPAIR: Final = "`council state verify --repair` restores the readable state, then try again"


def check_intact(report: VerificationReport) -> None:
    """Raise RefusedError if verification found an error."""
    if not report.is_valid:
        keys = ", ".join(map(str, (*report.damaged, *report.mismatched)))
        errors = [damage.describe() for damage in report.damage] or [f"wrong documents: {keys}"]
        raise RefusedError(f"the state to copy is damaged: {'; '.join(errors)}", _REPAIR)


def damaged_log_error(position: int) -> RefusedError:
    """Return the error for a log that can't be read after a commit."""
    return RefusedError(f"the state to copy is damaged after position {position}", _REPAIR)


async def read_dump_lines(dump: Dump) -> AsyncGenerator[LogLine]:
    """Yield the commits of a dump as log lines.

    Raises RefusedError if its positions are inconsistent.
    """
    position = 0
    async with aclosing(dump.commits) as commits:
        async for commit in commits:
            is_left_over = position < commit.position <= dump.first
            if not (is_left_over or commit.position == max(position, dump.first) + 1):
                raise _broken(f"commit {commit.position} follows commit {position}")
            yield from_dumped(commit)
            position = commit.position
    if max(position, dump.first) != dump.position:
        raise _broken(f"it ends at commit {position} instead of {dump.position}")


async def read_dump_parts(dump: Dump) -> AsyncGenerator[list[LogLine]]:
    """Yield the commits of a dump like `read_dump_lines`, many at a time."""
    part, size = list[LogLine](), 0
    async with aclosing(read_dump_lines(dump)) as lines:
        async for line in lines:
            part.append(line)
            size += len(line.payload)
            if size >= PART_BYTES:
                yield part
                part, size = [], 0
    yield part


def _broken(what: str) -> RefusedError:
    return RefusedError(f"the state to load is incomplete: {what}", "dump it again")


def not_empty_error(location: str, position: int) -> RefusedError:
    """Return the error for a non-empty target store."""
    what = (
        f"{location} is not empty: it is at position {position}"
        if position
        else f"{location} is being loaded by another process"
    )
    return RefusedError(what, "use an empty store, such as a new folder")


class Staging:
    """The staged segments of a load.

    Only one process at a time may stage in a store's folder.
    """

    def __init__(self, directory: Path, first: int, segment_bytes: int) -> None:
        """Stage a log that was pruned up to position `first`.

        Its segments have `segment_bytes`.
        """
        self._directory, self._folder = directory, directory / _LOADING
        self._first, self._segment_bytes = first, segment_bytes
        self._path = self._folder
        self._file: IO[bytes] | None = None
        self._packer: Packer | None = None
        """Set while pruned commits are written."""
        self._size = 0
        self._has_live = False

    def begin(self) -> None:
        """Create an empty staging folder, removing that of an earlier load."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        if self._first:
            self._open(Segment(1, self._first, is_packed=True))
            self._packer = Packer()
            self._write(self._packer.head())

    def add(self, lines: Sequence[LogLine]) -> None:
        """Add lines in the log's order."""
        pruned = b"".join(encode_line(line) for line in lines if line.position <= self._first)
        if self._packer is not None and pruned:
            self._write(self._packer.add(pruned))
        for line in lines:
            if line.position > self._first:
                self._add_live(line)

    def _add_live(self, line: LogLine) -> None:
        if not self._has_live or self._size >= self._segment_bytes:
            self._open(Segment(line.position))
            self._has_live = True
        self._write(encode_line(line))

    def _write(self, data: bytes) -> None:
        assert self._file is not None, "a segment was opened for it"  # noqa: S101  (for the type checker)
        self._file.write(data)
        self._size += len(data)

    def finish(self) -> None:
        """Make the segments durable; the load is not committed yet."""
        self._close()
        if not self._has_live:
            create_segment(self._folder, self._first + 1)  # pruned segments are never appended to
        sync_folder(self._folder)
        failpoint("state.load_finished")

    def put(self) -> None:
        """Commit the load.

        The caller must hold the lock of the store, which must be empty.
        """
        self._folder.rename(self._directory / _LOADED)
        sync_folder(self._directory)
        failpoint("state.loaded")
        install_loaded(self._directory)

    def discard(self) -> None:
        """Remove the staged segments unless the load is committed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self, segment: Segment) -> None:
        self._close()
        self._size, self._path = 0, segment.path(self._folder)
        self._file = open(self._path, "xb", opener=open_private)  # noqa: SIM115  (closed by `_close` or `discard`)

    def _close(self) -> None:
        """Close the current segment and make it durable."""
        if self._file is None:
            return
        with self._file as file:
            if self._packer is not None:
                file.seek(0)
                file.write(self._packer.head())
        self._file = self._packer = None
        make_durable(self._path)
        failpoint("state.load_staged")


def install_loaded(directory: Path) -> None:
    """Complete a committed load, if any. The caller must hold the store's lock."""
    loaded = directory / _LOADED
    if not loaded.is_dir():
        return
    for path in sorted(loaded.iterdir()):
        path.rename(directory / path.name)
        failpoint("state.load_put")
    sync_folder(directory)
    loaded.rmdir()
    sync_folder(directory)
