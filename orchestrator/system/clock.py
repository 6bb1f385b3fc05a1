"""Clocks with one protocol, so that a test can simulate hours in milliseconds."""

from __future__ import annotations

import math
import time
from typing import Protocol

import anyio


class Clock(Protocol):
    """A source of time and of waiting; tests use `testing.clock.ManualClock`."""

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch, for records; it may jump."""

    def monotonic(self) -> float:
        """Return seconds that never go backwards, for durations and deadlines within a process."""

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Wait until `event` is set or `monotonic()` reaches `until` (seconds; None: never)."""


class SystemClock:
    """The clocks of the machine."""

    def now(self) -> float:
        """Return the seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return the time of the event loop."""
        return anyio.current_time()

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Wait on the event loop."""
        with anyio.CancelScope(deadline=math.inf if until is None else until):
            await event.wait()
