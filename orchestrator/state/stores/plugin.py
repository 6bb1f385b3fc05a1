"""Register the built-in stores as a plugin does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Final

import pluggy

from orchestrator.config.store import MEMORY
from orchestrator.errors import RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterStore
from orchestrator.lazy import lazy_names
from orchestrator.protocols import Store, StoreType
from orchestrator.state.stores.file import open_file_store
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import Clock

_server_stores = lazy_names(
    "orchestrator.state.stores", {"postgres.store": ["PostgresStore"], "redis.store": ["RedisStore"]}
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@asynccontextmanager
async def open_memory_store(url: str, clock: Clock, /) -> AsyncIterator[Store]:
    """Open an empty store, whose contents are lost at the end of the block."""
    if url != MEMORY:
        raise RefusedError(f"{url!r} is not the URL of a store", "use `memory:` without a path")
    yield MemoryStore(clock)


def open_server_store(name: str, clients: Collection[str], server: str, extra: str) -> StoreType:
    """Return the type of the stores of class `name`; `clients` are the packages of its extra.

    The server has its own clock.
    """

    @asynccontextmanager
    async def opened(url: str, clock: Clock, /) -> AsyncIterator[Store]:  # noqa: ARG001  (the signature of the protocol)
        try:
            store_class = _server_stores(name)
        except ModuleNotFoundError as error:
            if error.name not in clients:
                raise
            raise RefusedError(
                f"the {server} client is not installed", f"`pip install 'cli-council[{extra}]'`"
            ) from None
        async with store_class.open(url) as store:
            yield store

    return opened


_open_redis_store = open_server_store("RedisStore", {"redis"}, "redis", "redis")

#: The built-in stores by scheme. Other plugins can't take these schemes.
BUILTIN_STORES: Final[Mapping[str, StoreType]] = {
    "file": open_file_store,
    "memory": open_memory_store,
    "postgresql": open_server_store("PostgresStore", {"psycopg", "psycopg_pool"}, "postgresql", "postgres"),
    "redis": _open_redis_store,
    "rediss": _open_redis_store,
}


@hookimpl
def council_register_stores(register: RegisterStore) -> None:
    """Register the schemes of the built-in stores."""
    for scheme, open_store in BUILTIN_STORES.items():
        register(scheme, open_store)
