"""What a run came to in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.domain.runs.model import (
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    SUCCESS_STATUSES,
    TaskDocument,
    TaskStatus,
    sum_known_cost,
)
from orchestrator.domain.scheduling.claims import ActiveTime, OrchestratorLease


@dataclass(frozen=True, slots=True)
class Metrics:
    """The figures of a run. Each task is counted once, as completed, in progress, failed or pending."""

    total_tasks: int
    completed: int
    """Landed, or done without that."""
    in_progress: int
    """In a session, built, checked, landing, or waiting for a person to approve something."""
    failed: int
    """Over without that, for whatever reason."""
    pending: int
    """Not begun, or waiting for another attempt or the next phase."""
    average_time_minutes: float | None
    """Active minutes from the first attempt's start to the landing, on average of the tasks that landed; None where
    that is known of none.
    """
    by_status: Mapping[str, int]
    """How many tasks are where; only statuses that some have."""
    input_tokens: int
    output_tokens: int
    cost: float | None
    """US dollars, as far as the CLIs told; None where none did."""


def compute_minutes_to_land(task: TaskDocument, landed_at: float | None, active: ActiveTime) -> float | None:
    """Return the active minutes from a task's first start to its landing; None where either is not known."""
    if task.status is not TaskStatus.LANDED or landed_at is None or task.started is None:
        return None
    return active.between(task.started, landed_at) / 60


def active_time(
    orchestrators: Iterable[OrchestratorLease],
    tasks: Iterable[TaskDocument],
    landed_at: Mapping[str, float],
    now: float,
) -> ActiveTime:
    """Return the active time of a run up to `now` by its records."""
    attempts = [attempt for task in tasks for attempt in task.attempts]
    ends = [attempt.ended for attempt in attempts if attempt.ended is not None]
    return ActiveTime.of(orchestrators, [*(attempt.started for attempt in attempts), *ends, *landed_at.values()], now)


def compute_metrics(tasks: Mapping[str, TaskDocument], landed_at: Mapping[str, float], active: ActiveTime) -> Metrics:
    """Return the figures of a run's tasks; `landed_at` has the instants (wall-clock seconds) of landings, by task."""
    counts = Counter(task.status for task in tasks.values())
    took = [compute_minutes_to_land(task, landed_at.get(name), active) for name, task in tasks.items()]
    known = [minutes for minutes in took if minutes is not None]
    attempts = [attempt for task in tasks.values() for attempt in task.attempts]
    pending = counts[TaskStatus.PENDING]
    over = sum(counts[status] for status in FINAL_STATUSES)
    return Metrics(
        total_tasks=len(tasks),
        completed=sum(counts[status] for status in SUCCESS_STATUSES),
        in_progress=len(tasks) - pending - over,
        failed=sum(counts[status] for status in RETRYABLE_STATUSES),
        pending=pending,
        average_time_minutes=sum(known) / len(known) if known else None,
        by_status={status.value: counts[status] for status in TaskStatus if counts[status]},
        input_tokens=sum(one.input_tokens for one in attempts),
        output_tokens=sum(one.output_tokens for one in attempts),
        cost=sum_known_cost(attempts),
    )
