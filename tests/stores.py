"""Open a store for a test: at a URL, or in a folder without an identity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from orchestrator.protocols import Store
from orchestrator.state.stores.file import SEGMENT_BYTES, FileStore
from orchestrator.state.stores.postgres.store import PostgresStore
from orchestrator.state.stores.redis.store import RedisStore
from orchestrator.system.clock import SystemClock

SERVER_SCHEMES = ("postgresql:", "redis:")


@asynccontextmanager
async def open_store(state: str, *, segment_bytes: int = SEGMENT_BYTES) -> AsyncIterator[Store]:
    """Open the store on a server at a URL, or that in a folder."""
    if state.startswith("postgresql:"):
        async with PostgresStore.open(state) as store:
            yield store
    elif state.startswith("redis:"):
        async with RedisStore.open(state) as store:
            yield store
    else:
        async with FileStore.open(Path(state), SystemClock(), segment_bytes=segment_bytes) as store:
            yield store


async def numbers(store: Store) -> list[int]:
    """Return the numbers in the events of all commits."""
    found = list[int]()
    end = await store.position()
    if end:
        async for record in store.watch():
            found += [event.data["n"] for event in record.events]
            if record.position == end:
                break
    return found
