"""Base of stores that wrap another: passes on reads, maintenance and copying."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import StoreUnavailable
from orchestrator.protocols import (
    VERSIONS_KEPT,
    CommitRecord,
    CompactionResult,
    Damage,
    Document,
    DocumentVersion,
    Dump,
    Key,
    StateSnapshot,
    Store,
    StoreStatistics,
    VerificationReport,
)

T = TypeVar("T")


class StoreWrapper:
    """A `Store` that delegates to an inner one; subclasses add `commit` and handle failing reads."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a read of the inner store; a subclass handles outages here."""
        return await read()

    async def _wait_for_recovery(self, error: StoreUnavailable) -> None:
        """Return once the inner store can be watched again, or raise the error that ended the watch."""
        raise error

    def local_paths(self) -> Sequence[Path]:
        """See `Store.local_paths`."""
        return self._inner.local_paths()

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        return await self._read(partial(self._inner.get, key))

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`."""
        return await self._read(partial(self._inner.list, kind, prefix))

    async def position(self) -> int:
        """See `Store.position`."""
        return await self._read(self._inner.position)

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """See `Store.watch`; it continues after the last record once the inner store is back."""
        while True:
            try:
                async with aclosing(self._inner.watch(after)) as records:
                    async for record in records:
                        after = record.position
                        yield record
            except StoreUnavailable as error:
                await self._wait_for_recovery(error)

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """See `Store.history`."""
        return await self._read(partial(self._inner.history, key, limit))

    async def at(self, position: int) -> StateSnapshot:
        """See `Store.at`."""
        return await self._read(partial(self._inner.at, position))

    async def compact(self, older_than: float, largest: int) -> CompactionResult:
        """See `Store.compact`."""
        return await self._inner.compact(older_than, largest)

    async def statistics(self) -> StoreStatistics:
        """See `Store.statistics`."""
        return await self._inner.statistics()

    async def verify(self) -> VerificationReport:
        """See `Store.verify`."""
        return await self._inner.verify()

    async def repair(self) -> VerificationReport:
        """See `Store.repair`."""
        return await self._inner.repair()

    def dump(self) -> AbstractAsyncContextManager[Dump]:
        """See `Store.dump`."""
        return self._inner.dump()

    async def load(self, dump: Dump) -> None:
        """See `Store.load`."""
        await self._inner.load(dump)

    @property
    def damage(self) -> Sequence[Damage]:
        """See `Store.damage`."""
        return self._inner.damage
