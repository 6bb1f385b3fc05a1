"""Helpers of the outage tests: a real store that can be disconnected."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio

from orchestrator.errors import StoreUnavailable
from orchestrator.protocols import Commit, CommitRecord, Store
from orchestrator.state.offline.outage import RetryIntervals, StoreWrapper
from orchestrator.state.stores import file
from orchestrator.system.clock import Clock

T = TypeVar("T")

#: No wait in tests.
QUICK_PAUSES = RetryIntervals(first=0.001, longest=0.005)


class DisconnectableStore(StoreWrapper):
    """A store behind a connection that can be cut."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._is_cut = False
        self._news = anyio.Event()
        self.lost_answers = 0
        """How many of the next commits are made without their maker's getting to know."""

    def cut(self) -> None:
        """Disconnect the store; watchers notice."""
        self._is_cut = True
        self._news.set()
        self._news = anyio.Event()

    def reconnect(self) -> None:
        """Reconnect the store."""
        self._is_cut = False

    def _check(self) -> None:
        if self._is_cut:
            raise StoreUnavailable("the other end", "it does not answer", "wait")

    async def commit(self, commit: Commit) -> int:
        self._check()
        position = await self._inner.commit(commit)
        if self.lost_answers:
            self.lost_answers -= 1
            raise StoreUnavailable("the other end", "it does not answer", "wait")
        return position

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        self._check()
        return await read()

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        self._check()
        async with aclosing(self._inner.watch(after)) as records:
            while (record := await self._next(records)) is not None:
                yield record

    async def _next(self, records: AsyncGenerator[CommitRecord]) -> CommitRecord | None:
        found, cut = list[CommitRecord](), self._news

        async with anyio.create_task_group() as group:

            async def take() -> None:
                found.append(await anext(records))
                group.cancel_scope.cancel()

            group.start_soon(take)
            await cut.wait()
            group.cancel_scope.cancel()
        self._check()
        return found[0] if found else None


class FailingStore(StoreWrapper):
    """A store with scripted failures; with `answers_are_lost` the failing calls take effect."""

    def __init__(self, inner: Store, *, answers_are_lost: bool) -> None:
        super().__init__(inner)
        self._failing = range(0)
        self._answers_are_lost = answers_are_lost
        self.calls = 0

    def fail(self, first: int, times: int) -> None:
        """Fail `times` calls, starting with the `first` one from now."""
        self.calls, self._failing = 0, range(first, first + times)

    async def commit(self, commit: Commit) -> int:
        return await self._read(partial(self._inner.commit, commit))

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        await self._read(self._inner.position)
        async with aclosing(super().watch(after)) as records:
            async for record in records:
                yield record

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        self.calls += 1
        if self.calls in self._failing:
            if self._answers_are_lost:
                await read()
            raise StoreUnavailable("the server", "it does not answer", "wait")
        return await read()


def fail_file_store(call: str, marker: str) -> None:
    """Fail the n-th call of each file store that this process opens, which creates the file `marker`."""
    open_intact = file.open_file_store

    @asynccontextmanager
    async def open_failing(url: str, clock: Clock, /) -> AsyncIterator[Store]:
        async with open_intact(url, clock) as store:
            failing = FailingStore(store, answers_are_lost=False)
            failing.fail(int(call), 1)
            try:
                yield failing
            finally:
                if failing.calls >= int(call):
                    Path(marker).touch()

    file.open_file_store = open_failing
