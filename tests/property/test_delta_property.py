"""A delta converts one version into the other and back."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.documents.delta import compute_delta, format_delta
from tests.deltas import apply_delta, revert_delta

#: The duration of an example has no meaning on a busy machine.

# Few names and values, so that versions overlap; with pairs that Python considers equal.
NAMES = st.sampled_from(["a", "b", "c.d", ""])
SCALARS = st.sampled_from([None, True, False, 0, 1, 1.0, 0.0, -0.0, "", "1", "ü\n\u2028"])
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=3)
        | st.lists(st.dictionaries(NAMES, inner, max_size=2), max_size=3)
    ),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(NAMES, JSON, max_size=4)


def text(value: Any) -> str:
    """Return a text that is equal for equal JSON only."""
    return json.dumps(value, sort_keys=True)


@given(DOCUMENTS, DOCUMENTS)
def test_delta_applies_forward_and_backward(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Applying gives the new version, reverting the old; no input is changed."""
    before = text([old, new])
    delta = compute_delta(old, new)
    assert text(apply_delta(old, delta)) == text(new)
    assert text(revert_delta(new, delta)) == text(old)
    assert text([old, new]) == before


@given(DOCUMENTS, DOCUMENTS)
def test_delta_has_one_line_per_change(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Equal versions have an empty delta, and no path is equal to or below another."""
    delta = compute_delta(old, new)
    paths = [*delta.added, *delta.modified, *delta.removed]
    reported = format_delta(delta)
    assert len(reported) == len(paths) == len(set(paths))
    assert all(len(line.splitlines()) == 1 for line in reported)
    assert (paths == []) == (text(old) == text(new))
    assert not any(one != other and other[: len(one)] == one for one in paths for other in paths)
    assert all(text(one.old) != text(one.new) for one in delta.modified.values())
