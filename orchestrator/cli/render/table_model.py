"""The model of a run's live table: rows, totals, selection of rows, and remaining time. Pure."""

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
from orchestrator.repo.git.change_counts import Changes

RETRY_LABEL = "retry"
"""What waits for another attempt."""


def activity_label(task: TaskDocument, *, is_blocked: bool = False) -> str:
    """Return what a task is doing, in a word."""
    if task.status is TaskStatus.PENDING and is_blocked:
        return "blocked"
    if task.status is TaskStatus.PENDING and task.attempts and not _is_between_phases(task):
        return RETRY_LABEL
    return task.status.record.activity


def _is_between_phases(task: TaskDocument) -> bool:
    """Whether a task waits for its next phase, and not because anything has failed."""
    return bool(task.phases) and task.attempt.outcome in {"built", "completed"}


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task, as text that a terminal only shows."""

    task: str
    phase: str
    adapter: str
    attempt: str
    elapsed: str
    changes: Changes
    words: str
    stage: str = ""
    """The phase of its workflow that a session is at."""


@dataclass(frozen=True, slots=True)
class RunTotals:
    """How many tasks are where, and what all of them took; times in seconds."""

    landed: int
    running: int
    """At work: in a session, in checks, landing."""
    queued: int
    waiting: int
    blocked: int
    failed: int
    """Over without having landed or being done, for whatever reason."""
    sessions: int
    capacity: int
    changes: Changes
    tokens: int
    cost: float | None
    elapsed: float
    left: float | None
    done: int = 0
    """Over, with nothing that could land."""
    asked: int = 0
    """A person is to approve what they came to."""
    ended: Mapping[str, int] = field(default_factory=dict)
    """How many of `failed` are in each state."""


@dataclass(frozen=True, slots=True)
class TableFrame:
    """What a terminal shows at an instant; `more` counts the tasks that have no row."""

    rows: Sequence[TaskRow]
    more: str
    totals: str


@dataclass(frozen=True, slots=True)
class RemainingWork:
    """What is left to do: `build` and `land` are the seconds that a task's sessions and its landing took on average.

    `working` has for each session at work how many tasks the longest chain of needs has that begins with it, and
    how long it has been; `chain` is the longest that begins with a task that waits.
    """

    build: float
    land: float
    working: Sequence[tuple[int, float]]
    waiting: int
    landing: int
    chain: int
    capacity: int


def estimate_time_left(ahead: RemainingWork) -> float:
    """Return the seconds that what is left will take, going by what was: no less than any of three bounds.

    All sessions side by side, as many as fit; the longest chain, one after another; all landings, one at a time.
    """
    each = ahead.build + ahead.land
    rests = [max(ahead.build - elapsed, 0.0) for _, elapsed in ahead.working]
    side_by_side = (ahead.waiting * ahead.build + sum(rests)) / max(ahead.capacity, 1)
    chains = [(length - 1) * each + rest for (length, _), rest in zip(ahead.working, rests, strict=True)]
    landings = (ahead.waiting + len(ahead.working) + ahead.landing) * ahead.land
    return max(side_by_side, landings, ahead.chain * each, *chains, 0.0)


def longest_chains(entries: Mapping[str, DispatchEntry]) -> dict[str, int]:
    """Return for each task how many tasks the longest chain of needs has that begins with it."""
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
    """Return at most `limit` tasks to show: the running ones, then finished and waiting ones.

    `finished` has the newest first. It gets half of the rows that the running tasks leave, and the rows that the
    waiting tasks do not need.
    """
    chosen = list(islice(working, limit))
    rest = limit - len(chosen)
    coming = list(islice(waiting, rest))
    chosen += islice(finished, max(rest - len(coming), (rest + 1) // 2))
    return chosen + coming[: limit - len(chosen)]


def format_estimate(seconds: float) -> str:
    """Return a length of time in words, as in `about 40 s`, `about 4 min` or `about 2 h 10 min`: rounded up."""
    if seconds <= 55:
        return f"about {max(math.ceil(seconds / 5) * 5, 5)} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    minutes = math.ceil(minutes / 10) * 10
    return f"about {minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def totals_line(totals: RunTotals) -> str:
    """Return the totals as one line; what is zero and need not be told is left out."""
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
    # The capacity is that of one process, and others may be at work beside it.
    most = f" of {totals.capacity}" if totals.sessions <= totals.capacity else ""
    parts.append(f"{totals.sessions}{most} sessions")
    if totals.changes.files:
        parts.append(format_line_counts(totals.changes))
    if totals.tokens:
        parts.append(f"{format_count(totals.tokens)} tokens")
    if totals.cost is not None:
        parts.append(f"${totals.cost:.2f}")
    return " · ".join(parts)
