"""The tables of a store, created by numbered migrations, and the named queries.

Migrations only go forward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psycopg

from orchestrator.errors import RefusedError
from orchestrator.state.stores.postgres.server import Address, Connection, Server, fetch

_FOLDER: Final = Path(__file__).parent
OLDEST: Final = 130_000
"""The oldest supported version of the server, as in `server_version_num`."""

_CHECK: Final = """
SELECT current_setting('server_version_num')::int AS version, current_setting('server_encoding') AS encoding,
    current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
    current_setting('server_version') AS name, current_setting('max_connections')::int AS max_connections,
    current_setting('synchronous_standby_names') AS standbys, pg_is_in_recovery() AS is_standby,
    to_regclass('{schema}.migrations') IS NOT NULL AS has_tables
"""
_NEWEST: Final = "SELECT coalesce(max(number), 0) FROM {schema}.migrations"


def read_queries() -> Mapping[str, str]:
    """Return the queries of this package by name."""
    _, *parts = re.split(r"^-- name: (\w+)\n", (_FOLDER / "queries.sql").read_text(), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def read_migrations() -> Sequence[tuple[int, str]]:
    """Return the numbers and text of the migrations."""
    paths = sorted((_FOLDER / "migrations").glob("*.sql"))
    return [(int(path.name.partition("_")[0]), path.read_text()) for path in paths]


def check_settings(address: Address, settings: Mapping[str, Any]) -> None:
    """Raise RefusedError for a server that is too old, or may lose commits.

    Only acknowledged commits count.
    """
    version = settings["version"] // 10_000
    problems: Sequence[tuple[bool, str, str]] = (
        (
            settings["version"] < OLDEST,
            f"the server is PostgreSQL {version}",
            f"upgrade it to PostgreSQL {OLDEST // 10_000} or newer",
        ),
        (
            settings["encoding"] != "UTF8",
            f"the database has the encoding {settings['encoding']}",
            "`CREATE DATABASE NAME ENCODING 'UTF8' TEMPLATE template0`, and use it",
        ),
        (settings["is_standby"], "the server is a standby", "use the URL of the primary"),
        (settings["fsync"] != "on", "it loses commits in a power failure", "set `fsync = on` in postgresql.conf"),
        (
            settings["full_page_writes"] != "on",
            "it can lose all data in a power failure",
            "set `full_page_writes = on` in postgresql.conf",
        ),
    )
    for is_wrong, what, remedy in problems:
        if is_wrong:
            raise RefusedError(f"{address}: {what}", remedy)


async def read_settings(server: Server, connection: Connection) -> Mapping[str, Any]:
    """Return the settings of a server, and whether its schema has tables."""
    cursor = connection.cursor(row_factory=psycopg.rows.dict_row)
    settings = await (await cursor.execute(server.sql(_CHECK))).fetchone()
    assert settings is not None, "it has one row"  # noqa: S101  (for the type checker)
    return settings


async def prepare(server: Server) -> None:
    """Check the server, and bring the tables up to date.

    Raises RefusedError for an unsuitable server and for tables of a newer program, StoreUnavailable without privileges.
    """

    async def run(connection: Connection) -> None:
        settings = await read_settings(server, connection)
        check_settings(server.address, settings)
        if not settings["has_tables"] or await _newest(server, connection) != read_migrations()[-1][0]:
            await _migrate(server, connection)

    await server.run(run)


async def _newest(server: Server, connection: Connection) -> int:
    ((newest,),) = await fetch(connection, server.sql(_NEWEST))
    return int(newest)


async def _migrate(server: Server, connection: Connection) -> None:
    async with connection.transaction():
        await connection.execute(server.sql("SELECT pg_advisory_xact_lock(hashtext('council migrations {schema}'))"))
        await connection.execute(
            server.sql(
                """DO $$ BEGIN
                    IF to_regnamespace('{schema}') IS NULL THEN CREATE SCHEMA {schema}; END IF;
                    CREATE TABLE IF NOT EXISTS {schema}.migrations (
                        number bigint PRIMARY KEY, time timestamptz NOT NULL DEFAULT now());
                END $$"""
            )
        )
        newest, migrations = await _newest(server, connection), read_migrations()
        if newest > migrations[-1][0]:
            raise RefusedError(
                f"{server.address}: schema {server.address.schema} has version {newest} of the tables, and this "
                f"version of council supports {migrations[-1][0]}",
                "upgrade cli-council",
            )
        for number, text in migrations:
            if number > newest:
                await connection.execute(server.sql(text))
                await connection.execute(server.sql("INSERT INTO {schema}.migrations VALUES (%s)"), (number,))
