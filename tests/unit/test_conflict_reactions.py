"""The choice of the tasks and sessions that a predicted conflict affects."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import FINAL_STATUSES, TaskStatus
from orchestrator.domain.scheduling.conflict_reactions import find_conflict_holds, find_conflict_rebases
from orchestrator.domain.sessions.predicted_conflicts import describe_rebase

WAITED_FOR = set(TaskStatus) - FINAL_STATUSES


def run(*pairs: str, action: str = "hold", **changes: Any) -> RunDocument:
    """Return a run with a predicted conflict for each pair of letters."""
    return RunDocument.model_construct(
        merge=RunDocument.model_fields["merge"]
        .get_default(call_default_factory=True)
        .model_copy(update={"on_predicted_conflict": action}),
        **{
            "held": {},
            "bumped": (),
            "released": (),
            "predicted_conflicts": tuple(tuple(pair) for pair in pairs),
            **changes,
        },
    )


def task(started: float = 0.0, status: str = "queued", **changes: Any) -> TaskDocument:
    attempt = Attempt(number=1, adapter="fake", base="", started=started)
    return TaskDocument.model_construct(status=TaskStatus(status), attempts=(attempt,), **changes)


def test_find_conflict_holds_chain_and_cycle_hold_all_but_the_earliest() -> None:
    tasks = {"a": task(3), "b": task(2), "c": task(1)}
    assert find_conflict_holds(run("ab", "bc"), tasks, {}) == {"a": "b", "b": "c"}
    assert find_conflict_holds(run("ab", "bc", "ac"), tasks, {}) == {"a": "c", "b": "c"}


@pytest.mark.parametrize("status", sorted(TaskStatus))
def test_find_conflict_holds_ends_with_the_other_task(status: str) -> None:
    tasks = {"a": task(1, status), "b": task(2)}
    assert find_conflict_holds(run("ab"), tasks, {}) == ({"b": "a"} if status in WAITED_FOR else {})


def test_find_conflict_holds_only_built_work_waits() -> None:
    for status in set(TaskStatus) - {TaskStatus.QUEUED}:
        assert find_conflict_holds(run("ab"), {"a": task(1, "running"), "b": task(2, status)}, {}) == {}


@pytest.mark.parametrize(
    ("changes", "priorities", "expected"),
    [
        pytest.param({}, {"b": 1}, {"a": "b"}, id="priority"),
        pytest.param({"bumped": ("b",)}, {}, {"a": "b"}, id="bumped"),
        pytest.param({"released": ("b",)}, {}, {}, id="released"),
        pytest.param({"held": {"a": ""}}, {}, {}, id="the other is held by a user"),
        pytest.param({"action": "notify"}, {}, {}, id="notify"),
    ],
)
def test_find_conflict_holds_follows_the_requests_of_users(
    changes: dict[str, Any], priorities: dict[str, int], expected: dict[str, str]
) -> None:
    assert find_conflict_holds(run("ab", **changes), {"a": task(1), "b": task(2)}, priorities) == expected


def test_find_conflict_holds_does_not_wait_for_a_task_that_cannot_land() -> None:
    """Such a task may itself wait for the landing of the held one."""
    held = task(2)
    assert find_conflict_holds(run("ab"), {"a": task(1, reason="b owns its paths"), "b": held}, {}) == {}
    assert find_conflict_holds(run("ab"), {"a": task(1, "pending", subtasks=("b",)), "b": held}, {}) == {}
    stalled = {"a": task(1, "pending"), "b": held}
    assert find_conflict_holds(run("ab"), stalled, {}) == {"b": "a"}
    assert find_conflict_holds(run("ab"), stalled, {}, is_stalled=True) == {}


@given(st.data())
def test_find_conflict_holds_never_holds_each_other(data: st.DataObject) -> None:
    """From any held task, the tasks that are waited for lead to one that is not held."""
    names = "abcdef"
    tasks = {
        name: task(
            data.draw(st.integers(0, 2)),
            data.draw(st.sampled_from(["queued", "running"])),
            bounces=data.draw(st.integers(0, 1)),
        )
        for name in names
    }
    pairs = data.draw(st.sets(st.sampled_from([one + other for one in names for other in names if one < other])))
    bumped = tuple(data.draw(st.permutations(names)))[: data.draw(st.integers(0, 3))]
    holds = find_conflict_holds(run(*pairs, bumped=bumped), tasks, dict.fromkeys(names, 0))
    for held in holds:
        chain = [held]
        while chain[-1] in holds:
            chain.append(holds[chain[-1]])
            assert len(chain) <= len(names)


def test_find_conflict_holds_does_not_wait_for_work_that_is_built_on_the_later_task() -> None:
    """It lands only after that."""
    attempt = Attempt(number=1, adapter="", base="", started=1.0, stacked_on={"b": "c1"})
    stacked = task(1).model_copy(update={"attempts": (attempt,), "commit": "c2"})
    assert find_conflict_holds(run("ab"), {"a": stacked, "b": task(2)}, {}) == {}


A, B, C = (SessionName("r", task, 1) for task in "abc")


def test_find_conflict_rebases_names_all_landed_work_of_a_session() -> None:
    tasks = {"a": task(1, "landed"), "b": task(2, "landed"), "c": task(3, "running")}
    conflicts = {(A, C): {"a.txt"}, (B, C): {"b.txt"}, (A, B): {"c.txt"}}
    found = find_conflict_rebases(run(action="rebase"), tasks, conflicts, [C])
    assert found == {C: {"a": {"a.txt"}, "b": {"b.txt"}}}
    note = describe_rebase(found[C])
    assert "the work of a, b has landed" in note
    assert "in a.txt, b.txt." in note


@pytest.mark.parametrize("status", sorted(TaskStatus))
def test_find_conflict_rebases_only_after_the_other_task_has_landed(status: str) -> None:
    tasks = {"a": task(2, "running"), "b": task(1, status)}
    found = find_conflict_rebases(run(action="rebase"), tasks, {(A, B): {"a.txt"}}, [A])
    assert found == ({A: {"b": {"a.txt"}}} if status == "landed" else {})


@pytest.mark.parametrize("action", ["notify", "hold"])
def test_find_conflict_rebases_only_with_rebase(action: str) -> None:
    tasks = {"a": task(1, "landed"), "b": task(2, "running")}
    assert find_conflict_rebases(run(action=action), tasks, {(A, B): {"a.txt"}}, [B]) == {}


def test_is_held_of_a_predicted_conflict_only_with_hold() -> None:
    """With `rebase`, there is nothing to release."""
    assert run("ab").is_held("a")
    assert not run("ab", action="rebase").is_held("a")
