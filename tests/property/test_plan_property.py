"""Waves respect needs, and shared paths of tasks in one wave are reported."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.settings.path_patterns import has_any_overlap
from orchestrator.engine.reports.dry_run import count_concurrent_sessions, plan_waves

_PATTERNS = ["src/**", "src/a/*", "src/a/b.py", "src/b*/x", "docs/", "**/x", "docs/[ab]*", "*"]


@st.composite
def _entries(draw: st.DrawFn) -> Mapping[str, DispatchEntry]:
    """Return shuffled tasks whose needs are lower numbers, so without cycles."""
    many = draw(st.integers(1, 25))
    made = {
        f"t{number}": DispatchEntry(
            needs=tuple(draw(st.lists(st.sampled_from([f"t{n}" for n in range(number)]), max_size=3)))
            if number
            else (),
            adapter=draw(st.sampled_from("xy")),
            priority=draw(st.integers(-2, 2)),
            owns=tuple(draw(st.lists(st.sampled_from(_PATTERNS), max_size=2))),
        )
        for number in range(many)
    }
    return {task: made[task] for task in draw(st.permutations(list(made)))}


@given(_entries())
def test_task_is_in_the_earliest_wave_after_its_needs(entries: Mapping[str, DispatchEntry]) -> None:
    """Each task is in one wave, directly after one of its needs."""
    waves = plan_waves(entries)
    places = [(task, number) for number, wave in enumerate(waves) for task in wave.tasks]
    wave_of = dict(places)
    assert len(places) == len(entries)
    assert wave_of.keys() == entries.keys()
    for task, number in places:
        assert number == 1 + max((wave_of[need] for need in entries[task].needs), default=-1)


@given(_entries())
def test_tasks_of_a_wave_are_in_dispatch_order(entries: Mapping[str, DispatchEntry]) -> None:
    """By priority, then file order."""
    order = list(entries)
    for wave in plan_waves(entries):
        assert list(wave.tasks) == sorted(wave.tasks, key=lambda task: (-entries[task].priority, order.index(task)))


@given(_entries())
def test_task_follows_earlier_owners_of_its_paths(entries: Mapping[str, DispatchEntry]) -> None:
    """The index by pattern prefixes finds the same pairs as comparing all."""
    for wave in plan_waves(entries):
        expected: dict[str, str] = {}
        for place, task in enumerate(wave.tasks):
            met = [one for one in wave.tasks[:place] if has_any_overlap(entries[one].owns, entries[task].owns)]
            expected |= {task: met[0]} if met else {}
        assert wave.waits_for == expected
        assert wave.is_exact


@given(_entries(), st.integers(0, 6), st.dictionaries(st.sampled_from("xy"), st.integers(1, 3)))
def test_concurrent_sessions_of_a_plan_respect_all_limits(
    entries: Mapping[str, DispatchEntry], most: int, capacities: Mapping[str, int]
) -> None:
    """Capacity, adapter limits and path ownership; at least one session if one fits."""
    for wave in plan_waves(entries):
        sessions = count_concurrent_sessions(wave, entries, capacities, most)
        adapters = [entries[task].adapter for task in wave.tasks]
        limit = sum(min(adapters.count(name), capacities.get(name, 99)) for name in set(adapters))
        assert min(most, 1) <= sessions <= min(most, limit, len(wave.tasks))
        if not capacities and not wave.waits_for:
            assert sessions == min(most, len(wave.tasks))


@pytest.mark.extended
def test_plan_of_ten_thousand_overlapping_tasks_is_fast() -> None:
    """An unbounded comparison is abandoned and reported."""
    many = 10_000
    entries = {f"t{number}": DispatchEntry(owns=(f"src/*{number}.py", f"**/x{number}")) for number in range(many)}
    apart = {f"t{number}": DispatchEntry(owns=(f"*-{number}.py",)) for number in range(many)}
    [wave] = plan_waves(entries)
    assert len(wave.tasks) == many
    [wave] = plan_waves(apart)
    assert not wave.is_exact


def test_chain_of_ten_thousand_tasks_has_ten_thousand_waves() -> None:
    """Neither depth nor size reaches the recursion limit."""
    entries = {f"t{number}": DispatchEntry(needs=(f"t{number - 1}",) if number else ()) for number in range(10_000)}
    assert [wave.tasks for wave in plan_waves(entries)] == [[task] for task in entries]
