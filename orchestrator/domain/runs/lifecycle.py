"""The state machine of task status: a transition without a row in the table is an error."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Any, Final, Self

from orchestrator.domain.events import tasks as events
from orchestrator.domain.events.base import TaskEvent
from orchestrator.domain.runs.model import (
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    SUCCESS_STATUSES,
    TaskDocument,
    TaskStatus,
)
from orchestrator.errors import InvalidTransition


class Trigger(StrEnum):
    """The causes of a change of a task's status, each with the event that records it."""

    event: type[TaskEvent]

    def __new__(cls, value: str, event: type[TaskEvent]) -> Self:
        """Make a member from its value and its event."""
        member = str.__new__(cls, value)
        member._value_, member.event = value, event
        return member

    START = "start", events.TaskStarted  #: an attempt is recorded
    RETRY = "retry", events.TaskRetrying  #: the attempt failed, another may follow
    HOLD = "hold", events.TaskPostponed  #: its adapter is unavailable; the attempt does not count
    INTERRUPT = "interrupt", events.TaskInterrupted  #: the orchestrator stopped during the attempt
    FAIL = "fail", events.TaskFailed  #: the last attempt failed
    IDLE = "idle", events.TaskNoChange  #: the program succeeded and changed nothing
    BUILD = "build", events.TaskQueued  #: the attempt's work is a commit
    ADVANCE = "advance", events.TaskAdvanced  #: its phase is complete, another follows
    EXPAND = "expand", events.TaskExpanded  #: its phase is complete, and the tasks of its plan run first
    REPEAT = "repeat", events.TaskPhaseRepeated  #: its phase, or an earlier one, is repeated
    ASK = "ask", events.TaskAwaitingApproval  #: the result of its phase needs approval
    APPROVE = "approve", events.TaskApproved  #: a person approved the result
    SEND_BACK = "send_back", events.TaskRejected  #: a person declined the result
    QUEUE = "queue", events.TaskQueued  #: all phases are complete, its work is queued to land
    FINISH = "finish", events.TaskDone  #: all phases are complete, and there is nothing to land
    CHECK = "check", events.TaskChecking  #: the checks of the merge start
    REQUEUE = "requeue", events.TaskRequeued  #: the checks were interrupted
    BOUNCE = "bounce", events.TaskRetrying  #: it can't land, another attempt may follow
    REJECT = "reject", events.TaskFailed  #: it can't land, and no further attempt follows
    INTEND = "intend", events.TaskLanding  #: the intent to move the target is recorded
    UNDO = "undo", events.TaskLandingAborted  #: the target was not moved
    DEFER = "defer", events.TaskDeferred  #: the target can't be moved at the moment
    CONFLICT = "conflict", events.TaskConflict  #: the merge has conflicts
    ADOPT = "adopt", events.TaskLanded  #: the target already has it
    LAND = "land", events.TaskLanded  #: the target was moved
    LOSE = "lose", events.TaskFailed  #: the target was rewritten without it
    DISTRUST = "distrust", events.TaskFailed  #: the record of the task is damaged
    CANCEL = "cancel", events.TaskCancelled  #: a person cancels it
    IGNORE = "ignore", events.TaskIgnored  #: a person excludes it from retries
    REVIVE = "revive", events.TaskRetryRequested  #: a person retries it


_S, _T = TaskStatus, Trigger
_CANCELLABLE = (_S.PENDING, _S.WAITING, _S.RUNNING, _S.QUEUED, _S.CHECKING)

TRANSITIONS: Final[dict[tuple[TaskStatus, Trigger], TaskStatus]] = {
    (_S.PENDING, _T.START): _S.RUNNING,
    (_S.PENDING, _T.ADOPT): _S.LANDED,
    (_S.PENDING, _T.FAIL): _S.FAILED,
    (_S.RUNNING, _T.RETRY): _S.PENDING,
    (_S.RUNNING, _T.HOLD): _S.PENDING,
    (_S.RUNNING, _T.INTERRUPT): _S.PENDING,
    (_S.RUNNING, _T.FAIL): _S.FAILED,
    (_S.RUNNING, _T.IDLE): _S.NO_CHANGE,
    (_S.RUNNING, _T.BUILD): _S.QUEUED,
    (_S.RUNNING, _T.ADVANCE): _S.PENDING,
    (_S.RUNNING, _T.EXPAND): _S.PENDING,
    (_S.RUNNING, _T.REPEAT): _S.PENDING,
    (_S.RUNNING, _T.ASK): _S.WAITING,
    (_S.RUNNING, _T.FINISH): _S.DONE,
    (_S.WAITING, _T.APPROVE): _S.PENDING,
    (_S.WAITING, _T.SEND_BACK): _S.PENDING,
    (_S.PENDING, _T.QUEUE): _S.QUEUED,
    (_S.PENDING, _T.FINISH): _S.DONE,
    (_S.QUEUED, _T.CHECK): _S.CHECKING,
    (_S.CHECKING, _T.REQUEUE): _S.QUEUED,
    (_S.CHECKING, _T.INTEND): _S.LANDING,
    (_S.CHECKING, _T.ADOPT): _S.LANDED,
    (_S.QUEUED, _T.INTEND): _S.LANDING,
    (_S.QUEUED, _T.DEFER): _S.QUEUED,
    (_S.QUEUED, _T.CONFLICT): _S.CONFLICT,
    (_S.QUEUED, _T.ADOPT): _S.LANDED,
    (_S.LANDING, _T.LAND): _S.LANDED,
    (_S.LANDING, _T.UNDO): _S.QUEUED,
    (_S.LANDING, _T.DEFER): _S.QUEUED,
    (_S.LANDED, _T.LOSE): _S.FAILED,
    (_S.RUNNING, _T.ADOPT): _S.LANDED,
    (_S.LANDING, _T.ADOPT): _S.LANDED,
    (_S.CONFLICT, _T.ADOPT): _S.LANDED,
    (_S.FAILED, _T.ADOPT): _S.LANDED,
    **{(status, _T.BOUNCE): _S.PENDING for status in (_S.QUEUED, _S.CHECKING)},
    **{(status, _T.REJECT): _S.FAILED for status in (_S.QUEUED, _S.CHECKING)},
    **{(status, _T.CANCEL): _S.CANCELLED for status in _CANCELLABLE},
    (_S.CANCELLED, _T.IGNORE): _S.CANCELLED,
    **{(status, _T.DISTRUST): _S.FAILED for status in set(_S) - FINAL_STATUSES},
    **{(status, _T.REVIVE): _S.PENDING for status in RETRYABLE_STATUSES},
}


def apply_trigger(subject: str, task: TaskDocument, trigger: Trigger, **changes: Any) -> TaskDocument:
    """Return the task after `trigger`, with `changes` to other fields; raise InvalidTransition without a row."""
    status = TRANSITIONS.get((task.status, trigger))
    if status is None:
        raise InvalidTransition(subject, task.status, trigger)
    return task.model_copy(update={"status": status, **changes})


def run_state(statuses: Collection[str], *, has_ended: bool, is_halted: bool, is_live: bool) -> str:
    """Return the state of a run, given the statuses of its tasks.

    `is_live` means that a process is active on it. A resumed run is no longer halted.
    """
    if has_ended:
        return "landed" if SUCCESS_STATUSES.issuperset(statuses) else "incomplete"
    if is_live:
        return "running"
    return "halted" if is_halted else "interrupted"
