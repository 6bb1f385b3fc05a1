"""Tables drawn with rich.

All text is printable (`text.printable`) and is not parsed as markup.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from orchestrator.cli.render.result import ResultRow, row_lines
from orchestrator.cli.render.table_model import RETRY_LABEL, TableFrame, TaskRow
from orchestrator.cli.render.text import format_line_counts, short_name, truncate_end
from orchestrator.domain.runs.statuses import SUCCESS_STATUSES, TaskStatus

_STYLES: Mapping[str, str] = {
    RETRY_LABEL: "magenta",
    **{text: one.record.style for one in TaskStatus for text in (one.record.label, one.record.activity)},
}
#: The minimum width of the terminal for optional columns.
_MIN_WIDTHS: Mapping[str, int] = {"adapter": 90, "attempt": 72, "lines": 60, "time": 46}
#: The maximum widths of some columns, and N where every column but the last gets at most 1/N of the line.
_MAX_COLUMN_WIDTHS: Mapping[str, int] = {"task": 32, "adapter": 16}
_MAX_COLUMN_SHARE = 3
_GAP = 2
#: Statuses that thousands of tasks may have without a difference, and the maximum rows of each in a result.
_COLLAPSED_STATES = frozenset({"blocked", *(one.record.label for one in (TaskStatus.PENDING, *SUCCESS_STATUSES))})
MAX_ROWS_PER_STATE = 200


def frame_lines(frame: TableFrame, width: int) -> list[list[Segment]]:
    """Return a frame as lines of at most `width` cells, without trailing spaces.

    Does not use rich's tables: for fifty rows they would take longer than the rest of a redraw.
    """
    columns = {name: cells for name, cells in _columns(frame.rows).items() if width >= _MIN_WIDTHS.get(name, 0)}
    *sized, last = columns
    widths = {name: min(_width(name, columns[name]), width // _MAX_COLUMN_SHARE) for name in sized}
    widths[last] = max(width - sum(widths.values()) - _GAP * len(sized), 0)
    drawn = [_line([(name, "dim") for name in columns], widths)] if frame.rows else []
    drawn += [_line(cells, widths) for cells in zip(*columns.values(), strict=True)]
    drawn = [Segment.adjust_line_length(line, width, pad=False) for line in drawn]
    foot = (frame.more, "dim"), (frame.totals, "bold")
    return drawn + [[Segment(truncate_end(text, width), Style.parse(style))] for text, style in foot if text]


_Cell = tuple[str, str]


def _columns(rows: Sequence[TaskRow]) -> dict[str, list[_Cell]]:
    """Return the cells of each column by its heading, as text and style."""
    return {
        "task": [(row.task, "none") for row in rows],
        "phase": [(row.phase or row.activity, _STYLES.get(row.activity) or "dim") for row in rows],
        "adapter": [(row.adapter, "dim") for row in rows],
        "attempt": [(row.attempt, "dim") for row in rows],
        "time": [(row.elapsed, "none") for row in rows],
        "lines": [(format_line_counts(row.changes) if row.changes.files else "", "none") for row in rows],
        "details": [(row.words, "none" if row.activity == "build" else "dim") for row in rows],
    }


def _width(name: str, cells: Sequence[_Cell]) -> int:
    return min(max(cell_len(text) for text, _ in [(name, ""), *cells]), _MAX_COLUMN_WIDTHS.get(name, 99))


def _line(cells: Sequence[_Cell], widths: Mapping[str, int]) -> list[Segment]:
    line: list[Segment] = []
    blanks = 0
    for (text, style), width in zip(cells, widths.values(), strict=True):
        shown = truncate_end(text, width)
        if shown:
            line += [Segment(" " * blanks), Segment(shown, Style.parse(style))]
            blanks = 0
        blanks += width - cell_len(shown) + _GAP
    return line


def count_wrapped_rows(lengths: Sequence[int], width: int) -> int:
    """Return the number of terminal rows of drawn lines after a resize.

    Lengths are in cells.
    """
    return sum(max(math.ceil(length / width), 1) for length in lengths)


def render_result_table(rows: Sequence[ResultRow]) -> str:
    """Return the result of a run as text for a terminal.

    The number of rows per status is limited.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    counts = Counter[str]()
    kept = []
    for row in rows:
        counts[row.status] += row.status in _COLLAPSED_STATES
        if counts[row.status] <= MAX_ROWS_PER_STATE:
            kept.append(row)
    drawn = Text()
    for row, (first, *others) in row_lines(kept):
        head = Text(first)
        at = first.index(row.status, len(short_name(row.task)) + 2)
        head.stylize(_STYLES.get(row.status, ""), at, at + len(row.status))
        steps = {f"    {step}" for step in row.steps}
        rest = (Text(line, "cyan" if line in steps else "") for line in others)
        drawn.append(Text("\n").join((head, *rest))).append("\n")
    more = ", ".join(
        f"{count - MAX_ROWS_PER_STATE} more {state}" for state, count in counts.items() if count > MAX_ROWS_PER_STATE
    )
    with console.capture() as capture:
        console.print(drawn, end="", soft_wrap=True)
        if more:
            console.print(Text(f"and {more}: `council status | less` shows all"))
    return capture.get()
