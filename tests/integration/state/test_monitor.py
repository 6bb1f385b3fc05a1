"""Periodic maintenance of the state by an active run, and `council state health` and `compact`."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.run_settings import Retention
from orchestrator.engine.scheduler.monitor import CHECKPOINT_INTERVAL, SWEEP_INTERVAL, Monitor
from orchestrator.engine.state.ledger import Ledger
from orchestrator.protocols import LARGE_DOCUMENT_BYTES, Commit, Event, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.stores.file import FileStore
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.recorded_run import RUN, RUN_STARTED, make_orchestrators, record_run, run_document
from tests.waiting import wait_for

LOCK, LATER = Key("lock", "a"), Key("lock", "b")


@asynccontextmanager
async def watched(store: Store, clock: ManualClock, folder: Path, retention: Retention) -> AsyncIterator[Ledger]:
    """Run the monitor of an active run."""
    run = run_document(folder).model_copy(update={"state": retention})
    await record_run(store, clock, run)
    ledger = await Ledger.take(store, clock, Redactor(()), make_orchestrators(store, clock, RUN), "off")
    async with anyio.create_task_group() as group:
        group.start_soon(Monitor(ledger).watch)
        await anyio.wait_all_tasks_blocked()
        yield ledger
        group.cancel_scope.cancel()


async def events(store: Store, name: str, count: int, after: int = 0) -> list[Event]:
    """Return the first events of a type, up to a number."""
    found: list[Event] = []
    with anyio.fail_after(60):
        async for record in store.watch(after):
            found += [one for one in record.events if one.type == name]
            if len(found) >= count:
                break
    return found


async def drive(clock: ManualClock, is_so: Callable[[], Awaitable[bool]]) -> None:
    """Advance the clock by an hour after each sweep (`Monitor._repeat`) until a condition is true."""
    with anyio.fail_after(60):
        while not await is_so():
            await pass_(clock, 3600.0)


async def pass_(clock: ManualClock, seconds: float) -> None:
    """Advance the clock until all periodic work is due, and return after the sweep."""
    clock.advance(seconds)
    await clock.wait_until_awaited(clock.monotonic() + SWEEP_INTERVAL)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[tuple[FileStore, ManualClock]]:
    """Yield a store with small segments, and its clock."""
    clock = ManualClock(RUN_STARTED)
    async with FileStore.open(tmp_path / "state", clock, segment_bytes=2_000) as opened:
        yield opened, clock


async def test_expired_documents_are_removed_every_thirty_seconds(
    store: tuple[FileStore, ManualClock], tmp_path: Path
) -> None:
    """With an event that names them; unexpired and extended ones stay."""
    state, clock = store
    async with watched(state, clock, tmp_path, Retention()):
        await state.commit(Commit([Write(LOCK, 0, {"by": 1}, ttl=10), Write(LATER, 0, {}, ttl=1000)]))
        clock.advance(SWEEP_INTERVAL - 1)
        await anyio.wait_all_tasks_blocked()
        assert (await state.statistics()).expired == [LOCK]
        clock.advance(1)
        (swept,) = await events(state, "state.expired_deleted", 1)
        assert swept.data == {"run": RUN, "count": 1, "documents": ["lock/a"]}
        assert (await state.statistics()).expired == []
        assert (await state.history(LOCK, 1))[0].value is None
        assert await state.get(LATER) is not None


async def test_history_is_compacted_as_configured(store: tuple[FileStore, ManualClock], tmp_path: Path) -> None:
    """By age and by size; current documents stay, and an event has the new start of the log."""
    state, clock = store
    async with watched(state, clock, tmp_path, Retention(retention=3600.0, max_size=1_000_000)):
        for number in range(40):
            await state.commit(Commit([Write(LATER, number, {"n": number, "text": "x" * 200})]))
        await pass_(clock, CHECKPOINT_INTERVAL)
        assert (await state.statistics()).first == 0

        async def has_gone() -> bool:
            return (await state.statistics()).first > 0

        await drive(clock, has_gone)
        done = await compacted(state)
        assert done.data["run"] == RUN
        assert done.data["first"] == (await state.statistics()).first > 0
        assert done.data["after"] < done.data["before"]
        newest = await state.get(LATER)
        assert newest is not None
        assert newest.value["n"] == 39
        assert len(await state.history(LATER)) == 10


async def compacted(store: Store) -> Event:
    """Return the newest compaction event, once there is one."""
    with anyio.fail_after(60):
        while True:
            records = read_range(store, (await store.statistics()).first, await store.position())
            found = [one async for record in records for one in record.events if one.type == "state.compacted"]
            if found:
                return found[-1]
            await anyio.sleep(0.01)


@pytest.mark.extended
async def test_endless_log_stays_within_its_size(store: tuple[FileStore, ManualClock], tmp_path: Path) -> None:
    """However young its commits are, the log stays within its limit, except for its newest segment.

    The content compresses to no less than half of its size, so old records have to go.
    """
    state, clock = store
    largest, noise = 20_000, random.Random(0)
    async with watched(state, clock, tmp_path, Retention(retention=None, max_size=largest)):
        for _ in range(5):
            for _ in range(100):
                text = noise.randbytes(150).hex()
                await state.commit(Commit([], [Event("noise", {"text": text})], durable=False))

            async def is_within() -> bool:
                return (await state.statistics()).log_bytes <= largest

            assert not await is_within()
            await drive(clock, is_within)
            assert await state.position() - (await state.statistics()).first < 2 * largest / 300


async def test_finding_is_recorded_once(store: tuple[FileStore, ManualClock], tmp_path: Path) -> None:
    """A document that has grown too large, and damage; recorded again only after a recovery."""
    state, clock = store
    big = {"text": "x" * LARGE_DOCUMENT_BYTES}
    async with watched(state, clock, tmp_path, Retention()):
        await state.commit(Commit([Write(LATER, 0, big)]))

        async def is_told(times: int) -> bool:
            return len(await warnings(state)) >= times

        await drive(clock, partial(is_told, 1))
        (segment, *_) = sorted((tmp_path / "state").glob("*.jsonl*"))
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 1
        segment.write_bytes(data)
        await drive(clock, partial(is_told, 2))
        for _ in range(5):
            await pass_(clock, 3600.0)
        reported = await warnings(state)
        assert len(reported) == 2, reported
        large, integrity = reported
        assert large["about"] == "document lock/b"
        assert integrity["about"] == "integrity"
        assert segment.name in integrity["reason"]
        assert "--repair" in integrity["remedy"]


async def warnings(store: Store) -> list[JsonObject]:
    """Return the warnings recorded for people."""
    records = [record async for record in read_range(store, 0, await store.position())]
    reported = [one.data for record in records for one in record.events if one.type == "state.warning"]
    return [one for one in reported if one["about"] != "latency"]  # hours pass between commits


@pytest.mark.extended
def test_health_of_a_running_run_has_no_findings(repository: Repository) -> None:
    """Everything is reported with exit code 0, and the run's own events stay unchanged."""
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(path)).code == 0
    ended = repository.council("state", "health", "--json")
    assert (ended.code, ended.result["exit"]) == (0, 0), ended
    assert {one["level"] for one in ended.result["findings"]} == {"ok"}
    names = {one["name"] for one in ended.result["findings"]}
    assert {"integrity", "log", "documents", "expired", "latency", "runs", "sessions", "conflicts"} == names
    assert "no problems, no warnings" in repository.council("state", "health").stdout


def test_health_reports_an_interrupted_run_and_damage(repository: Repository) -> None:
    """With the exit code and the remedy."""
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    repository.council("run", str(path), failpoints="work.recorded=kill")
    ended = repository.council("state", "health", "--json")
    assert ended.code == 1
    bad = {one["name"]: one for one in ended.result["findings"] if one["level"] != "ok"}
    assert set(bad) == {"runs"}
    assert "council resume" in bad["runs"]["remedy"]
    (segment,) = (repository.top / ".council/state").glob("*/*.jsonl")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    damaged = repository.council("state", "health", "--json")
    assert damaged.code == 1
    assert {one["level"] for one in damaged.result["findings"] if one["name"] == "integrity"} == {"problem"}


def test_health_names_a_silent_session(repository: Repository) -> None:
    """It is running, and silent for longer than its limit."""
    busy = {"use": "command", "argv": ["sh", "-c", "while :; do date >now; sleep 0.1; done"]}
    task = {"id": "mute", "prompt": "-", "idle_timeout": "500ms", "attempts": 1}
    with repository.start("run", str(repository.configure([task], adapters={"busy": busy}))) as child:
        wait_for(lambda: list((repository.top / ".council/logs").glob("*/mute.1.stdout")))

        def reported() -> list[str]:
            ended = repository.council("state", "health", "--json")
            return [one["message"] for one in ended.result["findings"] if one["name"].startswith("session ")]

        try:
            assert "no output for" in wait_for(reported)[0]
        finally:
            child.terminate()
            child.communicate()


async def test_compact_command_compacts(repository: Repository) -> None:
    """With the limits of the newest run's file unless options say otherwise.

    Removed positions can't be read any more.
    """
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], state={"retention": "off"})
    assert repository.council("run", str(path)).code == 0
    clock = ManualClock(RUN_STARTED)
    async with FileStore.open(repository.log, clock, segment_bytes=1_000) as store:
        for number in range(50):
            await store.commit(Commit([Write(LATER, number, {"text": "x" * 200})]))
    kept = repository.council("state", "compact", "--json").result
    assert kept["first"] == 0
    assert kept["after"] < kept["before"]  # it is compressed
    gone = repository.council("state", "compact", "--max-size", "1KB", "--json").result
    assert gone["first"] > 0
    refused = repository.council("state", "at", "1", "--json")
    assert refused.code == 2
    assert f"only to {gone['first']}" in refused.result["error"]
    assert repository.council("status", "--json").states == {"one": "landed"}
    assert repository.council("state", "compact", "--older-than", "yesterday").code == 2
