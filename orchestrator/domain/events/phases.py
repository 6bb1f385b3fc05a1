"""Events of the phases of workflows, and of handoffs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.domain.events.base import Shown, TaskEvent


class PhaseEvent(TaskEvent, is_base=True, prefix="phase"):
    """Base of the events of a visit of a phase."""

    phase: str
    visit: int
    """The number of this visit of the phase, starting at 1."""
    handoff: str = ""
    """The id of the phase's handoff, if any."""
    verdict: str = ""
    """For a review: `approve` or `reject`."""
    reason: str = ""
    """The reason for the failure, rejection or omission of the phase."""


class PhaseEntered(PhaseEvent):
    """A phase of the task's workflow started, for the first time or again."""

    type = "phase.entered"
    sentence = "phase {phase} started"


class PhaseAwaitingApproval(PhaseEvent):
    """The result of the phase waits for approval."""

    type = "phase.awaiting_approval"
    sentence = "phase {phase} waits for approval"


class PhaseCompleted(PhaseEvent):
    """The phase is complete."""

    type = "phase.completed"
    sentence = "phase {phase} completed"


class PhaseRejected(PhaseEvent):
    """A user rejected the result of the phase."""

    type = "phase.rejected"
    sentence = "phase {phase} rejected: {reason}"
    shown = Shown.NEVER


class PhaseFailed(PhaseEvent):
    """The phase failed."""

    type = "phase.failed"
    sentence = "phase {phase} failed"


class PhaseSkipped(PhaseEvent):
    """The condition of the phase was false."""

    type = "phase.skipped"
    sentence = "phase {phase} skipped: {reason}"


class PhaseCancelled(PhaseEvent):
    """The task was cancelled during the phase."""

    type = "phase.cancelled"
    sentence = "phase {phase} cancelled"


class HandoffSubmitted(TaskEvent):
    """A phase submitted a handoff."""

    type = "handoff.submitted"
    sentence = "phase {phase} submitted a handoff"
    shown = Shown.NEVER

    handoff: str
    """The id of the handoff."""
    kind: str
    protocol: str
    phase: str
    to: str | None
    """The phase that receives the handoff; null if no phase follows."""
    digest: str
    via: str
    """`file`, `tool` or `message`."""


class HandoffReceived(TaskEvent):
    """A phase received a handoff intact."""

    type = "handoff.received"
    sentence = "phase {phase} received a handoff"
    shown = Shown.NEVER

    handoff: str
    """The id of the handoff."""
    phase: str
    digest: str


class HandoffInvalid(TaskEvent):
    """The handoff of a phase was invalid and must be corrected."""

    type = "handoff.invalid"
    sentence = "invalid handoff from phase {phase}"

    phase: str
    violations: Sequence[Mapping[str, Any]]
    """Each with `rule`, `location`, `message` and `remedy`."""
