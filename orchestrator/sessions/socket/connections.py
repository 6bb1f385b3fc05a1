"""Background serving and accepting of connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import anyio.abc

_RETRY_INTERVAL: Final = 0.1  # seconds, when no file descriptor is free


@asynccontextmanager
async def run_in_background(serve: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run `serve` during the block, and cancel it at the end.

    An exception of the block is raised as it is, not in a group.
    """
    failed: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        try:
            yield
        except Exception as error:  # noqa: BLE001  raised again below
            failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed


async def accept_connection(listener: anyio.abc.SocketListener) -> anyio.abc.SocketStream:
    """Return the next connection; wait while no descriptor is free, and skip disconnected clients."""
    while True:
        try:
            return await listener.accept()
        except (OSError, anyio.BrokenResourceError):  # anyio raises the second for EMFILE
            await anyio.sleep(_RETRY_INTERVAL)
