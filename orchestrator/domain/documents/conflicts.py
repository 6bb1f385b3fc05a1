"""Several updates of one document: which compete, and what becomes of them by each strategy.

No clock and no I/O here, and no update is changed; what is returned may share parts with their values.
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
    """How updates that compete become one value."""

    LAST_WRITE_WINS = "last_write_wins"
    FIRST_WRITE_WINS = "first_write_wins"
    MERGE = "merge"  #: objects member by member, lists joined, of anything else the first
    MANUAL = "manual"  #: a person decides


@dataclass(frozen=True, slots=True)
class DocumentUpdate(Generic[KeyT]):
    """What somebody wants a document to be."""

    key: KeyT
    time: float
    """When it was made: wall-clock seconds."""
    writer: str
    value: Value
    """The whole document; None deletes it."""
    base: int | None = None
    """The version of the document that the writer had read, 0 if there was none; None: it read none."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The updates became one value."""

    value: Value


@dataclass(frozen=True, slots=True)
class Unresolved(Generic[KeyT]):
    """A person is to choose from the candidates, which are in order of time."""

    candidates: Sequence[DocumentUpdate[KeyT]]


def parse_strategy(name: str) -> ConflictStrategy:
    """Return the strategy of that name. Raises RefusedError, which lists them, where there is none."""
    try:
        return ConflictStrategy(name)
    except ValueError:
        raise RefusedError(
            f"there is no strategy {name!r} for conflicts", f"the known ones are {', '.join(ConflictStrategy)}"
        ) from None


def group_by_key(updates: Sequence[DocumentUpdate[KeyT]]) -> dict[KeyT, list[DocumentUpdate[KeyT]]]:
    """Return the updates of each key, in order of time; those of the same time as they were given."""
    grouped: dict[KeyT, list[DocumentUpdate[KeyT]]] = {}
    for update in sorted(updates, key=attrgetter("time")):
        grouped.setdefault(update.key, []).append(update)
    return grouped


def find_competing(updates: Sequence[DocumentUpdate[KeyT]]) -> dict[KeyT, list[DocumentUpdate[KeyT]]]:
    """Return the updates of each key that has more than one, in order of time."""
    return {key: competing for key, competing in group_by_key(updates).items() if len(competing) > 1}


def resolve_updates(
    updates: Sequence[DocumentUpdate[KeyT]], strategy: str = ConflictStrategy.LAST_WRITE_WINS
) -> Resolved | Unresolved[KeyT]:
    """Return what becomes of updates of one key, at least one, in any order.

    Which is first and which last is said by their times; of the same time the one that was given earlier is first.
    Raises RefusedError for an unknown strategy.
    """
    chosen = parse_strategy(strategy)
    ordered = sorted(updates, key=attrgetter("time"))
    if chosen is ConflictStrategy.MANUAL:
        return Unresolved(tuple(ordered))
    return Resolved(_CHOICES[chosen]([update.value for update in ordered]))


def merge_values(values: Sequence[Value]) -> Value:
    """Return all values as one, the first of them first: every field of each is in it.

    Objects are merged member by member and lists joined; where values are neither, or not of one kind, the first
    stays. A deletion has no fields and adds nothing: only where all delete is there nothing.
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
