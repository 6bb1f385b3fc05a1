"""Restore a task to a checkpoint, except for irreversible effects."""

from __future__ import annotations

from orchestrator.domain.runs.model import Attempt, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus


def roll_back_task(then: TaskDocument, now: TaskDocument) -> TaskDocument | str:
    """Return a task restored from `then`, or the reason to keep its state `now`.

    Three things are never rolled back. The target: a task that has landed or may have landed remains unchanged, and so
    does a task whose landing the target has lost since. Sessions: attempts that started since remain recorded, so that
    their numbers, logs and branches are never reused. Interrupted landings: these were resolved long ago, so the task
    is queued to land as if the landing had been undone.
    """
    if now.status is TaskStatus.LANDED:
        return "it has landed"
    if now.status is TaskStatus.LANDING:
        return "it may have landed: run `council resume` to find out"
    if then.status is TaskStatus.LANDED:
        return "the target no longer contains it"
    attempts = _attempts(then, now)
    status = TaskStatus.QUEUED if then.status is TaskStatus.LANDING else then.status
    changes = {"status": status, "landing_intent": None, "intended_merges": now.intended_merges}
    return then.model_copy(update={**changes, "attempts": attempts, "current": _current(then, attempts)})


def _attempts(then: TaskDocument, now: TaskDocument) -> tuple[Attempt, ...]:
    """Return attempts as of `then` if they had ended, else as of `now`."""
    known = {attempt.number: attempt for attempt in now.attempts}
    old = (each if each.ended is not None else known.get(each.number, each) for each in then.attempts)
    return (*old, *now.attempts[len(then.attempts) :])


def _current(then: TaskDocument, attempts: tuple[Attempt, ...]) -> int | None:
    """Return the current attempt's number; None for the newest or a new attempt."""
    if not then.attempts or then.status in {TaskStatus.PENDING, TaskStatus.RUNNING}:
        return None
    number = then.attempt.number
    return None if number == len(attempts) else number
