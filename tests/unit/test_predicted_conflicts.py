"""The choice of the sessions that are merged to predict conflicts."""

from __future__ import annotations

import pytest

from orchestrator.domain.sessions.predicted_conflicts import ChangedPaths


def changes(present: str = "", removed: str = "") -> ChangedPaths:
    """Return changes of the given files."""
    return ChangedPaths(frozenset(present.split()), frozenset(removed.split()))


@pytest.mark.parametrize(
    ("before", "after", "new", "are_edits", "causes"),
    [
        pytest.param(changes("a"), changes("a b"), "b", True, changes("b"), id="edit"),
        pytest.param(changes("a", "r"), changes("a b", "r"), "b", True, changes("b"), id="edit after a removal"),
        pytest.param(changes("a"), changes("a b"), "b", False, changes("b"), id="new file"),
        pytest.param(changes("a", "r"), changes("a b", "r"), "b", False, changes("a b", "r"), id="perhaps renamed"),
        pytest.param(changes("a"), changes("a", "r"), "r", False, changes("a r", "r"), id="removal"),
        pytest.param(changes("a", "r"), changes("a"), "r", False, changes("a r", "r"), id="removal undone"),
    ],
)
def test_causes_of_new_changes_include_possible_renames(
    before: ChangedPaths, after: ChangedPaths, new: str, are_edits: bool, causes: ChangedPaths
) -> None:
    """Of all files, as any of them may be the other name of a file."""
    assert after.select_causes({new}, before, are_edits=are_edits) == causes
