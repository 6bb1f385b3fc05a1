"""Keep a run going while its store can't be reached: commits and reads wait, or use a local fork of the state.

The wrapped store fulfils the `Store` contract. Without an outage it costs one extra call. Maintenance (`compact`,
`verify`, `repair`, `statistics`, `dump`, `load`) never waits, because no task depends on it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from orchestrator.errors import StoreUnavailable
from orchestrator.protocols import Commit, Event, Store
from orchestrator.state.offline.forking_store import continue_offline
from orchestrator.state.offline.retry import (
    DEFAULT_INTERVALS,
    Outage,
    RetryIntervals,
    commit_idempotently,
    is_outage,
    run_alongside,
)
from orchestrator.state.offline.wrapper import StoreWrapper
from orchestrator.system.clock import Clock

T = TypeVar("T")

#: Takes one event at a time, in order, from a task of its own.
EventSink = Callable[[Event], Awaitable[None]]

#: Seconds to send the remaining events after the body has ended.
_FLUSH_TIMEOUT: Final = 5.0


class PausingStore(StoreWrapper):
    """A store that waits while the inner store can't be reached; no commit is lost, and commits keep their order."""

    def __init__(self, inner: Store, outage: Outage) -> None:
        super().__init__(inner)
        self._outage = outage
        self._commit_lock = anyio.Lock()
        """Held by the commit that is retried; other commits queue for it in the order of their arrival."""
        self._waiting = 0

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`; a caller that is cancelled while this waits has committed nothing."""
        if not self._outage.is_active and not self._waiting:
            try:
                return await self._inner.commit(commit)
            except StoreUnavailable as error:
                self._begin_outage(error)
        self._waiting += 1
        try:
            async with self._commit_lock:
                return await self._outage.retry_until_reached(partial(commit_idempotently, self._inner, commit))
        finally:
            self._waiting -= 1

    def _begin_outage(self, error: StoreUnavailable) -> None:
        """Begin an outage; raise the error if waiting can't help."""
        if not self._outage.is_temporary(error):
            raise error
        self._outage.begin(error)

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        try:
            return await read()  # even during an outage, which may affect commits only: a full disk can be read
        except StoreUnavailable as error:
            self._begin_outage(error)
        return await self._outage.retry_until_reached(read)

    async def _wait_for_recovery(self, error: StoreUnavailable) -> None:
        self._begin_outage(error)
        await self.position()


@asynccontextmanager
async def survive_outages(
    store: Store,
    mode: Literal["pause", "continue"],
    clock: Clock,
    folder: Path,
    send_event: EventSink,
    *,
    intervals: RetryIntervals = DEFAULT_INTERVALS,
    is_temporary: Callable[[BaseException], bool] = is_outage,
    gives_up: Callable[[], bool] = lambda: False,
) -> AsyncIterator[Store]:
    """Wrap an open store for the body of the `async with`, so that a run survives outages of it.

    With `pause`, commits and reads wait until the store can be reached. With `continue`, they use a fork below
    `folder`, which starts with the documents that this process has seen. When the store is back, the fork's commits
    are replayed in order, and conflicting changes of other processes win. Forks of killed processes are replayed
    first. `is_temporary` selects the errors that `pause` waits for, until `gives_up` returns True: then they are
    raised.

    `send_event` takes an event when an outage begins (`outage.began`: `mode`, `reason`, `time`), when it ends
    (`outage.ended`: `mode`, `seconds`, and with `continue` the number of commits `replayed` and `refused`), and for
    each commit that was refused then (`outage.commit_rejected`: `keys`, `events`, `reason`). It may commit to the
    store that this yields, which waits like any other commit; an error that it raises ends the body.
    """
    send_stream, receive_stream = anyio.create_memory_object_stream[Event](math.inf)

    def on_event(event: Event) -> None:
        with suppress(anyio.ClosedResourceError):  # an outage while the last events are sent
            send_stream.send_nowait(event)

    sender = partial(_send_events, receive_stream, send_event)
    async with run_alongside(sender, grace_period=_FLUSH_TIMEOUT), AsyncExitStack() as stack:
        stack.enter_context(send_stream)
        if mode == "continue":
            outage = Outage(clock, intervals, on_event, mode)
            offline_store = continue_offline(store, outage, intervals, clock, folder, on_event)
            store = await stack.enter_async_context(offline_store)
        # The fork can't be written either where its own disk is full: then `continue` waits, too.
        yield PausingStore(store, Outage(clock, intervals, on_event, "pause", is_temporary, gives_up))


async def _send_events(receive_stream: MemoryObjectReceiveStream[Event], send_event: EventSink) -> None:
    with receive_stream:
        async for event in receive_stream:
            await send_event(event)
