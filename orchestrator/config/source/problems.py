"""Collect the mistakes of a config file, and format values and suggestions for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from orchestrator.errors import ConfigError, Problem, join_names

# A file of 8 MB can contain millions of mistakes; stop after this many.
_MOST_PROBLEMS: Final = 10_000
# difflib compares with every candidate: with more, a systematic mistake in a large file would take minutes.
_MOST_CANDIDATES: Final = 200
_LONGEST_SHOWN: Final = 60
_MOST_LISTED: Final = 10


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
    """The limit of mistakes is reached; the search stops."""


class Problems:
    """The problems of one file or value, without duplicates."""

    def __init__(self, file: Path | str) -> None:
        self._file = str(file)
        self._problems: dict[Problem, Position] = {}

    def add(self, at: Position, what: str, remedy: str) -> None:
        """Add a problem; raise TooManyProblems if the limit is reached."""
        column = at.column if at.line else 0
        self._problems.setdefault(Problem(self._file, at.line, column, what, remedy, at.path or None), at)
        if len(self._problems) >= _MOST_PROBLEMS:
            raise TooManyProblems

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self._problems)

    def error(self) -> ConfigError:
        """Return all problems as one error, in file order."""
        return ConfigError(sorted(self._problems, key=self._problems.__getitem__))


def quote_text(value: str) -> str:
    """Return text quoted for a message: escaped, and truncated to a readable length."""
    return repr(value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "…")


def describe_value(value: Any) -> str:
    """Return a description of a value in the file."""
    match value:
        case None:
            return "empty"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {quote_text(value)}"
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "a mapping" if value else "an empty mapping"


class KnownWords:
    """The words that are valid in one place; `plural` describes them in messages."""

    def __init__(self, words: Iterable[str], plural: str) -> None:
        self._words = list(words)
        self._folded = {word.casefold(): word for word in self._words}
        self._plural = plural

    def suggest(self, unknown: str) -> str:
        """Return the remedy for an unknown word: the most similar known one, or a list."""
        near = self._folded.get(unknown.casefold())
        if near is None and len(self._words) <= _MOST_CANDIDATES:
            near = next(iter(difflib.get_close_matches(unknown, self._words, n=1)), None)
        if near is not None:
            return f"did you mean {near!r}?"
        if not self._words:
            return f"there are no {self._plural}"
        return f"{self._plural} are {join_names(self._words, _MOST_LISTED)}"
