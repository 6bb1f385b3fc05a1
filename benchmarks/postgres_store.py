"""Commits of the PostgreSQL store, compared with those of a bare client.

Both do the same writes in a transaction.

python -m benchmarks.postgres_store [--quick], with COUNCIL_TEST_POSTGRES_URL or an installed server.
"""

from __future__ import annotations

from typing import Final
from uuid import uuid4

import psycopg

from benchmarks.measure import BenchmarkRow
from benchmarks.server_stores import main, make_commit, measure_store, wait_for_begin
from orchestrator.protocols import Key
from orchestrator.state.log.codec import encode_commit, split_events, split_values
from orchestrator.state.stores.postgres.store import PostgresStore
from tests.postgres_server import empty_store_url

#: The writes of a commit of one document, without any check.
BARE: Final = (
    "UPDATE {schema}.head SET position = position + 1, bytes = bytes + 100 WHERE is_only RETURNING position",
    "INSERT INTO {schema}.log VALUES (%(position)s, %(id)s, 0, 'bare', %(events)s, 100, '')",
    "INSERT INTO {schema}.history VALUES ('task', %(name)s, %(version)s, %(position)s, 1, 0, NULL, %(value)s, '')",
    """INSERT INTO {schema}.documents
    VALUES ('task', %(name)s, %(version)s, %(position)s, 0, 'bare', NULL, %(value)s, '')
    ON CONFLICT (kind, id) DO UPDATE SET version = excluded.version, position = excluded.position,
    time = excluded.time, by = excluded.by, expires = excluded.expires, value = excluded.value""",
    'NOTIFY "{channel}"',
)


def _measure(quick: bool) -> list[BenchmarkRow]:
    return measure_store("postgres_store", "psycopg", empty_store_url, quick=quick)


async def _by_store(url: str, commits: int, me: int) -> None:
    async with PostgresStore.open(url) as store:
        await store.get(Key("task", "none"))
        wait_for_begin()
        for number in range(commits):
            await store.commit(make_commit(me, number))


async def _by_client(url: str, commits: int, me: int) -> None:
    async with PostgresStore.open(url) as store:  # creates the tables
        first, *others = (store._server.sql(statement) for statement in BARE)
    async with await psycopg.AsyncConnection.connect(url.partition("?")[0], autocommit=True) as client:
        wait_for_begin()
        for number in range(commits):
            commit = make_commit(me, number)
            encoded = encode_commit(commit)
            (value,) = split_values(encoded.writes, encoded.payload)
            events = split_events(encoded.writes, encoded.payload)
            columns = {"id": uuid4(), "name": commit.writes[0].key.id, "version": number // 100 + 1, "value": value}
            async with client.transaction():
                cursor = await client.execute(first)
                ((position,),) = await cursor.fetchall()
                for statement in others:
                    await client.execute(statement, {**columns, "events": events, "position": position})


if __name__ == "__main__":
    main("postgres_store", {"store": _by_store, "bare": _by_client}, _measure)
