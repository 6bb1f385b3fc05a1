"""PostgreSQL servers that a store rejects, credentials, plans, views and damage: one line each, with the fix."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest

from orchestrator.errors import InvalidDocument, RefusedError, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Event, Guard, Key, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.log.codec import encode_commit
from orchestrator.state.stores.postgres.records import group_parameters
from orchestrator.state.stores.postgres.schema import check_settings, read_queries
from orchestrator.state.stores.postgres.server import PASSWORD, PASSWORD_FILE, fetch, parse_url
from orchestrator.state.stores.postgres.store import PostgresStore
from tests.cutting_proxy import create_certificate
from tests.postgres_server import GUARDED, PostgresServer, empty_store_url, started_server

pytestmark = pytest.mark.extended

TASK, OTHER, LEASE = Key("task", "a"), Key("task", "b"), Key("lease", "a")
SECRET = "s3cret-of-the-test"
PGPASS = f"127.0.0.1:*:*:{GUARDED}:{SECRET}\n"
PROPER = {"version": 150_000, "encoding": "UTF8", "fsync": "on", "full_page_writes": "on", "is_standby": False}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Return a server with a user whose password is `SECRET`, and one without privileges."""
    with started_server() as made:
        made.guard(SECRET)
        with made.connect() as admin:
            admin.execute("CREATE ROLE powerless LOGIN")
        yield made


async def opens(url: str) -> None:
    """Open a store, commit to it and read."""
    async with PostgresStore.open(url) as store:
        await store.commit(Commit([Write(TASK, 0, {"n": 1})]))
        assert await store.get(TASK) is not None


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"version": 120_020}, "PostgreSQL 12.*upgrade"),
        ({"encoding": "LATIN1"}, "ENCODING 'UTF8'"),
        ({"is_standby": True}, "URL of the primary"),
        ({"fsync": "off"}, "fsync = on"),
        ({"full_page_writes": "off"}, "full_page_writes = on"),
    ],
)
def test_unsuitable_server_is_refused(settings: dict[str, Any], what: str) -> None:
    """The error names the fix."""
    address = parse_url("postgresql://host/db")
    check_settings(address, PROPER)
    with pytest.raises(RefusedError, match=what):
        check_settings(address, PROPER | settings)


@pytest.mark.parametrize(
    "url", ["postgresql://host:port/db", "postgresql://host/db?pool=3", "postgresql://host/db?schema=a-b"]
)
def test_invalid_url_is_refused(url: str) -> None:
    """An unknown option is also invalid."""
    with pytest.raises(RefusedError):
        parse_url(url)


@pytest.mark.parametrize("url", ["postgresql://ada:hidden@host/db", "postgresql://host/db?password=hidden"])
def test_url_with_a_password_is_refused_without_showing_it(url: str) -> None:
    """The error names the variable."""
    with pytest.raises(RefusedError, match=PASSWORD) as caught:
        parse_url(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "shown"), [("a:1", "a:1"), ("a,b:1", "a:5432,b:1"), ("a:1,b:2", "a:1,b:2"), ("[::1]:3", "::1:3")]
)
def test_each_host_is_shown_with_its_port(hosts: str, shown: str) -> None:
    assert str(parse_url(f"postgresql://user@{hosts}/base")) == f"postgresql {shown}/base"


async def test_unknown_reply_of_the_server_fails_each_commit_of_a_group(server: PostgresServer) -> None:
    """None of them waits forever."""
    url, failed = server.url(), list[int]()
    async with PostgresStore.open(url) as store:
        replace_in_functions(server, url, "'ok'", "'new'")

        async def commit(number: int) -> None:
            with pytest.raises(AssertionError, match="unknown reply"):
                await store.commit(Commit(events=[Event("e", {"n": number})]))
            failed.append(number)

        with anyio.move_on_after(20):
            async with anyio.create_task_group() as group:
                for number in range(3):
                    group.start_soon(commit, number)
    assert sorted(failed) == [0, 1, 2]


def replace_in_functions(server: PostgresServer, url: str, old: str, new: str) -> None:
    """Replace text in all functions of a store, as a later version may."""
    query = "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = %s::regnamespace AND prosrc LIKE %s"
    with server.connect() as admin:
        found = admin.execute(query, (url.rpartition("schema=")[2], f"%{old}%")).fetchall()
        assert found
        for (text,) in found:
            admin.execute(text.replace(old, new))


def test_options_of_the_client_library_are_passed_on() -> None:
    """TLS options among them."""
    address = parse_url("postgresql://ada@host/db?schema=one&sslmode=verify-full&sslrootcert=/ca.pem")
    assert address.schema == "one"
    assert dict(address.options) == {
        "user": "ada", "host": "host", "dbname": "db", "sslmode": "verify-full", "sslrootcert": "/ca.pem",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"host": "unknown.invalid"}, "unknown host 'unknown.invalid': correct its name"),
        ({"port": "1"}, "start the server"),
        ({"database": "nothing"}, 'CREATE DATABASE "nothing"'),
        ({"user": "nobody"}, 'CREATE ROLE "nobody"'),
        ({"user": GUARDED}, PASSWORD),
        ({"user": "powerless"}, 'GRANT CREATE ON DATABASE "postgres" TO "powerless"'),
        ({"options": "&sslmode=require"}, "sslmode"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_unusable_server_is_reported_in_one_line_with_the_fix(
    server: PostgresServer, change: dict[str, str], what: str
) -> None:
    """The line names the server, and does not repeat the library's text around it."""
    given = {"host": "127.0.0.1", "port": str(server.port), "database": "postgres", "user": "admin"} | change
    url = "postgresql://{user}@{host}:{port}/{database}?schema=unusable".format(**given)
    with pytest.raises(StoreUnavailable, match=what) as caught:
        await opens(url + given.get("options", ""))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


async def test_password_comes_from_a_variable_a_file_or_pgpass(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong one is rejected; no message, log record or event has it."""
    url = server.url(user=GUARDED)
    monkeypatch.setenv(PASSWORD, SECRET)
    await opens(url)
    monkeypatch.setenv(PASSWORD, f"wrong-{SECRET}")
    with pytest.raises(StoreUnavailable, match="is wrong") as caught:
        await opens(url)
    said = str(caught.value) + repr(caught.value) + repr(caught.value.__cause__) + caplog.text
    monkeypatch.delenv(PASSWORD)
    for name, variable, text in (
        ("password", PASSWORD_FILE, f"{SECRET}\n"),
        ("pgpass", "PGPASSFILE", PGPASS),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(tmp_path / name))
            await opens(server.url(user=GUARDED))
    async with PostgresStore.open(server.url()) as store:
        said += repr([str(store._server.address), repr(store._server.address), await store.statistics()])
    assert SECRET not in said + caplog.text


async def test_readable_pgpass_is_ignored_with_the_needed_mode(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client library explains it on standard error."""
    (tmp_path / "pgpass").write_text(PGPASS)
    (tmp_path / "pgpass").chmod(0o644)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    with pytest.raises(StoreUnavailable, match=r"needs a password: .*pgpass \(mode 600\)"):
        await opens(server.url(user=GUARDED))
    assert "has group or world access" in capfd.readouterr().err


async def test_missing_file_with_the_password_is_reported(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error names the file."""
    monkeypatch.setenv(PASSWORD_FILE, str(tmp_path / "missing"))
    with pytest.raises(RefusedError, match="missing"):
        await opens(server.url(user=GUARDED))


@pytest.mark.parametrize("right", ["ALL ON ALL TABLES", "ALL ON", "EXECUTE ON ALL FUNCTIONS"])
async def test_revoked_privilege_is_granted_by_the_statement_in_the_message(server: PostgresServer, right: str) -> None:
    """A commit without a privilege changes nothing, and succeeds afterwards."""
    url = server.url(user="powerless")
    schema = url.rpartition("=")[2]
    with server.connect() as admin:
        admin.execute(f"CREATE SCHEMA {schema} AUTHORIZATION powerless")
        async with PostgresStore.open(url) as store:
            assert await store.commit(Commit([Write(TASK, 0, {"n": 1})])) == 1
            admin.execute(
                f"REVOKE {right} {'IN ' if 'ALL ' in right[4:] else ''}SCHEMA {schema} FROM PUBLIC, powerless"
            )
            with pytest.raises(StoreUnavailable, match="lacks a privilege") as caught:
                await store.commit(Commit([Write(TASK, 1, {"n": 2})]))
            admin.execute(caught.value.remedy.split("`")[1])
            assert await store.commit(Commit([Write(TASK, 1, {"n": 2})])) == 2


async def test_statements_in_messages_lead_to_a_working_store(server: PostgresServer) -> None:
    """A user who lacks everything gets it step by step."""
    url = server.url(user="new-comer").replace("/postgres?", "/private?")
    with server.connect() as admin:
        admin.execute('CREATE ROLE "new-comer" CONNECTION LIMIT 0')
        admin.execute("CREATE DATABASE private CONNECTION LIMIT 0")
        admin.execute("REVOKE CONNECT ON DATABASE private FROM PUBLIC")
        for expected in (
            "ALTER ROLE .* LOGIN", "ALTER ROLE .* LIMIT", "GRANT CONNECT", "ALTER DATABASE .* LIMIT", "GRANT CREATE",
        ):  # fmt: skip
            with pytest.raises(StoreUnavailable, match=expected) as caught:
                await opens(url)
            assert "\n" not in str(caught.value)
            admin.execute(caught.value.remedy.split("`")[1])
        await opens(url)


async def test_certificate_of_the_server_is_verified(server: PostgresServer) -> None:
    """Another authority, a missing file of authorities and another host name are reported in one line."""
    certificate, other = create_certificate(), create_certificate.__wrapped__()
    for name in ("server.crt", "server.key"):
        shutil.copy(certificate, server.data)
        (server.data / certificate.name).rename(server.data / name).chmod(0o600)
        if server.user is not None:
            os.chown(server.data / name, server.user, server.user)
    with server.connect() as admin:
        try:
            admin.execute("ALTER SYSTEM SET ssl = on")
        except psycopg.errors.InvalidParameterValue as error:
            pytest.skip(f"this server has no TLS: {error}")
        admin.execute("SELECT pg_reload_conf()")
    url = f"{server.url()}&sslmode=verify-full&sslrootcert="
    authority = certificate.with_name("authority.pem")
    async with PostgresStore.open(f"{url}{authority}") as store:
        query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert await store._server.fetch(query) == [(True,)]
    for wrong, what in (
        (f"{url}{other.with_name('authority.pem')}", "certificate verify failed"),
        (f"{url}/missing.pem", '"/missing.pem" does not exist'),
        (f"{url}{authority}".replace("127.0.0.1", "localhost"), 'does not match host name "localhost"'),
    ):
        with pytest.raises(
            StoreUnavailable, match=f"TLS failed: .*{what}.*correct `sslmode` or `sslrootcert`"
        ) as caught:
            await opens(wrong)
        assert "\n" not in str(caught.value)


async def _execute(store: PostgresStore, statement: str) -> None:
    async with store._server.connection() as connection:
        await connection.execute(statement)


async def test_tables_of_a_newer_program_are_refused() -> None:
    """Opening a store does not change them."""
    url = empty_store_url()
    async with PostgresStore.open(url) as store:
        await _execute(store, store._server.sql("INSERT INTO {schema}.migrations VALUES (1000)"))
    with pytest.raises(RefusedError, match="upgrade cli-council") as caught:
        await opens(url)
    assert "\n" not in str(caught.value)


async def test_stores_that_are_opened_at_once_create_the_tables_once() -> None:
    """The migrations take a lock."""
    url = empty_store_url()

    async def commit(number: int) -> None:
        async with PostgresStore.open(url) as store:
            await store.commit(Commit([Write(Key("task", str(number)), 0, {})]))

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(commit, number)
    async with PostgresStore.open(url) as store:
        assert await store.position() == 5


#: The function of version 3 that applied one commit; its body does not matter.
_COMMIT_OF_VERSION_3 = """
CREATE FUNCTION {schema}.commit(
    _id uuid, _attempt bigint, _is_repeated boolean, _is_durable boolean, _by text, _seen bigint, _events bytea,
    _kinds text[], _ids text[], _expected bigint[], _ttls double precision[], _values bytea[],
    _guard_kinds text[], _guard_ids text[], _epochs numeric[]
) RETURNS jsonb LANGUAGE sql AS 'SELECT NULL::jsonb'
"""


async def test_upgrade_of_the_tables_keeps_their_data() -> None:
    """Several processes open a store of version 3 at once: its log, documents and versions stay; commits continue."""
    url = empty_store_url()
    async with PostgresStore.open(url) as store:
        guard = Guard(LEASE, 1)
        await store.commit(Commit([Write(LEASE, 0, {"epoch": 1}, ttl=3_600), Write(TASK, 0, {"text": "a\0b"})]))
        await store.commit(Commit([Write(TASK, 1, {"n": 2**70})], [Event("e", {"n": 1})], [guard]))
        await store.commit(Commit([Write(OTHER, 0, {}), Write(TASK, 2, None)]))
        before = await _contents(store)
        for statement in (
            "DROP FUNCTION {schema}.commit",
            "DROP FUNCTION {schema}.records",
            "DELETE FROM {schema}.migrations WHERE number > 3",
            _COMMIT_OF_VERSION_3,
        ):
            await _execute(store, store._server.sql(statement))

    async def upgrade() -> None:
        async with PostgresStore.open(url) as store:
            assert await _contents(store) == before

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(upgrade)
    async with PostgresStore.open(url) as store:
        assert (await store.verify()).is_valid
        with pytest.raises(VersionConflict):
            await store.commit(Commit([Write(OTHER, 0, {})]))
        assert await store.commit(Commit([Write(TASK, 0, {}), Write(OTHER, 1, {})], guards=[guard])) == 4
        assert [one.version for one in await store.history(TASK)] == [4, 3, 2, 1]
        functions = "SELECT count(*) FROM pg_proc WHERE pronamespace = %(schema)s::regnamespace AND proname = 'commit'"
        assert await store._server.fetch(functions, {"schema": store._server.address.schema}) == [(1,)]


async def _contents(store: PostgresStore) -> tuple[Any, ...]:
    documents = [await store.list(kind) for kind in ("lease", "task")]
    records = [record async for record in read_range(store, 0, await store.position())]
    return documents, records, await store.history(TASK), (await store.at(2)).documents


#: Queries of the whole state, which read all of a table.
WHOLE = frozenset(
    {
        "compact", "connections", "damaged_commits", "damaged_versions", "differing_documents", "end_load", "expired",
        "install", "large", "load_commits", "load_versions", "lock", "lock_empty", "missing_commits",
        "remove_damaged_commits", "remove_damaged_versions", "replicas", "restart_log", "restore_document", "totals",
    }
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(read_queries().keys() - WHOLE - {"commit", "records"}))
async def test_query_uses_an_index(name: str) -> None:
    """No table is read sequentially, however large it is."""
    parameters = {
        "kind": "task", "id": "a", "pattern": "a%", "after": 5, "limit": 50, "position": 7,
    }  # fmt: skip
    async with PostgresStore.open(empty_store_url()) as store:
        await store.commit(Commit([Write(TASK, 0, {})]))
        async with store._server.connection() as connection:
            await connection.execute("SET enable_seqscan = off")
            cursor = await connection.execute(f"EXPLAIN {store._queries[name]}", parameters)
            plan = "\n".join(row[0] for row in await cursor.fetchall())
    assert "Seq Scan" not in plan
    assert "Index" in plan


async def test_watcher_does_not_read_the_whole_history() -> None:
    """Also while the server has no statistics of the tables, as after their creation."""
    async with PostgresStore.open(empty_store_url()) as store:
        async with anyio.create_task_group() as tasks:
            for number in range(1_600):
                keys = [Key("task", f"{number}/{part}") for part in range(3)]
                tasks.start_soon(store.commit, Commit([Write(key, 0, {"text": "x" * 500}) for key in keys]))
        query = "SELECT sum(seq_scan)::bigint, sum(idx_tup_fetch)::bigint FROM pg_stat_xact_user_tables"
        async with store._server.connection() as connection, connection.transaction():
            rows = await fetch(connection, store._queries["records"], {"after": 1_000, "limit": 50})
            parameters = {"schema": store._server.address.schema}
            ((scans, fetched),) = await fetch(connection, f"{query} WHERE schemaname = %(schema)s", parameters)
    assert (len(rows), scans) == (150, 0)
    assert fetched <= 250


async def test_statements_of_a_commit_use_indexes() -> None:
    """No table was read sequentially by hundred commits, according to the statistics of the server."""
    async with PostgresStore.open(empty_store_url()) as store:
        guard = Guard(LEASE, 1)
        await store.commit(Commit([Write(LEASE, 0, {"epoch": 1}), Write(TASK, 0, {})]))
        query = "SELECT sum(seq_scan)::bigint FROM pg_stat_xact_user_tables WHERE schemaname = %(schema)s"
        flags = {"is_repeated": True, "is_durable": True, "by": "", "seen": 0}
        async with store._server.connection() as connection, connection.transaction():
            before = await fetch(connection, query, {"schema": store._server.address.schema})
            for number in range(1, 101):
                group = group_parameters([encode_commit(Commit([Write(TASK, number, {})], guards=[guard]))])
                parameters = {**group, **flags, "attempt": number}
                ((((is_ok, _),), _),) = await fetch(connection, store._queries["commit"], parameters)
                assert is_ok == "ok"
            assert await fetch(connection, query, {"schema": store._server.address.schema}) == before


async def test_views_show_the_state_to_other_programs() -> None:
    """A value that jsonb can't contain is also readable there."""
    async with PostgresStore.open(empty_store_url()) as store:
        value = {"text": "a\0b", "big": 2**70}
        await store.commit(Commit([Write(TASK, 0, value), Write(LEASE, 0, {"epoch": 3}, ttl=60)]))
        await store.commit(Commit([Write(TASK, 1, {"n": 2}), Write(Key("checkpoint", "run/1"), 0, {"name": "x"})]))
        await store.commit(Commit([Write(TASK, 2, None)]))
        assert [one.value for one in await store.history(TASK)] == [None, {"n": 2}, value]

        async def rows(columns: str, view: str) -> list[tuple[Any, ...]]:
            return await store._server.fetch(
                store._server.sql(f"SELECT {columns} FROM {{schema}}.{view} ORDER BY 1, 2")
            )

        shown = {"text": "a\1b", "big": 2**70}
        assert await rows("change_type, version, old_data, new_data", "state_history WHERE state_type = 'task'") == [
            ("create", 1, None, shown),
            ("delete", 3, {"n": 2}, None),
            ("update", 2, shown, {"n": 2}),
        ]
        assert await rows("agent_id, state_type, state_data, version", "agent_state") == [
            ("a", "lease", {"epoch": 3}, 1), ("run/1", "checkpoint", {"name": "x"}, 1),
        ]  # fmt: skip
        assert await rows("id, workflow_id, checkpoint_data", "workflow_checkpoints") == [
            ("run/1", "run", {"name": "x"})
        ]
        assert await rows("id, epoch", "leases") == [("a", "3")]


async def test_too_long_name_is_refused() -> None:
    """An index can't contain it."""
    async with PostgresStore.open(empty_store_url()) as store:
        await store.commit(Commit([Write(Key("k", "é" * 999), 0, {})]))
        with pytest.raises(InvalidDocument, match="limit: 2000"):
            await store.commit(Commit([Write(Key("k", "é" * 1_000), 0, {})]))


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        ("UPDATE {schema}.documents SET value = '{}' WHERE id = 'a'", {}),
        ("DELETE FROM {schema}.documents WHERE id = 'a'", {}),
        ("UPDATE {schema}.history SET value = '{}' WHERE id = 'a' AND version = 2", {}),
        ("UPDATE {schema}.log SET events = '[]' WHERE position = 2", {}),
        ("DELETE FROM {schema}.log WHERE position = 2", {}),
        ("DELETE FROM {schema}.log WHERE position = 3", {}),
        (
            "UPDATE {schema}.documents SET value = '{}'; UPDATE {schema}.history SET value = '{}' WHERE version > 1",
            {"n": 1},
        ),
    ],
)
async def test_damage_is_reported_and_repaired(damage: str, lost: dict[str, int]) -> None:
    """The newest readable value of each document becomes current; versions continue."""
    async with PostgresStore.open(empty_store_url()) as store:
        await store.commit(Commit([Write(TASK, 0, {"n": 1}), Write(OTHER, 0, {"n": 9})], [Event("one")]))
        await store.commit(Commit([Write(TASK, 1, {"n": 2})], [Event("two")]))
        await store.commit(Commit(events=[Event("three")]))
        assert (await store.verify()).is_valid
        await _execute(store, store._server.sql(damage))
        report = await store.verify()
        assert not report.is_valid
        assert all("\n" not in one.describe() for one in report.damage)
        assert (await store.repair()).is_valid
        document, other = await store.get(TASK), await store.get(OTHER)
        assert document is not None
        assert document.value == (lost or {"n": 2})
        assert document.version >= 2
        assert other is not None
        assert await store.commit(Commit([Write(TASK, document.version, {"n": 3})])) == 5
        assert (await store.verify()).is_valid
        async with store.dump() as dump:
            assert [one.position async for one in dump.commits][-1] == 5
