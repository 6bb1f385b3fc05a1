"""Commits per second on a PostgreSQL server: the store, and a bare client that does the same writes in a transaction.

python -m benchmarks.postgres_store [--quick], with COUNCIL_TEST_POSTGRES_URL or an installed server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import IO, Final
from uuid import uuid4

import anyio
import psycopg

from benchmarks.measure import BenchmarkRow, Cost, argument_parser, measure_cost, measure_pairs, median, print_table
from benchmarks.state import make_document
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.log.codec import encode_commit, split_events, split_values
from orchestrator.state.stores.postgres.store import PostgresStore
from tests.postgres_server import empty_store_url

LIMIT: Final = 1 / 0.7
PROCESSES: Final = 8
#: The writes of a commit of one document, without any check.
BARE: Final = (
    "UPDATE {schema}.head SET position = position + 1, bytes = bytes + 100 WHERE is_only RETURNING position",
    "INSERT INTO {schema}.log VALUES (%(position)s, %(id)s, 0, 'bare', %(events)s, 100, '')",
    "INSERT INTO {schema}.history VALUES ('task', %(name)s, %(version)s, %(position)s, 1, 0, NULL, %(value)s, '')",
    "INSERT INTO {schema}.documents VALUES ('task', %(name)s, %(version)s, %(position)s, 0, 'bare', NULL, %(value)s, '')"
    " ON CONFLICT (kind, id) DO UPDATE SET version = excluded.version, position = excluded.position,"
    " time = excluded.time, by = excluded.by, expires = excluded.expires, value = excluded.value",
    'NOTIFY "{channel}"',
)


def measure(*, quick: bool) -> list[BenchmarkRow]:
    """Return the durations of commits by one and by eight processes."""
    rows = []
    for processes, commits in ((1, 500), (PROCESSES, 100)):
        count = commits // 20 if quick else commits
        pairs = measure_pairs(
            lambda jobs=processes, each=count: _run("store", jobs, each),  # type: ignore[misc]
            lambda jobs=processes, each=count: _run("bare", jobs, each),  # type: ignore[misc]
            1 if quick else 5,
        )
        ours, bare = (processes * count / median([pair[side].wall for pair in pairs]) for side in (0, 1))
        ratio = median([one.wall / other.wall for one, other in pairs])
        what, base = f"postgresql: durable commits, processes: {processes}", f"bare psycopg: {bare:.0f}/s"
        rows.append(BenchmarkRow(what, ours, "/s", base, ratio, LIMIT, is_ratio_limited=True))
    return rows


def _run(job: str, processes: int, commits: int) -> Cost:
    """Run processes that each make so many commits; the cost excludes their start."""
    argv = [sys.executable, "-m", "benchmarks.postgres_store", job, empty_store_url(), str(commits)]
    started = [
        subprocess.Popen([*argv, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]
    pipes = [(process.stdin, process.stdout) for process in started]
    for _, output in pipes:
        _read_line(output)
    with measure_cost() as cost:
        for commands, _ in pipes:
            if commands:
                commands.write("\n")
                commands.flush()
        for _, output in pipes:
            _read_line(output)
    for process in started:
        process.communicate()
    return cost()


def _read_line(output: IO[str] | None) -> None:
    if output is not None:
        output.readline()


def _wait_for_begin() -> None:
    os.write(1, b"ready\n")
    sys.stdin.readline()


async def _by_store(url: str, commits: int, me: int) -> None:
    async with PostgresStore.open(url) as store:
        await store.get(Key("task", "none"))
        _wait_for_begin()
        for number in range(commits):
            await store.commit(_commit(me, number))
    os.write(1, b"done\n")


def _commit(me: int, number: int) -> Commit:
    key = Key("task", f"{me}/{number % 100}")
    return Commit([Write(key, number // 100, make_document(number))], [Event("e", {"n": number})])


async def _by_client(url: str, commits: int, me: int) -> None:
    async with PostgresStore.open(url) as store:  # creates the tables
        first, *others = (store._server.sql(statement) for statement in BARE)
    async with await psycopg.AsyncConnection.connect(url.partition("?")[0], autocommit=True) as client:
        _wait_for_begin()
        for number in range(commits):
            commit = _commit(me, number)
            encoded = encode_commit(commit)
            (value,) = split_values(encoded.writes, encoded.payload)
            events = split_events(encoded.writes, encoded.payload)
            columns = {"id": uuid4(), "name": commit.writes[0].key.id, "version": number // 100 + 1, "value": value}
            async with client.transaction():
                cursor = await client.execute(first)
                row = await cursor.fetchone()
                assert row is not None
                for statement in others:
                    await client.execute(statement, {**columns, "events": events, "position": row[0]})
    os.write(1, b"done\n")


if __name__ == "__main__":
    if sys.argv[1:2] in (["store"], ["bare"]):
        job, address, times, name = sys.argv[1:]
        anyio.run(_by_store if job == "store" else _by_client, address, int(times), int(name))
    else:
        print_table(measure(quick=argument_parser(__doc__).parse_args().quick))
