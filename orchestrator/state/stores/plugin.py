"""Register the built-in stores as a plugin does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pluggy

from orchestrator.config.store import MEMORY
from orchestrator.errors import RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterStore
from orchestrator.protocols import Store
from orchestrator.state.stores.file import open_file_store
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import Clock

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@asynccontextmanager
async def open_memory_store(url: str, clock: Clock, /) -> AsyncIterator[Store]:
    """Open an empty store, whose contents are lost at the end of the block."""
    if url != MEMORY:
        raise RefusedError(f"{url!r} names no store", "use `memory:` without a path")
    yield MemoryStore(clock)


@asynccontextmanager
async def open_redis_store(url: str, clock: Clock, /) -> AsyncIterator[Store]:  # noqa: ARG001  (the signature of the protocol)
    """Open the store on a Redis or Valkey server, which has its own clock."""
    try:
        from orchestrator.state.stores.redis.store import RedisStore  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise RefusedError("the redis client is not installed", "`pip install 'cli-council[redis]'`") from None
    async with RedisStore.open(url) as store:
        yield store


@asynccontextmanager
async def open_postgres_store(url: str, clock: Clock, /) -> AsyncIterator[Store]:  # noqa: ARG001  (the signature of the protocol)
    """Open the store on a PostgreSQL server, which has its own clock."""
    try:
        from orchestrator.state.stores.postgres.store import PostgresStore  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        if error.name not in {"psycopg", "psycopg_pool"}:
            raise
        raise RefusedError("the postgresql client is not installed", "`pip install 'cli-council[postgres]'`") from None
    async with PostgresStore.open(url) as store:
        yield store


@hookimpl
def council_register_stores(register: RegisterStore) -> None:
    """Register the schemes of the built-in stores."""
    register("file", open_file_store)
    register("memory", open_memory_store)
    register("postgresql", open_postgres_store)
    register("redis", open_redis_store)
    register("rediss", open_redis_store)
