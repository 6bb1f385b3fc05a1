"""Rows of text with their columns under each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.cli.output import plain


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> Iterator[str]:
    """Yield a line for each row, as text that a terminal only shows; rows may end before the last column."""
    shown = [[plain(cell) for cell in row] for row in rows]
    columns = max((len(row) for row in shown), default=0)
    widths = [max((len(row[place]) for row in shown if place < len(row)), default=0) for place in range(columns)]
    for row in shown:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield f"{indent}{'  '.join(cells)}".rstrip()
