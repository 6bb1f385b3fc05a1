"""Replicas of a store's server: in `council state health`, and after a failover."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import psycopg
import pytest
from redis.asyncio import Redis

from orchestrator.errors import StateLost, StoreUnavailable
from orchestrator.protocols import Commit, Event, ServerStatistics, Store
from orchestrator.state.stores.postgres.store import PostgresStore
from orchestrator.state.stores.redis.store import RedisStore
from tests import postgres_server, redis_server
from tests.conftest import Repository
from tests.postgres_server import ADMIN, PostgresServer
from tests.redis_server import RedisServer
from tests.stores import numbers, open_store

pytestmark = pytest.mark.extended


@pytest.fixture
def primary() -> Iterator[PostgresServer]:
    """Return a server of the test's own."""
    with postgres_server.started_server() as made:
        yield made


@pytest.fixture
def standby(primary: PostgresServer) -> Iterator[PostgresServer]:
    """Return a standby of the primary."""
    with postgres_server.started_server(primary, cluster_name="second", wal_retrieve_retry_interval="100ms") as made:
        yield made


def execute(server: PostgresServer, *statements: str) -> list[tuple[Any, ...]]:
    """Execute statements as another program, and return the rows of the last one."""
    with psycopg.connect(server.url().partition("?")[0], autocommit=True) as admin:
        *_, last = (admin.execute(statement.encode()) for statement in statements)
        return last.fetchall() if last.description else []


def set_option(server: PostgresServer, name: str, value: str) -> None:
    """Change an option of a running server."""
    execute(server, f"ALTER SYSTEM SET {name} = '{value}'", "SELECT pg_reload_conf()")


def url_of_both(first: PostgresServer, second: PostgresServer) -> str:
    """Return the URL of a store on whichever of two servers is the primary."""
    hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
    return f"postgresql://{ADMIN}@{hosts}/postgres?target_session_attrs=read-write"


async def wait_for_server(store: Store, is_so: Callable[[ServerStatistics], bool]) -> ServerStatistics:
    """Return the statistics of a store's server once a condition is true."""
    with anyio.fail_after(30):
        while not ((found := (await store.statistics()).server) and is_so(found)):
            await anyio.sleep(0.02)
    return found


def is_synchronous(found: ServerStatistics) -> bool:
    """Return True once durable commits wait for a replica that has the whole log."""
    return any(one.is_synchronous and one.lag_bytes == 0 for one in found.replicas)


async def commit_numbers(store: Store, first: int, until: int) -> None:
    """Commit numbered events."""
    for number in range(first, until):
        await store.commit(Commit(events=[Event("e", {"n": number})]))


async def repeat(call: Callable[[], Awaitable[int]]) -> int:
    """Return the result of a call once the store can be reached."""
    with anyio.fail_after(60):
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await anyio.sleep(0.1)


def test_health_shows_the_replicas_of_a_postgresql_server(
    repository: Repository, primary: PostgresServer, standby: PostgresServer
) -> None:
    """With the kind of replication and the lag, also as JSON."""
    url = repository.environ["COUNCIL_STATE"] = primary.url()
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(path)).code == 0

    async def check_lag() -> None:
        async with open_store(url) as store:
            found = await wait_for_server(store, lambda found: [one.lag_bytes for one in found.replicas] == [0])
            assert [(one.name, one.state, one.is_synchronous) for one in found.replicas] == [
                ("second", "streaming", False)
            ]
            standby.signal(signal.SIGSTOP)
            try:
                await commit_numbers(store, 0, 5)
                (late,) = (await wait_for_server(store, lambda found: bool(found.replicas[0].lag_bytes))).replicas
                assert late.lag_bytes
            finally:
                standby.signal(signal.SIGCONT)
            await wait_for_server(store, lambda found: found.replicas[0].lag_bytes == 0)

    anyio.run(check_lag)
    shown = repository.council("state", "health", "--json")
    assert shown.code == 0, shown
    server = shown.result["server"]
    assert server["version"].startswith("postgresql ")
    assert server["pool"].items() >= {"max_size": 4, "in_use": 1, "waiting": 0}.items()
    assert 0 < server["connections"] <= server["max_connections"] == 100
    assert [one["name"] for one in server["replicas"]] == ["second"]
    assert 0 < shown.result["latency"]["read"] < shown.result["latency"]["commit"] + 1
    assert "replica second" in repository.council("state", "health").stdout


async def test_lag_is_unknown_without_the_privilege(primary: PostgresServer, standby: PostgresServer) -> None:
    """The remedy is a role of the server; the missing privilege is no error."""
    assert standby.process
    execute(primary, "CREATE ROLE plain LOGIN", "GRANT CREATE ON DATABASE postgres TO plain")
    async with PostgresStore.open(primary.url(user="plain")) as store:
        found = await wait_for_server(store, lambda found: bool(found.replicas))
        assert found.replicas[0].lag_bytes is None
        assert found.problem == ""
        execute(primary, "GRANT pg_monitor TO plain")
        await wait_for_server(store, lambda found: found.replicas[0].lag_bytes is not None)


async def test_missing_synchronous_standby_is_reported(primary: PostgresServer) -> None:
    """All durable commits would wait for it."""
    async with PostgresStore.open(primary.url()) as store:
        set_option(primary, "synchronous_standby_names", "absent")
        found = await wait_for_server(store, lambda found: bool(found.problem))
        assert "synchronous_standby_names = absent" in found.problem


async def test_synchronous_standby_has_every_acknowledged_commit(
    primary: PostgresServer, standby: PostgresServer
) -> None:
    """An open store continues on the promoted standby, with one URL for both."""
    async with PostgresStore.open(url_of_both(primary, standby)) as store:
        set_option(primary, "synchronous_standby_names", "second")
        await wait_for_server(store, is_synchronous)
        await commit_numbers(store, 0, 50)
        primary.kill()
        execute(standby, "SELECT pg_promote()")
        next_commit = Commit(events=[Event("e", {"n": 50})])
        assert await repeat(lambda: store.commit(next_commit)) == 51
        assert await numbers(store) == list(range(51))


async def test_repeated_commit_waits_for_the_synchronous_standby(
    primary: PostgresServer, standby: PostgresServer
) -> None:
    """The primary was restarted while the commit waited: it is in the log, but not on the standby."""
    async with PostgresStore.open(primary.url()) as store:
        set_option(primary, "synchronous_standby_names", "second")
        await wait_for_server(store, is_synchronous)
        standby.signal(signal.SIGSTOP)
        commit, acknowledged = Commit(events=[Event("e", {"n": 0})]), anyio.Event()

        async def send() -> None:
            assert await repeat(lambda: store.commit(commit)) == 1
            acknowledged.set()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(send)
                waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                with anyio.fail_after(30):
                    while not execute(primary, waiting):
                        await anyio.sleep(0.02)
                primary.kill()
                primary.start()
                with anyio.fail_after(30):
                    while not execute(primary, waiting):
                        assert not acknowledged.is_set()
                        await anyio.sleep(0.02)
                standby.signal(signal.SIGCONT)
        finally:
            standby.signal(signal.SIGCONT)
        assert acknowledged.is_set()
        assert await numbers(store) == [0]


async def test_commits_lost_by_an_asynchronous_failover_are_reported(
    primary: PostgresServer, standby: PostgresServer
) -> None:
    """A process that has seen them commits nothing; a new one continues from the standby's state."""
    url = url_of_both(primary, standby)
    async with PostgresStore.open(url) as store:
        await commit_numbers(store, 0, 5)
        await wait_for_server(store, lambda found: [one.lag_bytes for one in found.replicas] == [0])
        set_option(standby, "primary_conninfo", "")
        await wait_for_server(store, lambda found: not found.replicas)
        await commit_numbers(store, 5, 10)
        primary.kill()
        execute(standby, "SELECT pg_promote()")
        late = Commit(events=[Event("e", {"n": 10})])
        with pytest.raises(StateLost, match="position 5, after it was at 10"):
            await repeat_until_lost(lambda: store.commit(late))
    async with PostgresStore.open(url) as store:
        assert await numbers(store) == list(range(5))


async def repeat_until_lost(call: Callable[[], Awaitable[int]]) -> None:
    """Repeat a call until the store reports lost commits."""
    with anyio.fail_after(60):
        while True:
            try:
                await call()
            except StateLost:
                raise
            except StoreUnavailable:
                await anyio.sleep(0.1)


@asynccontextmanager
async def replicated_redis(primary: RedisServer, replica: RedisServer) -> Any:
    """Make a server the replica of another one, and yield a client of it."""
    async with Redis(port=replica.port) as client:
        await client.replicaof("127.0.0.1", primary.port)
        with anyio.fail_after(60):
            while (await client.info("replication"))["master_link_status"] != "up":
                await anyio.sleep(0.05)
        yield client


async def test_redis_replica_is_shown_and_has_every_acknowledged_commit() -> None:
    """Without the replica, nothing is acknowledged; after a failover, nothing is missing."""
    with redis_server.started_server() as primary, redis_server.started_server() as replica:
        async with replicated_redis(primary, replica) as client:
            prefix = "failover"
            async with RedisStore.open(primary.url(replicas="1", prefix=prefix)) as store:
                began = anyio.current_time()
                await commit_numbers(store, 0, 5)
                assert anyio.current_time() - began < 3  # a replica by itself reports its disk once a second
                found = await wait_for_server(store, is_synchronous)
                (one,) = found.replicas
                assert (one.name, one.state) == (f"127.0.0.1:{replica.port}", "online")
                assert one.lag_seconds is not None
                assert found.pool.size >= found.pool.in_use == found.pool.waiting == 0
                replica.signal(signal.SIGSTOP)
                with pytest.raises(StoreUnavailable, match="did not reach the disk, or all replicas"):
                    await commit_numbers(store, 5, 6)
                replica.signal(signal.SIGCONT)
            primary.kill()
            await client.replicaof("NO", "ONE")
            async with RedisStore.open(replica.url(prefix=prefix)) as store:
                assert (await numbers(store))[:5] == list(range(5))
