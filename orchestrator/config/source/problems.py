"""Collect the errors in a config file."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from orchestrator.errors import ConfigError, Problem

# A file of 8 MB can contain millions of errors; stop after this many.
_MOST_PROBLEMS: Final = 10_000
#: The file name in problems of values that no file has, such as those of options.
INLINE_NAME: Final = "<run>"


class Position(NamedTuple):
    """A position in a file; lines and columns count from 1.

    For a value without a file, the line is 0, `path` is the location, and `column` is the sort order.
    """

    line: int
    column: int
    path: str = ""

    def __str__(self) -> str:
        """Return the position as part of a sentence."""
        return f"on line {self.line}" if self.line else f"at {self.path}"


class TooManyProblems(Exception):
    """The limit of reported problems is reached, and the search stops."""


class Problems:
    """The problems in one file or value, without duplicates."""

    def __init__(self, file: Path | str) -> None:
        self._file = file
        self._problems: dict[Problem, Position] = {}

    def add(self, at: Position, message: str, remedy: str) -> None:
        """Add a problem; raise TooManyProblems if the limit is reached."""
        is_inline = not at.line and isinstance(self._file, Path)
        file = INLINE_NAME if is_inline else str(self._file)
        column = at.column if at.line else 0
        self._problems.setdefault(Problem(file, at.line, column, message, remedy, at.path or None), at)
        if len(self._problems) >= _MOST_PROBLEMS:
            raise TooManyProblems

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self._problems)

    def error(self) -> ConfigError:
        """Return all problems as one error, in file order."""
        return ConfigError(sorted(self._problems, key=self._problems.__getitem__))
