"""Phase records, by their table."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.domain.runs.phases import (
    OPEN_STATUSES,
    PHASE_TRANSITIONS,
    PhaseRecord,
    PhaseStatus,
    PhaseTrigger,
    advance_phase,
)
from orchestrator.errors import InvalidTransition

#: The transitions of a visit, defined independently of the table under test.
_LEADS = {
    (None, "enter"): "in_progress",
    (None, "skip"): "skipped",
    ("in_progress", "complete"): "completed",
    ("in_progress", "request_approval"): "awaiting_approval",
    ("in_progress", "fail"): "failed",
    ("in_progress", "cancel"): "cancelled",
    ("awaiting_approval", "approve"): "completed",
    ("awaiting_approval", "reject"): "rejected",
    ("awaiting_approval", "cancel"): "cancelled",
}


@pytest.mark.parametrize(("status", "trigger"), [*itertools.product([None, *PhaseStatus], PhaseTrigger)])
def test_transition_exists_for_expected_pairs_only(status: PhaseStatus | None, trigger: PhaseTrigger) -> None:
    """A row has its target status and keeps the records; a missing row raises and names both statuses."""
    record = None if status is None else PhaseRecord(phase="plan", status=status, started=1.0, attempts=(2,))
    if (status, trigger) in _LEADS:
        changes = {"phase": "plan"} if record is None else {"ended": 5.0}
        after = advance_phase("phase 'plan'", record, trigger, **changes)
        assert after.status == _LEADS[status, trigger]
        assert record is None or (after.started, after.attempts, after.ended) == (1.0, (2,), 5.0)
    else:
        with pytest.raises(InvalidTransition) as raised:
            advance_phase("phase 'plan'", record, trigger, phase="plan")
        assert (raised.value.state, raised.value.trigger) == (status or "not started", trigger)


def test_each_transition_is_expected_and_each_status_reached() -> None:
    """The table has no other rows; ended visits stay ended, open ones do not."""
    assert PHASE_TRANSITIONS == _LEADS
    assert set(PHASE_TRANSITIONS.values()) == set(PhaseStatus)
    assert {status for status, _ in PHASE_TRANSITIONS if status is not None} == OPEN_STATUSES
