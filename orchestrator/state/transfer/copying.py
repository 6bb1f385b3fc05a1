"""Copies a whole store into another one, or to and from a file, and does not say so before the two were compared."""

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
    """What was copied: up to which position, and from where on states can be told, as in `Dump`."""

    position: int
    first: int
    commits: int
    documents: int
    """How many there are as of that position."""
    bytes: int
    """Of all commits as JSON lines."""
    was_there: bool = False
    """Whether the same was in the target already, so that nothing was done."""
    packed: int | None = None
    """How many bytes the file has; None where there is none."""
    unreadable: Mapping[Key, str] = field(default_factory=dict)
    """Why documents of ours can't be read, by key: copied as they are, and `Council.repair` restores older versions."""

    @property
    def ratio(self) -> float | None:
        """How many times smaller the file is than its lines."""
        return self.bytes / self.packed if self.packed else None


class CommitTally:
    """Counts the commits that go by, and takes a checksum of all that is told of them."""

    def __init__(self) -> None:
        """Begin with none."""
        self._commits = self._bytes = 0
        self._time = 0.0
        self._sum = hashlib.sha256()
        self._expires: dict[Key, float | None] = {}

    async def lines(self, commits: AsyncGenerator[DumpedCommit]) -> AsyncGenerator[bytes]:
        """Count commits, and yield their lines (see `portable`)."""
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
        """Return what was counted of a dump."""
        living = [one for one in self._expires.values() if one is None or self._time < one]
        return CopyResult(dump.position, dump.first, self._commits, len(living), self._bytes, was_there)

    def is_same(self, other: CommitTally) -> bool:
        """Whether the same commits went by."""
        return (self._commits, self._sum.digest()) == (other._commits, other._sum.digest())


async def copy_store(source: Store, target: Store) -> CopyResult:
    """Copy a whole store as it is now into an empty one, and compare them.

    Raises as `Store.dump` and `Store.load` do, and StoreUnavailable if they differ. Where the target holds exactly the
    same already, as behind a copy that was cut off at its very end, nothing is done.
    """
    async with source.dump() as dump:
        tally, was_there = await _fill(target, dump)
    return await _compared(target, dump, tally, was_there=was_there)


async def export_to_stream(store: Store, stream: IO[bytes], time: float) -> CopyResult:
    """Write a whole store as it is now to a stream, as a file of `portable`; `time` is the wall-clock seconds now."""
    tally = CommitTally()
    async with store.dump() as dump:
        header = ExportHeader(position=dump.position, first=dump.first, time=time, by=get_writer_name())
        packed = await write_export(stream, header, tally.lines(dump.commits))
    return replace(tally.copied(dump), packed=packed, unreadable=dict(await find_unreadable(store)))


async def import_from_stream(name: str, opens: Callable[[], IO[bytes]], target: Store) -> CopyResult:
    """Load what `export` wrote into an empty store, and compare them; `name` is what errors call the file.

    RefusedError, and the target stays empty, where not every byte of the file is as it was written. Else as `copy`.
    """
    async with open_export(name, opens) as (reader, dump):
        try:
            tally, was_there = await _fill(target, dump)
        except InvalidDocument as error:
            raise RefusedError(f"{name}: {error}", REMEDY) from None
    return replace(await _compared(target, dump, tally, was_there=was_there), packed=reader.bytes)


async def _fill(target: Store, dump: Dump) -> tuple[CommitTally, bool]:
    """Load a dump, or go through it where the target may hold it already; return its tally, and which it was."""
    tally, position = CommitTally(), await target.position()
    if position not in {0, dump.position}:
        raise not_empty_error("the target", position)
    if position:
        await tally.finish(dump, dump.position)
    else:
        await target.load(replace(dump, commits=tally.passing(dump.commits)))
    return tally, position > 0


async def _compared(target: Store, dump: Dump, tally: CommitTally, *, was_there: bool) -> CopyResult:
    """Return what was copied if the target, as it is read now, holds exactly that."""
    held = CommitTally()
    async with target.dump() as found:
        first = found.first
        await held.finish(found, dump.position)
    if first == dump.first and held.is_same(tally):
        return replace(tally.copied(dump, was_there=was_there), unreadable=dict(await find_unreadable(target)))
    if was_there:
        raise not_empty_error("the target", dump.position)
    raise StoreUnavailable("the target", "what it holds differs from what was copied", "remove it, and copy anew")
