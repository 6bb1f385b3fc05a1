"""Late commits and watchers of a PostgreSQL server: each commit is applied once and seen in order."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import anyio
import psycopg
import pytest

from orchestrator.errors import LeaseLost, StateError, VersionConflict
from orchestrator.protocols import Commit, Event, Guard, Key, Write
from orchestrator.state.log.codec import encode_commit
from orchestrator.state.stores.postgres.records import group_parameters
from orchestrator.state.stores.postgres.store import PostgresStore
from tests import pooler
from tests.postgres_server import empty_store_url
from tests.stores import numbers

TASK = Key("task", "a")


async def connect(url: str) -> psycopg.AsyncConnection[Any]:
    """Return a connection of another program to the database of a store."""
    return await psycopg.AsyncConnection.connect(url.partition("?")[0])


async def test_attempt_that_arrives_after_a_rejected_repetition_is_not_applied() -> None:
    """Its caller already knows that the commit was rejected."""
    async with PostgresStore.open(empty_store_url()) as store:
        await store.commit(Commit([Write(TASK, 0, {})]))
        late = Commit([Write(TASK, 0, {})])
        store._groups._unknown[late.id] = None  # as if the connection broke while the first attempt waited
        with pytest.raises(VersionConflict):
            await store.commit(late)
        await store.commit(Commit([Write(TASK, 1, None)]))
        flags = {"is_repeated": False, "is_durable": True, "by": "", "seen": 0, "attempt": 1}
        parameters = {**group_parameters([encode_commit(late)]), **flags}
        ((replies, _),) = await store._server.fetch(store._queries["commit"], parameters)
        assert replies == [["late"]]
        assert await store.position() == 2


async def test_concurrent_commits_on_a_document_are_checked_in_order() -> None:
    """A later one may expect the version, or guard the epoch, that an earlier one writes."""
    async with PostgresStore.open(empty_store_url()) as store:
        lease, other = Key("lease", "a"), Key("task", "b")
        outcomes = await _commit_at_once(
            store,
            [
                Commit([Write(lease, 0, {"epoch": 1})]),
                Commit([Write(lease, 0, {"epoch": 5})]),
                Commit([Write(other, 0, {})], guards=[Guard(lease, 1)]),
                Commit([Write(lease, 1, {"epoch": 2})]),
                Commit([Write(other, 1, {})], guards=[Guard(lease, 1)]),
            ],
        )
    assert [one if isinstance(one, int) else type(one) for one in outcomes] == [1, VersionConflict, 2, 3, LeaseLost]


async def _commit_at_once(store: PostgresStore, commits: list[Commit]) -> list[int | StateError]:
    """Return the position or the error of each commit."""
    outcomes = dict[int, int | StateError]()

    async def commit(number: int) -> None:
        try:
            outcomes[number] = await store.commit(commits[number])
        except StateError as error:
            outcomes[number] = error

    async with anyio.create_task_group() as tasks:
        for number in range(len(commits)):
            tasks.start_soon(commit, number)
    return [outcomes[number] for number in range(len(commits))]


async def test_commits_become_visible_in_order_while_a_transaction_is_open() -> None:
    """A later commit waits for the transaction, so that a watcher never misses a position."""
    url = empty_store_url()
    async with PostgresStore.open(url) as store, await connect(url) as other:
        await store.commit(Commit([], [Event("e", {"n": 1})]))
        schema = store._server.address.schema
        await other.execute(
            f'SELECT "{schema}".commit(1, false, true, %s, 0, %s::uuid[], %b, %s, ' + ", ".join(["'{}'"] * 10) + ")",
            ("other", ["0" * 32], [b'[["e",{"n":2}]]'], [115]),
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


@pytest.mark.extended
async def test_stores_behind_a_pooler_see_all_commits_in_order() -> None:
    """They share its connections, and listen on none: announcements would pile up in other clients."""
    with pooler.started_server() as server:
        url = server.url()
        async with AsyncExitStack() as stack:
            stores = [await stack.enter_async_context(PostgresStore.open(url)) for _ in range(4)]
            seen = dict[int, list[int]]()

            async def follow(number: int) -> None:
                seen[number] = []
                async for record in stores[number].watch():
                    seen[number].append(record.position)
                    if record.position == 40:
                        return

            async def commit(number: int) -> None:
                for _ in range(10):
                    await stores[number].commit(Commit([], [Event("e")]))

            async with anyio.create_task_group() as tasks:
                for number in range(4):
                    tasks.start_soon(follow, number)
                    tasks.start_soon(commit, number)
            assert list(seen.values()) == [list(range(1, 41))] * 4
            backends = "SELECT count(*), count(*) FILTER (WHERE query LIKE 'LISTEN%%') FROM pg_stat_activity"
            ((used, listening),) = await stores[0]._server.fetch(f"{backends} WHERE datname = 'postgres'")
        assert (used <= 3, listening) == (True, 0)


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
