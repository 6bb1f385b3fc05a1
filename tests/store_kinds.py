"""The kinds of stores in tests: in memory, in files, and on real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from orchestrator.protocols import Store
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.state.stores.postgres.server import MAINTENANCE_TIMEOUT, TIMEOUT, Connection
from orchestrator.state.stores.postgres.store import PostgresStore
from orchestrator.state.stores.redis.store import RedisStore
from orchestrator.system.clock import Clock
from tests import pooler, postgres_server, redis_server
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

Server = PostgresServer | RedisServer
#: Modules that start servers, by kind of store.
SERVERS: Final[Mapping[str, ModuleType]] = {"postgres": postgres_server, "redis": redis_server}
#: The same, and PostgreSQL behind a pooler.
REACHED: Final[Mapping[str, ModuleType]] = {**SERVERS, "pooled postgres": pooler}
#: Parameters: all kinds. The tests of those on servers take longer.
ALL_KINDS: Final = ("memory", "file", *(pytest.param(kind, marks=pytest.mark.extended) for kind in SERVERS))
#: Parameters: the kinds that several processes can share.
SHARED_KINDS: Final = ("file", "postgres", pytest.param("redis", marks=pytest.mark.extended))


def empty_state(kind: str, folder: Path) -> str:
    """Return the folder or URL of an empty store, for `tests.stores.open_store`."""
    if kind == "file":
        return str(folder)
    url: str = SERVERS[kind].empty_store_url()
    return url


@asynccontextmanager
async def open_kind(kind: str, place: Path, clock: Clock) -> AsyncIterator[Store]:
    """Open the store of a kind and a place, on a clock driven by tests; in memory always an empty one."""
    match kind:
        case "memory":
            yield MemoryStore(clock)
        case "file":
            async with FileStore.open(place, clock) as store:
                yield store
        case "postgres":
            async with open_postgres_store(postgres_server.store_url_at(place), clock) as store:
                yield store
        case _:
            async with RedisStore.open(redis_server.store_url_at(place), clock=clock) as store:
                yield store


@asynccontextmanager
async def open_postgres_store(url: str, clock: Clock) -> AsyncIterator[PostgresStore]:
    """Open a store on a PostgreSQL server, where `clock` replaces the clock of the server.

    Each connection is given the time before it is used.
    """
    async with PostgresStore.open(url) as store:
        server = store._server
        lend = server.connection

        @asynccontextmanager
        async def connection(limit: float = TIMEOUT) -> AsyncIterator[Connection]:
            async with lend(limit) as lent:
                await lent.execute("SELECT set_config('council_test.now', %s, false)", (repr(clock.now()),))
                yield lent

        async with lend(MAINTENANCE_TIMEOUT) as lent:
            await lent.execute(
                server.sql(
                    "CREATE OR REPLACE FUNCTION {schema}.server_time() RETURNS double precision LANGUAGE sql VOLATILE "
                    "AS $$ SELECT current_setting('council_test.now')::double precision $$"
                )
            )
        server.connection = connection  # type: ignore[method-assign]  # of this store alone
        yield store
