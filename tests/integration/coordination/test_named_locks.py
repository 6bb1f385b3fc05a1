"""Named locks between real processes: modes, owners, expiry, timeouts, and deadlocks."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.documents.stored import LockMode
from orchestrator.domain.scheduling.deadlocks import LockWait, choose_victim, find_cycle, find_deadlock
from orchestrator.errors import LockUnavailable, RefusedError, UnreadableDocument
from orchestrator.locking.named_locks import NamedLocks
from orchestrator.protocols import Commit, Key, Write
from orchestrator.state.documents.validation import LOCK_KIND, find_unreadable
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock
from orchestrator.testing.clock import ManualClock
from tests.hypothesis_settings import example_settings
from tests.programs import run_python
from tests.store_kinds import SERVERS, empty_state
from tests.stores import open_store

#: Acquires a lock, reports it, and holds it until its standard input ends; may then acquire another.
HOLDER = """
import sys, anyio
from orchestrator.system.clock import SystemClock
from orchestrator.locking.named_locks import NamedLocks
from tests.stores import open_store

async def main(state, owner, name, mode, then=""):
    async with open_store(state) as store:
        locks = NamedLocks(store, SystemClock())
        await locks.acquire(name, mode=mode, owner=owner, timeout=20, expiry=60)
        print("held", flush=True)
        await anyio.to_thread.run_sync(sys.stdin.readline)
        if then:
            try:
                await locks.acquire(then, owner=owner, timeout=20)
                print("both", flush=True)
            except Exception as error:
                print(type(error).__name__, error, flush=True)
anyio.run(main, *sys.argv[1:])
"""


@pytest.fixture(params=["file", *(pytest.param(kind, marks=pytest.mark.extended) for kind in SERVERS)])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the folder or URL of an empty store."""
    return empty_state(request.param, tmp_path / "state")


@pytest.fixture
async def locks(state: str) -> AsyncIterator[NamedLocks]:
    """Return the locks of a store."""
    async with open_store(state) as store:
        yield NamedLocks(store, SystemClock())


@contextmanager
def holder(state: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock."""
    with run_python(HOLDER, state, *words) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child


async def test_readers_share_and_a_writer_is_exclusive(locks: NamedLocks, state: str) -> None:
    """Between processes; the error names the holder, and a dead process holds nothing."""
    with holder(state, "ada", "deploy", "read") as reader:
        mine = await locks.acquire("deploy", mode="read", owner="bob", expiry=10)
        assert (mine.owner, mine.mode, mine.expires_at - mine.acquired_at) == ("bob", "read", 10)
        with pytest.raises(LockUnavailable, match=rf"held by ada \(process {reader.pid} on "):
            await locks.acquire("deploy", owner="eve", timeout=0)
        assert await locks.release(mine)
        assert not await locks.release(mine)
        with pytest.raises(LockUnavailable, match="not released within"):
            await locks.acquire("deploy", owner="eve", timeout=0.05)
    written = await locks.acquire("deploy", owner="eve", timeout=5)
    assert [one.owner for one in await locks.held()] == ["eve"]
    with pytest.raises(LockUnavailable):
        await locks.acquire("deploy", mode="read", owner="bob", timeout=0)
    with pytest.raises(RefusedError, match="eve already holds deploy"):
        await locks.acquire("deploy", mode="read", owner="eve")
    assert await locks.release(written)


async def test_silent_owner_loses_its_lock_at_its_expiry() -> None:
    """The waiter gets it; the leftovers of the owner are cleaned up."""
    clock = ManualClock(1000.0)
    locks = NamedLocks(MemoryStore(clock), clock)
    first = await locks.acquire("a", owner="ada", expiry=10)
    await locks.acquire("b", owner="ada", expiry=10)
    clock.advance(9.9)
    with pytest.raises(LockUnavailable, match="held by ada"):
        await locks.acquire("a", owner="bob", timeout=0)
    clock.advance(0.2)
    assert (await locks.acquire("a", owner="bob", timeout=0)).owner == "bob"
    assert not await locks.release(first)
    assert await locks.cleanup_expired() == ["b"]
    assert [one.name for one in await locks.held()] == ["a"]


async def test_waiters_are_served_in_order_without_starving_a_writer(locks: NamedLocks) -> None:
    """A reader that comes after a waiting writer waits for it."""
    had: list[str] = []
    first = await locks.acquire("a", mode="read", owner="r1")

    async def take(owner: str, mode: str) -> None:
        lock = await locks.acquire("a", mode="write" if mode == "write" else "read", owner=owner, timeout=10)
        had.append(owner)
        await locks.release(lock)

    async with anyio.create_task_group() as group:
        for owner, mode in (("w", "write"), ("r2", "read")):
            group.start_soon(take, owner, mode)
            await anyio.wait_all_tasks_blocked()
            await anyio.sleep(0.1)
        assert had == []
        await locks.release(first)
    assert had == ["w", "r2"]


async def test_deadlock_of_two_processes_is_broken_immediately(locks: NamedLocks, state: str) -> None:
    """The last waiter is rejected with the cycle; the other one gets its lock."""
    with holder(state, "ada", "a", "write", "b") as theirs:
        mine = await locks.acquire("b", owner="bob", expiry=60)
        assert theirs.stdin is not None
        assert theirs.stdout is not None
        theirs.stdin.write("\n")
        theirs.stdin.flush()
        with anyio.fail_after(10):
            while "ada" not in await locks._waits():
                await anyio.sleep(0.01)
            with pytest.raises(LockUnavailable, match=r"deadlock: bob waits for a, ada waits for b, held by bob"):
                await locks.acquire("a", owner="bob", timeout=60)
        await locks.release(mine)
        assert theirs.stdout.readline() == "both\n"


@given(data=st.data())
@example_settings(25, deadline=None)
def test_no_deadlock_persists(data: st.DataObject) -> None:
    """Owners acquire random locks in random orders and modes: each call ends long before its timeout."""
    names = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["read", "write"])), min_size=1, max_size=3)
    plans = data.draw(st.lists(names.map(lambda plan: list({name: (name, mode) for name, mode in plan}.values())),
                               min_size=2, max_size=4))  # fmt: skip

    refused: list[str] = []

    async def work() -> None:
        locks = NamedLocks(MemoryStore(SystemClock()), SystemClock())

        async def one(owner: str, plan: list[tuple[str, str]]) -> None:
            held = []
            try:
                for name, mode in plan:
                    kind: LockMode = "read" if mode == "read" else "write"
                    held.append(await locks.acquire(name, mode=kind, owner=owner, timeout=60))
                    await anyio.sleep(0)
            except LockUnavailable as error:
                refused.append(str(error))
            for lock in held:
                await locks.release(lock)

        with anyio.fail_after(20):  # and no call reached its timeout
            async with anyio.create_task_group() as group:
                for number, plan in enumerate(plans):
                    group.start_soon(one, f"o{number}", plan)

    anyio.run(work)
    assert all("deadlock" in one for one in refused)


OWNERS = "abcdef"


@given(
    st.dictionaries(
        st.sampled_from(OWNERS), st.tuples(st.integers(0, 9), st.sets(st.sampled_from(OWNERS), max_size=3)), max_size=6
    )
)
def test_exactly_the_cycles_are_found(graph: dict[str, tuple[int, set[str]]]) -> None:
    """Exactly the owners in a cycle find it, and one owner per cycle gives up."""
    waits = {owner: LockWait(float(since), "x", blockers) for owner, (since, blockers) in graph.items()}
    reach = {owner: set(wait.blockers) for owner, wait in waits.items()}
    for via, one, other in itertools.product(OWNERS, repeat=3):
        if via in reach.get(one, ()) and other in reach.get(via, ()):
            reach[one].add(other)
    for owner in OWNERS:
        cycle = find_cycle(owner, waits)
        assert bool(cycle) == (owner in reach.get(owner, ()))
        for one, following in zip(cycle, (*cycle[1:], *cycle[:1]), strict=True):
            assert following in waits[one].blockers
        if cycle:
            victim = choose_victim(cycle, waits)
            assert all(waits[one].since <= waits[victim].since for one in cycle)
            assert (find_deadlock(owner, waits) is not None) == (victim == owner)


async def test_unserializable_lock_is_rejected() -> None:
    """An unknown mode, and times out of range; a lock of another program is named."""
    store = MemoryStore(SystemClock())
    locks = NamedLocks(store, SystemClock())
    wrong: list[dict[str, Any]] = [
        {"mode": "exclusive"}, {"mode": None}, {"expiry": 1e12}, {"expiry": float("nan")}, {"expiry": 0},
        {"timeout": 1e12}, {"timeout": float("nan")}, {"timeout": -1}, {"owner": 4711},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(RefusedError, match=r"choose one of read, write|both at most 1e|use strings"):
            await locks.acquire("deploy", **arguments)
    assert await store.position() == 0
    await locks.acquire("deploy", expiry=1e9)
    assert await find_unreadable(store) == []
    await store.commit(Commit([Write(Key(LOCK_KIND, "other"), 0, {"holders": "me", "waiters": []})]))
    with pytest.raises(UnreadableDocument, match="named_lock/other can't be read"):
        await locks.acquire("other")
    assert [one.name for one in await locks.held()] == ["deploy"]
