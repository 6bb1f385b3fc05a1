"""Usage totals of sessions."""

from __future__ import annotations

import pytest

from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.usage import Usage, compute_usage
from orchestrator.domain.settings.run_settings import Budget
from orchestrator.domain.wording import format_cost

RUN = RunDocument(
    id="run",
    config="council.yaml",
    repo=".",
    is_url=False,
    base="main",
    target="main",
    capacity=1,
    session_memory=1,
    adapters={},
    tasks=(),
    start="0" * 40,
    hub="hub",
    started=0.0,
    budget=Budget(tokens=100),
)


def attempt(number: int, adapter: str, *, ended: float | None, tokens: int, cost: float | None = None) -> Attempt:
    return Attempt(
        number=number, adapter=adapter, base="0" * 40, started=100.0, ended=ended, input_tokens=tokens, cost=cost
    )


def test_sessions_count_for_adapter_and_task() -> None:
    """A task with two adapters counts for both; one that never started is not listed."""
    tasks = {
        "b": TaskDocument(
            attempts=(
                attempt(1, "x", ended=160.0, tokens=10, cost=0.25),
                attempt(2, "y", ended=130.0, tokens=5),
            )
        ),
        "a": TaskDocument(attempts=(attempt(1, "x", ended=None, tokens=1, cost=0.5),)),
        "idle": TaskDocument(),
    }
    found = compute_usage(RUN, tasks, now=107.0)
    assert found.adapters == {"x": Usage(2, 67.0, 11, 0, 0, 0.75, 2, 0), "y": Usage(1, 30.0, 5, 0, 0, None, 0, 0)}
    assert found.tasks == {"b": Usage(2, 90.0, 15, 0, 0, 0.25, 1, 0), "a": Usage(1, 7.0, 1, 0, 0, 0.5, 1, 0)}
    assert found.total == Usage(3, 97.0, 16, 0, 0, 0.75, 2, 0)


def test_clock_set_back_subtracts_nothing() -> None:
    """An end before its start counts as no time."""
    found = compute_usage(RUN, {"a": TaskDocument(attempts=(attempt(1, "x", ended=40.0, tokens=0),))}, now=0.0)
    assert found.total.seconds == 0.0


def test_run_without_sessions_has_no_usage() -> None:
    """The total exists and is zero."""
    assert compute_usage(RUN, {"a": TaskDocument()}, now=1.0).total == Usage(0, 0, 0, 0, 0, None, 0, 0)


@pytest.mark.parametrize(
    ("cost", "text"), [(0.0015, "$0.0015"), (0.5, "$0.50"), (10.0, "$10.00"), (1.001, "$1.0010"), (0.0, "$0.00")]
)
def test_cost_shows_fractions_of_a_cent(cost: float, text: str) -> None:
    """Otherwise a cheap session would seem to be free."""
    assert format_cost(cost) == text
