"""Compute the active time of a run from its orchestrator leases."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain

from orchestrator.domain.runs.metrics import ActiveTime
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.claims import OrchestratorLease


def compute_active_time(
    orchestrators: Iterable[OrchestratorLease], recorded_at: Collection[float], now: float
) -> ActiveTime:
    """Return the active time of a run up to `now`.

    `recorded_at` has the times of records of the run. A killed orchestrator counts as active up to its last heartbeat
    or the last record before the next orchestrator joined, whichever is later. All times are wall-clock seconds.
    """
    leases = sorted(orchestrators, key=lambda lease: lease.since)
    spans = list[tuple[float, float]]()
    for number, lease in enumerate(leases):
        if lease.ended is not None and lease.reason is None:
            end = lease.ended
        elif lease.ended is None and now < lease.expires:
            end = now
        else:
            following = leases[number + 1].since if number + 1 < len(leases) else now
            end = max(chain([lease.heartbeat], (instant for instant in recorded_at if instant < following)))
        if spans and lease.since <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((lease.since, end))
    return ActiveTime(spans or None)


def find_last_heartbeat(orchestrators: Iterable[OrchestratorLease], started: float) -> float:
    """Return the last heartbeat of the orchestrators that were active when an attempt started, at least `started`."""
    return max([started, *(lease.heartbeat for lease in orchestrators if lease.since <= started)])


def compute_run_active_time(
    orchestrators: Iterable[OrchestratorLease],
    tasks: Iterable[TaskDocument],
    landed_at: Mapping[str, float],
    now: float,
) -> ActiveTime:
    """Return a run's active time up to `now`, given attempts and landing times."""
    attempts = [attempt for task in tasks for attempt in task.attempts]
    ends = [attempt.ended for attempt in attempts if attempt.ended is not None]
    recorded_at = [*(attempt.started for attempt in attempts), *ends, *landed_at.values()]
    return compute_active_time(orchestrators, recorded_at, now)
