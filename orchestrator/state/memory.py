"""The memory store: the file store's rules without its promises, for tests and simulation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import anyio

from orchestrator.clock import Clock
from orchestrator.protocols import (
    HISTORY,
    Commit,
    Compacted,
    Damage,
    Document,
    Key,
    Record,
    State,
    Statistics,
    Verified,
    Version,
)
from orchestrator.state.history import state_at, versions
from orchestrator.state.log import Line, encode_commit, to_record
from orchestrator.state.table import Stage, Table
from orchestrator.state.writer import name_of_writer


class MemoryStore:
    """A `Store` for one process and its lifetime."""

    damage: Sequence[Damage] = ()

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._by = name_of_writer()
        self._table = Table()
        self._lines: list[Line] = []
        self._news = anyio.Event()

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`."""
        line = Stage(self._table, self._by).add(encode_commit(commit), self._clock.now())
        self._table.apply(line)
        self._lines.append(line)
        self._news.set()
        self._news = anyio.Event()
        return line.position

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        return self._table.get(key, self._clock.now())

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`."""
        return self._table.documents(kind, self._clock.now(), prefix)

    async def position(self) -> int:
        """See `Store.position`."""
        return self._table.position

    async def watch(self, after: int = 0) -> AsyncGenerator[Record]:
        """See `Store.watch`."""
        while True:
            news = self._news
            while after < len(self._lines):
                after += 1
                yield to_record(self._lines[after - 1])
            await news.wait()

    async def history(self, key: Key, limit: int = HISTORY) -> Sequence[Version]:
        """See `Store.history`."""
        return versions(self._table.entry(key), key, limit, lambda position: self._lines[position - 1])

    async def compact(self, older_than: float, largest: int) -> Compacted:  # noqa: ARG002  it ends with its process
        """See `Store.compact`: nothing is ever let go of."""
        size = self._size()
        return Compacted(size, size, 0)

    async def statistics(self) -> Statistics:
        """See `Store.statistics`."""
        return self._table.statistics(0, self._size(), self._clock.now())

    async def verify(self) -> Verified:
        """See `Store.verify`."""
        table = Table()
        for line in self._lines:
            table.apply(line)
        return Verified(self._table.position, self._size(), (), *table.compare(self._table))

    async def repair(self) -> Verified:
        """See `Store.repair`: nothing can be damaged."""
        return await self.verify()

    def _size(self) -> int:
        return sum(len(line.payload) for line in self._lines)

    async def at(self, position: int) -> State:
        """See `Store.at`."""
        return state_at(position, iter(self._lines))
