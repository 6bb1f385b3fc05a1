"""Usage of sessions: time, tokens and cost, as far as reported by CLIs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument, sum_known_cost
from orchestrator.domain.settings.run_settings import Budget


@dataclass(frozen=True, slots=True)
class Usage:
    """The total usage of several sessions."""

    sessions: int
    seconds: float
    """The sum of wall-clock durations; running sessions count until now, interrupted ones until the last heartbeat."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    """The part of the input that was read from a cache."""
    cost: float | None
    """US dollars, as far as known; None if no cost is known."""
    priced: int
    """The number of sessions with a known cost."""
    estimated: int
    """The number of sessions with estimated usage (`Attempt.is_estimated`)."""


@dataclass(frozen=True, slots=True)
class RunUsage:
    """Usage of a run, in total, by adapter and by task, unless it has no sessions."""

    run: str
    total: Usage
    adapters: Mapping[str, Usage]
    tasks: Mapping[str, Usage]
    budget: Budget
    """The budget of the run."""
    damaged: Sequence[str]
    """Tasks whose newest record is unreadable, with possibly incomplete usage."""


def compute_usage(
    run: RunDocument, tasks: Mapping[str, TaskDocument], now: float, damaged: Sequence[str] = ()
) -> RunUsage:
    """Return a run's usage up to `now`; `damaged` tasks have unreadable records.

    `now` is in wall-clock seconds.
    """
    by_adapter = dict[str, list[Attempt]]()
    for task in tasks.values():
        for attempt in task.attempts:
            by_adapter.setdefault(attempt.adapter, []).append(attempt)
    return RunUsage(
        run.id,
        sum_usage((attempt for attempts in by_adapter.values() for attempt in attempts), now),
        {name: sum_usage(by_adapter[name], now) for name in sorted(by_adapter)},
        {name: sum_usage(task.attempts, now) for name, task in tasks.items() if task.attempts},
        run.budget,
        damaged,
    )


def sum_usage(attempts: Iterable[Attempt], now: float) -> Usage:
    """Return the total usage of attempts' sessions up to `now`."""
    attempts = list(attempts)
    return Usage(
        sessions=len(attempts),
        seconds=sum(attempt.duration(now) for attempt in attempts),
        input_tokens=sum(attempt.input_tokens for attempt in attempts),
        output_tokens=sum(attempt.output_tokens for attempt in attempts),
        cached_tokens=sum(attempt.cached_tokens for attempt in attempts),
        cost=sum_known_cost(attempts),
        priced=sum(attempt.cost is not None for attempt in attempts),
        estimated=sum(attempt.is_estimated for attempt in attempts),
    )
