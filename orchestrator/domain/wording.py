"""Values, lists of names, and suggestions, as parts of messages."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any, Final

from orchestrator import lazy

# Each unknown name is compared with all names: with more, a systematic error in a large file would take minutes.
_MOST_CANDIDATES: Final = 200
_MOST_FOLDED: Final = 5_000
_LONGEST_SHOWN: Final = 60
_MOST_LISTED: Final = 10


def quote_text(value: str) -> str:
    """Return text quoted for a message: escaped, and truncated to a readable length."""
    return repr(value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "…")


def join_names(names: Collection[str], limit: int = 5, separator: str = ", ") -> str:
    """Return the first names, and the number of remaining names."""
    rest = len(names) - limit
    return separator.join(islice(names, limit)) + (f" and {rest} more" if rest > 0 else "")


def format_cost(cost: float) -> str:
    """Return an amount of US dollars with two decimals, or four if it has fractions of a cent."""
    return f"${cost:.4f}".removesuffix("00")


def find_similar(unknown: str, names: Collection[str], limit: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return likely meanings of an unknown name: another case, or similar names."""
    same = [name for name in names if name.casefold() == unknown.casefold()] if len(names) <= _MOST_FOLDED else []
    if same or len(names) > _MOST_CANDIDATES:
        return same[:limit]
    return lazy.difflib.get_close_matches(unknown, names, n=limit, cutoff=cutoff)


def suggest_similar(unknown: str, names: Collection[str], limit: int = 1) -> str | None:
    """Return a "did you mean" remedy with similar names; None if there are none."""
    similar = find_similar(unknown, names, limit)
    return f"did you mean {' or '.join(map(repr, similar))}?" if similar else None


def suggest(unknown: str, known: Collection[str], plural: str) -> str:
    """Return the remedy for an unknown name: similar names, or a list of known ones.

    The list is called `plural`.
    """
    if not known:
        return f"there are no {plural}"
    return suggest_similar(unknown, known) or f"{plural} are {join_names(known, _MOST_LISTED)}"


def describe_value(value: Any) -> str:
    """Return a description of a value in a file."""
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
