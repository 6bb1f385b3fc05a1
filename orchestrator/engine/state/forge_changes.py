"""Notice that a forge has reported a change (`council serve-webhooks`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

import anyio

from orchestrator.domain.events.runs import ForgeChanged
from orchestrator.errors import CouncilError, HistoryCompacted
from orchestrator.protocols import Event, Store
from orchestrator.system.clock import Clock


async def watch_events(store: Store, is_cause: Callable[[Event], bool], wake: Callable[[], None]) -> None:
    """Call `wake` after each commit with such an event, until cancelled or the store is unavailable."""
    while True:
        try:
            async with aclosing(store.watch(await store.position())) as records:
                async for record in records:
                    if any(map(is_cause, record.events)):
                        wake()
        except HistoryCompacted:
            continue
        except (CouncilError, OSError):  # what is read regularly is read anyway
            return


class ForgeChanges:
    """The changes that a forge reports to one run."""

    def __init__(self, store: Store, run: str, clock: Clock) -> None:
        self._store, self._run, self._clock = store, run, clock
        self._reported = anyio.Event()

    async def watch(self) -> None:
        """Notice changes until cancelled."""
        await watch_events(self._store, self._is_change, lambda: self._reported.set())  # noqa: PLW0108  it is replaced

    def _is_change(self, event: Event) -> bool:
        return event.type == ForgeChanged.type and event.data.get("run") == self._run

    async def wait(self, seconds: float) -> None:
        """Wait for a change since the last call, or for a time."""
        await self._clock.wait(self._reported, self._clock.monotonic() + seconds)
        self._reported = anyio.Event()
