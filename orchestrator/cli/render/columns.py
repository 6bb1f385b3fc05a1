"""Text in columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len, set_cell_size

from orchestrator.cli.render.text import printable

COLUMNS = 80
"""The maximum width of a line in terminal cells, except for longer words such as commands and paths."""
#: The maximum width of a name in a table.
_LONGEST_NAME = 24
#: Words that are never broken; a command in backticks is one word.
_WORDS = re.compile(r"[^\s`]*`[^`]*`\S*|\S+")


def short_name(name: str) -> str:
    """Return a name for a table, shortened in the middle if it is long. Not for commands."""
    if _width(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{set_cell_size(name, half).rstrip()}…{set_cell_size(name[::-1], half - 1).rstrip()[::-1]}"


def _width(text: str) -> int:
    """Return the number of cells of printable text."""
    return len(text) if text.isascii() else cell_len(text)  # most text is ASCII, which needs no table


def wrapped(text: str, *, head: str = "", indent: str = "") -> Iterator[str]:
    """Break text into lines between words, the first behind `head`, the others indented.

    No path and no command in backticks is divided.
    """
    words = _WORDS.findall(text)
    whole = head + " ".join(words)
    if _width(whole) <= COLUMNS:
        words, head = [], whole
    line, gap = head, ""
    for word in words:
        if line and _width(f"{line}{gap}{word}") > COLUMNS:
            yield line.rstrip()
            line, gap = indent, ""
        line, gap = f"{line}{gap}{word}", " "
    if line:
        yield line.rstrip()


def described(rows: Sequence[Sequence[str]], indent: str = "") -> Iterator[str]:
    """Yield rows in columns; the last column is prose and wraps."""
    heads = align_columns([[*row[:-1], "|"] for row in rows], indent)
    for row, head in zip(rows, heads, strict=True):
        yield from wrapped(printable(row[-1]), head=head.removesuffix("|"), indent=f"{indent}    ")


def align_columns(rows: Sequence[Sequence[str]], indent: str = "") -> Iterator[str]:
    """Yield a printable line for each row; rows may have fewer columns."""
    shown = [[printable(cell) for cell in row] for row in rows]
    columns = max((len(row) for row in shown), default=0)
    widths = [max((len(row[place]) for row in shown if place < len(row)), default=0) for place in range(columns)]
    for row in shown:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield f"{indent}{'  '.join(cells)}".rstrip()
