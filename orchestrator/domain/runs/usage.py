"""What sessions used up: time, tokens and money, as far as their CLIs told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument, sum_known_cost


@dataclass(frozen=True, slots=True)
class Usage:
    """What some sessions used up together."""

    sessions: int
    seconds: float
    """From their starts to their ends on the wall clock, one after the other; those at work by now count so far, and
    those that were cut off until they gave their last sign of life.
    """
    input_tokens: int
    output_tokens: int
    cost: float | None
    """US dollars, as far as they are known; None where they are of no session."""
    priced: int
    """Of how many of the sessions the cost is known."""
    estimated: int
    """Of how many of these it comes from the price of the model, because the CLI did not tell it."""


@dataclass(frozen=True, slots=True)
class RunUsage:
    """What a run used up, in all, by adapter and by task; only those that had a session."""

    run: str
    total: Usage
    adapters: Mapping[str, Usage]
    tasks: Mapping[str, Usage]
    budget: Mapping[str, float]
    """What the run's sessions may use up in all, as far as there are limits: `tokens`, `cost`, `time` (seconds)."""
    damaged: Sequence[str]
    """Tasks of which a newer state was recorded than can be read: of them more may have been used up."""


def compute_usage(
    run: RunDocument, tasks: Mapping[str, TaskDocument], now: float, damaged: Sequence[str] = ()
) -> RunUsage:
    """Return what a run's sessions used up by `now` (wall-clock seconds), of which some records are `damaged`."""
    by_adapter = dict[str, list[Attempt]]()
    for task in tasks.values():
        for attempt in task.attempts:
            by_adapter.setdefault(attempt.adapter, []).append(attempt)
    return RunUsage(
        run.id,
        _sum((one for attempts in by_adapter.values() for one in attempts), now),
        {name: _sum(by_adapter[name], now) for name in sorted(by_adapter)},
        {name: _sum(task.attempts, now) for name, task in tasks.items() if task.attempts},
        {key: limit for key, limit in run.budget.items() if limit is not None},
        damaged,
    )


def _sum(attempts: Iterable[Attempt], now: float) -> Usage:
    found = list(attempts)
    return Usage(
        sessions=len(found),
        # A wall clock may have been set back meanwhile.
        seconds=sum(max((now if one.ended is None else one.ended) - one.started, 0.0) for one in found),
        input_tokens=sum(one.input_tokens for one in found),
        output_tokens=sum(one.output_tokens for one in found),
        cost=sum_known_cost(found),
        priced=sum(one.cost is not None for one in found),
        estimated=sum(one.is_estimated for one in found),
    )
