"""Outages of a store: detect them, wait for their end, and repeat commits without doing them twice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import anyio
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from orchestrator.errors import LeaseLost, StateLost, StoreFull, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Event, Store
from orchestrator.system.clock import Clock

T = TypeVar("T")

EventHandler = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class RetryIntervals:
    """Seconds between two attempts to reach a store: random, up to `first`, then twice that, … up to `longest`."""

    first: float = 0.1
    longest: float = 10.0


DEFAULT_INTERVALS: Final = RetryIntervals()


def is_outage(error: BaseException) -> bool:
    """Return True if the store is unavailable but may recover; lost state never does."""
    return isinstance(error, StoreUnavailable) and not isinstance(error, StateLost)


def is_full(error: BaseException) -> bool:
    """Return True if the store's disk is full."""
    return isinstance(error, StoreFull)


async def commit_idempotently(store: Store, commit: Commit) -> int:
    """Commit, or return the position of the same earlier commit whose acknowledgement was lost; see `Store.commit`."""
    try:
        return await store.commit(commit)
    except (VersionConflict, LeaseLost):
        position = await _find_commit(store, commit)
        if position is None:
            raise
        return position


async def _find_commit(store: Store, commit: Commit) -> int | None:
    """Return the position at which a commit was already made, or None.

    It was made if a single commit wrote every one of its documents with the next version and the same value.
    """
    positions = set[int]()
    for write in commit.writes:
        newest = next(iter(await store.history(write.key, 1)), None)
        if newest is None or newest.damaged or newest.value != write.value:
            return None
        # A document that was deleted or never existed is expected at 0, whatever its version.
        if write.expected and newest.version != write.expected + 1:
            return None
        positions.add(newest.position)
    return positions.pop() if len(positions) == 1 else None


class Outage:
    """The time during which a store can't be reached, shared by all calls that wait for its end."""

    def __init__(
        self,
        clock: Clock,
        intervals: RetryIntervals,
        on_event: EventHandler,
        mode: str,
        is_temporary: Callable[[BaseException], bool] = is_outage,
        gives_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wait for the end of errors that are `is_temporary`, until `gives_up` returns True; raise all other errors."""
        self.is_temporary, self._gives_up = is_temporary, gives_up
        self._clock, self._intervals, self._on_event, self._mode = clock, intervals, on_event, mode
        self._since: float | None = None
        self._ended = anyio.Event()

    @property
    def is_active(self) -> bool:
        """Whether the last attempt to reach the store failed."""
        return self._since is not None

    def begin(self, error: StoreUnavailable) -> None:
        """Mark the store as unreachable; send one event for the whole outage."""
        if self._since is None:
            self._since, self._ended = self._clock.monotonic(), anyio.Event()
            self._on_event(Event("outage.began", {"mode": self._mode, "reason": error.what, "time": self._clock.now()}))

    def end(self, **facts: int) -> None:
        """Mark the store as reachable; send an event if an outage was active."""
        if self._since is not None:
            seconds = self._clock.monotonic() - self._since
            self._since = None
            self._ended.set()
            self._on_event(Event("outage.ended", {"mode": self._mode, "seconds": seconds, **facts}))

    async def retry_until_reached(self, call: Callable[[], Awaitable[T]], *, update_status: bool = True) -> T:
        """Repeat `call` until it reaches the store, and return its result.

        With `update_status`, failures begin the outage and success ends it.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(self.is_temporary),
            wait=wait_random_exponential(multiplier=self._intervals.first, max=self._intervals.longest),
            stop=lambda _: self._gives_up(),
            sleep=self._sleep,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                try:
                    result = await call()
                except StoreUnavailable as error:
                    if update_status and self.is_temporary(error):
                        self.begin(error)
                    raise
                if update_status:
                    self.end()
                return result
        raise AssertionError("an attempt returns or raises")

    async def _sleep(self, seconds: float) -> None:
        await self._clock.wait(self._ended, self._clock.monotonic() + seconds)


@asynccontextmanager
async def run_alongside(*tasks: Callable[[], Coroutine[Any, Any, None]], grace_period: float) -> AsyncIterator[None]:
    """Run tasks concurrently with the body, and for at most `grace_period` seconds after it.

    An error of the body is raised as it is, not in an exception group.
    """
    raised: Exception | None = None
    async with anyio.create_task_group() as group:
        for task in tasks:
            group.start_soon(task)
        try:
            yield
        except Exception as error:  # noqa: BLE001  which one is told below
            raised = error
        group.cancel_scope.deadline = anyio.current_time() + grace_period
    if raised is not None:
        raise raised
