"""A manual clock for tests."""

from __future__ import annotations

import anyio


class ManualClock:
    """A clock that only `advance` moves. Wall-clock and monotonic time move together."""

    def __init__(self, now: float = 1_000_000_000.0) -> None:
        """Start at `now` (wall-clock seconds); the monotonic time starts at 0."""
        self._start = now
        self._passed = 0.0
        self._waiting: list[tuple[float, anyio.Event]] = []
        self._more_wait: anyio.Event | None = None

    def now(self) -> float:
        """Return the time in wall-clock seconds."""
        return self._start + self._passed

    def monotonic(self) -> float:
        """Return the seconds since the clock was created."""
        return self._passed

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Wait for `event`, which is set when the clock reaches `until` (seconds)."""
        if until is not None:
            self._waiting.append((until, event))
            if self._more_wait is not None:
                self._more_wait.set()
            self._ring()
        await event.wait()

    def advance(self, seconds: float) -> None:
        """Advance the time and wake the waiters whose deadline has passed."""
        self._passed += seconds
        self._ring()

    async def wait_until_awaited(self, until: float) -> None:
        """Wait until a task waits for this monotonic time, so that `advance` can wake it."""
        while until not in (deadline for deadline, _ in self._waiting):
            more = self._more_wait = anyio.Event()
            await more.wait()

    def _ring(self) -> None:
        for until, event in self._waiting:
            if until <= self._passed:
                event.set()
        self._waiting = [(until, event) for until, event in self._waiting if until > self._passed]
