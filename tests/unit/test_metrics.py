"""Run metrics: each task is counted once, and times are those of landed tasks."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.domain.runs.metrics import ActiveTime, compute_metrics, compute_minutes_to_land
from orchestrator.domain.runs.model import Attempt, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.active_time import compute_active_time
from orchestrator.domain.scheduling.claims import OrchestratorIdentity, OrchestratorLease
from orchestrator.engine.reports.run_summary import landing_times
from orchestrator.protocols import Document, Key


def task(status: TaskStatus, *starts: float, **spent: Any) -> TaskDocument:
    """Return a task with one attempt per start time."""
    attempts = tuple(
        Attempt(number=number, adapter="x", base="b", started=start, **spent) for number, start in enumerate(starts, 1)
    )
    return TaskDocument(status=status, attempts=attempts)


def test_each_status_is_counted_once() -> None:
    """Completed, in progress, failed and pending add up to the total, as documented."""
    tasks = {status.value: task(status) for status in TaskStatus}
    found = compute_metrics(tasks, {}, ActiveTime())
    assert found.completed + found.in_progress + found.failed + found.pending == found.total_tasks == len(TaskStatus)
    assert found.by_status == dict.fromkeys(TaskStatus, 1)


@pytest.mark.parametrize("status", TaskStatus)
def test_status_is_counted_by_its_record(status: TaskStatus) -> None:
    """An ended task without success has failed, whether it can be retried or not."""
    found = compute_metrics({"a": task(status)}, {}, ActiveTime())
    counts = {name: getattr(found, name) for name in ("completed", "in_progress", "failed", "pending")}
    expected = "in_progress"
    if status.record.is_final:
        expected = "completed" if status.record.is_successful else "failed"
    elif status is TaskStatus.PENDING:
        expected = "pending"
    assert [name for name, count in counts.items() if count] == [expected], f"status {status.value!r}"


def test_no_tasks_have_no_average() -> None:
    found = compute_metrics({}, {}, ActiveTime())
    assert (found.total_tasks, found.average_time_minutes, found.cost, found.by_status) == (0, None, None, {})


def test_average_is_from_first_start_to_landing() -> None:
    """Failed attempts are included; tasks without a start or a landing are not."""
    tasks = {
        "a": task(TaskStatus.LANDED, 0.0, 60.0),
        "b": task(TaskStatus.LANDED, 120.0),
        "adopted": task(TaskStatus.LANDED),
        "failed": task(TaskStatus.FAILED, 0.0),
    }
    landed_at = {"a": 180.0, "b": 180.0, "adopted": 500.0, "failed": 9_000.0}
    assert compute_metrics(tasks, landed_at, ActiveTime()).average_time_minutes == 2.0


@pytest.mark.parametrize(("landed_at", "minutes"), [(None, None), (160.0, 1.0), (50.0, 0.0)])
def test_clock_set_back_gives_no_negative_time(landed_at: float | None, minutes: float | None) -> None:
    """Negative times are zero; missing times are unknown."""
    assert compute_minutes_to_land(task(TaskStatus.LANDED, 100.0), landed_at, ActiveTime()) == minutes


def orchestrator(number: int, since: float, heartbeat: float, **facts: Any) -> OrchestratorLease:
    """Return the record of a process."""
    owner = OrchestratorIdentity(id=str(number), host="h", boot="b", pid=number, started=None)
    return OrchestratorLease(owner=owner, epoch=1, since=since, heartbeat=heartbeat, expires=heartbeat + 300, **facts)


def test_pauses_are_not_active_time() -> None:
    """A killed process was active up to its last heartbeat or record; overlaps count once."""
    processes = [
        orchestrator(2, 1_000.0, 1_060.0, ended=1_100.0),
        orchestrator(1, 0.0, 60.0, ended=1_001.0, reason="2 took over: process exited"),
        orchestrator(3, 1_050.0, 1_050.0, ended=1_090.0),
        orchestrator(4, 5_000.0, 5_000.0),
    ]
    killed = compute_active_time(processes, (), 5_010.0)
    assert killed.spans == [(0.0, 60.0), (1_000.0, 1_100.0), (5_000.0, 5_010.0)]
    assert killed.between(30.0, 1_010.0) == 40.0
    assert killed.between(1_010.0, 30.0) == 0.0
    assert compute_active_time(processes, (85.0, 1_002.0), 5_010.0).between(0.0, 999.0) == 85.0
    assert compute_active_time([orchestrator(1, 0.0, 60.0)], (), 9_000.0).between(0.0, 9_000.0) == 60.0


def test_landing_time_comes_from_the_task_document() -> None:
    """If the document was lost, the time is unknown."""
    tasks = {name: task(TaskStatus.LANDED, 0.0) for name in ("a", "lost")} | {"failed": task(TaskStatus.FAILED, 0.0)}
    documents = {name: Document(Key("task", name), 1, b"{}", 1, name == "lost", 60.0) for name in tasks}
    assert landing_times(tasks, documents) == {"a": 60.0}


def test_usage_includes_all_attempts() -> None:
    """Tokens add up; the cost is null only if no attempt reported one."""
    tasks = {
        "a": task(TaskStatus.FAILED, 0.0, 1.0, input_tokens=10, output_tokens=1, cost=0.5),
        "b": task(TaskStatus.LANDED, 0.0, input_tokens=5),
    }
    found = compute_metrics(tasks, {}, ActiveTime())
    assert (found.input_tokens, found.output_tokens, found.cost) == (25, 2, 1.0)
    assert compute_metrics({"b": tasks["b"]}, {}, ActiveTime()).cost is None
