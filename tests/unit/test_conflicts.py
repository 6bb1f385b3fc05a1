"""Conflicting updates of one document, by examples."""

from __future__ import annotations

import pytest

from orchestrator.domain.documents.conflicts import (
    ConflictStrategy,
    DocumentUpdate,
    Resolved,
    find_competing,
    resolve_updates,
)
from orchestrator.errors import RefusedError

EARLY = DocumentUpdate("x", 1.0, "ada", {"n": 1, "tags": ["a"], "in": {"ada": 1, "n": 1}, "odd": [1]})
LATE = DocumentUpdate("x", 2.0, "bob", {"n": 2, "tags": ["b"], "in": {"bob": 2, "n": 2}, "odd": 5, "new": None})
GONE = DocumentUpdate("x", 3.0, "cleo", None)


@pytest.mark.parametrize(
    ("strategy", "value"),
    [
        ("last_write_wins", LATE.value),
        ("first_write_wins", EARLY.value),
        (
            "merge",
            {"n": 1, "tags": ["a", "b"], "in": {"ada": 1, "n": 1, "bob": 2}, "odd": [1], "new": None},
        ),
    ],
)
def test_each_strategy_has_the_expected_result(strategy: str, value: object) -> None:
    assert resolve_updates([LATE, EARLY], strategy) == Resolved(value)  # type: ignore[arg-type]  # it is one


def test_deletion_wins_or_adds_nothing() -> None:
    """A deletion competes like any update, and contributes nothing to a merge."""
    assert resolve_updates([GONE, LATE]) == Resolved(None)
    assert resolve_updates([GONE, LATE], ConflictStrategy.FIRST_WRITE_WINS) == Resolved(LATE.value)
    assert resolve_updates([GONE, LATE], ConflictStrategy.MERGE) == Resolved(LATE.value)
    assert resolve_updates([GONE, GONE], ConflictStrategy.MERGE) == Resolved(None)


def test_updates_of_equal_time_are_ordered() -> None:
    """Of equal times, the later argument is later."""
    one, two = DocumentUpdate("x", 1.0, "ada", {"n": 1}), DocumentUpdate("x", 1.0, "bob", {"n": 2})
    assert (
        resolve_updates([one, two])
        == resolve_updates([two, one], ConflictStrategy.FIRST_WRITE_WINS)
        == Resolved({"n": 2})
    )
    assert (
        resolve_updates([two, one])
        == resolve_updates([one, two], ConflictStrategy.FIRST_WRITE_WINS)
        == Resolved({"n": 1})
    )


def test_only_keys_with_several_updates_compete() -> None:
    """A single update is not a conflict."""
    other = DocumentUpdate("y", 1.0, "ada", {})
    assert find_competing([LATE, other, EARLY]) == {"x": [EARLY, LATE]}


def test_unknown_strategy_names_the_known_ones() -> None:
    """The error names the mistake and the valid strategies."""
    with pytest.raises(RefusedError) as caught:
        resolve_updates([EARLY], "newest")
    assert str(caught.value) == (
        "unknown conflict strategy 'newest': use one of last_write_wins, first_write_wins, merge, manual"
    )
