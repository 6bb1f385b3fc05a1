"""Deliver the events of a run to its sinks.

Delivery neither delays nor fails the run. One forwarder per sink follows the store from a cursor that is recorded after
delivery, so that each event arrives at least once, even across restarts. Events about the forwarders themselves, and
about trackers, are not delivered, because two failing receivers could keep each other busy.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import inf
from typing import Any

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, wait_exponential
from tenacity.wait import wait_base

from orchestrator.domain.events.base import RunEvent
from orchestrator.domain.events.runs import (
    SinkFailing,
    SinkRecovered,
    SinkSkipped,
    SinkUndelivered,
)
from orchestrator.domain.security.secrets import Redactor
from orchestrator.engine.state.records import cursor_key
from orchestrator.errors import CouncilError, HistoryCompacted, PluginFailed, VersionConflict, plugin_code
from orchestrator.protocols import Commit, CommitRecord, Event, RecordedEvent, Sink, Store, Write
from orchestrator.system.background import call_plugin, run_in_background
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: The maximum number of events per batch (events of one commit stay together).
MAX_BATCH_EVENTS = 100
#: The maximum delay before a retry in seconds, and that at the end of the run, when time is limited.
RETRY_WAIT: wait_base = wait_exponential(max=60.0)
FINAL_RETRY_DELAY = 0.5


@dataclass(frozen=True, slots=True)
class DeliveryTimeouts:
    """Time limits of delivery, in seconds.

    `per_call`: to open, send or close; `last`: for all remaining events at the end of the run; `cursor`: between cursor
    writes.
    """

    per_call: float = 30.0
    last: float = 10.0
    cursor: float = 1.0


DELIVERY_TIMEOUTS = DeliveryTimeouts()


@dataclass(frozen=True, slots=True)
class EventSubscriber:
    """A sink of a run.

    `patterns` select its events; `open` opens it.
    """

    name: str
    patterns: Sequence[str]
    open: Callable[[], AbstractAsyncContextManager[Sink]]

    def wants(self, event: Event, run: str) -> bool:
        """Return True if the subscriber receives an event."""
        if event.data.get("run") != run or event.type.startswith(("sink.", "tracker.")):
            return False
        return any(fnmatchcase(event.type, pattern) for pattern in self.patterns)


@asynccontextmanager
async def forward_events(
    store: Store,
    clock: Clock,
    redactor: Redactor,
    run: str,
    subscribers: Sequence[EventSubscriber],
    timeouts: DeliveryTimeouts = DELIVERY_TIMEOUTS,
) -> AsyncIterator[None]:
    """Deliver events to the subscribers during the body and shortly afterwards.

    Undelivered events are reported as `sink.undelivered`, and delivered by the next call. If the body raises, delivery
    stops immediately.
    """
    forwarders = [EventForwarder(store, clock, redactor, run, subscriber, timeouts) for subscriber in subscribers]
    deliveries = [forwarder.deliver_until_end for forwarder in forwarders]
    async with run_in_background(*deliveries, grace=timeouts.last, grace_after_error=0):
        yield
        goal = await store.position()
        for forwarder in forwarders:
            forwarder.end(goal)
    for forwarder in forwarders:
        await forwarder.close(goal)


class EventForwarder:
    """Delivers the events of one run to one subscriber."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        run: str,
        subscriber: EventSubscriber,
        timeouts: DeliveryTimeouts,
    ) -> None:
        self._store, self._clock, self._redactor = store, clock, redactor
        self._run, self._subscriber, self._timeouts = run, subscriber, timeouts
        self._key = cursor_key(run, "sink", subscriber.name)
        self._version = 0
        self._recorded = 0
        self._recorded_at = -inf
        self._delivered = 0
        self._done = 0
        """The position up to which all events are delivered."""
        self._goal: int | None = None
        self._is_finished = self._is_failing = False
        self._call_scope = anyio.CancelScope()
        self._idle_scope: anyio.CancelScope | None = None
        self._retry_now = anyio.Event()

    async def deliver_until_end(self) -> None:
        """Deliver until the position given to `end` is reached; retry failures."""
        retrying = AsyncRetrying(
            retry=retry_if_result(lambda _: not self._is_finished),
            wait=self._choose_wait,
            sleep=self._pause,
            after=_restart_after_progress,
        )
        try:
            await self._begin()
            await retrying(self._try)
        except (CouncilError, OSError):
            # The store is unavailable: the next process delivers the rest.
            return

    def end(self, goal: int) -> None:
        """Stop once all events up to the position `goal` are delivered."""
        self._goal = goal
        self._retry_now.set()
        if self._is_caught_up() and self._idle_scope is not None:
            self._idle_scope.cancel()

    async def close(self, goal: int) -> None:
        """Record the cursor, and report the number of undelivered events."""
        try:
            await self._record()
            undelivered = await self._count(goal)
            if undelivered:
                await self._note(SinkUndelivered, undelivered=undelivered)
        except (CouncilError, OSError):
            return

    async def _begin(self) -> None:
        cursor = await self._store.get(self._key)
        if cursor is not None:
            self._version, self._done = cursor.version, int(cursor.value["position"])
        self._delivered = self._recorded = self._done

    async def _try(self) -> bool:
        """Deliver events, and report a failure; return whether an event was delivered."""
        before = self._delivered
        if (reason := await self._deliver()) is not None and not self._is_failing:
            self._is_failing = True
            await self._note(SinkFailing, reason=self._redactor.text(reason))
        return self._delivered > before

    async def _deliver(self) -> str | None:
        """Deliver to a sink; return the reason if delivery ended early, else None.

        The sink is opened at the first event.
        """
        try:
            with anyio.CancelScope() as self._call_scope, plugin_code(_StoreFailed, HistoryCompacted):
                await self._deliver_all()
        except _StoreFailed as error:
            raise error.error from None
        except HistoryCompacted as compacted:
            await self._skip(compacted.first)
            return await self._deliver()
        except PluginFailed as failed:
            return str(failed)
        if self._call_scope.cancelled_caught:
            return f"timed out after {self._timeouts.per_call:g} s"
        return None if self._is_finished else "the event stream closed"

    def _set_timeout(self, seconds: float) -> None:
        self._call_scope.deadline = anyio.current_time() + seconds

    async def _deliver_all(self) -> None:
        sink: Sink | None = None
        batch: list[RecordedEvent] = []
        async with aclosing(self._store.watch(self._done)) as records, AsyncExitStack() as stack:
            while (record := await self._next(records)) is not None:
                wanted = [event for event in record.events if self._subscriber.wants(event, self._run)]
                batch += [RecordedEvent(record.position, record.time, event) for event in wanted]
                newest = self._goal if self._goal is not None else await self._ask_position()
                if record.position < newest and len(batch) < MAX_BATCH_EVENTS:
                    continue
                if batch:
                    self._set_timeout(self._timeouts.per_call)
                    if sink is None:
                        sink = await stack.enter_async_context(self._subscriber.open())
                    await call_plugin(partial(sink.send, batch))
                    self._set_timeout(inf)
                    await self._record_sent(batch[-1].position)
                    batch = []
                self._done = record.position
            self._is_finished = self._is_caught_up()
            self._set_timeout(self._timeouts.per_call)

    async def _next(self, records: AsyncGenerator[CommitRecord]) -> CommitRecord | None:
        """Return the next record; None at the goal."""
        if self._is_caught_up():
            return None
        with anyio.CancelScope() as scope:
            self._idle_scope = scope
            try:
                return await anext(records, None)
            except HistoryCompacted:
                raise
            except (CouncilError, OSError) as error:
                raise _StoreFailed(error) from error
            finally:
                self._idle_scope = None
        return None

    async def _skip(self, first: int) -> None:
        """Continue after the pruned part of the log, and report the gap."""
        await self._note(SinkSkipped, after=self._done, until=first)
        self._done = self._delivered = max(self._delivered, first)
        await self._record()

    def _is_caught_up(self) -> bool:
        return self._goal is not None and self._done >= self._goal

    async def _ask_position(self) -> int:
        try:
            return await self._store.position()
        except (CouncilError, OSError) as error:
            raise _StoreFailed(error) from error

    async def _record_sent(self, position: int) -> None:
        failpoint("sink.sent")
        self._delivered = position
        try:
            if self._is_failing:
                self._is_failing = False
                await self._note(SinkRecovered)
            if self._clock.monotonic() - self._recorded_at >= self._timeouts.cursor:
                await self._record()
        except (CouncilError, OSError) as error:
            raise _StoreFailed(error) from error

    async def _record(self) -> None:
        while self._delivered > self._recorded:
            try:
                await self._store.commit(Commit([Write(self._key, self._version, {"position": self._delivered})]))
            except VersionConflict:  # an earlier or concurrent leader has also delivered some events
                cursor = await self._store.get(self._key)
                if cursor is None:  # the record of the run was deleted
                    raise
                self._version, self._recorded = cursor.version, int(cursor.value["position"])
            else:
                self._version += 1
                self._recorded, self._recorded_at = self._delivered, self._clock.monotonic()

    async def _note(self, event_type: Callable[..., RunEvent], **fields: Any) -> None:
        event = event_type(run=self._run, sink=self._subscriber.name, **fields)
        await self._store.commit(Commit([], [Event.of(event)]))

    def _choose_wait(self, state: RetryCallState) -> float:
        return RETRY_WAIT(state) if self._goal is None else min(RETRY_WAIT(state), FINAL_RETRY_DELAY)

    async def _pause(self, delay: float) -> None:
        if self._goal is not None:
            self._retry_now = anyio.Event()
        await self._clock.wait(self._retry_now, self._clock.monotonic() + delay)

    async def _count(self, goal: int) -> int:
        undelivered = 0
        begin = max(self._delivered, (await self._store.statistics()).first)
        if self._done >= goal or begin >= goal:
            return undelivered
        async with aclosing(self._store.watch(begin)) as records:
            async for record in records:
                if record.position > goal:
                    break
                undelivered += sum(self._subscriber.wants(event, self._run) for event in record.events)
                if record.position == goal:
                    break
        return undelivered


def _restart_after_progress(state: RetryCallState) -> None:
    """Reset the delay after an attempt that delivered events."""
    if state.outcome is not None and state.outcome.result():
        state.attempt_number = 1


class _StoreFailed(Exception):
    """The store failed, not the sink."""

    def __init__(self, error: Exception) -> None:
        self.error = error
