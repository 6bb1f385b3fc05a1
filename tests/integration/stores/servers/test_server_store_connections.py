"""Lost connections to a server: each commit is applied once and reported, wherever its exchange is cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import pytest

from orchestrator.errors import StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Event, Key, Store, Write
from orchestrator.state.stores.postgres.store import PostgresStore
from tests.cutting_proxy import CuttingProxy
from tests.pooler import Pooler
from tests.store_kinds import REACHED, SERVERS, Server
from tests.stores import numbers, open_store

pytestmark = pytest.mark.extended

TASK = Key("task", "a")


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server | Pooler]:
    """Return a server of these tests."""
    with REACHED[request.param].started_server() as made:
        yield made


@asynccontextmanager
async def opened(server: Server | Pooler) -> AsyncIterator[tuple[CuttingProxy, Store]]:
    """Open a store through a proxy."""
    async with CuttingProxy(server.port).serve() as proxy, open_store(server.url(port=proxy.port)) as store:
        yield proxy, store


async def settle(store: Store) -> None:
    """Wait until the pool has replaced its lost connections: only the commit's exchange is to be cut."""
    if not isinstance(store, PostgresStore):
        return
    with anyio.fail_after(30):
        while (found := store._server.pool).in_use or not found.size:
            await anyio.sleep(0.001)


@pytest.mark.parametrize(
    ("server", "step", "least"),
    [
        ("postgres", 97, {"request": 500, "reply": 50}),
        pytest.param("postgres", 1, {"request": 500, "reply": 50}, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param("pooled postgres", 97, {"request": 500, "reply": 50}, marks=pytest.mark.extended),
        pytest.param("redis", 1, {"request": 150, "reply": 5}, marks=pytest.mark.extended),
    ],
    indirect=["server"],
    scope="module",
)
@pytest.mark.parametrize("has_write", [False, True], ids=["events", "write"])
async def test_commit_is_applied_once_wherever_its_exchange_is_cut(
    server: Server | Pooler, has_write: bool, step: int, least: dict[str, int]
) -> None:
    """The same applies to a commit of events alone, which no version protects."""

    def commit_of(number: int) -> Commit:
        return Commit([Write(TASK, number, {"n": 1})] if has_write else [], [Event("e", {"n": 100 + number})])

    async with opened(server) as (proxy, store):
        for number in range(5):
            await store.commit(commit_of(number))
        count = 5
        for direction, size in least.items():
            boundary, before = 0, -1
            while proxy.cuts != before:  # until the whole exchange passes
                before = proxy.cuts
                await settle(store)
                proxy.arm(direction, boundary)
                assert await store.commit(commit_of(count)) == count + 1
                count, boundary = count + 1, boundary + step
            proxy.reset()
            assert boundary - step > size
        assert await numbers(store) == [100 + number for number in range(count)]


async def test_repeated_commit_of_an_unknown_outcome_is_applied_once(server: Server) -> None:
    """After an outage the same commit returns the position at which it was applied; another one conflicts."""
    async with opened(server) as (proxy, store):
        await store.commit(Commit([Write(TASK, 0, {})], [Event("e", {"n": 0})]))
        commit = Commit([], [Event("e", {"n": 1})])
        proxy.refuses = True
        proxy.arm("reply", 0)
        with pytest.raises(StoreUnavailable):
            await store.commit(commit)
        proxy.refuses = False
        assert await store.commit(commit) == 2
        assert await store.commit(Commit([], [Event("e", {"n": 2})])) == 3
        with pytest.raises(VersionConflict):
            await store.commit(Commit([Write(TASK, 0, {})]))
        assert await numbers(store) == [0, 1, 2]


async def test_pruned_commit_of_an_unknown_outcome_is_not_applied_again(server: Server) -> None:
    """Pruning keeps the ids of new commits."""
    async with opened(server) as (proxy, store):
        await store.commit(Commit([], [Event("e", {"n": 0})]))
        commit = Commit([], [Event("e", {"n": 1})])
        proxy.refuses = True
        proxy.arm("reply", 0)
        with pytest.raises(StoreUnavailable):
            await store.commit(commit)
        proxy.refuses = False
        await store.commit(Commit([], [Event("e", {"n": 2})]))
        assert (await store.compact(float("inf"), 0)).first >= 2
        assert await store.commit(commit) == 2
        assert await store.position() == 3


async def test_commit_whose_reply_is_lost_or_late_is_applied_once(server: Server) -> None:
    """Without an answer in time it fails, and can be repeated; a late answer is one."""
    async with opened(server) as (proxy, store):
        commit = Commit([], [Event("e", {"n": 0})])
        proxy.silent = frozenset({"reply"})
        with pytest.raises(StoreUnavailable, match="no answer in 5 s"):
            await store.commit(commit)
        proxy.silent, proxy.delay = frozenset(), 0.2
        assert await store.commit(commit) == 1
        assert await store.commit(Commit([], [Event("e", {"n": 1})])) == 2
        assert await numbers(store) == [0, 1]


async def test_silent_server_fails_every_call_in_seconds(server: Server) -> None:
    """It accepts connections and answers nothing; afterwards all calls succeed on new connections."""
    async with opened(server) as (proxy, store):
        await store.commit(Commit([Write(TASK, 0, {"n": 0})]))

        async def fail(call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(StoreUnavailable, match=r"no answer in 5 s|no free connection"):
                await call()

        proxy.blackhole()
        calls: list[Callable[[], Awaitable[object]]] = [
            partial(store.commit, Commit([], [Event("e", {"n": number})])) for number in range(8)
        ]
        reads: list[Callable[[], Awaitable[object]]] = [*[partial(store.get, TASK)] * 8, partial(anext, store.watch(1))]
        with anyio.fail_after(12):
            async with anyio.create_task_group() as tasks:
                for call in (*calls, *reads):
                    tasks.start_soon(fail, call)
        proxy.silent = frozenset()
        with anyio.fail_after(2):
            for call in calls:
                await call()
            assert await store.position() == 9


async def test_restarted_server_is_used_again_by_an_open_store(server: Server) -> None:
    """A call during the outage fails; the next calls succeed."""
    async with open_store(server.url()) as store:
        for number in range(8):
            await store.commit(Commit([Write(TASK, number, {"n": number})]))
        server.kill()
        with pytest.raises(StoreUnavailable, match="start the server"):
            await store.get(TASK)
        server.start()
        document = await store.get(TASK)
        assert document is not None
        assert document.value == {"n": 7}
        assert await store.commit(Commit([Write(TASK, 8, {"n": 8})])) == 9


async def test_watcher_of_another_connection_gets_commits_at_once(server: Server) -> None:
    """Redis ends its blocking read, and PostgreSQL sends a notification, long before the watcher's next look."""
    url = server.url()
    async with open_store(url) as ours, open_store(url) as theirs:
        delays, began = list[float](), anyio.current_time()
        with anyio.fail_after(60):
            await theirs.commit(Commit([], [Event("e")]))
            async for record in ours.watch():
                delays.append(anyio.current_time() - began)
                if record.position == 30:
                    break
                began = anyio.current_time()
                await theirs.commit(Commit([], [Event("e")]))
        assert sorted(delays)[len(delays) // 2] < 0.15
