"""Status records: an incomplete or contradictory one fails when it is defined."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.domain.runs.phases import OPEN_STATUSES, PASSED_STATUSES, PhaseStatus
from orchestrator.domain.runs.statuses import (
    CLAIMED_STATUSES,
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    SUCCESS_STATUSES,
    ReleaseReason,
    StatusRecord,
    TaskStatus,
)

PROPERTIES: dict[str, Any] = {"label": "x", "activity": "x", "style": "", "release": ReleaseReason.FAILED}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"is_successful": True}, "status 'x' is successful and not final"),
        ({"is_final": True, "release": None}, "status 'x' is final and keeps the claim: give it a `release`"),
        ({"is_active": True}, "status 'x' is active without a claim: set `release=None`"),
        ({"is_landing": True}, "status 'x' is active without a claim: set `release=None`"),
    ],
)
def test_status_record_with_contradiction_raises_value_error(changes: dict[str, Any], error: str) -> None:
    """The message names the status and the mistake."""
    with pytest.raises(ValueError, match=error):
        StatusRecord(**PROPERTIES | changes)


def test_status_release_reason_of_claimed_task_raises_value_error() -> None:
    """All other statuses need one."""
    for status in TaskStatus:
        if status in CLAIMED_STATUSES:
            with pytest.raises(ValueError, match="keeps its claim"):
                _ = status.release_reason
        else:
            assert isinstance(status.release_reason, ReleaseReason)


def test_retryable_statuses_name_the_command() -> None:
    """Each unsuccessful final status can be retried and says how."""
    assert FINAL_STATUSES == RETRYABLE_STATUSES | SUCCESS_STATUSES
    for status in RETRYABLE_STATUSES:
        assert any(command == "council retry {}" for _, command in status.record.next_steps), status


def test_phase_statuses_are_open_passed_or_ended() -> None:
    """No status is both open and passed, and each has its own event."""
    assert not OPEN_STATUSES & PASSED_STATUSES
    assert len({status.record.event for status in PhaseStatus}) == len(PhaseStatus)
