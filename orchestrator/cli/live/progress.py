"""What a person or a program sees of a run while it is at work: lines of events, or a table on a terminal."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from orchestrator.api.council import Council
from orchestrator.protocols import CommitRecord


class DisplayProgress:
    """Knows up to which position of the log a run has been shown."""

    def __init__(self) -> None:
        self._shown, self._moved = 0, anyio.Event()

    async def reach(self, position: int) -> None:
        """Wait until all is shown up to a position of the log."""
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
