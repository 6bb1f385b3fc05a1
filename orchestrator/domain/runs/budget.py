"""Budgets of sessions, tasks and runs, and their usage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from orchestrator.domain.runs.model import Attempt
from orchestrator.domain.settings.run_settings import Budget
from orchestrator.domain.wording import format_cost

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
    """Return the total spending of attempts; running ones count no seconds."""
    total = Spending()
    for attempt in attempts:
        seconds = attempt.duration(attempt.started)
        total += Spending(attempt.input_tokens + attempt.output_tokens, attempt.cost or 0.0, seconds)
    return total


def compute_remaining_cost(budgets: Iterable[tuple[Budget, Spending]]) -> float | None:
    """Return the US dollars left in the tightest budget; None if unlimited."""
    remaining = [budget.cost - spent.cost for budget, spent in budgets if budget.cost is not None]
    return max(min(remaining), 0.0) if remaining else None
