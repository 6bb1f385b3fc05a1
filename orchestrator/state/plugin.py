"""The stores that come with the package, registered as a plugin's would be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pluggy

from orchestrator.clock import Clock
from orchestrator.errors import RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterStore
from orchestrator.protocols import Store
from orchestrator.state.file import FileStore
from orchestrator.state.memory import MemoryStore

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


def open_file_store(url: str, clock: Clock, /) -> AbstractAsyncContextManager[Store]:
    """Open the store in the folder that a `file:` URL names (RFC 8089); RefusedError if it names another machine's."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in {"", "localhost"} or not path.startswith("/"):
        raise RefusedError(f"{url!r} names no folder of this machine", "write file:///an/absolute/path")
    return FileStore.open(Path(path), clock)


@asynccontextmanager
async def open_memory_store(url: str, clock: Clock, /) -> AsyncIterator[Store]:
    """Make an empty store that is gone at the end of the `async with`."""
    if url != "memory:":
        raise RefusedError(f"{url!r} names no store", "write memory: and nothing behind it")
    yield MemoryStore(clock)


@hookimpl
def council_register_stores(register: RegisterStore) -> None:
    """Register the schemes `file` and `memory`."""
    register("file", open_file_store)
    register("memory", open_memory_store)
