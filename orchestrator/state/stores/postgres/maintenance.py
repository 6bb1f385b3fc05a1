"""Verify, repair and dump the tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from orchestrator.domain.events.state import StateLogRepaired, StateRepaired
from orchestrator.errors import RefusedError
from orchestrator.protocols import (
    Commit,
    Damage,
    DumpedCommit,
    Event,
    Key,
    ReplicaStatistics,
    ServerStatistics,
    VerificationReport,
    Write,
)
from orchestrator.state.log.codec import MAX_TTL
from orchestrator.state.stores.postgres.records import to_commits, unescape
from orchestrator.state.stores.postgres.schema import check_settings, read_settings
from orchestrator.state.stores.postgres.server import Connection, Server, fetch

Queries = Mapping[str, str]
_ROWS: Final = 50
"""The number of rows of a dump to fetch at once."""


async def verify_state(connection: Connection, queries: Queries, name: str) -> VerificationReport:
    """Check all checksums and positions, and compare the documents with the log."""
    ((position, _, size),) = await fetch(connection, queries["head"])
    path, damage = Path(name), list[Damage]()
    lost: dict[int, list[Key]] = defaultdict(list)
    for kind, document, _, where in await fetch(connection, queries["damaged_versions"]):
        lost[where].append(Key(unescape(kind), unescape(document)))
    for (where,) in await fetch(connection, queries["damaged_commits"]):
        lost.setdefault(where, [])
    for where, keys in sorted(lost.items()):
        damage.append(Damage(path, None, keys, f"commit {where} is damaged"))
    for start, end in await fetch(connection, queries["missing_commits"]):
        damage.append(Damage(path, None, None, f"commits {start} to {end} are missing"))
    found = await fetch(connection, queries["differing_documents"])
    mismatched = [Key(unescape(kind), unescape(document)) for kind, document in found]
    return VerificationReport(position, size, damage, (), mismatched)


async def repair_state(connection: Connection, queries: Queries, report: VerificationReport) -> Commit:
    """Remove damaged data; return the commit that makes the readable values current.

    The log then starts after its newest damaged commit.
    """
    writes, events = list[Write](), list[Event]()
    async with connection.transaction():
        for query in ("lock", "restart_log", "remove_damaged_commits", "remove_damaged_versions"):
            await connection.execute(queries[query])
        for kind, document in await fetch(connection, queries["differing_documents"]):
            key = Key(unescape(kind), unescape(document))
            parameters = {"kind": kind, "id": document}
            ((version, value, remaining),) = await fetch(connection, queries["restore_document"], parameters)
            is_expired = remaining is not None and remaining <= 0
            known = None if value is None or is_expired else json.loads(value)
            ttl = None if remaining is None or is_expired else min(remaining, MAX_TTL)
            writes.append(Write(key, 0 if known is None else version, known, ttl))
            events.append(Event.of(StateRepaired(key=str(key), lost_version=version, is_known=known is not None)))
    return Commit(writes, [*events, Event.of(StateLogRepaired(damage=len(report.damage)))])


async def read_dumped(
    server: Server, connection: Connection, query: str, position: int
) -> AsyncGenerator[DumpedCommit]:
    """Yield the commits up to a position; `query` is `dump`."""
    rows = list[tuple[Any, ...]]()
    with server.translated():
        async with connection.cursor("dump", binary=True) as cursor:
            cursor.itersize = _ROWS
            await cursor.execute(query, {"position": position})
            async for row in cursor:
                if rows and row[0] != rows[0][0]:
                    (commit,) = to_commits(rows)
                    yield commit
                    rows = []
                rows.append(row)
    for commit in to_commits(rows):
        yield commit


async def read_server(server: Server, connection: Connection, queries: Mapping[str, str]) -> ServerStatistics:
    """Return the state of a server. Without `pg_monitor`, the user sees that there are replicas, but not their lag."""
    settings = await read_settings(server, connection)
    ((connections,),) = await fetch(connection, queries["connections"])
    replicas = [ReplicaStatistics(*row) for row in await fetch(connection, queries["replicas"])]
    problem, remedy = _find_problem(server, settings, replicas)
    return ServerStatistics(
        f"postgresql {settings['name']}",
        connections,
        settings["max_connections"],
        server.pool,
        replicas,
        problem,
        remedy,
    )


def _find_problem(
    server: Server, settings: Mapping[str, Any], replicas: Sequence[ReplicaStatistics]
) -> tuple[str, str]:
    """Return why the server may lose or not accept commits, and the remedy; both are empty if it does neither."""
    try:
        check_settings(server.address, settings)
    except RefusedError as error:
        return error.message, error.remedy
    are_visible = all(one.lag_bytes is not None for one in replicas)
    if settings["standbys"] and are_visible and not any(one.is_synchronous for one in replicas):
        names = f"`synchronous_standby_names = {settings['standbys']}`"
        return f"durable commits wait for a standby of {names}: none is connected", "start it, or change the setting"
    return "", ""
