"""What becomes of commits and reads while a store can't be reached: they wait, or go on with what is known here.

A store that is wrapped in this way is one by the same contract. While all is well it costs nothing but a call; upkeep
(`compact`, `verify`, `repair`, `statistics`, `dump`, `load`) is never held, since nobody's work depends on it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from orchestrator.errors import LeaseLost, StateLost, StoreFull, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Event, Store
from orchestrator.state.offline.wrapper import StoreWrapper
from orchestrator.system.clock import Clock

T = TypeVar("T")

#: What is told: at once, in this order, by a task of its own.
EventSink = Callable[[Event], Awaitable[None]]

#: Seconds that what is still to be told gets at the end.
_FLUSH_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class RetryIntervals:
    """Seconds between two tries to reach a store: at random up to `first`, then to twice that, … and to `longest`."""

    first: float = 0.1
    longest: float = 10.0


DEFAULT_INTERVALS: Final = RetryIntervals()


def is_outage(error: BaseException) -> bool:
    """Whether it may pass: what was lost comes back by no waiting."""
    return isinstance(error, StoreUnavailable) and not isinstance(error, StateLost)


def is_full(error: BaseException) -> bool:
    """Whether the store's disk is full."""
    return isinstance(error, StoreFull)


async def commit_idempotently(store: Store, commit: Commit) -> int:
    """Commit what may have been committed before, where only the acknowledgement was lost; see `Store.commit`."""
    try:
        return await store.commit(commit)
    except (VersionConflict, LeaseLost):
        position = await _position_of(store, commit)
        if position is None:
            raise
        return position


async def _position_of(store: Store, commit: Commit) -> int | None:
    """Return where a commit was made, if each document that it writes stands at the next version, with the very value,
    by one commit."""
    positions = set[int]()
    for write in commit.writes:
        newest = next(iter(await store.history(write.key, 1)), None)
        if newest is None or newest.damaged or newest.value != write.value:
            return None
        # What was deleted, or never was, is expected at 0 whatever its version.
        if write.expected and newest.version != write.expected + 1:
            return None
        positions.add(newest.position)
    return positions.pop() if len(positions) == 1 else None


class Outage:
    """A stretch of time in which a store can't be reached, for all that wait for its end."""

    def __init__(
        self,
        clock: Clock,
        pauses: RetryIntervals,
        news: Callable[[Event], None],
        mode: str,
        passes: Callable[[BaseException], bool] = is_outage,
        gives_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """`passes` is which errors may pass; others are raised as they are, and all once `gives_up` says so."""
        self.passes, self._gives_up = passes, gives_up
        self._clock, self._pauses, self._news, self._mode = clock, pauses, news, mode
        self._since: float | None = None
        self._over = anyio.Event()

    @property
    def is_on(self) -> bool:
        """Whether the store could not be reached when that was tried last."""
        return self._since is not None

    def begin(self, error: StoreUnavailable) -> None:
        """Note that it can't be reached, and tell so once."""
        if self._since is None:
            self._since, self._over = self._clock.monotonic(), anyio.Event()
            self._news(Event("outage.began", {"mode": self._mode, "reason": error.what, "time": self._clock.now()}))

    def end(self, **facts: int) -> None:
        """Note that it can be reached, and tell so once."""
        if self._since is not None:
            lasted = self._clock.monotonic() - self._since
            self._since = None
            self._over.set()
            self._news(Event("outage.ended", {"mode": self._mode, "seconds": lasted, **facts}))

    async def until_reached(self, call: Callable[[], Awaitable[T]], *, note: bool = True) -> T:
        """Return what `call` returns once the store can be reached; with `note`, tell how it stands meanwhile."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(self.passes),
            wait=wait_random_exponential(multiplier=self._pauses.first, max=self._pauses.longest),
            stop=lambda _: self._gives_up(),
            sleep=self._sleep,
            reraise=True,
        )
        async for trial in retrying:
            with trial:
                try:
                    found = await call()
                except StoreUnavailable as error:
                    if note and self.passes(error):
                        self.begin(error)
                    raise
                if note:
                    self.end()
                return found
        raise AssertionError("a trial returns or raises")

    async def _sleep(self, seconds: float) -> None:
        await self._clock.wait(self._over, self._clock.monotonic() + seconds)


class PausingStore(StoreWrapper):
    """A store that waits where another can't be reached: nothing is lost, and commits keep their order."""

    def __init__(self, inner: Store, outage: Outage) -> None:
        super().__init__(inner)
        self._outage = outage
        self._line = anyio.Lock()
        """Held by the commit that is tried; others stand behind it in the order in which they came."""
        self._waiting = 0

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`; a caller that is cancelled while this waits has committed nothing."""
        if not self._outage.is_on and not self._waiting:
            try:
                return await self._inner.commit(commit)
            except StoreUnavailable as error:
                if not self._outage.passes(error):
                    raise
                self._outage.begin(error)
        self._waiting += 1
        try:
            async with self._line:
                return await self._outage.until_reached(partial(commit_idempotently, self._inner, commit))
        finally:
            self._waiting -= 1

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        try:
            return await read()  # also during an outage, which may be of commits alone: a full disk can be read
        except StoreUnavailable as error:
            if not self._outage.passes(error):
                raise
            self._outage.begin(error)
        return await self._outage.until_reached(read)

    async def _wait_for_recovery(self, error: StoreUnavailable) -> None:
        if not self._outage.passes(error):
            raise error
        self._outage.begin(error)
        await self.position()


@asynccontextmanager
async def survive_outages(
    store: Store,
    mode: Literal["pause", "continue"],
    clock: Clock,
    folder: Path,
    tell: EventSink,
    *,
    pauses: RetryIntervals = DEFAULT_INTERVALS,
    passes: Callable[[BaseException], bool] = is_outage,
    gives_up: Callable[[], bool] = lambda: False,
) -> AsyncIterator[Store]:
    """Wrap an open store for the body of the `async with`, so that work goes on when it can't be reached.

    With `pause`, commits and reads wait until it can be. With `continue`, they go on with what this process has seen of
    it, in a store of their own below `folder`, and are committed in their order once it can be reached again; what
    somebody else has written meanwhile counts. What a killed process left there is committed first of all. `passes` is
    which errors are waited for with `pause`, until `gives_up` is true: then they are raised.

    `tell` gets an event when an outage begins (`outage.began`: `mode`, `reason`, `time`) and when it is over
    (`outage.ended`: `mode`, `seconds`, and with `continue` how many commits were `replayed` and `refused`), and one for
    each commit that was refused then (`outage.commit_rejected`: `keys`, `events`, `reason`). It may commit to the store that
    this yields, which waits like any other; what it raises ends the body.
    """
    send, receive = anyio.create_memory_object_stream[Event](math.inf)

    def news(event: Event) -> None:
        with suppress(anyio.ClosedResourceError):  # an outage of the last words
            send.send_nowait(event)

    async with run_alongside(partial(_send_events, receive, tell), last=_FLUSH_TIMEOUT), AsyncExitStack() as stack:
        stack.enter_context(send)
        if mode == "continue":
            from orchestrator.state.offline.forking_store import continue_offline

            outage = Outage(clock, pauses, news, mode)
            going_on = continue_offline(store, outage, pauses, clock, folder, news)
            store = await stack.enter_async_context(going_on)
        # What goes on may not, on a disk that is full: then it waits, too.
        yield PausingStore(store, Outage(clock, pauses, news, "pause", passes, gives_up))


async def _send_events(receive: MemoryObjectReceiveStream[Event], tell: EventSink) -> None:
    with receive:
        async for event in receive:
            await tell(event)


@asynccontextmanager
async def run_alongside(*works: Callable[[], Coroutine[Any, Any, None]], last: float) -> AsyncIterator[None]:
    """Do some works beside the body, and for `last` seconds behind it; what the body raises is raised as it is."""
    raised: Exception | None = None
    async with anyio.create_task_group() as group:
        for work in works:
            group.start_soon(work)
        try:
            yield
        except Exception as error:
            raised = error
        group.cancel_scope.deadline = anyio.current_time() + last
    if raised is not None:
        raise raised
