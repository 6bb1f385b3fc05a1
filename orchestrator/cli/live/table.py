"""The live table of a run. Reads only stored state, so any process can show it."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import anyio
import anyio.to_thread
from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlCode, ControlType, Segment, SegmentLines
from rich.text import Text

from orchestrator.api.council import Council
from orchestrator.cli.live.model import LiveRun
from orchestrator.cli.render.events import event_line, is_shown
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.result import adapter_line, live_enable_command
from orchestrator.cli.render.rich_tables import count_wrapped_rows, frame_lines
from orchestrator.cli.render.table_model import TableFrame
from orchestrator.cli.streams import redirect_to_null
from orchestrator.domain.runs.model import AdapterDocument
from orchestrator.engine.reports.report import AdapterReport
from orchestrator.protocols import CommitRecord

#: Seconds between two redraws; an unchanged table is not drawn again.
_REFRESH_INTERVAL = 0.25
#: Lines that are not available for rows: the header, the totals, and one for the cursor.
_RESERVED_LINES = 3


class LiveTable:
    """A table of a run at the bottom of the terminal, with important events above it."""

    def __init__(self, council: Council, run: str, output: Output) -> None:
        self._council, self._run, self._output = council, run, output
        self._above: deque[str] = deque()

    async def show(self, follow: Callable[[Callable[[CommitRecord], None]], Awaitable[None]]) -> None:
        """Show the run until cancelled, then remove the table.

        `follow` supplies its commits.
        """
        activity = await self._council.sessions.activity(self._run)
        view = LiveRun(activity.record, activity.attempts)
        self._above.extend(_unavailable_adapters(activity.record.adapters, self._run))

        def take(record: CommitRecord) -> None:
            if record.position > activity.position:
                view.apply(record)
            for event in record.events:
                if event.data.get("run") == self._run and is_shown(event, above_table=True):
                    self._above.append(event_line(record.time, event))

        screen, self._output.print_above_table = _Screen(), self._above.append
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(activity.show, view.activity)
                group.start_soon(self._draw, view, screen)
                await follow(take)
        finally:
            self._output.print_above_table = None
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(screen.leave, self._taken())

    async def _draw(self, view: LiveRun, screen: _Screen) -> None:
        while True:
            frame = view.frame(time.time(), max(screen.height - _RESERVED_LINES, 0))
            # In a thread: a user who pauses the terminal's output (Ctrl-S) must not block the run.
            await anyio.to_thread.run_sync(screen.draw, frame, self._taken())
            await anyio.sleep(_REFRESH_INTERVAL)

    def _taken(self) -> list[str]:
        taken = list(self._above)
        self._above.clear()
        return taken


def _unavailable_adapters(learned: Mapping[str, AdapterDocument], run: str) -> Iterator[str]:
    """Yield a line for each adapter that was unavailable from the start."""
    for name, one in learned.items():
        if one.disabled_reason is not None or one.is_cooling_down(time.time()):
            yield adapter_line(
                AdapterReport(name, one.cooldown_until, one.disabled_reason), live_enable_command(name, run)
            )


class _Screen:
    """The terminal that standard output is connected to. Not thread-safe."""

    def __init__(self) -> None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True,
                          redirect_stdout=False, redirect_stderr=False)  # fmt: skip
        self._drawn: tuple[TableFrame, int, int] | None = None
        self._lengths: Sequence[int] = ()
        self._has_hung_up = False

    @property
    def height(self) -> int:
        """The current number of lines."""
        return self._console.height

    def draw(self, frame: TableFrame, above: Sequence[str]) -> None:
        """Print lines above the table, and redraw the table if it has changed. Blocks."""
        width, height = self._console.size
        drawn = (frame, width, height)
        if self._has_hung_up or (drawn == self._drawn and not above):
            return
        try:
            self._live.start()
            if self._drawn is not None and width < self._drawn[1]:
                self._clear_wrapped_rows(width)
            self._print(above)
            lines = frame_lines(frame, width)[-height:]
            self._live.update(SegmentLines(lines, new_lines=True), refresh=True)
        except OSError:
            self._hang_up()
        else:
            self._drawn, self._lengths = drawn, [Segment.get_line_length(line) for line in lines]

    def leave(self, above: Sequence[str]) -> None:
        """Remove the table, and print the remaining lines. Blocks."""
        if self._has_hung_up:
            return
        try:
            if self._drawn is not None:
                self._clear_wrapped_rows(self._console.width)
                self._live.stop()
            self._print(above)
        except OSError:
            self._hang_up()

    def _print(self, lines: Sequence[str]) -> None:
        if lines:
            self._console.print(Text("\n".join(lines)), soft_wrap=True)

    def _clear_wrapped_rows(self, width: int) -> None:
        """Clear the rows that wrapped when the terminal became narrower."""
        rows, drawn = count_wrapped_rows(self._lengths, width), len(self._lengths)
        if rows == drawn:
            return
        clear: list[ControlCode] = [(ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)]
        for _ in range(rows - 1):
            clear += [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)]
        if drawn > 1:
            clear.append((ControlType.CURSOR_DOWN, drawn - 1))
        self._console.control(Control(*clear))

    def _hang_up(self) -> None:
        self._has_hung_up = True
        redirect_to_null(sys.stdout)
