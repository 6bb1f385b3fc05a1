"""Budgets and token prices."""

from __future__ import annotations

import pytest

from orchestrator.domain.runs.model import Attempt
from orchestrator.domain.runs.usage import Spending, compute_budget_usage, compute_remaining_cost, sum_spending
from orchestrator.domain.settings.run_settings import Budget, Price, find_price


def attempt(**facts: object) -> Attempt:
    return Attempt.model_validate({"number": 1, "adapter": "a", "base": "b", "started": 10.0, **facts})


def test_each_limit_is_compared_with_its_usage() -> None:
    found = {
        one.key: one for one in compute_budget_usage(Budget(tokens=100, cost=2.0, time=60.0), Spending(80, 1.5, 60.0))
    }
    assert {key: (one.is_low, one.is_exhausted) for key, one in found.items()} == {
        "tokens": (True, False),
        "cost": (False, False),
        "time": (True, True),
    }


def test_no_limits_are_never_low() -> None:
    assert list(compute_budget_usage(Budget(), Spending(10**12, 10.0**6, 10.0**9))) == []


def test_usage_includes_all_attempts_despite_clock_changes() -> None:
    done = [
        attempt(ended=15.0, input_tokens=5, output_tokens=2, cost=0.5),
        attempt(ended=4.0, input_tokens=1),
        attempt(ended=None, output_tokens=1),
    ]
    assert sum_spending(done) == Spending(9, 0.5, 5.0)


def test_tightest_budget_limits_the_next_session() -> None:
    limits = [(Budget(cost=3.0), Spending(cost=2.5)), (Budget(cost=2.0), Spending(cost=0.25)), (Budget(), Spending())]
    assert compute_remaining_cost(limits) == 0.5
    assert compute_remaining_cost([(Budget(cost=1.0), Spending(cost=4.0))]) == 0.0
    assert compute_remaining_cost([(Budget(tokens=1), Spending())]) is None


PRICES = {
    "gpt-5": Price(input=1, output=10, cached_input=0.5),
    "gpt-5-mini": Price(input=0.25, output=2),
    "local/llama": Price(input=0, output=0),
}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-5", "gpt-5"),
        ("gpt-5-2025-08-07", "gpt-5"),
        ("openai/gpt-5-mini-high", "gpt-5-mini"),
        ("local/llama", "local/llama"),
        ("gpt-55", None),
        ("gpt", None),
        (None, None),
    ],
)
def test_price_is_found_by_the_prefix_of_a_model(model: str | None, name: str | None) -> None:
    assert find_price(model, PRICES) == (None if name is None else PRICES[name])


def test_cached_tokens_have_their_own_price() -> None:
    assert PRICES["gpt-5"].cost(1_000_000, 100_000, 400_000) == pytest.approx(0.6 + 0.2 + 1.0)
    assert PRICES["gpt-5-mini"].cost(1_000_000, 0, 400_000) == pytest.approx(0.25)
