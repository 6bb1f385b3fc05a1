"""Decide which built tasks and running sessions a predicted merge conflict affects. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import FINAL_STATUSES, TaskStatus
from orchestrator.domain.scheduling.dispatch import AGING_SECONDS


def find_conflict_holds(
    run: RunDocument, tasks: Mapping[str, TaskDocument], priorities: Mapping[str, int], *, is_stalled: bool = False
) -> dict[str, str]:
    """Return the queued tasks that wait for a predicted conflict, each with the first task that it waits for.

    Of two tasks, the later one waits. The order is total, so tasks never wait for each other, and the earliest one
    never waits. `tasks` has at least the tasks with predicted conflicts. `is_stalled` means that no session will start
    without a landing: then no task waits for one that has no session.
    """
    if run.merge.on_predicted_conflict != "hold":
        return {}

    def rank(task: str) -> tuple[int, float, str]:
        document, place = tasks[task], run.bumped.index(task) if task in run.bumped else len(run.bumped)
        began = (document.started or 0.0) / AGING_SECONDS
        return place, began - priorities.get(task, 0) + document.bounces, task

    holds: dict[str, str] = {}
    for pair in run.predicted_conflicts:
        if any(task not in tasks for task in pair):
            continue
        earlier, later = sorted(pair, key=rank)
        is_built = tasks[later].status is TaskStatus.QUEUED and later not in run.released
        if is_built and _may_land(earlier, tasks, run, is_stalled=is_stalled):
            holds[later] = min(earlier, holds.get(later, earlier), key=rank)
    return holds


def _may_land(task: str, tasks: Mapping[str, TaskDocument], run: RunDocument, *, is_stalled: bool) -> bool:
    """Return whether a task may land without a landing of another task, or an action that a user has put off."""
    document = tasks[task]
    if document.status in FINAL_STATUSES or task in run.held:
        return False
    if document.status is TaskStatus.QUEUED:
        is_stacked = any(need not in tasks or tasks[need].status not in FINAL_STATUSES for need in document.stack)
        # With a reason it can't land now, perhaps because another task owns its paths.
        return document.reason is None and not is_stacked
    return document.status is not TaskStatus.PENDING or not (is_stalled or document.subtasks)


def find_conflict_rebases(
    run: RunDocument,
    tasks: Mapping[str, TaskDocument],
    conflicts: Mapping[tuple[SessionName, SessionName], Collection[str]],
    running: Collection[SessionName],
) -> dict[SessionName, dict[str, Collection[str]]]:
    """Return the running sessions that conflict with landed work: the conflicting paths, by landed task.

    `conflicts` are the paths of the current predictions, by pair of sessions.
    """
    rebases: dict[SessionName, dict[str, Collection[str]]] = {}
    if run.merge.on_predicted_conflict != "rebase":
        return rebases
    for pair, paths in conflicts.items():
        for session, other in (pair, pair[::-1]):
            if session in running and tasks[other.task].status is TaskStatus.LANDED:
                rebases.setdefault(session, {})[other.task] = paths
    return rebases


def describe_conflict_hold(task: str, other: str) -> str:
    """Return why a task does not land before `other`."""
    return (
        f"a merge conflict with {other} is predicted: it waits until {other} has landed or ended; "
        f"`council queue release {task}` lets it land"
    )
