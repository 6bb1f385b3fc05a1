"""Lost connections to a Redis server: each commit is applied once and reported, wherever its exchange is cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest

from orchestrator.errors import StoreFull, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.stores.redis.store import RedisStore
from tests.cutting_proxy import CuttingProxy
from tests.redis_server import RedisServer, started_server
from tests.stores import numbers

TASK = Key("task", "a")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Return a server of these tests."""
    with started_server() as made:
        yield made


@asynccontextmanager
async def opened(server: RedisServer, prefix: str) -> AsyncIterator[tuple[CuttingProxy, RedisStore]]:
    """Open a store through a proxy."""
    async with CuttingProxy(server.port).serve() as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0?prefix={prefix}"
        async with RedisStore.open(url) as store:
            yield proxy, store


@pytest.mark.extended
@pytest.mark.parametrize("has_write", [False, True], ids=["events", "write"])
async def test_commit_is_applied_once_wherever_its_exchange_is_cut(server: RedisServer, has_write: bool) -> None:
    """The same applies to a commit of events alone, which no version protects."""

    def commit_of(number: int) -> Commit:
        return Commit([Write(TASK, number, {"n": 1})] if has_write else [], [Event("e", {"n": 100 + number})])

    async with opened(server, f"cut-{has_write}") as (proxy, store):
        for number in range(5):
            await store.commit(commit_of(number))
        count, cuts = 5, dict[str, int]()
        for direction in ("request", "reply"):
            boundary, before = 0, -1
            while proxy.cuts != before:  # until the whole exchange passes
                before = proxy.cuts
                proxy.arm(direction, boundary)
                assert await store.commit(commit_of(count)) == count + 1
                count, boundary = count + 1, boundary + 1
            proxy.reset()
            cuts[direction] = boundary - 1
        assert cuts["request"] > 150
        assert cuts["reply"] > 5
        assert await numbers(store) == [100 + number for number in range(count)]


async def test_repeated_commit_of_an_unknown_outcome_is_applied_once(server: RedisServer) -> None:
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


@pytest.mark.extended
async def test_commit_whose_reply_is_lost_or_late_is_applied_once(server: RedisServer) -> None:
    """Without an answer in five seconds it fails, and can be repeated; a late answer is one."""
    async with opened(server, "silent") as (proxy, store):
        commit = Commit([], [Event("e", {"n": 0})])
        proxy.loses_replies = True
        with pytest.raises(StoreUnavailable, match="no answer in 5 s"):
            await store.commit(commit)
        proxy.loses_replies, proxy.delay = False, 0.2
        assert await store.commit(commit) == 1
        assert await store.commit(Commit([], [Event("e", {"n": 1})])) == 2
        assert await numbers(store) == [0, 1]


async def test_restarted_server_is_used_again_by_an_open_store(server: RedisServer) -> None:
    """A call during the outage fails; a watcher fails too, and the next calls succeed."""
    async with RedisStore.open(server.url()) as store:
        await store.commit(Commit([Write(TASK, 0, {"n": 1})]))
        server.kill()
        with pytest.raises(StoreUnavailable, match="start the server"):
            await store.get(TASK)
        server.start()
        document = await store.get(TASK)
        assert document is not None
        assert document.value == {"n": 1}
        assert await store.commit(Commit([Write(TASK, 1, {"n": 2})])) == 2


async def test_full_memory_of_the_server_is_reported_and_changes_nothing(server: RedisServer) -> None:
    """Commits succeed again once there is space."""
    async with RedisStore.open(server.url()) as store:
        await store.commit(Commit([Write(TASK, 0, {"n": 1})]))
        client = store._log.client
        try:
            await client.config_set("maxmemory", "1")
            with pytest.raises(StoreFull, match="memory is full"):
                await store.commit(Commit([Write(TASK, 1, {"n": 2})]))
        finally:
            await client.config_set("maxmemory", "0")
        assert await store.position() == 1
        assert await store.commit(Commit([Write(TASK, 1, {"n": 2})])) == 2


async def test_watcher_of_another_connection_gets_commits_at_once(server: RedisServer) -> None:
    """The blocking read ends with the commit: in the median within 20 ms."""
    url = server.url()
    async with RedisStore.open(url) as ours, RedisStore.open(url) as theirs:
        delays, began = list[float](), anyio.current_time()
        with anyio.fail_after(60):
            await theirs.commit(Commit([], [Event("e")]))
            async for record in ours.watch():
                delays.append(anyio.current_time() - began)
                if record.position == 30:
                    break
                began = anyio.current_time()
                await theirs.commit(Commit([], [Event("e")]))
        assert sorted(delays)[len(delays) // 2] < 0.02
