"""The statuses of a task, and the transitions between them.

To add a status: a member with its record, and the transitions to and from it, here; the event of each new trigger in
`domain.events.tasks`. A status without a record or a transition, and a trigger without an event, fail at import.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, Self

from orchestrator.domain.events import tasks as events
from orchestrator.domain.events.base import TaskEvent
from orchestrator.domain.runs.phases import PhaseStatus


class ReleaseReason(StrEnum):
    """The reason to release the claim on a task."""

    COMPLETE = "complete"  #: the task has landed, or had nothing to do
    ABANDONED = "abandoned"  #: any orchestrator may claim the task for another attempt
    FAILED = "failed"  #: the task is finished without landing


Style = Literal["", "cyan", "blue", "yellow", "bold yellow", "green", "bold green", "red"]
StepLabel = Literal["next", "then", "or"]
NextSteps = tuple[tuple[StepLabel, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRecord:
    """The properties of a status."""

    label: str
    """The label in output for users."""
    activity: str
    """The activity of a task, in one word for the live table."""
    style: Style
    """The color in tables."""
    release: ReleaseReason | None
    """The reason to release the claim on the task; None: an orchestrator holds the claim, after an attempt began."""
    waits_for_user: bool
    """Only a user can continue it, and the run waits for that."""
    plain_phase: PhaseStatus
    """The status of the single phase of a task without a workflow that has this status."""
    next_steps: NextSteps
    """The next commands for a user, each with the task as `{}`."""
    is_final: bool = False
    """The task is finished; only a user can continue it."""
    is_successful: bool = False
    """Dependents may start."""
    is_retryable: bool = False
    """A user may retry it."""
    is_active: bool = False
    """A session, a check or a landing runs."""
    is_landing: bool = False
    """Between a built commit and its landing."""

    def __post_init__(self) -> None:
        """Raise ValueError if the properties contradict each other."""
        keeps, is_busy = self.release is None, self.is_active or self.is_landing
        commands = [command for _, command in self.next_steps]
        has_retry, labels = "council retry {}" in commands, [label for label, _ in self.next_steps]
        contradictions = {
            "is successful and not final": self.is_successful and not self.is_final,
            "is retryable: set `is_final=True`, and omit `is_successful`": self.is_retryable
            and (self.is_successful or not self.is_final),
            "is final and keeps the claim: set `release`": self.is_final and keeps,
            "waits for a user and is final or keeps the claim: set `release`": self.waits_for_user
            and (self.is_final or keeps),
            "waits for a user: list the commands to continue in `next_steps`": self.waits_for_user and not commands,
            "is active without a claim: set `release=None`": is_busy and not keeps,
            "keeps the claim: set `is_active` or `is_landing`": keeps and not is_busy,
            "is successful: set `release=ReleaseReason.COMPLETE`": self.is_successful
            and self.release is not ReleaseReason.COMPLETE,
            "is not final: set `release=ReleaseReason.ABANDONED`": not (self.is_final or keeps)
            and self.release is not ReleaseReason.ABANDONED,
            "must name `council retry {}` in `next_steps` exactly if `is_retryable` is set": has_retry
            != self.is_retryable,
            "has `next_steps` that do not begin with `next`": labels[:1] not in ([], ["next"]) or "next" in labels[1:],
            "has `next_steps` that are not commands with `{}`": any(
                not command.startswith("council ") or command.count("{}") != 1 for command in commands
            ),
        }
        for contradiction, applies in contradictions.items():
            if applies:
                raise ValueError(f"status {self.label!r} {contradiction}")


_RETRY: Final[tuple[StepLabel, str]] = ("next", "council retry {}")
_LOGS_AND_RETRY: Final[NextSteps] = (("next", "council logs {}"), ("then", "council retry {}"))


class TaskStatus(StrEnum):
    """The stored status of a task, with its record; blocked and claimed are derived."""

    record: StatusRecord

    def __new__(cls, value: str, record: StatusRecord | None = None) -> Self:
        """Make a member from its value and its record; raises TypeError without one."""
        if record is None:
            raise TypeError(f"status {value!r} has no record: add a `StatusRecord`")
        member = str.__new__(cls, value)
        member._value_, member.record = value, record
        return member

    @property
    def release_reason(self) -> ReleaseReason:
        """The reason to release a task's claim; raises ValueError if the claim is kept."""
        if self.record.release is None:
            raise ValueError(f"a task that is {self.record.label} keeps its claim")
        return self.record.release

    PENDING = (
        "pending",
        StatusRecord(
            label="pending",
            activity="waiting",
            style="",
            release=ReleaseReason.ABANDONED,
            waits_for_user=False,
            plain_phase=PhaseStatus.IN_PROGRESS,
            next_steps=(),
        ),
    )
    RUNNING = (
        "running",
        StatusRecord(
            label="running",
            activity="build",
            style="cyan",
            release=None,
            waits_for_user=False,
            plain_phase=PhaseStatus.IN_PROGRESS,
            next_steps=(),
            is_active=True,
        ),
    )
    #: Built, in the merge queue.
    QUEUED = (
        "queued",
        StatusRecord(
            label="queued",
            activity="queued",
            style="blue",
            release=None,
            waits_for_user=False,
            plain_phase=PhaseStatus.COMPLETED,
            next_steps=(),
            is_landing=True,
        ),
    )
    #: Merged, checks run on the merged tree.
    CHECKING = (
        "checking",
        StatusRecord(
            label="checking",
            activity="checks",
            style="yellow",
            release=None,
            waits_for_user=False,
            plain_phase=PhaseStatus.COMPLETED,
            next_steps=(),
            is_active=True,
            is_landing=True,
        ),
    )
    #: The intent to update the target is recorded.
    LANDING = (
        "landing",
        StatusRecord(
            label="landing",
            activity="landing",
            style="bold green",
            release=None,
            waits_for_user=False,
            plain_phase=PhaseStatus.COMPLETED,
            next_steps=(),
            is_active=True,
            is_landing=True,
        ),
    )
    LANDED = (
        "landed",
        StatusRecord(
            label="landed",
            activity="landed",
            style="green",
            release=ReleaseReason.COMPLETE,
            waits_for_user=False,
            plain_phase=PhaseStatus.COMPLETED,
            next_steps=(),
            is_final=True,
            is_successful=True,
        ),
    )
    #: The result of a phase needs approval.
    AWAITING_APPROVAL = (
        "awaiting_approval",
        StatusRecord(
            label="waiting for approval",
            activity="approval",
            style="bold yellow",
            release=ReleaseReason.ABANDONED,
            waits_for_user=True,
            plain_phase=PhaseStatus.AWAITING_APPROVAL,
            next_steps=(
                ("next", "council show {}"),
                ("then", "council approve {}"),
                ("or", "council reject {} --note TEXT"),
            ),
        ),
    )
    #: Its pull request is open.
    PROPOSED = (
        "proposed",
        StatusRecord(
            label="pull request open",
            activity="review",
            style="bold yellow",
            release=ReleaseReason.ABANDONED,
            waits_for_user=True,
            plain_phase=PhaseStatus.COMPLETED,
            next_steps=(("next", "council show {}"), ("or", "council cancel {}")),
        ),
    )
    #: All phases are complete, and there is nothing to land.
    DONE = (
        "done",
        StatusRecord(
            label="done",
            activity="done",
            style="green",
            release=ReleaseReason.COMPLETE,
            waits_for_user=False,
            plain_phase=PhaseStatus.COMPLETED,
            next_steps=(("next", "council show {}"),),
            is_final=True,
            is_successful=True,
        ),
    )
    NO_CHANGE = (
        "no_change",
        StatusRecord(
            label="no change",
            activity="no change",
            style="red",
            release=ReleaseReason.COMPLETE,
            waits_for_user=False,
            plain_phase=PhaseStatus.FAILED,
            next_steps=_LOGS_AND_RETRY,
            is_final=True,
            is_retryable=True,
        ),
    )
    CONFLICT = (
        "conflict",
        StatusRecord(
            label="conflict",
            activity="conflict",
            style="red",
            release=ReleaseReason.FAILED,
            waits_for_user=False,
            plain_phase=PhaseStatus.COMPLETED,
            next_steps=(_RETRY,),
            is_final=True,
            is_retryable=True,
        ),
    )
    FAILED = (
        "failed",
        StatusRecord(
            label="failed",
            activity="failed",
            style="red",
            release=ReleaseReason.FAILED,
            waits_for_user=False,
            plain_phase=PhaseStatus.FAILED,
            next_steps=_LOGS_AND_RETRY,
            is_final=True,
            is_retryable=True,
        ),
    )
    CANCELLED = (
        "cancelled",
        StatusRecord(
            label="cancelled",
            activity="cancelled",
            style="red",
            release=ReleaseReason.ABANDONED,
            waits_for_user=False,
            plain_phase=PhaseStatus.CANCELLED,
            next_steps=(_RETRY,),
            is_final=True,
            is_retryable=True,
        ),
    )


FINAL_STATUSES: Final = frozenset(status for status in TaskStatus if status.record.is_final)
SUCCESS_STATUSES: Final = frozenset(status for status in TaskStatus if status.record.is_successful)
#: Final statuses without success: dependents stay blocked.
UNSUCCESSFUL_STATUSES: Final = FINAL_STATUSES - SUCCESS_STATUSES
RETRYABLE_STATUSES: Final = frozenset(status for status in TaskStatus if status.record.is_retryable)
LANDING_STATUSES: Final = frozenset(status for status in TaskStatus if status.record.is_landing)
ACTIVE_STATUSES: Final = frozenset(status for status in TaskStatus if status.record.is_active)
CLAIMED_STATUSES: Final = frozenset(status for status in TaskStatus if status.record.release is None)
#: Only a user continues the task, and the run waits for that.
USER_STATUSES: Final = frozenset(status for status in TaskStatus if status.record.waits_for_user)
#: An attempt may start, or may have to wait for other tasks.
STARTABLE_STATUSES: Final = frozenset(TaskStatus) - FINAL_STATUSES - CLAIMED_STATUSES - USER_STATUSES


class Trigger(StrEnum):
    """The causes of a status change of a task, each with the event that records it."""

    event: type[TaskEvent]

    def __new__(cls, value: str, event: type[TaskEvent]) -> Self:
        """Create a member from its value and its event."""
        member = str.__new__(cls, value)
        member._value_, member.event = value, event
        return member

    START = "start", events.TaskStarted  #: an attempt is recorded
    RETRY = "retry", events.TaskRetrying  #: the attempt failed, another may follow
    POSTPONE = "postpone", events.TaskPostponed  #: its adapter is unavailable; the attempt does not count
    INTERRUPT = "interrupt", events.TaskInterrupted  #: the orchestrator stopped during the attempt
    FAIL = "fail", events.TaskFailed  #: the last attempt failed
    FINISH_UNCHANGED = "finish_unchanged", events.TaskNoChange  #: the program succeeded and changed nothing
    BUILD = "build", events.TaskQueued  #: the attempt's work is a commit
    ADVANCE = "advance", events.TaskAdvanced  #: its phase is complete, another follows
    EXPAND = "expand", events.TaskExpanded  #: its phase is complete, and the tasks of its plan run first
    REPEAT = "repeat", events.TaskPhaseRepeated  #: its phase, or an earlier one, is repeated
    REQUEST_APPROVAL = "request_approval", events.TaskAwaitingApproval  #: the result of its phase needs approval
    APPROVE = "approve", events.TaskApproved  #: a user approved the result
    REJECT_RESULT = "reject_result", events.TaskRejected  #: a user rejected the result
    QUEUE = "queue", events.TaskQueued  #: all phases are complete, its work is queued to land
    FINISH = "finish", events.TaskDone  #: all phases are complete, and there is nothing to land
    CHECK = "check", events.TaskChecking  #: the checks of the merge start
    REQUEUE = "requeue", events.TaskRequeued  #: the checks were interrupted
    RETRY_WORK = "retry_work", events.TaskRetrying  #: it can't land, another attempt may follow
    CONTINUE_WORK = "continue_work", events.TaskContinued  #: a message of the user arrived before it landed
    REBASE = "rebase", events.TaskRebased  #: the work that it is built on has changed
    WITHDRAW = "withdraw", events.TaskWithdrawn  #: the work that it is built on will not land
    REJECT = "reject", events.TaskFailed  #: it can't land, and no further attempt follows
    PROPOSE = "propose", events.TaskProposed  #: its pull request is open
    INTEND = "intend", events.TaskLanding  #: the intent to update the target is recorded
    ABORT_LANDING = "abort_landing", events.TaskLandingAborted  #: the target was not updated
    DEFER = "defer", events.TaskDeferred  #: the target can't be moved at the moment
    CONFLICT = "conflict", events.TaskConflict  #: the merge has conflicts
    ADOPT = "adopt", events.TaskLanded  #: the target already has it
    LAND = "land", events.TaskLanded  #: the target was moved
    DROP = "drop", events.TaskFailed  #: the target was rewritten without it
    FAIL_DAMAGED = "fail_damaged", events.TaskFailed  #: the record of the task is damaged
    CANCEL = "cancel", events.TaskCancelled  #: a user cancels it
    IGNORE = "ignore", events.TaskIgnored  #: a user excludes it from retries
    REQUEST_RETRY = "request_retry", events.TaskRetryRequested  #: a user retries it


_S, _T = TaskStatus, Trigger
_CANCELLABLE = (_S.PENDING, _S.AWAITING_APPROVAL, _S.PROPOSED, _S.RUNNING, _S.QUEUED, _S.CHECKING)

TRANSITIONS: Final[dict[tuple[TaskStatus, Trigger], TaskStatus]] = {
    (_S.PENDING, _T.START): _S.RUNNING,
    (_S.PENDING, _T.ADOPT): _S.LANDED,
    (_S.PENDING, _T.FAIL): _S.FAILED,
    (_S.RUNNING, _T.RETRY): _S.PENDING,
    (_S.RUNNING, _T.POSTPONE): _S.PENDING,
    (_S.RUNNING, _T.INTERRUPT): _S.PENDING,
    (_S.RUNNING, _T.FAIL): _S.FAILED,
    (_S.RUNNING, _T.FINISH_UNCHANGED): _S.NO_CHANGE,
    (_S.RUNNING, _T.BUILD): _S.QUEUED,
    (_S.RUNNING, _T.ADVANCE): _S.PENDING,
    (_S.RUNNING, _T.EXPAND): _S.PENDING,
    (_S.RUNNING, _T.REPEAT): _S.PENDING,
    (_S.RUNNING, _T.REQUEST_APPROVAL): _S.AWAITING_APPROVAL,
    (_S.RUNNING, _T.FINISH): _S.DONE,
    (_S.AWAITING_APPROVAL, _T.APPROVE): _S.PENDING,
    (_S.AWAITING_APPROVAL, _T.REJECT_RESULT): _S.PENDING,
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
    (_S.CHECKING, _T.PROPOSE): _S.PROPOSED,
    (_S.QUEUED, _T.PROPOSE): _S.PROPOSED,
    (_S.PROPOSED, _T.DEFER): _S.PROPOSED,
    (_S.PROPOSED, _T.RETRY_WORK): _S.PENDING,
    (_S.PROPOSED, _T.ADOPT): _S.LANDED,
    (_S.LANDING, _T.LAND): _S.LANDED,
    (_S.LANDING, _T.ABORT_LANDING): _S.QUEUED,
    (_S.LANDING, _T.DEFER): _S.QUEUED,
    (_S.LANDED, _T.DROP): _S.FAILED,
    (_S.RUNNING, _T.ADOPT): _S.LANDED,
    (_S.LANDING, _T.ADOPT): _S.LANDED,
    (_S.CONFLICT, _T.ADOPT): _S.LANDED,
    (_S.FAILED, _T.ADOPT): _S.LANDED,
    **{(status, _T.RETRY_WORK): _S.PENDING for status in (_S.QUEUED, _S.CHECKING)},
    (_S.QUEUED, _T.CONTINUE_WORK): _S.PENDING,
    (_S.QUEUED, _T.REBASE): _S.QUEUED,
    (_S.QUEUED, _T.WITHDRAW): _S.PENDING,
    **{(status, _T.REJECT): _S.FAILED for status in (_S.QUEUED, _S.CHECKING)},
    **{(status, _T.CANCEL): _S.CANCELLED for status in _CANCELLABLE},
    (_S.CANCELLED, _T.IGNORE): _S.CANCELLED,
    **{(status, _T.FAIL_DAMAGED): _S.FAILED for status in set(_S) - FINAL_STATUSES},
    **{(status, _T.REQUEST_RETRY): _S.PENDING for status in RETRYABLE_STATUSES},
}


def _check_reachable() -> None:
    """Raise ValueError for unreachable or invalid statuses, and for unused triggers."""
    entered = set(TRANSITIONS.values())
    left = {status for status, trigger in TRANSITIONS if trigger not in {Trigger.FAIL_DAMAGED, Trigger.CANCEL}}
    for status in TaskStatus:
        if status is not TaskStatus.PENDING and status not in entered:
            raise ValueError(f"no transition leads to the status {status}: add one to TRANSITIONS")
        if status not in left and not status.record.is_final:
            raise ValueError(f"only {Trigger.CANCEL} leads from the status {status}: add a transition to TRANSITIONS")
    for trigger in set(Trigger) - {trigger for _, trigger in TRANSITIONS}:
        raise ValueError(f"no transition has the trigger {trigger}: add one to TRANSITIONS")


_check_reachable()


def run_state(statuses: Collection[str], *, has_ended: bool, is_halted: bool, is_live: bool) -> str:
    """Return the state of a run, given the statuses of its tasks.

    `is_live` means that a process is active in it. A resumed run is no longer halted.
    """
    if has_ended:
        return "landed" if SUCCESS_STATUSES.issuperset(statuses) else "incomplete"
    if is_live:
        return "running"
    return "halted" if is_halted else "interrupted"
