"""Run metrics: task counts, times, tokens and cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.domain.runs.model import TaskDocument, sum_known_cost
from orchestrator.domain.runs.statuses import FINAL_STATUSES, SUCCESS_STATUSES, UNSUCCESSFUL_STATUSES, TaskStatus


@dataclass(frozen=True, slots=True)
class ActiveTime:
    """The wall-clock times at which at least one orchestrator was active in a run."""

    spans: Sequence[tuple[float, float]] | None = None
    """In order, without overlaps; None if unknown, so that all time counts."""

    def between(self, start: float, end: float) -> float:
        """Return the active seconds from `start` to `end`; 0 if the clock was set back."""
        spans = [(start, end)] if self.spans is None else self.spans
        return sum(max(min(end, last) - max(start, first), 0.0) for first, last in spans)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics of a run; each task is completed, in progress, failed or pending."""

    total_tasks: int
    completed: int
    """Landed, or done without a landing."""
    in_progress: int
    """In a session, queued to land, in checks, landing, or waiting for approval."""
    failed: int
    """Finished without success, for any reason."""
    pending: int
    """Not started, or waiting for another attempt or the next phase."""
    average_time_minutes: float | None
    """The mean active minutes from the first start to the landing, of landed tasks; None if unknown for all."""
    by_status: Mapping[str, int]
    """Task counts by status, without zeros."""
    input_tokens: int
    output_tokens: int
    cost: float | None
    """US dollars, as far as known; None if no cost is known."""


def compute_minutes_to_land(task: TaskDocument, landed_at: float | None, active: ActiveTime) -> float | None:
    """Return active minutes from a task's first start to landing; None if unknown."""
    if task.status is not TaskStatus.LANDED or landed_at is None or task.started is None:
        return None
    return active.between(task.started, landed_at) / 60


def compute_metrics(tasks: Mapping[str, TaskDocument], landed_at: Mapping[str, float], active: ActiveTime) -> Metrics:
    """Return the metrics of a run; `landed_at` has landing times by task.

    They are wall-clock seconds.
    """
    counts = Counter(task.status for task in tasks.values())
    minutes = [compute_minutes_to_land(task, landed_at.get(name), active) for name, task in tasks.items()]
    known = [value for value in minutes if value is not None]
    attempts = [attempt for task in tasks.values() for attempt in task.attempts]
    pending = counts[TaskStatus.PENDING]
    finished = sum(counts[status] for status in FINAL_STATUSES)
    return Metrics(
        total_tasks=len(tasks),
        completed=sum(counts[status] for status in SUCCESS_STATUSES),
        in_progress=len(tasks) - pending - finished,
        failed=sum(counts[status] for status in UNSUCCESSFUL_STATUSES),
        pending=pending,
        average_time_minutes=sum(known) / len(known) if known else None,
        by_status={status.value: counts[status] for status in TaskStatus if counts[status]},
        input_tokens=sum(attempt.input_tokens for attempt in attempts),
        output_tokens=sum(attempt.output_tokens for attempt in attempts),
        cost=sum_known_cost(attempts),
    )
