"""Detect a store's outages, wait for their end, and retry commits safely.

The wrapped stores fulfil the `Store` contract and cost one extra call while there is no outage. Maintenance (`compact`,
`verify`, `repair`, `statistics`, `dump`, `load`) never waits, because no task depends on it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import anyio
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from orchestrator.domain.events.base import TypedEvent
from orchestrator.domain.events.state import OutageEnded, OutageStarted
from orchestrator.errors import LeaseLost, StateLost, StoreFull, StoreUnavailable, StoreUnreachable, VersionConflict
from orchestrator.protocols import (
    VERSIONS_KEPT,
    Commit,
    CommitRecord,
    Damage,
    Document,
    DocumentVersion,
    Key,
    StateSnapshot,
    Store,
)
from orchestrator.system.clock import Clock

T = TypeVar("T")

EventHandler = Callable[[TypedEvent], None]

_log = logging.getLogger("orchestrator.outage")


@dataclass(frozen=True, slots=True)
class RetryIntervals:
    """Random pauses in seconds between attempts to reach a store.

    They are up to `first` at the beginning, then double up to `longest`.
    """

    first: float = 0.1
    longest: float = 3.0


DEFAULT_INTERVALS: Final = RetryIntervals()


def is_outage(error: BaseException) -> bool:
    """Return True if the store is unavailable but may recover.

    Lost state never recovers.
    """
    return isinstance(error, StoreUnavailable) and not isinstance(error, StateLost)


def _is_unreachable(error: BaseException) -> bool:
    return isinstance(error, StoreUnreachable)


def is_full(error: BaseException) -> bool:
    """Return True if the store's disk is full."""
    return isinstance(error, StoreFull)


async def commit_idempotently(store: Store, commit: Commit) -> int:
    """Commit; return the position of an earlier try of which only the reply was lost.

    See `Store.commit`.
    """
    try:
        return await store.commit(commit)
    except (VersionConflict, LeaseLost):
        position = await find_commit(store, commit)
        if position is None:
            raise
        return position


async def find_commit(store: Store, commit: Commit) -> int | None:
    """Return the position at which a commit was already made, or None.

    It was made if a single commit wrote all of its documents with the next version and the same value.
    """
    positions = set[int]()
    for write in commit.writes:
        newest = next(iter(await store.history(write.key, 1)), None)
        if newest is None or newest.damaged or newest.value != write.value:
            return None
        # A document that was deleted or never existed is expected at 0, regardless of its version.
        if write.expected and newest.version != write.expected + 1:
            return None
        positions.add(newest.position)
    return positions.pop() if len(positions) == 1 else None


class Outage:
    """An outage of a store, shared by all calls that wait for its end."""

    def __init__(
        self,
        clock: Clock,
        intervals: RetryIntervals,
        on_event: EventHandler,
        mode: str,
        is_temporary: Callable[[BaseException], bool] = is_outage,
        gives_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wait for the end of errors that are `is_temporary`; raise all others.

        Once `gives_up` returns True, all errors are raised.
        """
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
            self._on_event(OutageStarted(mode=self._mode, reason=str(error), started=self._clock.now()))

    def end(self, **facts: int) -> None:
        """Mark the store as reachable; send an event if there was an outage."""
        if self._since is not None:
            seconds = self._clock.monotonic() - self._since
            self._since = None
            self._ended.set()
            self._on_event(OutageEnded(mode=self._mode, seconds=seconds).replace(**facts))

    async def retry_until_reached(self, call: Callable[[], Awaitable[T]], *, update_status: bool = True) -> T:
        """Retry `call` until it reaches the store, and return its result.

        With `update_status`, failure begins the outage and success ends it.
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


class StoreWrapper:
    """A `Store` that delegates to an inner one.

    Subclasses add `commit` and handle failing reads.
    """

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.local_paths = inner.local_paths
        self.compact, self.statistics = inner.compact, inner.statistics
        self.verify, self.repair = inner.verify, inner.repair
        self.dump, self.load = inner.dump, inner.load

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        """Return the result of reading the inner store. Subclasses handle outages here."""
        return await read()

    async def _wait_for_recovery(self, error: StoreUnavailable) -> None:
        """Return once the inner store can be watched again, or raise its error."""
        raise error

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
        """See `Store.watch`.

        Continues after the last record once the inner store is reachable again.
        """
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

    @property
    def damage(self) -> Sequence[Damage]:
        """See `Store.damage`."""
        return self._inner.damage


class PausingStore(StoreWrapper):
    """A store that waits while its inner store is unreachable.

    Commits are not lost and keep their order.
    """

    def __init__(self, inner: Store, outage: Outage, flush_events: Callable[[], Awaitable[bool]] | None = None) -> None:
        super().__init__(inner)
        self.inner, self.outage, self.flush_events = inner, outage, flush_events
        self._commit_lock = anyio.Lock()
        """Held by the commit that is being retried; other commits queue in order of arrival."""
        self._waiting = 0

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`; if cancelled while waiting, nothing is committed."""
        if not self.outage.is_active and not self._waiting:
            try:
                return await self._inner.commit(commit)
            except StoreUnavailable as error:
                self._begin_outage(error)
        self._waiting += 1
        try:
            async with self._commit_lock:
                return await self.outage.retry_until_reached(partial(commit_idempotently, self._inner, commit))
        finally:
            self._waiting -= 1

    def _begin_outage(self, error: StoreUnavailable) -> None:
        """Begin an outage. Raises the error if waiting can't help."""
        if not self.outage.is_temporary(error):
            raise error
        self.outage.begin(error)

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        try:
            return await read()  # even during an outage, which may only affect commits: a full disk can be read
        except StoreUnavailable as error:
            self._begin_outage(error)
        return await self.outage.retry_until_reached(read)

    async def _wait_for_recovery(self, error: StoreUnavailable) -> None:
        self._begin_outage(error)
        await self.position()


def log_event(event: TypedEvent) -> None:
    """Log an event of an outage, which is recorded only when the store is reachable again."""
    _log.warning(event.sentence.format(**event.data()))


async def wait_for_server(open_store: Callable[[], Awaitable[T]], error: StoreUnreachable, clock: Clock) -> T:
    """Return the result of `open_store`, which failed with `error`, once the server answers."""
    outage = Outage(clock, DEFAULT_INTERVALS, log_event, "pause", _is_unreachable)
    outage.begin(error)
    return await outage.retry_until_reached(open_store)


def pausing_store(store: Store, clock: Clock, gives_up: Callable[[], bool]) -> Store:
    """Return a store that waits while its server does not answer, and logs that."""
    return PausingStore(store, Outage(clock, DEFAULT_INTERVALS, log_event, "pause", _is_unreachable, gives_up))


def end_pauses(store: Store) -> Store:
    """Return the store in a store of `pausing_store`, which raises its errors from now on; return others unchanged."""
    if not isinstance(store, PausingStore):
        return store
    store.outage.is_temporary = lambda _: False
    return store.inner


async def flush_outage_events(store: Store) -> bool:
    """Wait until the events of the outages so far are sent, if the store is from `survive_outages`.

    Return True if any were sent since the last call.
    """
    if isinstance(store, PausingStore) and store.flush_events is not None:
        return await store.flush_events()
    return False


def waiting_store(store: Store, clock: Clock) -> Store:
    """Return a store whose readers and followers silently wait for a remote store.

    A local store is returned unchanged.
    """
    if store.local_paths():
        return store
    return PausingStore(store, Outage(clock, DEFAULT_INTERVALS, lambda _: None, "pause"))
