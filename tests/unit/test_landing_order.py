"""The order of the merge queue."""

from __future__ import annotations

from orchestrator.domain.scheduling.dispatch import AGING_SECONDS
from orchestrator.domain.scheduling.landing_order import LandingCandidate, order_landings


def candidate(task: str, *, priority: int = 0, built: float = 0.0, bounces: int = 0) -> LandingCandidate:
    return LandingCandidate(task, priority, built, bounces)


def test_order_landings_equal_tasks_by_age_then_given_order() -> None:
    assert order_landings([candidate("b", built=2), candidate("a", built=1), candidate("c", built=2)]) == [
        "a",
        "b",
        "c",
    ]


def test_order_landings_priority_is_first_until_others_have_waited() -> None:
    urgent = candidate("urgent", priority=2, built=2 * AGING_SECONDS)
    assert order_landings([candidate("old", built=1), urgent]) == ["urgent", "old"]
    assert order_landings([candidate("older", built=-1), urgent]) == ["older", "urgent"]


def test_order_landings_sent_back_task_waits_behind_later_ones() -> None:
    again = candidate("again", bounces=2)
    assert order_landings([again, candidate("new", built=1.9 * AGING_SECONDS)]) == ["new", "again"]
    assert order_landings([again, candidate("newer", built=2.1 * AGING_SECONDS)]) == ["again", "newer"]


def test_order_landings_bumped_tasks_are_first() -> None:
    tasks = [candidate("a"), candidate("b", priority=100), candidate("c"), candidate("d")]
    assert order_landings(tasks, ["d", "gone", "c"]) == ["d", "c", "b", "a"]
