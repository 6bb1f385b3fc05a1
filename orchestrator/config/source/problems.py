"""The mistakes of one file, gathered until all are known, and the words that tell of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from orchestrator.errors import ConfigError, Problem

# A file of eight megabytes can hold millions of mistakes; nobody reads on after this many.
_MOST_PROBLEMS: Final = 10_000
# difflib compares with every candidate: among more than these, a systematic slip in a large file would take minutes.
_MOST_CANDIDATES: Final = 200
_LONGEST_SHOWN: Final = 60
_MOST_LISTED: Final = 10


class Position(NamedTuple):
    """A place in the file; lines and columns count from 1.

    In a value that comes from no file the line is 0, `path` leads to the place, and `column` orders the places.
    """

    line: int
    column: int
    path: str = ""

    def __str__(self) -> str:
        """Return the place as a sentence names it."""
        return f"on line {self.line}" if self.line else f"at {self.path}"


class TooManyProblems(Exception):
    """The search for mistakes was given up; those that were found are told."""


class Problems:
    """What is wrong with one file or value. A problem that is found twice in the same words counts once."""

    def __init__(self, file: Path | str) -> None:
        self._file = str(file)
        self._found: dict[Problem, Position] = {}

    def add(self, at: Position, what: str, remedy: str) -> None:
        """Note a mistake; TooManyProblems if that makes it senseless to look for more."""
        column = at.column if at.line else 0
        self._found.setdefault(Problem(self._file, at.line, column, what, remedy, at.path or None), at)
        if len(self._found) >= _MOST_PROBLEMS:
            raise TooManyProblems

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._found)

    def error(self) -> ConfigError:
        """Return them all as one error, in the file's order."""
        return ConfigError(sorted(self._found, key=self._found.__getitem__))


def quote_text(value: str) -> str:
    """Return text as it is quoted in a message: escaped and cut to a readable length."""
    return repr(value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "…")


def join_names(names: Sequence[str], most: int = 5) -> str:
    """Return some of the names, and how many there are beside."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def describe_value(value: Any) -> str:
    """Return what a value of the file is, in words."""
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
    """The words that are known in one place; `plural` is what they are called together."""

    def __init__(self, words: Iterable[str], plural: str) -> None:
        self._words = list(words)
        self._folded = {word.casefold(): word for word in self._words}
        self._plural = plural

    def suggest(self, unknown: str) -> str:
        """Return the remedy for a word that is not among them: the nearest one, or what there is."""
        near = self._folded.get(unknown.casefold())
        if near is None and len(self._words) <= _MOST_CANDIDATES:
            near = next(iter(difflib.get_close_matches(unknown, self._words, n=1)), None)
        if near is not None:
            return f"did you mean {near!r}?"
        if not self._words:
            return f"there are no {self._plural}"
        rest = len(self._words) - _MOST_LISTED
        return f"{self._plural} are {', '.join(self._words[:_MOST_LISTED])}" + (f" and {rest} more" if rest > 0 else "")
