"""Progress of an active run: lines of events, or a table on a terminal."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from orchestrator.api.council import Council
from orchestrator.protocols import CommitRecord


class DisplayProgress:
    """The position of the log up to which a run has been shown."""

    def __init__(self) -> None:
        self._shown, self._moved = 0, anyio.Event()

    async def reach(self, position: int) -> None:
        """Wait until all events up to a position of the log are shown."""
        while self._shown < position:
            await self._moved.wait()

    async def follow(self, council: Council, after: int, take: Callable[[CommitRecord], None]) -> None:
        """Hand over each record behind a position, as it comes."""
        self._advance(after)
        async for record in council.history.follow(after):
            take(record)
            self._advance(record.position)

    def _advance(self, position: int) -> None:
        self._shown = position
        self._moved.set()
        self._moved = anyio.Event()
