"""What a task comes back as when a checkpoint is restored: as it was, but for what no record can undo."""

from __future__ import annotations

from orchestrator.domain.runs.model import Attempt, TaskDocument, TaskStatus


def roll_back_task(then: TaskDocument, now: TaskDocument) -> TaskDocument | str:
    """Return a task as it was `then`, for it to go on from there; or why it stays as it is `now`.

    Three things are never turned back. What is on the target: a task that has landed, or may have, stays as it is,
    and so does one that the target has lost since. What sessions have done: attempts that were begun since stay on
    record, so that their numbers, logs and branches are never used again. And landings that were cut off: the move that
    was under way then has long been settled, so that the task waits to land as if that had been undone.
    """
    if now.status is TaskStatus.LANDED:
        return "it has landed"
    if now.status is TaskStatus.LANDING:
        return "it may have landed, `council resume` finds out"
    if then.status is TaskStatus.LANDED:
        return "the target has lost it since"
    attempts = _attempts(then, now)
    status = TaskStatus.QUEUED if then.status is TaskStatus.LANDING else then.status
    changes = {"status": status, "intent": None, "intended": now.intended}
    return then.model_copy(update={**changes, "attempts": attempts, "current": _current(then, attempts)})


def _attempts(then: TaskDocument, now: TaskDocument) -> tuple[Attempt, ...]:
    """Return the attempts that had ended, as they were, and the others as they are."""
    known = {one.number: one for one in now.attempts}
    old = (one if one.ended is not None else known.get(one.number, one) for one in then.attempts)
    return (*old, *now.attempts[len(then.attempts) :])


def _current(then: TaskDocument, attempts: tuple[Attempt, ...]) -> int | None:
    """Return the attempt that the task is about again; None for the newest, or where another has to follow anyway."""
    if not then.attempts or then.status in {TaskStatus.PENDING, TaskStatus.RUNNING}:
        return None
    number = then.attempt.number
    return None if number == len(attempts) else number
