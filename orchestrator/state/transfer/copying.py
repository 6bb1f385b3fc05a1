"""Copy a whole store into another one, or to and from a file, and compare both before reporting success."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import IO

from orchestrator.errors import InvalidDocument, RefusedError, StoreUnavailable
from orchestrator.protocols import Dump, DumpedCommit, Key, Store
from orchestrator.state.documents.validation import find_unreadable
from orchestrator.state.log.dump_checks import not_empty_error
from orchestrator.state.log.writer_name import get_writer_name
from orchestrator.state.transfer.export_file import REMEDY, ExportHeader, commit_line, open_export, write_export


@dataclass(frozen=True, slots=True)
class CopyResult:
    """The outcome of a copy; `position` and `first` are those of the `Dump`."""

    position: int
    first: int
    commits: int
    documents: int
    """The number of documents at that position."""
    bytes: int
    """The size of all commits as JSON lines."""
    was_there: bool = False
    """Whether the target already had the same content, so that nothing was copied."""
    packed: int | None = None
    """The size of the file in bytes; None if there is none."""
    unreadable: Mapping[Key, str] = field(default_factory=dict)
    """Unreadable documents of council's own, with the reason: copied unchanged; `Council.repair` fixes them."""

    @property
    def ratio(self) -> float | None:
        """The compression ratio of the file."""
        return self.bytes / self.packed if self.packed else None


class CommitTally:
    """Counts commits, and computes a checksum of their complete content."""

    def __init__(self) -> None:
        """Start with no commit."""
        self._commits = self._bytes = 0
        self._time = 0.0
        self._sum = hashlib.sha256()
        self._expires: dict[Key, float | None] = {}

    async def lines(self, commits: AsyncGenerator[DumpedCommit]) -> AsyncGenerator[bytes]:
        """Count commits, and yield their lines (see `export_file`)."""
        async with aclosing(commits) as found:
            async for commit in found:
                yield self._count(commit)

    async def passing(self, commits: AsyncGenerator[DumpedCommit]) -> AsyncGenerator[DumpedCommit]:
        """Count commits, and yield them."""
        async with aclosing(commits) as found:
            async for commit in found:
                self._count(commit)
                yield commit

    async def finish(self, dump: Dump, until: int) -> None:
        """Count the commits of a dump up to a position."""
        async with aclosing(dump.commits) as found:
            async for commit in found:
                if commit.position > until:
                    return
                self._count(commit)

    def _count(self, commit: DumpedCommit) -> bytes:
        line = commit_line(commit)
        self._commits += 1
        self._bytes += len(line)
        self._sum.update(line)
        self._time = commit.time
        for one in commit.documents:
            if one.encoded is None:
                self._expires.pop(one.key, None)
            else:
                self._expires[one.key] = one.expires
        return line

    def copied(self, dump: Dump, *, was_there: bool = False) -> CopyResult:
        """Return the result for a counted dump."""
        living = [one for one in self._expires.values() if one is None or self._time < one]
        return CopyResult(dump.position, dump.first, self._commits, len(living), self._bytes, was_there)

    def is_same(self, other: CommitTally) -> bool:
        """Return True if both have counted the same commits."""
        return (self._commits, self._sum.digest()) == (other._commits, other._sum.digest())


async def copy_store(source: Store, target: Store) -> CopyResult:
    """Copy a whole store into an empty one, and compare them.

    Raises like `Store.dump` and `Store.load`, and StoreUnavailable if they differ. If the target already has the same
    content, as after a copy that was interrupted at its very end, nothing is copied.
    """
    async with source.dump() as dump:
        tally, was_there = await _fill(target, dump)
    return await _compared(target, dump, tally, was_there=was_there)


async def export_to_stream(store: Store, stream: IO[bytes], time: float) -> CopyResult:
    """Write a whole store to a stream in the format of `export_file`; `time` is the current wall-clock time."""
    tally = CommitTally()
    async with store.dump() as dump:
        header = ExportHeader(position=dump.position, first=dump.first, time=time, by=get_writer_name())
        packed = await write_export(stream, header, tally.lines(dump.commits))
    return replace(tally.copied(dump), packed=packed, unreadable=dict(await find_unreadable(store)))


async def import_from_stream(name: str, opens: Callable[[], IO[bytes]], target: Store) -> CopyResult:
    """Load an export into an empty store, and compare them; `name` is the file's name in errors.

    RefusedError, with an empty target, if any byte of the file was changed. Otherwise like `copy_store`.
    """
    async with open_export(name, opens) as (reader, dump):
        try:
            tally, was_there = await _fill(target, dump)
        except InvalidDocument as error:
            raise RefusedError(f"{name}: {error}", REMEDY) from None
    return replace(await _compared(target, dump, tally, was_there=was_there), packed=reader.bytes)


async def _fill(target: Store, dump: Dump) -> tuple[CommitTally, bool]:
    """Load a dump, or only count it if the target may have it already; return its tally, and True if so."""
    tally, position = CommitTally(), await target.position()
    if position not in {0, dump.position}:
        raise not_empty_error("the target", position)
    if position:
        await tally.finish(dump, dump.position)
    else:
        await target.load(replace(dump, commits=tally.passing(dump.commits)))
    return tally, position > 0


async def _compared(target: Store, dump: Dump, tally: CommitTally, *, was_there: bool) -> CopyResult:
    """Return the result if the target, read again, has exactly the copied content."""
    held = CommitTally()
    async with target.dump() as found:
        first = found.first
        await held.finish(found, dump.position)
    if first == dump.first and held.is_same(tally):
        return replace(tally.copied(dump, was_there=was_there), unreadable=dict(await find_unreadable(target)))
    if was_there:
        raise not_empty_error("the target", dump.position)
    raise StoreUnavailable("the target", "its content differs from the original", "remove it, and copy again")
