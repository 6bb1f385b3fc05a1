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
    """Open an empty store, whose contents are lost at the end of the `async with` block."""
    if url != MEMORY:
        raise RefusedError(f"{url!r} names no store", "use `memory:` without a path")
    yield MemoryStore(clock)


@hookimpl
def council_register_stores(register: RegisterStore) -> None:
    """Register the schemes `file` and `memory`."""
    register("file", open_file_store)
    register("memory", open_memory_store)
