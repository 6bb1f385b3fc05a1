"""How much sessions, tasks and runs may use up, and how near to that they are. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from orchestrator.domain.runs.model import Attempt

#: The part of a limit from which on it is warned of.
WARNING_RATIO = 0.8


@dataclass(frozen=True, slots=True)
class Spending:
    """What was used up: tokens in and out, US dollars as far as they are known, seconds of sessions."""

    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Spending) -> Spending:
        """Return both together."""
        return Spending(self.tokens + other.tokens, self.cost + other.cost, self.seconds + other.seconds)


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be used up; None: without a limit. The dollars are those that are known."""

    tokens: float | None = None
    cost: float | None = None
    seconds: float | None = None

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
        return (self.tokens, self.cost, self.seconds) != (None, None, None)


@dataclass(frozen=True, slots=True)
class BudgetUsage:
    """How much of one limit is used up; `key` is what the limit is called in a file."""

    key: str
    used: float
    limit: float

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is left."""
        return self.used >= self.limit

    @property
    def is_low(self) -> bool:
        """Whether it is to be warned of."""
        return self.used >= WARNING_RATIO * self.limit

    def describe(self) -> str:
        """Return it in words."""
        match self.key:
            case "cost":
                return f"${self.used:.4f} of ${self.limit:.2f}"
            case "time":
                return f"{_shown(self.used)} of {_shown(self.limit)} of sessions"
            case _:
                return f"{self.used:,.0f} of {self.limit:,.0f} tokens"


def _shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def compute_budget_usage(budget: Budget, spent: Spending) -> Iterator[BudgetUsage]:
    """Yield how much of each limit is used up."""
    if budget.tokens is not None:
        yield BudgetUsage("tokens", spent.tokens, budget.tokens)
    if budget.cost is not None:
        yield BudgetUsage("cost", spent.cost, budget.cost)
    if budget.seconds is not None:
        yield BudgetUsage("time", spent.seconds, budget.seconds)


def sum_spending(attempts: Iterable[Attempt]) -> Spending:
    """Return what attempts that are over used up together."""
    total = Spending()
    for one in attempts:
        seconds = 0.0 if one.ended is None else max(one.ended - one.started, 0.0)
        total += Spending(one.input_tokens + one.output_tokens, one.cost or 0.0, seconds)
    return total


def compute_remaining_cost(budgets: Iterable[tuple[Budget, Spending]]) -> float | None:
    """Return how many dollars are left of the tightest budget; None where none limits them."""
    left = [budget.cost - spent.cost for budget, spent in budgets if budget.cost is not None]
    return max(min(left), 0.0) if left else None
