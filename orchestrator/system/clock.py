"""Where the time comes from: one protocol, so that a test can drive hours in milliseconds."""

from __future__ import annotations

import math
import time
from typing import Protocol

import anyio


class Clock(Protocol):
    """A source of time and of waiting; `testing.clock.ManualClock` is the one that tests drive."""

    def now(self) -> float:
        """Wall-clock time in seconds since the epoch, for records; it may jump."""

    def monotonic(self) -> float:
        """Seconds that never go backwards, for durations and deadlines within one process."""

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Return once `event` is set or `monotonic()` has reached `until` (seconds; None: never)."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """The event loop's clock."""
        return anyio.current_time()

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Wait on the event loop."""
        with anyio.CancelScope(deadline=math.inf if until is None else until):
            await event.wait()
