"""Bounded parts of the log, and backward reads, on every store."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.runs.model import RequestAction
from orchestrator.domain.security.secrets import Redactor
from orchestrator.engine.scheduler.requests import RequestHandler, submit_request
from orchestrator.engine.state.change_feed import follow_changes
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import HistoryCompacted, RefusedError
from orchestrator.protocols import Commit, CommitRecord, Event, Key, Store
from orchestrator.state.documents import log_reader
from orchestrator.state.documents.log_reader import find_position, follow_log, read_backwards, read_range
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.testing.clock import ManualClock
from tests.hypothesis_settings import example_settings
from tests.recorded_run import RUN, make_orchestrators, record_run, run_document
from tests.store_kinds import ALL_KINDS, open_kind

TASK = Key("task", "r/a")


class ForgetfulStore(MemoryStore):
    """A store whose log starts at a given position."""

    first = 0

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """See `Store.watch`."""
        if after < self.first:
            raise HistoryCompacted(after, self.first)
        async with aclosing(super().watch(after)) as records:
            async for record in records:
                yield record


@pytest.fixture
def clock() -> ManualClock:
    """A clock fixed at 1000 s."""
    return ManualClock(1000.0)


@pytest.fixture(params=ALL_KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    """Yield an empty store of each kind."""
    if request.param == "memory":
        yield ForgetfulStore(clock)
    elif request.param == "file":
        async with FileStore.open(tmp_path, clock, segment_bytes=2_000) as opened:
            yield opened
    else:
        async with open_kind(request.param, tmp_path, clock) as opened:
            yield opened


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split even a short log into several parts."""
    monkeypatch.setattr(log_reader, "_FIRST_PART", 4)
    monkeypatch.setattr(log_reader, "_LARGEST_PART", 8)


async def fill(store: Store, commits: int, clock: ManualClock) -> None:
    """Make this many commits, one per second."""
    for number in range(commits):
        await store.commit(Commit([], [Event("n", {"n": number})]))
        clock.advance(1)


async def test_part_of_the_log_ends(store: Store, clock: ManualClock) -> None:
    """It contains nothing before or after it, and does not wait for future commits."""
    await fill(store, 30, clock)
    for after, until in ((0, 30), (0, 1), (7, 7), (7, 8), (12, 30), (30, 30), (30, 5)):
        found = [record.position async for record in read_range(store, after, until)]
        assert found == list(range(after + 1, until + 1))


async def test_backward_parts_are_complete(store: Store, clock: ManualClock) -> None:
    await fill(store, 30, clock)
    parts = [[record.position for record in part] async for part in read_backwards(store, 30, 3)]
    assert parts[0] == [27, 28, 29, 30]
    assert [position for part in reversed(parts) for position in part] == list(range(4, 31))


async def test_search_in_new_commits_reads_no_old_log(clock: ManualClock) -> None:
    """A log that starts at a position returns the commits after it, and says where it ended."""
    store = ForgetfulStore(clock)
    await fill(store, 30, clock)
    store.first = 20
    found: list[int] = []

    async def read() -> None:
        async for part in read_backwards(store, 30):
            found.extend(record.position for record in part)

    with pytest.raises(HistoryCompacted):
        await read()
    assert sorted(found) == list(range(21, 31))
    assert await find_position(store, 1025.5) == 26
    with pytest.raises(RefusedError, match="or position 20 or later"):
        await find_position(store, 1010.0)


@pytest.mark.parametrize(
    ("instant", "position"), [(999.9, 0), (1000.0, 1), (1000.9, 1), (1014.0, 15), (1029.0, 30), (9999.0, 30)]
)
async def test_time_maps_to_the_newest_commit_before(
    store: Store, clock: ManualClock, instant: float, position: int
) -> None:
    await fill(store, 30, clock)
    assert await find_position(store, instant) == position


@example_settings(60)
@given(steps=st.lists(st.integers(-5, 5), max_size=40), instant=st.integers(950, 1050))
async def test_time_lookup_ignores_clock_jumps(steps: list[int], instant: int) -> None:
    clock = ManualClock(1000.0)
    store = MemoryStore(clock)
    times = []
    for step in steps:
        clock.advance(step)
        await store.commit(Commit())
        times.append(clock.now())
    expected = [position for position, time in enumerate(times, 1) if time <= instant]
    assert await find_position(store, instant) == (expected[-1] if expected else 0)


async def test_log_with_an_unreadable_newest_commit_ends(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost commit never arrives: the readable ones are all there are."""
    monkeypatch.setattr(log_reader, "_PATIENCE", 0.3)
    async with FileStore.open(tmp_path, clock) as store:
        await fill(store, 10, clock)
    [segment] = tmp_path.glob("*.jsonl")
    data = bytearray(segment.read_bytes())
    start = data.rfind(b"\n", 0, len(data) - 1) + 1
    data[start + 40] ^= 1  # in the last header
    segment.write_bytes(data)
    async with FileStore.open(tmp_path, clock) as store:
        assert store.damage
        assert await store.position() == 10
        assert [record.position async for record in read_range(store, 0, 10)] == list(range(1, 10))
        assert await find_position(store, 9999.0) == 9


async def forget(store: Store) -> int:
    """Grow the log by many segments and prune all but the newest; return its first position."""
    for _ in range(40):
        await store.commit(Commit(events=[Event("e", {"text": "x" * 500})]))
    return (await store.compact(math.inf, 1)).first


async def test_stopped_follower_continues_after_removed_commits(tmp_path: Path, clock: ManualClock) -> None:
    async with (
        FileStore.open(tmp_path, clock, segment_bytes=2_000) as store,
        aclosing(follow_log(store, 0)) as records,
    ):
        await store.commit(Commit(events=[Event("e")]))
        assert (await anext(records)).position == 1
        before = first = 1
        for _ in range(2):
            first, last = await forget(store), await store.position()
            assert before < first < last
            with anyio.fail_after(10):
                found = [await anext(records)]
                while found[-1].position < last:
                    found.append(await anext(records))
            positions = [one.position for one in found]
            assert positions == sorted(positions)
            assert set(range(first + 1, last + 1)) <= set(positions)
            before = last
        async with aclosing(follow_log(store, 0)) as late:
            assert (await anext(late)).position == first + 1


async def test_stopped_owner_still_finds_requests(tmp_path: Path, clock: ManualClock) -> None:
    """Although the log of the request has been pruned."""
    async with FileStore.open(tmp_path, clock, segment_bytes=2_000) as store:
        await record_run(store, clock, run_document(tmp_path))
        ledger = await Ledger.take(store, clock, Redactor(()), make_orchestrators(store, clock, RUN), "off")
        async with aclosing(follow_changes(ledger)) as changes:
            for task in ("models", "api"):
                await submit_request(store, clock, RUN, RequestAction.CANCEL, [task])
                await forget(store)
                with anyio.fail_after(10):
                    found = (await anext(changes)).request
                assert found is not None
                assert list(found.tasks) == [task]
                await RequestHandler(ledger).complete(found)


async def test_future_commits_are_not_waited_for(store: Store) -> None:
    """A part ends where the log ends, whatever position was requested."""
    with anyio.fail_after(5):
        assert [one async for one in read_range(store, 0, 1)] == []
        assert [part async for part in read_backwards(store, 5) if part] == []
        await store.commit(Commit([], [Event("a")]))
        assert [one.position async for one in read_range(store, 0, 9)] == [1]
        assert [one.position for part in [part async for part in read_backwards(store, 9)] for one in part] == [1]
