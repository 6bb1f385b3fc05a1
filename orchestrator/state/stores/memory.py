"""The memory store: the file store's semantics without durability, for tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from orchestrator.errors import HistoryCompacted
from orchestrator.protocols import (
    VERSIONS_KEPT,
    Commit,
    CommitRecord,
    CompactionResult,
    Damage,
    Document,
    DocumentVersion,
    Dump,
    DumpedCommit,
    Key,
    StateSnapshot,
    StoreStatistics,
    VerificationReport,
)
from orchestrator.state.log.codec import LogLine, encode_commit, get_writer_name, to_dumped, to_record
from orchestrator.state.log.loading import check_intact, not_empty_error, read_dump_lines
from orchestrator.state.log.table import CommitStage, DocumentTable, read_versions, rebuild_state
from orchestrator.system.clock import Clock


class MemoryStore:
    """A `Store` in the memory of a single process."""

    damage: Sequence[Damage] = ()

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._by = get_writer_name()
        self._table = DocumentTable()
        self._lines: dict[int, LogLine] = {}
        self._kept_from = 0  # the position of the oldest state that can be reproduced
        self._news = anyio.Event()

    def local_paths(self) -> Sequence[Path]:
        """See `Store.local_paths`."""
        return ()

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`."""
        stage = CommitStage(self._table, self._by)
        line = stage.add(encode_commit(commit), self._clock.now())
        self._table.take(stage)
        self._lines[line.position] = line
        self._announce()
        return line.position

    def _announce(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        return self._table.get(key, self._clock.now())

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`."""
        return self._table.documents(kind, self._clock.now(), prefix)

    async def position(self) -> int:
        """See `Store.position`."""
        return self._table.position

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """See `Store.watch`."""
        while True:
            news = self._news
            while after < self._table.position:
                self._check_kept(after)
                after += 1
                yield to_record(self._lines[after])
            self._check_kept(after)
            await news.wait()

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """See `Store.history`."""
        return read_versions(self._table.entry(key), key, limit, self._lines.get)

    async def compact(self, older_than: float, largest: int) -> CompactionResult:  # noqa: ARG002  (the signature of the protocol)
        """See `Store.compact`: nothing is ever pruned."""
        size = self._size()
        return CompactionResult(size, size, self._kept_from)

    async def statistics(self) -> StoreStatistics:
        """See `Store.statistics`."""
        return self._table.statistics(self._kept_from, self._size(), self._clock.now())

    async def verify(self) -> VerificationReport:
        """See `Store.verify`."""
        table = DocumentTable()
        for line in self._lines.values():
            table.apply(line)
        return VerificationReport(self._table.position, self._size(), (), *table.compare(self._table))

    async def repair(self) -> VerificationReport:
        """See `Store.repair`: nothing can be damaged."""
        return await self.verify()

    def _size(self) -> int:
        return sum(len(line.payload) for line in self._lines.values())

    async def at(self, position: int) -> StateSnapshot:
        """See `Store.at`."""
        self._check_kept(position)
        return rebuild_state(position, self._lines.values(), self._kept_from)

    @asynccontextmanager
    async def dump(self) -> AsyncIterator[Dump]:
        """See `Store.dump`."""
        check_intact(await self.verify())
        yield Dump(self._table.position, self._kept_from, self._dumped(list(self._lines.values())))

    async def _dumped(self, lines: Sequence[LogLine]) -> AsyncGenerator[DumpedCommit]:
        for line in lines:
            yield to_dumped(line)

    async def load(self, dump: Dump) -> None:
        """See `Store.load`."""
        table, lines = DocumentTable(), dict[int, LogLine]()
        async for line in read_dump_lines(dump):
            table.apply(line)
            lines[line.position] = line
        table.position = dump.position
        if self._table.position:
            raise not_empty_error("the store in memory", self._table.position)
        self._table, self._lines, self._kept_from = table, lines, dump.first
        self._announce()

    def _check_kept(self, position: int) -> None:
        if position < self._kept_from:
            raise HistoryCompacted(position, self._kept_from)
