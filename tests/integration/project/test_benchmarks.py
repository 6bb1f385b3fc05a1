"""The benchmarks run; their figures are not checked here, because the machine may be busy."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmarks import (
    conflict_prediction,
    contexts,
    cycle,
    locks,
    merge_queue,
    resume,
    scheduler,
    session_commands,
    startup,
    state,
    worktrees,
)
from benchmarks.measure import BenchmarkRow, Cost, format_table, measure_cost, measure_pairs, median


def check(rows: list[BenchmarkRow], expected: list[str]) -> None:
    """Check that each expected row exists, has a figure, and is a line of the table."""
    assert [row.what for row in rows if not any(part in row.what for part in expected)] == []
    assert [part for part in expected if not any(part in row.what for row in rows)] == []
    for row in rows:
        assert math.isfinite(row.measured), row
        assert row.measured > 0, row
        assert row.ratio is None or row.ratio > 0, row
    lines = format_table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {7}


@pytest.mark.slow
def test_startup_is_measured() -> None:
    """The command's help, and a status with and without a snapshot."""
    check(startup.measure(quick=True), ["council --help", "council status", "without a snapshot"])


@pytest.mark.slow
def test_resume_is_measured() -> None:
    """Resume to the first session, and status, of a long and a short run."""
    check(resume.measure(quick=True), ["council resume", "council status"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_resume_and_status_are_flat_to_ten_thousand_tasks() -> None:
    """Neither takes twice the processor time that it takes for a thousand tasks."""
    rows = resume.measure(quick=False, rounds=3)
    assert [row.verdict for row in rows] == ["yes", "yes"], format_table(rows)
    assert all(f"{resume.TASKS[0]:,} tasks" in row.what for row in rows)


@pytest.mark.extended
def test_conflict_prediction_is_measured() -> None:
    """The processor time of all sessions, and the delay of predictions."""
    check(conflict_prediction.measure(quick=True), ["start of one session", "sessions on 50 files", "predictions"])


@pytest.mark.slow
def test_merge_queue_is_measured() -> None:
    """Runs, time and processor time, with batches and looking ahead."""
    check(merge_queue.measure(quick=True), ["runs with batches", "batches: ", "looking ahead: "])


@pytest.mark.slow
def test_session_commands_are_measured() -> None:
    """A command and the hook, compared with a Python process that does nothing."""
    check(session_commands.measure(quick=True), ["council peers", "the hook"])


@pytest.mark.slow
def test_scheduler_is_measured() -> None:
    """Picks and memory, for each shape of a run."""
    rows = scheduler.measure(quick=True)
    check(rows, ["a pick of", "whole way", "memory"])
    assert len(rows) == 3 * len(scheduler.SHAPES)


@pytest.mark.extended
def test_cycle_is_measured() -> None:
    """All tasks land both ways; wall time and CPU time are reported."""
    check(cycle.measure(quick=True), [": processor", ": clock"])


@pytest.mark.slow
def test_slot_assignment_is_measured() -> None:
    """Compared with plain git; without a limit if there are few files."""
    rows = worktrees.measure(quick=True)
    check(rows, ["acquire,", "acquire, moved", "release", "clean, in the background", "find changes"])
    assert {row.verdict for row in rows} == {""}


@pytest.mark.slow
def test_state_is_measured() -> None:
    """Both kinds of commits compared with SQLite, opening a long log, compression savings, and a shared store."""
    rows = state.measure(quick=True)
    alone = ["durable commits", "commits, 40 at once", ": processor", "opening", ", packed", "packed closed segments"]
    check(rows, [*alone, "claims by priority", "99 of 100 within", "a change seen", "a watcher at rest", "followed by"])


def test_contexts_are_measured() -> None:
    """One status update, and a scan of a hundred."""
    check(contexts.measure(quick=True), ["a status update", "a list of 100 sessions"])


@pytest.mark.slow
def test_locks_are_measured() -> None:
    """Compared with each alternative, and together with ownership."""
    check(
        locks.measure(quick=True),
        ["compared with filelock", "compared with portalocker", "compared with raw flock", "own a path"],
    )


@pytest.mark.parametrize(
    "name",
    [
        "startup",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "session_commands",
                "resume",
                "scheduler",
                "cycle",
                "state",
                "contexts",
                "locks",
                "worktrees",
            )
        ),
    ],
)
def test_each_benchmark_is_a_program(name: str) -> None:
    """It runs by its path and has a `--help`."""
    done = subprocess.run([sys.executable, f"benchmarks/{name}.py", "--help"], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"--quick" in done.stdout


def test_limits_are_absolute_or_ratios() -> None:
    assert BenchmarkRow("a", 2.0, "s", limit=1.0).verdict == "no"
    assert BenchmarkRow("a", 2.0, "s", ratio=0.5, limit=1.0, is_ratio_limited=True).verdict == "yes"
    assert BenchmarkRow("a", 2.0, "s").verdict == ""


def test_pairs_alternate() -> None:
    """Both sides are warmed up once, then measured in turn."""
    order: list[str] = []

    def side(name: str) -> Callable[[], Cost]:
        def measure() -> Cost:
            with measure_cost() as cost:
                order.append(name)
            return cost()

        return measure

    pairs = measure_pairs(side("a"), side("b"), 2)
    assert order == ["a", "b"] * 3
    assert len(pairs) == 2
    assert median([3.0, 1.0, 2.0]) == 2.0
