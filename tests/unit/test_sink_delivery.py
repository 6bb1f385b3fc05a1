"""Sinks get every event at least once and in order, and can neither delay nor fail the run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from math import inf
from pathlib import Path

import anyio
import pytest
from tenacity import RetryCallState, wait_fixed

from orchestrator.domain.security.secrets import Redactor
from orchestrator.engine import sinks
from orchestrator.engine.sinks import DeliveryTimeouts, EventSubscriber, forward_events
from orchestrator.engine.state.records import cursor_key
from orchestrator.errors import RefusedError, StoreUnavailable
from orchestrator.protocols import Commit, CommitRecord, Event, Key, RecordedEvent, Sink, Store, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock

PATIENCE = DeliveryTimeouts(per_call=0.2, last=0.6, cursor=0.0)
SECRET = "correct-horse-battery"

Send = Callable[[Sequence[RecordedEvent]], object]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry soon."""
    monkeypatch.setattr(sinks, "RETRY_WAIT", wait_fixed(0.01))
    monkeypatch.setattr(sinks, "FINAL_RETRY_DELAY", 0.01)


class Listener:
    """A recording sink; `on_send` may raise, or return an awaitable."""

    def __init__(self, on_send: Callable[[int], object] = lambda _: None) -> None:
        self.batches: list[list[RecordedEvent]] = []
        self.opened = self.closed = self.calls = 0
        self._on_send = on_send

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Sink]:
        """Count the calls."""
        self.opened += 1
        try:
            yield self
        finally:
            self.closed += 1

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Run `on_send`, then record the events."""
        self.calls += 1
        wait = self._on_send(self.calls)
        if wait is not None:
            await wait  # type: ignore[misc]
        self.batches.append(list(events))

    @property
    def numbers(self) -> list[int]:
        """Return the numbers of all received events."""
        return [one.event.data["n"] for batch in self.batches for one in batch if "n" in one.event.data]


def outlet(listener: Listener, *patterns: str, name: str = "ear") -> EventSubscriber:
    """Return a listener as a sink of a run."""
    return EventSubscriber(name, patterns or ("*",), listener.open)


class Bench:
    """A store with numbered events."""

    def __init__(self) -> None:
        self.store = MemoryStore(SystemClock())
        self._count = 0

    async def record(self, times: int = 1, kind: str = "task.started", run: str = "r") -> None:
        """Record events with consecutive numbers."""
        for _ in range(times):
            self._count += 1
            await self.store.commit(Commit([], [Event(kind, {"run": run, "n": self._count})]))

    def feeding(
        self, *outlets: EventSubscriber, patience: DeliveryTimeouts = PATIENCE
    ) -> AbstractAsyncContextManager[None]:
        """Run the feeders of a run's outlets."""
        return forward_events(self.store, SystemClock(), Redactor([SECRET]), "r", outlets, patience)

    async def records(self) -> list[CommitRecord]:
        """Return all records."""
        found: list[CommitRecord] = []
        if await self.store.position():
            async for record in self.store.watch():
                found.append(record)
                if record.position == await self.store.position():
                    break
        return found

    async def delivery_events(self, prefix: str = "sink.") -> list[tuple[str, dict[str, object]]]:
        """Return the events about sink delivery."""
        events = [event for record in await self.records() for event in record.events]
        return [(one.type, one.data) for one in events if one.type.startswith(prefix)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition is true."""
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.005)


async def test_sink_gets_all_events_of_its_run_in_order() -> None:
    """Earlier and concurrent events are delivered; writing the cursor is no event and causes no loop."""
    bench, ear = Bench(), Listener()
    await bench.record(3)
    async with bench.feeding(outlet(ear)):
        await until(lambda: len(ear.numbers) == 3)
        await bench.record(1, run="another")
        await bench.record(2)
        await until(lambda: len(ear.numbers) == 5)
        last = ear.batches[-1][-1].position
        with anyio.fail_after(10):
            while (cursor := await bench.store.get(cursor_key("r", "sink", "ear"))) is None or cursor.value != {
                "position": last
            }:
                await anyio.sleep(0.005)
        settled = await bench.store.position()
        await anyio.sleep(0.1)
        assert await bench.store.position() == settled
    assert ear.numbers == [1, 2, 3, 5, 6]
    assert (ear.opened, ear.closed) == (1, 1)
    assert await bench.delivery_events() == []
    cursor = await bench.store.get(cursor_key("r", "sink", "ear"))
    assert cursor is not None
    assert cursor.value == {"position": ear.batches[-1][-1].position}


async def test_sink_without_events_is_not_opened() -> None:
    """An unavailable sink without pending events causes no error and no delay."""
    bench, ear = Bench(), Listener()
    await bench.record(2)
    async with bench.feeding(outlet(ear)):
        pass
    before = await bench.store.position()
    gone = Listener()
    async with bench.feeding(outlet(gone), outlet(gone, "no.such", name="other")):
        pass
    assert (ear.numbers, gone.opened) == ([1, 2], 0)
    assert await bench.store.position() == before


async def test_burst_is_delivered_in_batches_with_few_cursors() -> None:
    """Hundreds of events take a few calls and few commits."""
    bench, ear = Bench(), Listener()
    await bench.record(350)
    async with bench.feeding(outlet(ear), patience=DeliveryTimeouts(cursor=60.0)):
        await until(lambda: len(ear.numbers) == 350)
    assert ear.numbers == list(range(1, 351))
    assert [len(batch) for batch in ear.batches] == [100, 100, 100, 50]
    cursors = [key for record in await bench.records() for key in record.documents if key.kind == "cursor"]
    assert len(cursors) == 2  # the first one and the one at the end


async def test_patterns_select_the_events() -> None:
    bench, ear = Bench(), Listener()
    for kind in ("run.created", "task.started", "task.landed", "run.finished"):
        await bench.record(1, kind)
    async with bench.feeding(outlet(ear, "task.l*", "run.finished")):
        await until(lambda: len(ear.numbers) == 2)
    assert ear.numbers == [3, 4]


async def test_failing_sink_is_retried_and_failure_and_recovery_are_reported_once() -> None:
    """One event per streak of failures and one for its end, without secrets; delivery stays complete and ordered."""

    def fails_at_first(call: int) -> None:
        if call <= 3:
            raise ValueError(f"no\nway {call}: {SECRET}")

    bench, ear = Bench(), Listener(fails_at_first)
    await bench.record(2)
    async with bench.feeding(outlet(ear)):
        await until(lambda: ear.numbers == [1, 2])
        await bench.record()
        await until(lambda: ear.numbers == [1, 2, 3])
    assert ear.opened == 4
    assert await bench.delivery_events() == [
        ("sink.failing", {"run": "r", "sink": "ear", "reason": "ValueError: no way 1: [redacted]"}),
        ("sink.recovered", {"run": "r", "sink": "ear"}),
    ]


async def test_delay_of_a_sink_grows_until_an_event_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure in a row has a longer delay; a delivered event starts it again."""
    failures = list[int]()

    def wait(state: RetryCallState) -> float:
        failures.append(state.attempt_number)
        return 0.01

    def on_send(call: int) -> None:
        if call in {1, 2, 4, 5}:
            raise OSError("unreachable")

    monkeypatch.setattr(sinks, "RETRY_WAIT", wait)
    bench, ear = Bench(), Listener(on_send)
    await bench.record()
    async with bench.feeding(outlet(ear)):
        await until(lambda: len(ear.numbers) == 1)
        await bench.record()
        await until(lambda: len(ear.numbers) == 2)
    assert failures == [1, 2, 1, 2]


async def test_two_failing_sinks_do_not_keep_each_other_busy() -> None:
    """Delivery events are not delivered to sinks."""
    ears = [Listener(lambda call: 1 // (call % 2 - 1) if call % 2 else None) for _ in range(2)]
    bench = Bench()
    await bench.record()
    async with bench.feeding(*(outlet(ear, name=f"e{index}") for index, ear in enumerate(ears))):
        await until(lambda: all(ear.numbers == [1] for ear in ears))
        await until(lambda: len(bench.store._lines) >= 7)
        settled = await bench.store.position()
        await anyio.sleep(0.1)
        assert await bench.store.position() == settled
    assert [name for name, _ in await bench.delivery_events()].count("sink.failing") == 2


@pytest.mark.parametrize("hangs", ["send", "open", "close"])
async def test_hanging_sink_is_abandoned(hangs: str) -> None:
    """After its timeout; the end of the run is not delayed, and undelivered events are reported."""
    bench, ear = Bench(), Listener(lambda _: anyio.sleep_forever() if hangs == "send" else None)

    @asynccontextmanager
    async def hanging() -> AsyncIterator[Sink]:
        async with ear.open() as sink:
            if hangs == "open":
                await anyio.sleep_forever()
            yield sink
            if hangs == "close":
                await anyio.sleep_forever()

    await bench.record(2)
    with anyio.fail_after(5):
        async with bench.feeding(EventSubscriber("ear", ("*",), hanging)):
            await bench.record(1)
    reported = await bench.delivery_events()
    assert reported[0] == ("sink.failing", {"run": "r", "sink": "ear", "reason": "timed out after 0.2 s"})
    assert reported[1:] == (
        [] if hangs == "close" else [("sink.undelivered", {"run": "r", "sink": "ear", "undelivered": 3})]
    )
    assert ear.numbers == ([1, 2, 3] if hangs == "close" else [])


async def test_undelivered_events_are_delivered_next_time() -> None:
    """From the cursor on, including events in between; delivered ones are not repeated."""

    def fails_later(call: int) -> None:
        if call > 1:
            raise OSError("gone")

    bench = Bench()
    await bench.record(2)
    first = Listener(fails_later)
    async with bench.feeding(outlet(first)):
        await until(lambda: first.numbers == [1, 2])
        await bench.record(2)
    assert (await bench.delivery_events())[-1] == ("sink.undelivered", {"run": "r", "sink": "ear", "undelivered": 2})
    await bench.record()
    second = Listener()
    async with bench.feeding(outlet(second)):
        pass
    assert second.numbers == [3, 4, 5]
    assert [name for name, _ in await bench.delivery_events()] == ["sink.failing", "sink.undelivered"]


async def test_compacted_events_are_skipped_and_reported(tmp_path: Path) -> None:
    """A sink behind a compaction gets the remaining events, and the gap is recorded."""
    ear = Listener()
    async with FileStore.open(tmp_path, SystemClock(), segment_bytes=200) as store:
        for number in range(1, 21):
            await store.commit(Commit([], [Event("task.started", {"run": "r", "n": number})]))
        first = (await store.compact(inf, 0)).first
        assert 0 < first < 20
        async with forward_events(store, SystemClock(), Redactor([]), "r", [outlet(ear)], PATIENCE):
            await until(lambda: 20 in ear.numbers)
        assert ear.numbers == list(range(first + 1, 21))
        found = [event async for event in _rest(store, first) if event.type.startswith("sink.")]
        assert found == [Event("sink.skipped", {"run": "r", "sink": "ear", "after": 0, "until": first})]


async def _rest(store: Store, after: int) -> AsyncIterator[Event]:
    last = await store.position()
    async for record in store.watch(after):
        for event in record.events:
            yield event
        if record.position >= last:
            return


async def test_delivered_but_unrecorded_event_is_repeated() -> None:
    """At least once: an event delivered without a cursor update is delivered again."""
    bench, ears = Bench(), [Listener(), Listener()]
    await bench.record(2)

    async def break_off() -> None:
        async with bench.feeding(outlet(ears[0]), patience=DeliveryTimeouts(cursor=60.0)):
            await until(lambda: ears[0].numbers == [1, 2])
            await bench.record()
            await until(lambda: ears[0].numbers == [1, 2, 3])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await break_off()
    async with bench.feeding(outlet(ears[1])):
        pass
    assert ears[1].numbers == [3]


@pytest.mark.parametrize("error", [RefusedError("not installed", "install it"), SystemExit(3), ValueError("no")])
async def test_sink_that_can_not_be_opened_does_not_affect_the_run(error: BaseException) -> None:
    """Errors that would end a process elsewhere, and a missing sink, are reported only."""
    bench = Bench()

    def refused() -> AbstractAsyncContextManager[Sink]:
        raise error

    await bench.record()
    async with bench.feeding(EventSubscriber("list", ("*",), refused)):
        pass
    reported = await bench.delivery_events()
    assert [(name, data["sink"]) for name, data in reported] == [("sink.failing", "list"), ("sink.undelivered", "list")]


class _Odd(BaseException):
    """An exception that no sink should raise."""


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_sink_that_cancels_itself_cancels_nothing_else(is_cancelled: bool) -> None:
    """A cancellation from inside the sink, such as of an awaited task, is an ordinary failure."""

    def fail_once(call: int) -> None:
        if call == 1:
            raise anyio.get_cancelled_exc_class() if is_cancelled else _Odd

    bench, ear = Bench(), Listener(fail_once)
    await bench.record()
    async with bench.feeding(outlet(ear)):
        await until(lambda: ear.numbers == [1])
        await bench.record()
    assert ear.numbers == [1, 2]
    assert [name for name, _ in await bench.delivery_events()] == ["sink.failing", "sink.recovered"]


async def test_sink_that_closes_itself_is_reopened() -> None:
    """A context manager that swallows an error has still failed."""
    bench, ear = Bench(), Listener(lambda call: 1 // 0 if call == 1 else None)

    @asynccontextmanager
    async def swallowing() -> AsyncIterator[Sink]:
        async with ear.open() as sink:
            try:
                yield sink
            except ZeroDivisionError:
                return

    await bench.record()
    async with bench.feeding(EventSubscriber("ear", ("*",), swallowing)):
        await until(lambda: ear.numbers == [1])
    assert (await bench.delivery_events())[0][1]["reason"] == "the event stream closed"


async def test_error_of_the_body_is_raised_immediately() -> None:
    """The error passes unchanged and does not wait for a sink."""
    bench, ear = Bench(), Listener(lambda _: anyio.sleep_forever())
    await bench.record()

    async def refuse() -> None:
        async with bench.feeding(outlet(ear), patience=DeliveryTimeouts(per_call=60, last=60)):
            await until(lambda: ear.calls == 1)
            raise RefusedError("no", "stop")

    with anyio.fail_after(5), pytest.raises(RefusedError):
        await refuse()
    assert ear.closed == 1


async def test_second_delivery_to_a_sink_ends_the_first() -> None:
    """A feeder stops when another one moved the cursor, which now owns the delivery."""
    bench, ear = Bench(), Listener()
    async with bench.feeding(outlet(ear)):
        await bench.record()
        await until(lambda: ear.numbers == [1])
        key: Key = cursor_key("r", "sink", "ear")
        await until(lambda: bench.store._table.get(key, 0.0) is not None)
        found = await bench.store.get(key)
        assert found is not None
        await bench.store.commit(Commit([Write(key, found.version, {"position": 99})]))
        await bench.record(2)
        await until(lambda: len(ear.numbers) >= 2)
    assert await bench.delivery_events() == []


async def test_failing_store_is_raised_to_the_run() -> None:
    """The feeder raises no error of its own."""

    class Failing(MemoryStore):
        async def position(self) -> int:
            raise StoreUnavailable("disk", "full", "free some space")

    bench, ear = Bench(), Listener()
    bench.store = Failing(SystemClock())
    await bench.record()
    with pytest.raises(StoreUnavailable):
        async with bench.feeding(outlet(ear)):
            await anyio.sleep(0.05)
    assert ear.numbers == []


async def test_rest_is_delivered_after_another_process() -> None:
    """The other process moved the cursor, as a replacement of a failed leader does."""
    bench, listener = Bench(), Listener()
    key = cursor_key("r", "sink", "ear")
    await bench.store.commit(Commit([Write(key, 0, {"position": 0})]))
    async with bench.feeding(outlet(listener)):
        await bench.record()
        await until(lambda: listener.numbers == [1])
        while (cursor := await bench.store.get(key)) is None or cursor.value["position"] == 0:
            await anyio.sleep(0.005)
        await bench.store.commit(Commit([Write(key, cursor.version, cursor.value)]))
        await bench.record(2)
        await until(lambda: listener.numbers == [1, 2, 3])
        await bench.record()
        await until(lambda: listener.numbers == [1, 2, 3, 4])
    written = await bench.store.get(key)
    assert written is not None
    events = [record for record in await bench.records() if key not in record.documents]
    assert written.value["position"] == events[-1].position
    assert await bench.delivery_events() == []
