"""The progress of an active run, as event lines or as a live table on a terminal."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio

from orchestrator.api.council import Council
from orchestrator.cli.render.output import Output
from orchestrator.protocols import CommitRecord


@asynccontextmanager
async def show_progress(council: Council, run: str, output: Output, after: int) -> AsyncIterator[DisplayProgress]:
    """Show a run's events after a log position until the context ends."""
    progress = DisplayProgress()
    async with anyio.create_task_group() as group:
        if output.can_draw_tables:
            from orchestrator.cli.live.table import LiveTable  # noqa: PLC0415  rich is slow to import

            group.start_soon(LiveTable(council, run, output).show, partial(progress.follow, council, after))
        else:

            def take(record: CommitRecord) -> None:
                for event in record.events:
                    if event.data.get("run") == run:
                        output.event(record.time, event)

            group.start_soon(progress.follow, council, after, take)
        yield progress
        group.cancel_scope.cancel()


class DisplayProgress:
    """The log position up to which events have been shown."""

    def __init__(self) -> None:
        self._shown, self._moved = 0, anyio.Event()

    async def reach(self, position: int) -> None:
        """Wait until all events up to a log position are shown."""
        while self._shown < position:
            await self._moved.wait()

    async def follow(self, council: Council, after: int, take: Callable[[CommitRecord], None]) -> None:
        """Pass each commit after a log position to `take`, live; never returns."""
        self._advance(after)
        async for record in council.history.follow(after):
            take(record)
            self._advance(record.position)

    def _advance(self, position: int) -> None:
        self._shown = position
        self._moved.set()
        self._moved = anyio.Event()
