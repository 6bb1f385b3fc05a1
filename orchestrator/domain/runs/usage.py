"""Usage of sessions: time, tokens and cost, as far as reported by CLIs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument, sum_known_cost
from orchestrator.domain.settings.run_settings import Budget
from orchestrator.domain.wording import format_cost


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


#: The fraction of a limit above which a warning is shown.
WARNING_RATIO = 0.8


@dataclass(frozen=True, slots=True)
class Spending:
    """Input and output tokens, known cost in US dollars, and session seconds."""

    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Spending) -> Spending:
        """Return the sum."""
        return Spending(self.tokens + other.tokens, self.cost + other.cost, self.seconds + other.seconds)


@dataclass(frozen=True, slots=True)
class BudgetUsage:
    """The usage of one limit; `key` is its name in the config file."""

    key: str
    used: float
    limit: float

    @property
    def is_exhausted(self) -> bool:
        """Whether the limit is reached."""
        return self.used >= self.limit

    @property
    def is_low(self) -> bool:
        """Whether the limit is almost reached, which causes a warning."""
        return self.used >= WARNING_RATIO * self.limit

    def describe(self) -> str:
        """Return the usage as text."""
        match self.key:
            case "cost":
                return f"{format_cost(self.used)} of {format_cost(self.limit)}"
            case "time":
                return f"{_format_seconds(self.used)} of {_format_seconds(self.limit)} of session time"
            case _:
                return f"{self.used:,.0f} of {self.limit:,.0f} tokens"


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def compute_budget_usage(budget: Budget, spent: Spending) -> Iterator[BudgetUsage]:
    """Yield the usage of each limit."""
    used = {"tokens": spent.tokens, "cost": spent.cost, "time": spent.seconds}
    yield from (BudgetUsage(key, used[key], limit) for key, limit in budget.limits.items())


def sum_spending(attempts: Iterable[Attempt]) -> Spending:
    """Return the total spending of attempts; running ones add no time."""
    total = Spending()
    for attempt in attempts:
        seconds = attempt.duration(attempt.started)
        total += Spending(attempt.input_tokens + attempt.output_tokens, attempt.cost or 0.0, seconds)
    return total


def compute_remaining_cost(budgets: Iterable[tuple[Budget, Spending]]) -> float | None:
    """Return the US dollars left in the tightest budget; None if unlimited."""
    remaining = [budget.cost - spent.cost for budget, spent in budgets if budget.cost is not None]
    return max(min(remaining), 0.0) if remaining else None
