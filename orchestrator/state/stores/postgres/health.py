"""The state of the server: its connections, its replicas, and unsuitable settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import RefusedError
from orchestrator.protocols import ReplicaStatistics, ServerStatistics
from orchestrator.state.stores.postgres.schema import check_settings, read_settings
from orchestrator.state.stores.postgres.server import Connection, Server, fetch


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
