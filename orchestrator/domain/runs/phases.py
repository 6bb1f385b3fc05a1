"""Phase records of a task, and the table of their transitions.

Other transitions are errors. Restarting a phase adds a record, so that the records are the full history: two records
with one name are two visits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.events import phases as events
from orchestrator.errors import InvalidTransition


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStatusRecord:
    """The properties of the status of a visit."""

    label: str
    """The label in output for users."""
    event: type[events.PhaseEvent]
    """The event that records the status."""
    is_open: bool = False
    """The visit continues with another session or a user's decision."""
    is_passed: bool = False
    """The next phase may start."""


class PhaseStatus(StrEnum):
    """The status of one visit of a phase, each with its record."""

    record: PhaseStatusRecord

    def __new__(cls, value: str, record: PhaseStatusRecord) -> Self:
        """Create a member from its value and its record."""
        member = str.__new__(cls, value)
        member._value_, member.record = value, record
        return member

    IN_PROGRESS = (
        "in_progress",
        PhaseStatusRecord(label="in progress", event=events.PhaseEntered, is_open=True),
    )
    #: Its result needs approval.
    AWAITING_APPROVAL = (
        "awaiting_approval",
        PhaseStatusRecord(label="waiting for approval", event=events.PhaseAwaitingApproval, is_open=True),
    )
    COMPLETED = "completed", PhaseStatusRecord(label="completed", event=events.PhaseCompleted, is_passed=True)
    #: A user rejected its result.
    REJECTED = "rejected", PhaseStatusRecord(label="rejected", event=events.PhaseRejected)
    FAILED = "failed", PhaseStatusRecord(label="failed", event=events.PhaseFailed)
    #: Its condition was false.
    SKIPPED = "skipped", PhaseStatusRecord(label="skipped", event=events.PhaseSkipped, is_passed=True)
    #: Its task was cancelled before it finished.
    CANCELLED = "cancelled", PhaseStatusRecord(label="cancelled", event=events.PhaseCancelled)


class PhaseTrigger(StrEnum):
    """Events that change the status of a phase."""

    ENTER = "enter"
    SKIP = "skip"
    COMPLETE = "complete"  #: its result is valid
    REQUEST_APPROVAL = "request_approval"  #: its result is valid and needs approval
    APPROVE = "approve"
    REJECT = "reject"
    FAIL = "fail"
    CANCEL = "cancel"


_S, _T = PhaseStatus, PhaseTrigger

#: A visit that does not exist yet has the status None.
PHASE_TRANSITIONS: Final[dict[tuple[PhaseStatus | None, PhaseTrigger], PhaseStatus]] = {
    (None, _T.ENTER): _S.IN_PROGRESS,
    (None, _T.SKIP): _S.SKIPPED,
    (_S.IN_PROGRESS, _T.COMPLETE): _S.COMPLETED,
    (_S.IN_PROGRESS, _T.REQUEST_APPROVAL): _S.AWAITING_APPROVAL,
    (_S.IN_PROGRESS, _T.FAIL): _S.FAILED,
    (_S.IN_PROGRESS, _T.CANCEL): _S.CANCELLED,
    (_S.AWAITING_APPROVAL, _T.APPROVE): _S.COMPLETED,
    (_S.AWAITING_APPROVAL, _T.REJECT): _S.REJECTED,
    (_S.AWAITING_APPROVAL, _T.CANCEL): _S.CANCELLED,
}

OPEN_STATUSES: Final = frozenset(status for status in PhaseStatus if status.record.is_open)
PASSED_STATUSES: Final = frozenset(status for status in PhaseStatus if status.record.is_passed)


class InputSummary(StoredDocument):
    """The values passed to a phase: names, and sizes as JSON in bytes."""

    keys: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    size: int = 0
    total_size: int = 0
    """The total size in bytes, including omitted values."""


class PhaseRecord(StoredDocument):
    """One visit of a phase. Times are wall-clock seconds."""

    phase: str
    status: PhaseStatus
    started: Instant | None = None
    ended: Instant | None = None
    attempts: tuple[int, ...] = ()
    """The numbers of its attempts."""
    inputs: InputSummary | None = None
    """The values passed to it; None: values are not filtered for it."""
    received: tuple[str, ...] = ()
    """The ids of the handoffs that it received."""
    commit: str | None = None
    """The commit with the task's work at the end of the visit, if the phase writes."""
    base: str | None = None
    """The commit that `commit` is compared with."""
    handoff: str | None = None
    """The id of its handoff."""
    verdict: str | None = None
    """For a review: `approve` or `reject`."""
    repairs: int = 0
    """The number of times that its session was asked to fix its handoff."""
    rounds: int = 0
    """The number of times that its work was sent back because `until` failed."""
    note: str | None = None
    """The comment of the user who approved or rejected it."""
    reason: str | None = None
    """The reason for its failure, rejection or omission."""


def advance_phase(subject: str, record: PhaseRecord | None, trigger: PhaseTrigger, **changes: Any) -> PhaseRecord:
    """Return a visit after `trigger`; raise InvalidTransition if impossible.

    `changes` are changes to its fields. Without a `record`, the new visit consists of `changes`, which must include
    `phase`.
    """
    before = None if record is None else record.status
    status = PHASE_TRANSITIONS.get((before, trigger))
    if status is None:
        raise InvalidTransition(subject, before or "not started", trigger)
    if record is None:
        return PhaseRecord(status=status, **changes)
    return record.model_copy(update={"status": status, **changes})
