"""Properties of every resolution of conflicting updates."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.documents.conflicts import (
    ConflictStrategy,
    DocumentUpdate,
    Resolved,
    Unresolved,
    find_competing,
    group_by_key,
    merge_values,
    resolve_updates,
)

#: The duration of an example has no meaning on a busy machine.

NAMES = st.sampled_from("abc")
SCALARS = st.none() | st.booleans() | st.integers(0, 3) | st.text(max_size=2)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=3)
LISTLESS = st.recursive(SCALARS, lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=6)
#: Updates in which each field name has values of one kind.
OF_ONE_KIND = st.fixed_dictionaries(
    {},
    optional={
        "list": st.lists(SCALARS, max_size=2),
        "scalar": SCALARS,
        "object": st.fixed_dictionaries({}, optional={"list": st.lists(SCALARS, max_size=2), "scalar": SCALARS}),
    },
)
STRATEGIES = st.sampled_from(list(ConflictStrategy))


@st.composite
def batches(draw: st.DrawFn, least: int = 0, keys: str = "xyz") -> list[DocumentUpdate[str]]:
    """Return updates with distinct times."""
    times = draw(st.lists(st.integers(0, 1_000), unique=True, min_size=least, max_size=5))
    return [
        DocumentUpdate(draw(st.sampled_from(keys)), float(time), f"w{time}", draw(st.none() | OBJECTS))
        for time in times
    ]


def covers(merged: Any, value: Any) -> bool:
    """Return whether a merge has every field of an object and every item of its lists."""
    if isinstance(merged, dict) and isinstance(value, dict):
        return all(name in merged and covers(merged[name], inner) for name, inner in value.items())
    if isinstance(merged, list) and isinstance(value, list):
        return all(item in merged for item in value)
    return True


@given(batches(least=1, keys="x"), STRATEGIES, st.randoms())
def test_update_order_does_not_matter(
    batch: list[DocumentUpdate[str]], strategy: ConflictStrategy, random: Any
) -> None:
    """With distinct times every order has the same result."""
    shuffled = random.sample(batch, len(batch))
    assert resolve_updates(shuffled, strategy) == resolve_updates(batch, strategy)
    assert find_competing(shuffled) == find_competing(batch)


@given(batches(least=1, keys="x"), STRATEGIES)
def test_updates_are_not_modified(batch: list[DocumentUpdate[str]], strategy: ConflictStrategy) -> None:
    before = json.dumps([(one.time, one.value) for one in batch])
    resolve_updates(batch, strategy)
    assert json.dumps([(one.time, one.value) for one in batch]) == before


@given(batches(least=1, keys="x"))
def test_winner_is_one_of_the_updates(batch: list[DocumentUpdate[str]]) -> None:
    """The last has the greatest time, the first the least; a person gets all of them."""
    assert resolve_updates(batch) == Resolved(max(batch, key=lambda one: one.time).value)
    assert resolve_updates(batch, ConflictStrategy.FIRST_WRITE_WINS) == Resolved(
        min(batch, key=lambda one: one.time).value
    )
    left = resolve_updates(batch, ConflictStrategy.MANUAL)
    assert isinstance(left, Unresolved)
    assert list(left.candidates) == sorted(batch, key=lambda one: one.time)


@given(batches())
def test_conflicting_fields_are_those_that_differ(batch: list[DocumentUpdate[str]]) -> None:
    """Every update is in the group of its key, and a group of one is no conflict."""
    groups = group_by_key(batch)
    assert sorted(one.time for group in groups.values() for one in group) == sorted(one.time for one in batch)
    assert all(one.key == key for key, group in groups.items() for one in group)
    assert find_competing(batch) == {key: group for key, group in groups.items() if len(group) > 1}


@given(st.lists(st.none() | OBJECTS, min_size=1, max_size=4))
def test_merge_has_every_field_of_each_update(values: list[dict[str, Any] | None]) -> None:
    """And no others; it is empty only if all updates delete."""
    merged = merge_values(values)
    present = [value for value in values if value is not None]
    assert (merged is None) == (not present)
    if merged is not None:
        assert set(merged) == {name for value in present for name in value}
        assert covers(merged, present[0])
        assert all(set(value) <= set(merged) for value in present)


@given(st.lists(OF_ONE_KIND, min_size=1, max_size=4))
def test_merge_of_equal_kinds_loses_nothing_at_any_depth(values: list[dict[str, Any]]) -> None:
    """Every nested field and list item of each update is in the merge."""
    merged = merge_values(values)
    assert all(covers(merged, value) for value in values)
    assert len((merged or {}).get("list", [])) == sum(len(value.get("list", [])) for value in values)


@given(OF_ONE_KIND, OF_ONE_KIND, OF_ONE_KIND)
def test_merge_of_equal_kinds_is_associative(one: dict[str, Any], two: dict[str, Any], three: dict[str, Any]) -> None:
    """Only then: `[1]`, `5` and `[2]` merge to `[1, 2]` or `[1]`."""
    assert (
        merge_values([merge_values([one, two]), three])
        == merge_values([one, merge_values([two, three])])
        == merge_values([one, two, three])
    )


@given(st.dictionaries(NAMES, LISTLESS, max_size=3))
def test_merge_with_itself_is_unchanged_without_lists(value: dict[str, Any]) -> None:
    """Lists are concatenated."""
    assert merge_values([value, value]) == value
