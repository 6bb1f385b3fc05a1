"""Clocks with a common protocol, so that tests can simulate hours in milliseconds."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Protocol

import anyio


class Clock(Protocol):
    """A source of time that can be waited on. Tests use `testing.clock.ManualClock`."""

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch, for records. It may jump."""

    def monotonic(self) -> float:
        """Return monotonic seconds, for durations and deadlines within a process."""

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Wait until `event` is set or `monotonic()` reaches `until` (None: never)."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        """Return the seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return the event loop's time."""
        return anyio.current_time()

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Wait on the event loop."""
        with anyio.CancelScope(deadline=math.inf if until is None else until):
            await event.wait()


def format_local_time(instant: float) -> str:
    """Format a point in time (seconds since the epoch) in the local time zone."""
    return f"{datetime.fromtimestamp(instant, UTC).astimezone():%Y-%m-%d %H:%M:%S}"
