"""Lost connections to a PostgreSQL server, and watchers: each commit is applied once and seen in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import psycopg
import pytest

from orchestrator.errors import StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.stores.postgres.store import PostgresStore
from tests.cutting_proxy import CuttingProxy
from tests.postgres_server import PostgresServer, empty_store_url, started_server
from tests.stores import numbers

TASK = Key("task", "a")


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Return a server of these tests."""
    with started_server() as made:
        yield made


@asynccontextmanager
async def opened(server: PostgresServer, schema: str) -> AsyncIterator[tuple[CuttingProxy, PostgresStore]]:
    """Open a store through a proxy."""
    async with (
        CuttingProxy(server.port).serve() as proxy,
        PostgresStore.open(server.url(schema, port=proxy.port)) as store,
    ):
        yield proxy, store


async def connect(url: str) -> psycopg.AsyncConnection[Any]:
    """Return a connection of another program to the database of a store."""
    return await psycopg.AsyncConnection.connect(url.partition("?")[0])


async def settle(store: PostgresStore) -> None:
    """Wait until the pool has replaced its lost connections: only the commit's exchange is to be cut."""
    with anyio.fail_after(30):
        while (found := store._server.pool_statistics)["pool_available"] != found["pool_size"] or not found[
            "pool_size"
        ]:
            await anyio.sleep(0.001)


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("has_write", [False, True], ids=["events", "write"])
async def test_commit_is_applied_once_wherever_its_exchange_is_cut(
    server: PostgresServer, has_write: bool, step: int
) -> None:
    """The same applies to a commit of events alone, which no version protects."""

    def commit_of(number: int) -> Commit:
        return Commit([Write(TASK, number, {"n": 1})] if has_write else [], [Event("e", {"n": 100 + number})])

    async with opened(server, f"cut_{has_write}_{step}".lower()) as (proxy, store):
        for number in range(5):
            await store.commit(commit_of(number))
        count, cuts = 5, dict[str, int]()
        for direction in ("request", "reply"):
            boundary, before = 0, -1
            while proxy.cuts != before:  # until the whole exchange passes
                before = proxy.cuts
                await settle(store)
                proxy.arm(direction, boundary)
                assert await store.commit(commit_of(count)) == count + 1
                count, boundary = count + 1, boundary + step
            proxy.reset()
            cuts[direction] = boundary - step
        assert cuts["request"] > 500
        assert cuts["reply"] > 50
        assert await numbers(store) == [100 + number for number in range(count)]


async def test_repeated_commit_of_an_unknown_outcome_is_applied_once(server: PostgresServer) -> None:
    """After an outage the same commit returns the position at which it was applied; another one conflicts."""
    async with opened(server, "unknown") as (proxy, store):
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


async def test_pruned_commit_of_an_unknown_outcome_is_not_applied_again(server: PostgresServer) -> None:
    """Pruning keeps the ids of new commits."""
    async with opened(server, "pruned") as (proxy, store):
        commit = Commit([], [Event("e", {"n": 1})])
        proxy.refuses = True
        proxy.arm("reply", 0)
        with pytest.raises(StoreUnavailable):
            await store.commit(commit)
        proxy.refuses = False
        await store.commit(Commit([], [Event("e", {"n": 2})]))
        assert (await store.compact(float("inf"), 0)).first == 1
        assert await store.commit(commit) == 1
        assert await store.position() == 2


async def test_attempt_that_arrives_after_a_rejected_repetition_is_not_applied() -> None:
    """Its caller already knows that the commit was rejected."""
    async with PostgresStore.open(empty_store_url()) as store:
        await store.commit(Commit([Write(TASK, 0, {})]))
        late = Commit([Write(TASK, 0, {})])
        store._groups._unknown[late.id] = None  # as if the connection broke while the first attempt waited
        with pytest.raises(VersionConflict):
            await store.commit(late)
        await store.commit(Commit([Write(TASK, 1, None)]))
        call = store._queries["commit"].replace("{n}", "")
        lists: dict[str, Any] = {name: [] for name in ("guard_kinds", "guard_ids", "epochs")}
        lists |= {"kinds": ["task"], "ids": ["a"], "expected": [0], "ttls": [None], "values": [b"{}"]}
        flags = {"is_repeated": False, "is_durable": True, "by": "", "seen": 0}
        ((reply,),) = await store._server.fetch(
            f"SELECT {call}", {**lists, **flags, "id": late.id, "attempt": 1, "events": b"[]"}
        )
        assert reply == ["late"]
        assert await store.position() == 2


async def test_restarted_server_is_used_again_by_an_open_store(server: PostgresServer) -> None:
    """A call during the outage fails; the next calls succeed, and a watcher gets the next commit."""
    async with PostgresStore.open(server.url()) as store:
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


async def test_commits_become_visible_in_order_while_a_transaction_is_open() -> None:
    """A later commit waits for the transaction, so that a watcher never misses a position."""
    url = empty_store_url()
    async with PostgresStore.open(url) as store, await connect(url) as other:
        await store.commit(Commit([], [Event("e", {"n": 1})]))
        schema = store._server.address.schema
        await other.execute(
            f'SELECT "{schema}".commit(%s, 1, false, true, %s, 0, %s, ' + ", ".join(["'{}'"] * 8) + ")",
            ("0" * 32, "other", b'[["e",{"n":2}]]'),
        )
        seen = list[int]()
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:

                async def follow() -> None:
                    async for record in store.watch():
                        seen.append(record.position)
                        if record.position == 3:
                            return

                tasks.start_soon(follow)
                tasks.start_soon(store.commit, Commit([], [Event("e", {"n": 3})]))
                blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
                while not await _count(other, blocked):
                    await anyio.sleep(0.01)
                assert await store.position() == 1
                await other.commit()
        assert seen == [1, 2, 3]
        assert await numbers(store) == [1, 2, 3]


async def _count(connection: psycopg.AsyncConnection[Any], query: str) -> int:
    cursor = await connection.execute(query)
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def test_watcher_of_another_connection_gets_commits_at_once() -> None:
    """A notification arrives long before the watcher's next look."""
    url = empty_store_url()
    async with PostgresStore.open(url) as ours, PostgresStore.open(url) as theirs:
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


async def test_watcher_whose_notifications_are_lost_gets_commits() -> None:
    """As behind a pooler in transaction mode; polling finds them."""
    url = empty_store_url()
    async with PostgresStore.open(url) as store, PostgresStore.open(url) as theirs, await connect(url) as other:
        await other.set_autocommit(True)
        seen = list[int]()
        with anyio.fail_after(30):
            await theirs.commit(Commit([], [Event("e")]))
            async for record in store.watch():
                seen.append(record.position)
                if record.position == 5:
                    break
                await other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE %s", ("LISTEN %",)
                )
                await theirs.commit(Commit([], [Event("e")]))
        assert seen == [1, 2, 3, 4, 5]


async def test_many_watchers_share_a_connection() -> None:
    """Each of them sees each commit, also if the one that waits for notifications ends."""
    async with PostgresStore.open(empty_store_url()) as store:
        seen = dict[int, list[int]]()

        async def follow(name: int, until: int) -> None:
            seen[name] = []
            async for record in store.watch():
                seen[name].append(record.position)
                if record.position == until:
                    return

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for name in range(6):
                    tasks.start_soon(follow, name, name + 1)
                for _ in range(6):
                    await anyio.sleep(0)
                    await store.commit(Commit([], [Event("e")]))
        assert seen == {name: list(range(1, name + 2)) for name in range(6)}
