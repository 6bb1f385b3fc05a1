"""Serve something while a block runs, and accept the connections of sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import anyio.abc

_REST: Final = 0.1  # seconds until the next try where the machine has no descriptor left


@asynccontextmanager
async def run_in_background(serve: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run `serve` during the block, and cancel it at the end.

    An exception of the block is raised as itself, and not as one of a group.
    """
    failed: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        try:
            yield
        except Exception as error:
            failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed


async def accept_connection(listener: anyio.abc.SocketListener) -> anyio.abc.SocketStream:
    """Return the next connection; waits while no descriptor is left, and passes over clients that have gone already."""
    while True:
        try:
            return await listener.accept()
        except (OSError, anyio.BrokenResourceError):  # anyio makes the second of EMFILE
            await anyio.sleep(_REST)
