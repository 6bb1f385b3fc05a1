"""Sessions that probe an adapter after a cooldown."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread

from orchestrator.protocols import SessionEvent, ToolCall, UsageReport
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.system.clock import Clock

#: Seconds between readings of the output of a probe.
POLL_INTERVAL = 1.0


@asynccontextmanager
async def watch_probe(
    follower: OutputFollower, clock: Clock, on_response: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Call `on_response` once, as soon as a session reports a response of its model during the body."""

    async def watch() -> None:
        while not any(map(is_response, await anyio.to_thread.run_sync(follower.read) or ())):
            await clock.wait(anyio.Event(), clock.monotonic() + POLL_INTERVAL)
        await on_response()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        yield
        group.cancel_scope.cancel()


def is_response(event: SessionEvent) -> bool:
    """Return whether only a response of the model causes an event; CLIs print their own errors as messages."""
    return isinstance(event, ToolCall) or (isinstance(event, UsageReport) and event.output_tokens > 0)
