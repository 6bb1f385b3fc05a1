"""The phases of a task as they are recorded: every change of one is a row of a table; a missing row is the error.

A task enters a phase anew each time it has to be done again from its beginning, so the records tell its whole way:
those of a name that is there twice are two visits.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from orchestrator.domain.documents.times import Instant
from orchestrator.errors import InvalidTransition


class PhaseStatus(StrEnum):
    """Where one visit of a phase is."""

    IN_PROGRESS = "in_progress"
    AWAITING = "awaiting"  #: its result waits for a person to approve it
    COMPLETED = "completed"
    REJECTED = "rejected"  #: a person sent its result back
    FAILED = "failed"
    SKIPPED = "skipped"  #: its condition did not hold
    CANCELLED = "cancelled"  #: its task was, before it was over


class PhaseTrigger(StrEnum):
    """What can happen to a phase."""

    ENTER = "enter"
    SKIP = "skip"
    COMPLETE = "complete"  #: its result is there, and valid
    ASK = "ask"  #: the same, and a person is to approve it
    APPROVE = "approve"
    REJECT = "reject"
    FAIL = "fail"
    CANCEL = "cancel"


_S, _T = PhaseStatus, PhaseTrigger

#: What is not there yet has no status.
PHASE_TRANSITIONS: Final[dict[tuple[PhaseStatus | None, PhaseTrigger], PhaseStatus]] = {
    (None, _T.ENTER): _S.IN_PROGRESS,
    (None, _T.SKIP): _S.SKIPPED,
    (_S.IN_PROGRESS, _T.COMPLETE): _S.COMPLETED,
    (_S.IN_PROGRESS, _T.ASK): _S.AWAITING,
    (_S.IN_PROGRESS, _T.FAIL): _S.FAILED,
    (_S.IN_PROGRESS, _T.CANCEL): _S.CANCELLED,
    (_S.AWAITING, _T.APPROVE): _S.COMPLETED,
    (_S.AWAITING, _T.REJECT): _S.REJECTED,
    (_S.AWAITING, _T.CANCEL): _S.CANCELLED,
}

#: The event that each status is recorded with.
PHASE_EVENTS: Final[dict[PhaseStatus, str]] = {
    _S.IN_PROGRESS: "phase.entered",
    _S.AWAITING: "phase.awaiting",
    _S.COMPLETED: "phase.completed",
    _S.REJECTED: "phase.rejected",
    _S.FAILED: "phase.failed",
    _S.SKIPPED: "phase.skipped",
    _S.CANCELLED: "phase.cancelled",
}

#: Visits that go on: by another session, or by a person's word.
OPEN_STATUSES: Final = frozenset({PhaseStatus.IN_PROGRESS, PhaseStatus.AWAITING})
#: States of a visit that has its phase behind it.
PASSED_STATUSES: Final = frozenset({PhaseStatus.COMPLETED, PhaseStatus.SKIPPED})


class GivenValues(BaseModel):
    """What of all that was known a phase was given: names of values, and bytes of them as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    size: int = 0
    whole: int = 0
    """Bytes of all, those that were left out with them."""


class PhaseRecord(BaseModel):
    """One visit of a phase. Times are wall-clock seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    phase: str
    status: PhaseStatus
    started: Instant | None = None
    ended: Instant | None = None
    attempts: tuple[int, ...] = ()
    """The numbers of the attempts that were made at it."""
    given: GivenValues | None = None
    received: tuple[str, ...] = ()
    """The ids of the handoffs that it was given."""
    commit: str | None = None
    """The commit that holds the task's work up to its end, where it writes."""
    base: str | None = None
    """The commit that this is judged against."""
    handoff: str | None = None
    """The id of the handoff that came of it."""
    verdict: str | None = None
    """Of a review: `approve` or `reject`."""
    repairs: int = 0
    """How often its session was asked to mend what it handed over."""
    rounds: int = 0
    """How often its work was sent back because of what it is to be done `until`."""
    note: str | None = None
    """What the person said who approved or rejected it."""
    reason: str | None = None
    """Why it failed, was rejected or skipped."""


def advance_phase(subject: str, record: PhaseRecord | None, trigger: PhaseTrigger, **changes: Any) -> PhaseRecord:
    """Return a visit after `trigger`, with `changes` to its fields; InvalidTransition without a row.

    The first one is made of `changes` alone, `phase` among them.
    """
    before = None if record is None else record.status
    status = PHASE_TRANSITIONS.get((before, trigger))
    if status is None:
        raise InvalidTransition(subject, before or "not begun", trigger)
    if record is None:
        return PhaseRecord(status=status, **changes)
    return record.model_copy(update={"status": status, **changes})
