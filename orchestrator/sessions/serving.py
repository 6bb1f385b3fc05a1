"""Serve something while a block runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio


@asynccontextmanager
async def serving(serve: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run `serve` during the block, and cancel it at the end.

    An exception of the block is raised as itself, and not as one of a group.
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
