"""Status records: an incomplete or contradictory one fails when it is defined."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from orchestrator.domain.runs.phases import OPEN_STATUSES, PASSED_STATUSES, PhaseStatus
from orchestrator.domain.runs.statuses import (
    CLAIMED_STATUSES,
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    SUCCESS_STATUSES,
    UNSUCCESSFUL_STATUSES,
    ReleaseReason,
    StatusRecord,
    TaskStatus,
)

PROPERTIES: dict[str, Any] = {
    "label": "x",
    "activity": "x",
    "style": "",
    "release": ReleaseReason.FAILED,
    "waits_for_user": False,
    "plain_phase": PhaseStatus.FAILED,
    "next_steps": (),
    "is_final": True,
}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"is_successful": True, "is_final": False}, "status 'x' is successful and not final"),
        ({"is_retryable": True, "is_final": False}, "status 'x' is retryable: set `is_final=True`, and omit"),
        ({"is_retryable": True, "is_successful": True}, "status 'x' is retryable"),
        ({"release": None}, "status 'x' is final and keeps the claim: set `release`"),
        ({"is_active": True}, "status 'x' is active without a claim: set `release=None`"),
        ({"is_landing": True}, "status 'x' is active without a claim: set `release=None`"),
        ({"is_final": False, "release": None}, "status 'x' keeps the claim: set `is_active` or `is_landing`"),
        ({"waits_for_user": True, "is_final": False, "release": None}, "waits for a user and is final or keeps"),
        ({"waits_for_user": True}, "status 'x' waits for a user and is final or keeps the claim"),
        ({"waits_for_user": True, "is_final": False}, "list the commands to continue in `next_steps`"),
        ({"is_successful": True}, "status 'x' is successful: set `release=ReleaseReason.COMPLETE`"),
        ({"is_final": False}, "status 'x' is not final: set `release=ReleaseReason.ABANDONED`"),
        ({"is_retryable": True}, "must name `council retry {}` in `next_steps` exactly if `is_retryable` is set"),
        ({"next_steps": (("next", "council retry {}"),)}, "must name `council retry {}` in `next_steps` exactly if"),
        ({"next_steps": (("or", "council show {}"),)}, "has `next_steps` that do not begin with `next`"),
        ({"next_steps": (("next", "council show"),)}, "has `next_steps` that are not commands with `{}`"),
    ],
)
def test_status_record_with_contradiction_raises_value_error(changes: dict[str, Any], error: str) -> None:
    """The message names the status and the mistake."""
    with pytest.raises(ValueError, match=re.escape(error)):
        StatusRecord(**PROPERTIES | changes)


@pytest.mark.parametrize("name", [name for name in PROPERTIES if name != "is_final"])
def test_status_record_without_required_property_raises_type_error(name: str) -> None:
    """None of them has a default that a new status could get by accident."""
    with pytest.raises(TypeError, match=name):
        StatusRecord(**{key: value for key, value in PROPERTIES.items() if key != name})


def test_status_release_reason_of_claimed_task_raises_value_error() -> None:
    """All other statuses need one."""
    for status in TaskStatus:
        if status in CLAIMED_STATUSES:
            with pytest.raises(ValueError, match="keeps its claim"):
                _ = status.release_reason
        else:
            assert isinstance(status.release_reason, ReleaseReason)


def test_final_statuses_are_successful_or_unsuccessful() -> None:
    """A status that can be retried is unsuccessful; an unsuccessful one may have no retry."""
    assert FINAL_STATUSES == SUCCESS_STATUSES | UNSUCCESSFUL_STATUSES
    assert not SUCCESS_STATUSES & UNSUCCESSFUL_STATUSES
    assert RETRYABLE_STATUSES <= UNSUCCESSFUL_STATUSES


def test_phase_statuses_are_open_passed_or_ended() -> None:
    """No status is both open and passed, and each has its own event."""
    assert not OPEN_STATUSES & PASSED_STATUSES
    assert len({status.record.event for status in PhaseStatus}) == len(PhaseStatus)


_WITHOUT_RETRY = """
from orchestrator.domain.runs import statuses
from orchestrator.domain.runs.statuses import TaskStatus

statuses.RETRYABLE_STATUSES -= {TaskStatus.CONFLICT}  # before other modules import it

from orchestrator.domain.runs.metrics import ActiveTime, compute_metrics
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry

entries = {"a": DispatchEntry(), "b": DispatchEntry(("a",))}
board = DispatchBoard.of(entries, {"a": TaskStatus.CONFLICT, "b": TaskStatus.PENDING})
assert board.choose_tasks(9, 0.0) == [], "it starts again after a restart"
board.sync_task("a", TaskStatus.CONFLICT, 0.0)
assert board.choose_tasks(9, 0.0) == [], "it starts again after a change by another process"
assert board.blocked == {"b": "a"}, board.blocked
assert compute_metrics({"a": TaskDocument(status=TaskStatus.CONFLICT)}, {}, ActiveTime()).failed == 1
"""


def test_unsuccessful_status_without_retry_blocks_dependents_and_counts_as_failed() -> None:
    """Its own process, in which no module has seen that the status can be retried."""
    subprocess.run([sys.executable, "-c", _WITHOUT_RETRY], check=True)


_WITH_PAUSED = """
import pathlib
from orchestrator.domain.runs import statuses

source = pathlib.Path(statuses.__file__).read_text()
paused = '    PAUSED = "paused", StatusRecord(label="paused", activity="paused", style="",'
paused += ' release=ReleaseReason.ABANDONED, waits_for_user=True, plain_phase=PhaseStatus.IN_PROGRESS,'
paused += ' next_steps=(("next", "council show {}"), ("then", "council approve {}")))'
source = source.replace("    RUNNING = ", paused + "\\n    RUNNING = ", 1)
ask = "_T.REQUEST_APPROVAL"
rows = f"    (_S.RUNNING, {ask}): _S.PAUSED, (_S.PENDING, {ask}): _S.AWAITING_APPROVAL, ROW\\n"
source = source.replace(f"    (_S.RUNNING, {ask}): _S.AWAITING_APPROVAL,\\n", rows, 1)
"""

_SCHEDULED = """
exec(compile(source.replace("ROW", "(_S.PAUSED, _T.APPROVE): _S.PENDING,"), "statuses", "exec"), vars(statuses))
from orchestrator.cli.live.model import _USER_ACTIVITIES
from orchestrator.cli.live.session_activity import _SESSION_ENDED
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry
from orchestrator.engine.reports.task_details import _plain_visit
from orchestrator.domain.runs.model import Attempt

PAUSED = statuses.TaskStatus.PAUSED
entries = {"a": DispatchEntry(owns=("x",)), "b": DispatchEntry(owns=("x",))}
board = DispatchBoard.of(entries, {"a": PAUSED})
assert board.choose_tasks(9, 0.0) == ["b"], "it owns its paths or starts"
board = DispatchBoard(entries)
board.sync_task("a", PAUSED, 0.0)
assert board.choose_tasks(9, 0.0) == ["b"], "it owns its paths or starts after a change by another process"
assert "paused" in _USER_ACTIVITIES and PAUSED in _SESSION_ENDED
attempt = Attempt(number=1, adapter="x", started=1.0, base="0" * 40)
assert _plain_visit(TaskDocument(status=PAUSED, attempts=(attempt,)), [attempt], 2.0).status == "in_progress"
"""

_WITHOUT_EXIT = """
try:
    exec(compile(source.replace("ROW", ""), "statuses", "exec"), vars(statuses))
except ValueError as error:
    assert "only cancel leads from the status paused" in str(error), error
else:
    raise AssertionError("a status that a task can leave only by `cancel` is accepted")
"""

_WITHOUT_RECORD = """
source = source.replace(paused, '    PAUSED = "paused"').replace("ROW", "")
try:
    exec(compile(source, "statuses", "exec"), vars(statuses))
except TypeError as error:
    assert "status 'paused' has no record" in str(error), error
else:
    raise AssertionError("a status without a record is accepted")
"""


@pytest.mark.parametrize("script", [_SCHEDULED, _WITHOUT_EXIT, _WITHOUT_RECORD])
def test_new_status_is_scheduled_by_its_record_or_rejected(script: str) -> None:
    """Its own process adds the status to the module's source, before other modules import it."""
    subprocess.run([sys.executable, "-c", _WITH_PAUSED + script], check=True)
