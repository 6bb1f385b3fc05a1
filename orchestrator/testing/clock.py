"""A clock that a test drives."""

from __future__ import annotations

import anyio


class ManualClock:
    """Stands still until it is told to advance; both of its times move together."""

    def __init__(self, now: float = 1_000_000_000.0) -> None:
        """Begin at `now` (wall-clock seconds); the monotonic time begins at 0."""
        self._start = now
        self._passed = 0.0
        self._waiting: list[tuple[float, anyio.Event]] = []
        self._more_wait: anyio.Event | None = None

    def now(self) -> float:
        """Wall-clock seconds."""
        return self._start + self._passed

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._passed

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Return once `event` is set or the clock was advanced to `until`, which sets the event."""
        if until is not None:
            self._waiting.append((until, event))
            if self._more_wait is not None:
                self._more_wait.set()
            self._ring()
        await event.wait()

    def advance(self, seconds: float) -> None:
        """Move the time forward and wake whoever waited for it."""
        self._passed += seconds
        self._ring()

    async def wait_until_awaited(self, until: float) -> None:
        """Return once somebody waits for that time of the monotonic clock: only then does it make sense to advance."""
        while until not in (one for one, _ in self._waiting):
            more = self._more_wait = anyio.Event()
            await more.wait()

    def _ring(self) -> None:
        for until, event in self._waiting:
            if until <= self._passed:
                event.set()
        self._waiting = [(until, event) for until, event in self._waiting if until > self._passed]
