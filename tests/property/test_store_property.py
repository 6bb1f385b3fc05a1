"""Over random histories each store behaves like a dict with history, despite closes, kills and truncation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orchestrator.errors import HistoryCompacted, LeaseLost, RefusedError, VersionConflict
from orchestrator.protocols import VERSIONS_KEPT, Commit, CommitRecord, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.state.stores.redis.store import RedisStore
from orchestrator.testing.clock import ManualClock
from tests.power_loss import lose_power
from tests.store_kinds import SERVERS, Server, open_postgres_store

LEASE = Key("lease", "l")
KEYS = [*(Key("task", name) for name in ("a", "ab", "b", "ü/c")), Key("run", "a"), LEASE]
SEGMENT_BYTES = 2_000
ALL = 1 << 40


@dataclass(frozen=True)
class Happened:
    """A commit of the model: key -> (version, value, expiry)."""

    time: float
    documents: dict[Key, tuple[int, JsonObject | None, float | None]]
    events: list[Event]


values = st.none() | st.builds(
    lambda number, size: {"epoch": number, "text": "x" * size}, st.integers(1, 3), st.sampled_from([0, 0, 30, 400])
)
#: Document, offset of the expected version, value, lifetime.
writes = st.lists(
    st.tuples(
        st.sampled_from(KEYS),
        st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, -1]),
        values,
        st.sampled_from([None, None, None, 10.0, 60.0]),
    ),
    max_size=4,
    unique_by=lambda write: write[0],
)
guards = st.lists(st.builds(Guard, st.just(LEASE), st.integers(1, 3)), max_size=1)


class StoreMachine(RuleBasedStateMachine):
    """Two stores with the same contents, and the model of these."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.log: list[Happened] = []
        self.first = 0  # the position of the oldest available state
        self.kept: dict[Key, int] = {}  # the position from which versions of a document exist
        self.resources = ExitStack()
        self.portal = self.resources.enter_context(start_blocking_portal())
        self.stores: list[Store] = []
        self.closers: list[AbstractContextManager[Store]] = []

    # What depends on the kind of store.

    def opened(self) -> AbstractAsyncContextManager[Store]:
        """Open another store with the contents."""
        raise NotImplementedError

    def die(self) -> None:
        """Kill all processes, and open both stores again."""
        raise NotImplementedError

    def synced(self) -> None:
        """Record what is durable."""

    # Test helpers.

    def teardown(self) -> None:
        """Close everything."""
        self.close()
        self.resources.close()

    @initialize()
    def open(self) -> None:
        """Open both stores."""
        for _ in range(2):
            closer = self.portal.wrap_async_context_manager(self.opened())
            self.stores.append(closer.__enter__())
            self.closers.append(closer)

    def close(self) -> None:
        """Close both, in order."""
        for closer in self.closers:
            closer.__exit__(None, None, None)
        self.stores, self.closers = [], []

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a coroutine function."""
        return self.portal.call(function, *arguments)

    def entry(self, key: Key, until: int | None = None) -> tuple[int, JsonObject | None, float | None]:
        """Return the newest version of a document after that many commits."""
        found = [one.documents[key] for one in self.log[:until] if key in one.documents]
        return found[-1] if found else (0, None, None)

    def state(self, now: float, until: int | None = None) -> dict[Key, tuple[int, JsonObject]]:
        """Return all documents after that many commits."""
        entries = {key: self.entry(key, until) for key in KEYS}
        return {
            key: (version, value)
            for key, (version, value, expires) in entries.items()
            if value is not None and (expires is None or now < expires)
        }

    def version(self, key: Key) -> int:
        """Return the version that a writer must expect."""
        return self.state(self.clock.now()).get(key, (0, None))[0]

    def commit_of(self, writes: Sequence[Any], guards: Sequence[Guard], number: int, durable: bool) -> Commit:
        """Return a commit of the drawn changes."""
        made = [Write(key, max(self.version(key) + off, 0), value, ttl) for key, off, value, ttl in writes]
        return Commit(made, [Event("e", {"n": number})], guards, durable)

    def refusal(self, commit: Commit) -> type[Exception] | None:
        """Return the expected exception."""
        lease = self.state(self.clock.now()).get(LEASE)
        if any(lease is None or lease[1]["epoch"] != guard.epoch for guard in commit.guards):
            return LeaseLost
        return VersionConflict if any(one.expected != self.version(one.key) for one in commit.writes) else None

    def apply_to_model(self, commit: Commit) -> None:
        """Apply a commit to the model."""
        now = self.clock.now()
        documents = {
            one.key: (self.entry(one.key)[0] + 1, one.value, now + one.ttl if one.ttl and one.value else None)
            for one in commit.writes
        }
        self.log.append(Happened(now, documents, list(commit.events)))

    # Rules.

    @rule(writes=writes, guards=guards, durable=st.booleans(), which=st.integers(0, 1))
    def commit(self, writes: Sequence[Any], guards: Sequence[Guard], durable: bool, which: int) -> None:
        """Commit atomically."""
        commit = self.commit_of(writes, guards, len(self.log), durable)
        expected = self.refusal(commit)
        if expected is not None:
            with pytest.raises(expected):
                self.call(self.stores[which].commit, commit)
            return
        assert self.call(self.stores[which].commit, commit) == len(self.log) + 1
        self.apply_to_model(commit)
        if durable:
            self.synced()

    @rule(key=st.sampled_from(KEYS), size=st.sampled_from([0, 100]), durable=st.booleans(), which=st.integers(0, 1))
    def commit_often(self, key: Key, size: int, durable: bool, which: int) -> None:
        """Write enough versions of one document to drop the oldest."""
        for number in range(VERSIONS_KEPT + 1):
            commit = self.commit_of([(key, 0, {"epoch": number, "text": "x" * size}, None)], [], number, durable)
            assert self.call(self.stores[which].commit, commit) == len(self.log) + 1
            self.apply_to_model(commit)
        if durable:
            self.synced()

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=2, unique=True), durable=st.booleans())
    def commit_together(self, keys: list[Key], durable: bool) -> None:
        """Commit concurrently in both stores; all succeed, in some order."""
        commits = [self.commit_of([(key, 0, {"epoch": 1}, None)], [], 0, durable) for key in keys]
        positions: dict[int, Commit] = {}

        async def commit(store: Store, one: Commit) -> None:
            positions[await store.commit(one)] = one

        async def commit_all() -> None:
            async with anyio.create_task_group() as tasks:
                for number, one in enumerate(commits):
                    tasks.start_soon(commit, self.stores[number % 2], one)

        self.call(commit_all)
        assert sorted(positions) == list(range(len(self.log) + 1, len(self.log) + len(commits) + 1))
        for _, one in sorted(positions.items()):
            self.apply_to_model(one)
        if durable:
            self.synced()

    @rule(seconds=st.sampled_from([1, 10, 100]))
    def wait(self, seconds: int) -> None:
        """Advance the time."""
        self.clock.advance(seconds)

    @rule(which=st.integers(0, 1), age=st.sampled_from([0, 10, 100, 1000]), largest=st.sampled_from([ALL, ALL, 2_000]))
    def compact(self, which: int, age: int, largest: int) -> None:
        """Compact a part of the history."""
        found = self.call(self.stores[which].compact, self.clock.now() - age, largest)
        assert self.first <= found.first <= len(self.log)
        if found.first > self.first:
            self.first = found.first
            for key in KEYS:
                at = [position for position, one in enumerate(self.log, 1) if key in one.documents]
                old = [position for position in at if self.kept.get(key, 0) <= position <= self.first]
                left = old[-1:] if self.entry(key, self.first)[1] is None else old[-VERSIONS_KEPT:]
                if left:
                    self.kept[key] = left[0]

    @rule()
    def reopen(self) -> None:
        """Close and reopen the store."""
        self.close()
        self.open()

    @rule()
    def kill(self) -> None:
        """Kill all processes."""
        self.die()

    # Invariants.

    @invariant()
    def is_what_it_should_be(self) -> None:
        """Both stores return each document without damage."""
        if not self.stores:
            return
        expected = self.state(self.clock.now())
        for store in self.stores:
            for key in KEYS:
                found = self.call(store.get, key)
                assert (found and (found.version, found.value)) == expected.get(key), key
                assert not (found and found.damaged)
            listed = self.call(store.list, "task", "a")
            assert [one.key.id for one in listed] == [name for name in ("a", "ab") if Key("task", name) in expected]
            assert self.call(store.position) == len(self.log)
            assert not any(one.keys is None or one.keys for one in store.damage), store.damage

    @rule(key=st.sampled_from(KEYS), which=st.integers(0, 1), limit=st.integers(1, 15))
    def history(self, key: Key, which: int, limit: int) -> None:
        """The versions are the written ones, as far as they are kept."""
        expected = [
            (*one.documents[key][:2], position, one.time, one.events)
            for position, one in enumerate(self.log, 1)
            if key in one.documents and position >= self.kept.get(key, 0)
        ]
        found = self.call(self.stores[which].history, key, limit)
        reported = [(one.version, one.value, one.position, one.time, list(one.events)) for one in found]
        assert reported == expected[::-1][:limit]

    @rule(position=st.integers(-3, 1 << 20), which=st.integers(0, 1))
    def at(self, position: int, which: int) -> None:
        """The state at a position is that of the model."""
        position = position % (len(self.log) + 2)
        if position < self.first:
            with pytest.raises(HistoryCompacted):
                self.call(self.stores[which].at, position)
        elif position > len(self.log):
            with pytest.raises(RefusedError):
                self.call(self.stores[which].at, position)
        else:
            time = self.log[position - 1].time if position else 0
            found = self.call(self.stores[which].at, position)
            reported = {key: (one.version, one.value) for key, one in found.documents.items()}
            assert reported == self.state(time, position)

    @rule(after=st.integers(0, 1 << 20), which=st.integers(0, 1))
    def watch(self, after: int, which: int) -> None:
        """A watcher sees each commit once, in order."""
        after = after % (len(self.log) + 1)

        async def watch() -> list[CommitRecord]:
            records = list[CommitRecord]()
            async with aclosing(self.stores[which].watch(after)) as watched:
                while len(records) < len(self.log) - after:
                    records.append(await anext(watched))
                return records

        if after < self.first:
            if after < len(self.log):
                with pytest.raises(HistoryCompacted):
                    self.call(watch)
            return
        expected = [
            (position, one.time, {key: document[:2] for key, document in one.documents.items()}, one.events)
            for position, one in enumerate(self.log[after:], after + 1)
        ]
        found = self.call(watch)
        assert [(one.position, one.time, dict(one.documents), list(one.events)) for one in found] == expected

    @rule(which=st.integers(0, 1))
    def verify(self, which: int) -> None:
        """A new read returns the same contents."""
        found = self.call(self.stores[which].verify)
        assert found.is_valid, found
        assert found.position == len(self.log)


class FileStoreMachine(StoreMachine):
    """Two stores on one folder."""

    def __init__(self) -> None:
        super().__init__()
        self.durable = 0
        self.durable_end: tuple[str, int] = ("", 0)  # the segment and the offset in it
        self.marks: list[bytes] = []
        memory = Path("/dev/shm")
        folder = TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
        self.top = Path(self.resources.enter_context(folder))
        self.places = 0
        self.place = self.top / "0"

    def opened(self) -> AbstractAsyncContextManager[Store]:
        """Open the folder."""
        return FileStore.open(self.place, self.clock, segment_bytes=SEGMENT_BYTES)

    def die(self) -> None:
        """Kill all processes."""
        self.move(lambda _: None)

    def synced(self) -> None:
        """Record what is durable."""
        newest = max(self.place.glob("*.jsonl"))
        self.durable, self.durable_end = len(self.log), (newest.name, newest.stat().st_size)

    def move(self, change: Callable[[Path], object]) -> None:
        """Continue in a copy of the folder with a change, as if all processes had been killed."""
        self.places += 1
        place = self.top / str(self.places)
        shutil.copytree(self.place, place)
        self.close()
        shutil.rmtree(self.place)
        self.place = place
        change(place)
        self.open()

    @invariant()
    def has_a_mark(self) -> None:
        """Keep the marks, for a later loss of power."""
        if self.stores:
            self.marks.append((self.place / "lock").read_bytes())

    @rule(garbage=st.binary(min_size=1, max_size=60) | st.integers(1, 10_000), within=st.booleans())
    def kill_within_a_write(self, garbage: bytes | int, within: bool) -> None:
        """Leave a part of a write behind, or garbage."""

        def leave(place: Path) -> None:
            newest = max(place.glob("*.jsonl"), default=None)
            lines = newest.read_bytes().splitlines(keepends=True) if newest else []
            tail = (lines[-1] if lines else b"")[:-1] if isinstance(garbage, int) else garbage
            tail = tail[: garbage % max(len(tail), 1)] if isinstance(garbage, int) else tail
            if newest is not None and within:
                with newest.open("ab") as log:
                    log.write(tail)
            elif newest is not None and lines:
                (place / f"{len(self.log) + 1:020d}.jsonl").write_bytes(tail)

        self.move(leave)

    @precondition(lambda self: self.log)
    @rule(seed=st.integers(0, 1 << 30), mark=st.integers(0, 1 << 30))
    def lose_power(self, seed: int, mark: int) -> None:
        """Keep the durable commits and possibly the first of the others."""
        older = self.marks[-1 - mark % min(len(self.marks), 4)] if self.marks else None

        def lose(place: Path) -> None:
            name, end = self.durable_end
            newest = max(place.glob("*.jsonl")).name
            lose_power(place, end if name == newest else 0, Random(seed), older)

        self.move(lose)
        position = self.call(self.stores[0].position)
        assert self.durable <= position <= len(self.log)
        assert position >= self.first
        del self.log[position:]
        self.synced()


class MemoryStoreMachine(StoreMachine):
    """The same store twice."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(self.clock)

    def opened(self) -> AbstractAsyncContextManager[Store]:
        """Return the only store."""
        return nullcontext(self.store)

    def die(self) -> None:
        """Keep the process: the contents end with it."""


class ServerStoreMachine(StoreMachine):
    """Two stores on one server."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.url = self.server.url()

    def opened(self) -> AbstractAsyncContextManager[Store]:
        """Connect to the server."""
        if self.url.startswith("redis:"):
            return RedisStore.open(self.url, clock=self.clock)
        return open_postgres_store(self.url, self.clock)

    def die(self) -> None:
        """Kill the server and restart it."""
        self.close()
        self.server.kill()
        self.server.start()
        self.open()


def run(
    machine: type[StoreMachine], examples: int, steps: int, phases: Sequence[Phase] = (Phase.reuse, Phase.generate)
) -> None:
    """Run that many histories of that many steps; by default without shrinking, which may exceed the time of a test."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    bounds = settings(
        phases=phases,
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=checks,
        print_blob=True,
    )
    run_state_machine_as_test(machine, settings=bounds)


@pytest.mark.parametrize("machine", [FileStoreMachine, pytest.param(MemoryStoreMachine, marks=pytest.mark.extended)])
def test_store_behaves_like_a_dict_with_history(machine: type[StoreMachine]) -> None:
    """A few short histories."""
    run(machine, 10, 30)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_store_behaves_like_a_dict_with_history_for_long() -> None:
    """Many long ones."""
    run(FileStoreMachine, 1500, 60, tuple(Phase))


@pytest.mark.extended
@pytest.mark.parametrize(
    ("kind", "examples", "steps", "phases"),
    [
        ("redis", 8, 25, (Phase.reuse, Phase.generate)),
        pytest.param("postgres", 8, 25, (Phase.reuse, Phase.generate), marks=pytest.mark.extended),
        *(
            pytest.param(kind, 300, 60, tuple(Phase), marks=[pytest.mark.slow, pytest.mark.timeout(1200)])
            for kind in SERVERS
        ),
    ],
)
def test_store_on_a_server_behaves_like_a_dict_with_history(
    kind: str, examples: int, steps: int, phases: Sequence[Phase]
) -> None:
    """Also when the server is killed."""
    with SERVERS[kind].started_server() as server:
        machine: Any = type("Machine", (ServerStoreMachine,), {"server": server})
        run(machine, examples, steps, phases)
