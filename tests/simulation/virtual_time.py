"""An event loop whose time jumps to the next timer: hours in milliseconds, deterministic per seed."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualDeadlock(BaseException):
    """All tasks wait for each other."""


class _Jumping(selectors.SelectSelector):
    """A selector without files that advances the time."""

    def __init__(self, passes: Callable[[float], None]) -> None:
        super().__init__()
        self._passes = passes

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Advance the time by `timeout` seconds."""
        if timeout is None:
            raise VirtualDeadlock
        if timeout > 0:
            self._passes(timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop without threads and files; its time starts at 0."""

    def __init__(self) -> None:
        self._passed = 0.0
        super().__init__(_Jumping(self._pass))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Return virtual seconds."""
        return self._passed

    def _pass(self, seconds: float) -> None:
        self._passed += max(seconds, 1e-9)


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time."""
    loop = VirtualTimeLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()
