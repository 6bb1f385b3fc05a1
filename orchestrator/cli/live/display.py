"""Show a run while it is active: as lines of events, or as a table on a terminal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from orchestrator.api.council import Council
from orchestrator.cli.live.progress import DisplayProgress
from orchestrator.cli.render.output import Output
from orchestrator.protocols import CommitRecord


@asynccontextmanager
async def show_progress(council: Council, run: str, output: Output, after: int) -> AsyncIterator[DisplayProgress]:
    """Show the events of a run after a position of the log, for the body of the `async with`."""
    progress = DisplayProgress()
    async with anyio.create_task_group() as group:
        if output.can_draw_tables:
            from orchestrator.cli.live.table import LiveTable  # noqa: PLC0415  rich takes its time

            group.start_soon(LiveTable(council, run, output).show, progress, after)
        else:

            def take(record: CommitRecord) -> None:
                for event in record.events:
                    if event.data.get("run") == run:
                        output.event(record.time, event)

            group.start_soon(progress.follow, council, after, take)
        yield progress
        group.cancel_scope.cancel()
