"""Rollback of tasks, from the old and the current document."""

from __future__ import annotations

import pytest

from orchestrator.domain.runs.model import Attempt, PreparedMerge, TaskDocument
from orchestrator.domain.runs.rollback import roll_back_task
from orchestrator.domain.runs.statuses import TaskStatus

BASE, COMMIT = "a" * 40, "b" * 40


def attempt(number: int, outcome: str | None = "built") -> Attempt:
    """Return an attempt; without an outcome it is active."""
    ended = None if outcome is None else 10.0 * number + 5
    return Attempt(number=number, adapter="x", base=BASE, started=10.0 * number, ended=ended, outcome=outcome)


@pytest.mark.parametrize("status", [one for one in TaskStatus if one is not TaskStatus.LANDED])
def test_landed_or_possibly_landed_work_stays(status: TaskStatus) -> None:
    """A landing is a fact of the target and is not rolled back."""
    then = TaskDocument(status=status, attempts=(attempt(1),))
    landed = TaskDocument(status=TaskStatus.LANDED, attempts=(attempt(1),), landed=COMMIT)
    landing = TaskDocument(
        status=TaskStatus.LANDING,
        attempts=(attempt(1),),
        landing_intent=PreparedMerge(old=BASE, new=COMMIT, recorded=1.0),
    )
    assert roll_back_task(then, landed) == "it has landed"
    assert "may have landed" in str(roll_back_task(then, landing))
    if status is not TaskStatus.LANDING:
        assert roll_back_task(landed, then) == "the target no longer contains it"


@pytest.mark.parametrize("status", [TaskStatus.RUNNING, TaskStatus.PENDING])
def test_next_attempt_has_a_new_number(status: TaskStatus) -> None:
    """A task that ran or waited keeps later attempts on record, and the newest one is current."""
    outcome = None if status is TaskStatus.RUNNING else "interrupted"
    then = TaskDocument(status=status, attempts=(attempt(1, outcome),))
    now = TaskDocument(status=TaskStatus.FAILED, attempts=(attempt(1, "crash"), attempt(2, "crash")), failures=2)
    back = roll_back_task(then, now)
    assert isinstance(back, TaskDocument)
    assert (back.status, back.failures, back.attempt.number) == (status, 0, 2)
    # Unfinished attempts ended meanwhile; finished ones are unchanged.
    assert [one.outcome for one in back.attempts] == [outcome or "crash", "crash"]


@pytest.mark.parametrize("status", [TaskStatus.QUEUED, TaskStatus.CHECKING, TaskStatus.FAILED])
def test_outcome_of_an_attempt_is_restored(status: TaskStatus) -> None:
    """A queued task lands the work of its own attempt, although there are later ones."""
    then = TaskDocument(status=status, attempts=(attempt(1),), commit=COMMIT)
    now = TaskDocument(status=TaskStatus.PENDING, attempts=(attempt(1, "checks_failed"), attempt(2, "crash")))
    back = roll_back_task(then, now)
    assert isinstance(back, TaskDocument)
    assert (back.status, back.commit, back.attempt.number, back.attempt.outcome) == (status, COMMIT, 1, "built")
    assert [one.number for one in back.attempts] == [1, 2]
    assert [one.reason for one in back.with_attempt(reason="why")] == ["why", None]
    again = roll_back_task(back, now.model_copy(update={"attempts": (*now.attempts, attempt(3))}))
    assert isinstance(again, TaskDocument)
    assert (again.attempt.number, len(again.attempts)) == (1, 3)


def test_landing_in_progress_returns_to_the_queue() -> None:
    """Its move of the target was completed since: repeating it could overwrite files of others."""
    intent = PreparedMerge(old=BASE, new=COMMIT, recorded=1.0)
    then = TaskDocument(status=TaskStatus.LANDING, attempts=(attempt(1),), commit=COMMIT, landing_intent=intent)
    now = TaskDocument(status=TaskStatus.CONFLICT, attempts=(attempt(1, "conflict"),), commit=COMMIT)
    back = roll_back_task(then, now)
    assert isinstance(back, TaskDocument)
    assert (back.status, back.landing_intent, back.commit, back.current) == (TaskStatus.QUEUED, None, COMMIT, None)
