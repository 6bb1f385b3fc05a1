"""Detect conflicting updates of a document, and resolve them by a strategy.

Updates are never modified; results may share parts with their values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from operator import attrgetter
from typing import Any, Generic, TypeVar

from orchestrator.errors import RefusedError

KeyT = TypeVar("KeyT", bound=Hashable)
Value = dict[str, Any] | None


class ConflictStrategy(StrEnum):
    """How to resolve conflicting updates."""

    LAST_WRITE_WINS = "last_write_wins"
    FIRST_WRITE_WINS = "first_write_wins"
    MERGE = "merge"  #: merge objects by member, concatenate lists, else keep the first value
    MANUAL = "manual"  #: a user decides


@dataclass(frozen=True, slots=True)
class DocumentUpdate(Generic[KeyT]):
    """A requested new value of a document."""

    key: KeyT
    time: float
    """The time of the request in wall-clock seconds."""
    writer: str
    value: Value
    """The complete document; None deletes it."""
    base: int | None = None
    """The version that the writer had read, 0 if the document did not exist; None: not read."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The resolved value."""

    value: Value


@dataclass(frozen=True, slots=True)
class Unresolved(Generic[KeyT]):
    """Candidates for a manual choice, in order of time."""

    candidates: Sequence[DocumentUpdate[KeyT]]


def parse_strategy(name: str) -> ConflictStrategy:
    """Return the strategy with this name; raise RefusedError if there is none."""
    try:
        return ConflictStrategy(name)
    except ValueError:
        raise RefusedError(f"unknown conflict strategy {name!r}", f"use one of {', '.join(ConflictStrategy)}") from None


def group_by_key(updates: Sequence[DocumentUpdate[KeyT]]) -> dict[KeyT, list[DocumentUpdate[KeyT]]]:
    """Return the updates by key, sorted by time; the sort is stable."""
    grouped: dict[KeyT, list[DocumentUpdate[KeyT]]] = {}
    for update in sorted(updates, key=attrgetter("time")):
        grouped.setdefault(update.key, []).append(update)
    return grouped


def find_competing(updates: Sequence[DocumentUpdate[KeyT]]) -> dict[KeyT, list[DocumentUpdate[KeyT]]]:
    """Return the updates of each key with more than one, sorted by time."""
    return {key: conflicting for key, conflicting in group_by_key(updates).items() if len(conflicting) > 1}


def resolve_updates(
    updates: Sequence[DocumentUpdate[KeyT]], strategy: str = ConflictStrategy.LAST_WRITE_WINS
) -> Resolved | Unresolved[KeyT]:
    """Resolve one or more updates of one key, passed in any order.

    Their times determine the order; updates with equal times keep the given order. Raises RefusedError for an unknown
    strategy.
    """
    chosen = parse_strategy(strategy)
    ordered = sorted(updates, key=attrgetter("time"))
    if chosen is ConflictStrategy.MANUAL:
        return Unresolved(tuple(ordered))
    return Resolved(_CHOICES[chosen]([update.value for update in ordered]))


def merge_values(values: Sequence[Value]) -> Value:
    """Return the merge of all values, in order, with all of their fields.

    Objects are merged by member and lists are concatenated; otherwise, or for different types, the first value is kept.
    A deletion adds nothing: the result is None only if all values are deletions.
    """
    present = [value for value in values if value is not None]
    return reduce(_merge_pair, present) if present else None


def _merge_pair(first: Any, then: Any) -> Any:
    if isinstance(first, dict) and isinstance(then, dict):
        added = {name: _merge_pair(first[name], value) if name in first else value for name, value in then.items()}
        return {**first, **added}
    if isinstance(first, list) and isinstance(then, list):
        return [*first, *then]
    return first


_CHOICES: Mapping[ConflictStrategy, Callable[[Sequence[Value]], Value]] = {
    ConflictStrategy.LAST_WRITE_WINS: lambda values: values[-1],
    ConflictStrategy.FIRST_WRITE_WINS: lambda values: values[0],
    ConflictStrategy.MERGE: merge_values,
}
