"""What a store that stands before another passes on as it is: upkeep and copying, for which nobody is kept waiting."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from orchestrator.protocols import Compacted, Damage, Dump, Statistics, Store, Verified


class Wrapping:
    """The part of a `Store` that is the inner store's; what reads and writes is the subclass's."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    async def compact(self, older_than: float, largest: int) -> Compacted:
        """See `Store.compact`."""
        return await self._inner.compact(older_than, largest)

    async def statistics(self) -> Statistics:
        """See `Store.statistics`."""
        return await self._inner.statistics()

    async def verify(self) -> Verified:
        """See `Store.verify`."""
        return await self._inner.verify()

    async def repair(self) -> Verified:
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
