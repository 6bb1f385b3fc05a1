"""Deltas between two versions of a document, by examples."""

from __future__ import annotations

from orchestrator.domain.documents.delta import (
    Delta,
    Modified,
    compute_delta,
    delta_to_json,
    format_delta,
)
from tests.deltas import apply_delta, revert_delta

OLD = {
    "status": "running",
    "reason": None,
    "paths": ["a"],
    "attempts": [{"number": 1, "ended": None}],
    "limits": {"time": 60, "no.such": 1},
}
NEW = {
    "status": "landed",
    "paths": ["a", "b"],
    "attempts": [{"number": 1, "ended": 2.5}, {"number": 2}],
    "limits": {"time": 60.0},
    "landed": {"commit": "c0ffee"},
}


def test_delta_has_added_modified_and_removed_fields() -> None:
    """Paths lead into objects and lists of objects; other lists and new values count as one value."""
    assert compute_delta(OLD, NEW) == Delta(
        added={("attempts", 1): {"number": 2}, ("landed",): {"commit": "c0ffee"}},
        modified={
            ("status",): Modified("running", "landed"),
            ("paths",): Modified(["a"], ["a", "b"]),
            ("attempts", 0, "ended"): Modified(None, 2.5),
            ("limits", "time"): Modified(60, 60.0),
        },
        removed={("reason",): None, ("limits", "no.such"): 1},
    )


def test_line_describes_a_change() -> None:
    """In path order; null is a value, an absent field is none."""
    assert format_delta(compute_delta(OLD, NEW)) == [
        "attempts[0].ended: null → 2.5",
        'attempts[1]: absent → {"number": 2}',
        'landed: absent → {"commit": "c0ffee"}',
        'limits."no.such": 1 → absent',
        "limits.time: 60 → 60.0",
        'paths: ["a"] → ["a", "b"]',
        "reason: null → absent",
        'status: "running" → "landed"',
    ]


def test_long_value_is_shortened_in_the_middle() -> None:
    """The result has its beginning, its end, and at most the requested length."""
    (line,) = format_delta(compute_delta({"log": "a" * 500 + "end"}, {"log": "\x1b[2J\n"}), longest=12)
    assert line == r'log: "aaaaaaa…nd" → "\u001b[…\n"'
    for longest in range(1, 9):
        (line,) = format_delta(compute_delta({"n": 10**20}, {"n": 0}), longest)
        assert len(line) == len("n:  → 0") + longest


def test_list_replaced_by_an_object_is_one_change() -> None:
    assert compute_delta({"x": []}, {"x": {}}).modified == {("x",): Modified([], {})}
    assert compute_delta({"x": [{}]}, {"x": [{}, 1]}).modified == {("x",): Modified([{}], [{}, 1])}
    assert compute_delta({"x": []}, {"x": []}) == Delta({}, {}, {})


def test_order_of_members_is_ignored() -> None:
    """Also in objects inside lists that count as one value."""
    one, other = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert compute_delta({"x": one, "y": [1, one], "z": [one]}, {"z": [other], "y": [1, other], "x": other}) == Delta(
        {}, {}, {}
    )


def test_records_at_the_end_of_a_list_are_added_and_removed() -> None:
    """Several at once, in order."""
    one, three = {"x": [{"n": 1}]}, {"x": [{"n": 1}, {"n": 2}, {"n": 3}]}
    delta = compute_delta(one, three)
    assert delta == Delta({("x", 1): {"n": 2}, ("x", 2): {"n": 3}}, {}, {})
    assert (apply_delta(one, delta), revert_delta(three, delta)) == (three, one)
    assert revert_delta(one, compute_delta(three, one)) == three


def test_exported_delta_is_plain_json() -> None:
    """Paths are lists, since JSON objects have text keys only."""
    assert delta_to_json(compute_delta({"x": [{}], "z": 1}, {"x": [{"y": 2}], "n": [], "z": 3})) == {
        "added": [{"path": ["x", 0, "y"], "new": 2}, {"path": ["n"], "new": []}],
        "modified": [{"path": ["z"], "old": 1, "new": 3}],
        "removed": [],
    }
