"""Thousands of simulated runs with faults: claims are exclusive, and each task lands exactly once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.orchestrators import FaultRates, simulate

MANY, CHUNK = 10_000, 625


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disable logging, whose records would fill the memory."""
    logger = logging.getLogger("orchestrator.claims")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.mark.parametrize(
    ("first", "seeds"),
    [
        pytest.param(0, 40, id="few"),
        *(pytest.param(n, CHUNK, marks=[pytest.mark.slow, pytest.mark.timeout(600)]) for n in range(0, MANY, CHUNK)),
    ],
)
def test_faults_of_any_kind_land_every_task_once(first: int, seeds: int) -> None:
    """Pauses longer than a lease, crashes at any step, lost acknowledgements, skewed clocks."""
    seen, takeovers = Counter[str](), 0
    for seed in range(first, first + seeds):
        outcome = simulate(seed)
        assert not outcome.violations, f"seed {seed}: {outcome.violations}"
        seen += outcome.seen
        takeovers += outcome.takeovers
    # Enough faults happened.
    assert (
        min(seen[one] for one in ("crashed", "stopped", "lost acknowledgement", "adopted", "LeaseLost")) > seeds // 20
    )
    assert takeovers > seeds


def test_faults_without_fencing_are_detected() -> None:
    """Without the guards of commits the history check finds violations."""
    found = [simulate(seed, is_fenced=False).violations for seed in range(20)]
    assert sum(map(bool, found)) >= 5
    for kind in ("wrote work/", "although it was over"):
        assert any(kind in text for one in found for text in one)


@pytest.mark.parametrize("seed", [3, 17])
def test_same_seed_gives_the_same_simulation(seed: int) -> None:
    """Including the time of each commit."""
    first, second = simulate(seed), simulate(seed)
    assert first == second
    assert first.records != simulate(seed + 1).records


def test_eight_orchestrators_without_faults_finish_forty_tasks() -> None:
    """Without takeovers and retries."""
    outcome = simulate(1, processes=8, tasks=40, fault_rates=FaultRates(0, 0, 0, 0, give_up=0, override=0))
    assert (outcome.violations, outcome.takeovers, outcome.seen) == ([], 0, Counter())
