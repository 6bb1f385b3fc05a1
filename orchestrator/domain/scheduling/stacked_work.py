"""Decide if work that is built on unlanded work of other tasks may land, waits, or must change. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from enum import Enum, auto
from typing import NamedTuple

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import LANDING_STATUSES, SUCCESS_STATUSES, UNSUCCESSFUL_STATUSES, TaskStatus


class StackState(Enum):
    """The next step for built work that is stacked on the work of other tasks."""

    READY = auto()  #: all of these have landed as they were, or are ahead in the same chain of merges
    WAITS = auto()  #: one of them has not landed yet, or is built again
    OUTDATED = auto()  #: all of them are built or have landed, and some differently: the work is rebased
    ABANDONED = auto()  #: one of them will not land


class StackVerdict(NamedTuple):
    """The state of stacked work, and the task that decides it, if any."""

    state: StackState
    need: str = ""


_READY = StackVerdict(StackState.READY)


def judge_stack(
    stack: Mapping[str, str],
    tasks: Mapping[str, TaskDocument],
    blocked: Container[str] = (),
    ahead: Container[str] = (),
) -> StackVerdict:
    """Return the state of built work, given the commits that it is stacked on, by task.

    `blocked` tasks can no longer start, and those that are `ahead` land first in any case.
    """
    if not stack:
        return _READY
    for need in stack:
        if need in blocked or tasks[need].status in UNSUCCESSFUL_STATUSES:
            return StackVerdict(StackState.ABANDONED, need)
    waits, changed = None, None
    for need, commit in stack.items():
        other = tasks[need]
        if other.status not in LANDING_STATUSES | SUCCESS_STATUSES:
            return StackVerdict(StackState.WAITS, need)
        is_equal = other.commit == commit
        if other.status in SUCCESS_STATUSES:
            is_equal = is_equal and other.landed in other.intended_merges  # otherwise its commit is not on the target
        elif need not in ahead:
            waits = waits or need
        changed = changed if is_equal else changed or need
    if changed is not None:
        return StackVerdict(StackState.OUTDATED, changed)
    return _READY if waits is None else StackVerdict(StackState.WAITS, waits)


def select_stack(needs: Iterable[str], tasks: Mapping[str, TaskDocument]) -> dict[str, str]:
    """Return the commits of the needed tasks that are built and have not landed, by task."""
    found = ((need, tasks[need]) for need in needs)
    return {need: one.commit for need, one in found if one.status in LANDING_STATUSES and one.commit is not None}


def find_stack_waits(tasks: Mapping[str, TaskDocument]) -> dict[str, str]:
    """Return the queued tasks that land only after another one, with that task."""
    verdicts = {task: judge_stack(one.stack, tasks) for task, one in tasks.items() if one.status is TaskStatus.QUEUED}
    return {task: verdict.need for task, verdict in verdicts.items() if verdict.state is not StackState.READY}


def describe_stack_wait(task: str, need: str, tasks: Mapping[str, TaskDocument]) -> str:
    """Return why a task does not land before `need`, whose work it is built on."""
    if tasks[need].status in LANDING_STATUSES | SUCCESS_STATUSES and tasks[need].commit != tasks[task].stack.get(need):
        return f"it is built on the work of {need}, which has changed: it is rebased, and lands after {need}"
    if tasks[need].status in LANDING_STATUSES | SUCCESS_STATUSES:
        return f"it is built on the work of {need}, which has not landed yet"
    return f"it is built on the work of {need}, which is being built again: it lands after {need}"
