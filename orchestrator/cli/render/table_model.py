"""The model of the live table: rows, totals, and remaining time. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from orchestrator.cli.render.text import format_count, format_elapsed, format_line_counts
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.wording import format_cost
from orchestrator.repo.git.change_counts import Changes

RETRY_LABEL = "retry"
"""The label of tasks that wait for another attempt."""


def activity_label(task: TaskDocument, *, is_blocked: bool = False) -> str:
    """Return the current activity of a task, in one word."""
    if task.status is TaskStatus.PENDING and is_blocked:
        return "blocked"
    if task.status is TaskStatus.PENDING and task.attempts and not _is_between_phases(task):
        return RETRY_LABEL
    return task.status.record.activity


def _is_between_phases(task: TaskDocument) -> bool:
    """Return True if a task waits for its next phase, not for a retry after a failure."""
    return bool(task.phases) and task.attempt.outcome in {"built", "completed"}


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task as printable text."""

    task: str
    activity: str
    adapter: str
    attempt: str
    elapsed: str
    changes: Changes
    words: str
    phase: str = ""
    """The current phase of the task's workflow; empty if the task has none."""


@dataclass(frozen=True, slots=True)
class RunTotals:
    """The number of tasks by state, and their total usage.

    Times are in seconds, cost is in US dollars.
    """

    landed: int
    running: int
    """Tasks in a session, in checks or landing."""
    queued: int
    waiting: int
    blocked: int
    failed: int
    """Tasks that ended without success, for any reason."""
    sessions: int
    capacity: int
    changes: Changes
    tokens: int
    cost: float | None
    elapsed: float
    left: float | None
    done: int = 0
    """Successful tasks that had nothing to land."""
    asked: int = 0
    """Tasks that wait for a user's approval."""
    ended: Mapping[str, int] = field(default_factory=dict)
    """The number of tasks in `failed` by state."""


@dataclass(frozen=True, slots=True)
class TableFrame:
    """The content of the terminal at a point in time.

    `more` is a line that counts the tasks without a row.
    """

    rows: Sequence[TaskRow]
    more: str
    totals: str


@dataclass(frozen=True, slots=True)
class RemainingWork:
    """The remaining work of a run.

    `build` and `land` are the average seconds of a task's sessions and of its landing. `working` has, for each running
    session, the length of the longest dependency chain that starts with its task, and the elapsed seconds. `chain` is
    the length of the longest chain that starts with a waiting task.
    """

    build: float
    land: float
    working: Sequence[tuple[int, float]]
    waiting: int
    landing: int
    chain: int
    capacity: int


def estimate_time_left(ahead: RemainingWork) -> float:
    """Estimate the remaining seconds of a run from past averages.

    Returns the largest of three lower bounds: all sessions at full capacity, the longest dependency chain, and all
    landings one at a time.
    """
    each = ahead.build + ahead.land
    rests = [max(ahead.build - elapsed, 0.0) for _, elapsed in ahead.working]
    concurrent = (ahead.waiting * ahead.build + sum(rests)) / max(ahead.capacity, 1)
    chains = [(length - 1) * each + rest for (length, _), rest in zip(ahead.working, rests, strict=True)]
    landings = (ahead.waiting + len(ahead.working) + ahead.landing) * ahead.land
    return max(concurrent, landings, ahead.chain * each, *chains, 0.0)


def longest_chains(entries: Mapping[str, DispatchEntry]) -> dict[str, int]:
    """Return the length of the longest dependency chain that starts with each task."""
    lengths = dict.fromkeys(entries, 1)
    waiting = Counter(need for entry in entries.values() for need in set(entry.needs))
    ends = [task for task in entries if not waiting[task]]
    while ends:
        task = ends.pop()
        for need in set(entries[task].needs):
            lengths[need] = max(lengths[need], lengths[task] + 1)
            waiting[need] -= 1
            if not waiting[need]:
                ends.append(need)
    return lengths


def choose_rows(working: Iterable[str], waiting: Iterable[str], finished: Iterable[str], limit: int) -> list[str]:
    """Return at most `limit` tasks to show: running, finished and waiting ones.

    `finished` has the newest first. It gets half of the rows that the running tasks leave, and the rows that the
    waiting tasks do not need.
    """
    chosen = list(islice(working, limit))
    rest = limit - len(chosen)
    coming = list(islice(waiting, rest))
    chosen += islice(finished, max(rest - len(coming), (rest + 1) // 2))
    return chosen + coming[: limit - len(chosen)]


def format_estimate(seconds: float) -> str:
    """Return a duration, rounded up, for example `about 40 s` or `about 2 h 10 min`."""
    if seconds <= 55:
        return f"about {max(math.ceil(seconds / 5) * 5, 5)} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    minutes = math.ceil(minutes / 10) * 10
    return f"about {minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def totals_line(totals: RunTotals) -> str:
    """Return the totals as one line; omit most counts that are zero."""
    counts = {
        "landed": totals.landed,
        "done": totals.done,
        "running": totals.running,
        "queued": totals.queued,
        "waiting": totals.waiting,
        "to be approved": totals.asked,
        "blocked": totals.blocked,
        **(totals.ended or {"failed": totals.failed}),
    }
    parts = [f"{count} {name}" for name, count in counts.items() if count or name in {"landed", "running"}]
    parts.append(format_elapsed(totals.elapsed))
    if totals.left is not None:
        parts.append(f"{format_estimate(totals.left)} left")
    # The capacity is that of one process; the sessions of additional workers may exceed it.
    most = f" of {totals.capacity}" if totals.sessions <= totals.capacity else ""
    parts.append(f"{totals.sessions}{most} sessions")
    if totals.changes.files:
        parts.append(format_line_counts(totals.changes))
    if totals.tokens:
        parts.append(f"{format_count(totals.tokens)} tokens")
    if totals.cost is not None:
        parts.append(format_cost(totals.cost))
    return " · ".join(parts)
