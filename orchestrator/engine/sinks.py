"""Tells sinks and trackers what happens in a run, beside it: they never hold it up, and never fail it.

A feeder for each follows the store from a cursor that is recorded after delivery, so that every event comes at least
once, across restarts too. What feeders say of themselves is fed to nobody: two that fail could keep each other busy.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf

import anyio

from orchestrator.domain.runs.retry import Backoff, retry_delay
from orchestrator.domain.security.secrets import Redactor
from orchestrator.engine.state.records import cursor_key
from orchestrator.errors import CouncilError, HistoryCompacted, VersionConflict
from orchestrator.protocols import Commit, CommitRecord, Event, JsonObject, RecordedEvent, Sink, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Events that are delivered at once, at most (those of one commit stay together).
MAX_BATCH_EVENTS = 100
#: How long to wait before what failed is tried again; and at the run's end, when there is little time.
RETRY_BACKOFF = Backoff(initial=1.0, factor=2.0, max=60.0, jitter=False)
FINAL_RETRY_DELAY = 0.5

_MAX_REASON_LENGTH = 500  # characters


@dataclass(frozen=True, slots=True)
class DeliveryTimeouts:
    """Seconds: for a sink to open, to send or to close; for all that is left at the run's end; between cursors."""

    per_call: float = 30.0
    last: float = 10.0
    cursor: float = 1.0


DELIVERY_TIMEOUTS = DeliveryTimeouts()


@dataclass(frozen=True, slots=True)
class EventSubscriber:
    """A sink or tracker of a run: its kind and name, the events it wants (by patterns), and how it is opened."""

    kind: str
    name: str
    patterns: Sequence[str]
    open: Callable[[], AbstractAsyncContextManager[Sink]]

    def wants(self, event: Event, run: str) -> bool:
        """Whether an event is for it."""
        if event.data.get("run") != run or event.type.startswith(("sink.", "tracker.")):
            return False
        return any(fnmatchcase(event.type, pattern) for pattern in self.patterns)


@asynccontextmanager
async def forward_events(
    store: Store,
    clock: Clock,
    redactor: Redactor,
    run: str,
    outlets: Sequence[EventSubscriber],
    patience: DeliveryTimeouts = DELIVERY_TIMEOUTS,
) -> AsyncIterator[None]:
    """Feed the outlets of a run during the body, then until they have all of it, within limits.

    What is left then is told as `sink.undelivered`, and delivered when this is entered again. If the body raises, it ends
    at once.
    """
    feeders = [EventForwarder(store, clock, redactor, run, outlet, patience) for outlet in outlets]
    raised: Exception | None = None
    goal = 0
    async with anyio.create_task_group() as group:
        for feeder in feeders:
            group.start_soon(feeder.feed)
        try:
            yield
            goal = await store.position()
        except Exception as error:
            raised = error
            group.cancel_scope.cancel()
        for feeder in feeders:
            feeder.end(goal)
        group.cancel_scope.deadline = anyio.current_time() + patience.last
    if raised is not None:
        raise raised
    for feeder in feeders:
        await feeder.close(goal)


class EventForwarder:
    """Delivers the events of one run to one outlet."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        run: str,
        outlet: EventSubscriber,
        patience: DeliveryTimeouts,
    ) -> None:
        self._store, self._clock, self._redactor = store, clock, redactor
        self._run, self._subscriber, self._timeouts = run, outlet, patience
        self._key = cursor_key(run, outlet.kind, outlet.name)
        self._version = 0
        self._recorded = 0
        self._recorded_at = -inf
        self._delivered = 0
        self._done = 0
        """The position up to which there is nothing more to deliver."""
        self._goal: int | None = None
        self._is_over = self._is_failing = False
        self._limit = anyio.CancelScope()
        self._idle: anyio.CancelScope | None = None
        self._hurry = anyio.Event()

    async def feed(self) -> None:
        """Deliver until `end` says how far, and that is reached; whatever fails is tried again."""
        failures = 0
        try:
            await self._begin()
            while not self._is_over:
                before = self._delivered
                why = await self._try()
                if why is not None:
                    failures = 1 if self._delivered > before else failures + 1
                    await self._failed(why)
                    await self._pause(failures)
        except (CouncilError, OSError):
            # The store can't be used: whoever resumes delivers the rest.
            return

    def end(self, goal: int) -> None:
        """Nothing comes behind the position `goal`: deliver up to there, and be over."""
        self._goal = goal
        self._hurry.set()
        if self._is_caught_up() and self._idle is not None:
            self._idle.cancel()

    async def close(self, goal: int) -> None:
        """Record how far it came, and tell how much is left."""
        try:
            await self._record()
            left = await self._count(goal)
            if left:
                await self._note("behind", {"left": left})
        except (CouncilError, OSError):
            return

    async def _begin(self) -> None:
        found = await self._store.get(self._key)
        if found is not None:
            self._version, self._done = found.version, int(found.value["position"])
        self._delivered = self._recorded = self._done

    async def _try(self) -> str | None:
        """Deliver, to an outlet that is opened once there is something; return why that ended before it was over."""
        try:
            with anyio.CancelScope() as self._limit:
                await self._deliver_all()
        except _StoreFailed as failed:
            raise failed.error from None
        except HistoryCompacted as gone:
            await self._skip(gone.first)
            return None
        except (anyio.get_cancelled_exc_class(), KeyboardInterrupt):
            raise
        except BaseException as error:
            return _describe_error(error)
        if self._limit.cancelled_caught:
            return f"it took longer than {self._timeouts.per_call:g} s"
        return None if self._is_over else "it closed by itself"

    def _allow(self, seconds: float) -> None:
        self._limit.deadline = anyio.current_time() + seconds

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
                    self._allow(self._timeouts.per_call)
                    if sink is None:
                        sink = await stack.enter_async_context(self._subscriber.open())
                    await _send(sink, batch)
                    self._allow(inf)
                    await self._sent(batch[-1].position)
                    batch = []
                self._done = record.position
            self._is_over = self._is_caught_up()
            self._allow(self._timeouts.per_call)

    async def _next(self, records: AsyncGenerator[CommitRecord]) -> CommitRecord | None:
        """Return the next record; None once nothing more is to come."""
        if self._is_caught_up():
            return None
        with anyio.CancelScope() as scope:
            self._idle = scope
            try:
                return await anext(records, None)
            except HistoryCompacted:
                raise
            except (CouncilError, OSError) as error:
                raise _StoreFailed(error) from error
            finally:
                self._idle = None
        return None

    async def _skip(self, first: int) -> None:
        """Go on behind what the store has let go of, and tell that nobody got it."""
        await self._note("skipped", {"after": self._done, "until": first})
        self._done = self._delivered = max(self._delivered, first)
        await self._record()

    def _is_caught_up(self) -> bool:
        return self._goal is not None and self._done >= self._goal

    async def _ask_position(self) -> int:
        try:
            return await self._store.position()
        except (CouncilError, OSError) as error:
            raise _StoreFailed(error) from error

    async def _sent(self, position: int) -> None:
        failpoint("sink.sent")
        self._delivered = position
        try:
            if self._is_failing:
                self._is_failing = False
                await self._note("recovered", {})
            if self._clock.monotonic() - self._recorded_at >= self._timeouts.cursor:
                await self._record()
        except (CouncilError, OSError) as error:
            raise _StoreFailed(error) from error

    async def _record(self) -> None:
        while self._delivered > self._recorded:
            try:
                await self._store.commit(Commit([Write(self._key, self._version, {"position": self._delivered})]))
            except VersionConflict:  # whoever coordinated before, or wanted to, has delivered some of it, too
                found = await self._store.get(self._key)
                if found is None:  # the record of the run is removed
                    raise
                self._version, self._recorded = found.version, int(found.value["position"])
            else:
                self._version += 1
                self._recorded, self._recorded_at = self._delivered, self._clock.monotonic()

    async def _failed(self, why: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            await self._note("failing", {"reason": self._redactor.text(why)})

    async def _note(self, what: str, details: JsonObject) -> None:
        kind = self._subscriber.kind
        await self._store.commit(
            Commit([], [Event(f"{kind}.{what}", {"run": self._run, kind: self._subscriber.name, **details})])
        )

    async def _pause(self, failures: int) -> None:
        delay = retry_delay(RETRY_BACKOFF, failures)
        if self._goal is not None:
            self._hurry = anyio.Event()
            delay = min(delay, FINAL_RETRY_DELAY)
        await self._clock.wait(self._hurry, self._clock.monotonic() + delay)

    async def _count(self, goal: int) -> int:
        left = 0
        begin = max(self._delivered, (await self._store.statistics()).first)
        if self._done >= goal or begin >= goal:
            return left
        async with aclosing(self._store.watch(begin)) as records:
            async for record in records:
                if record.position > goal:
                    break
                left += sum(self._subscriber.wants(event, self._run) for event in record.events)
                if record.position == goal:
                    break
        return left


async def _send(sink: Sink, batch: Sequence[RecordedEvent]) -> None:
    """Hand over events; in a task of its own, so that one which is cancelled from within does not cancel the run."""
    raised: BaseException | None = RuntimeError("it was cancelled, but not by us")

    async def send() -> None:
        nonlocal raised
        try:
            await sink.send(batch)
            raised = None
        except (anyio.get_cancelled_exc_class(), KeyboardInterrupt):
            raise
        except BaseException as error:
            raised = error

    async with anyio.create_task_group() as group:
        group.start_soon(send)
    if raised is not None:
        raise raised


class _StoreFailed(Exception):
    """It was the store that failed, and not the outlet that is told."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _describe_error(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    told = str(error) if isinstance(error, CouncilError) else f"{type(error).__name__}: {error}"
    return " ".join(told.split())[:_MAX_REASON_LENGTH]
