"""Runs while the wall clock jumps by an hour, back and forth."""

from __future__ import annotations

import itertools
from typing import Any

import anyio

from orchestrator import Council
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository

HOUR = 3600.0


class JumpingClock(SystemClock):
    """The machine's clocks, with a wall clock that has another offset at each read."""

    def __init__(self, *offsets: float) -> None:
        """Take the offsets in seconds, in turn."""
        self._offsets = itertools.cycle(offsets)

    def now(self) -> float:
        """See `Clock.now`."""
        return super().now() + next(self._offsets)


async def test_run_survives_clock_jumps(repository: Repository) -> None:
    """Retries, checks, order and landings are normal, and no session times out."""
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": "write one.txt 1", "checks": ["test -e README.md"], "timeout": "60s"},
        {"id": "two", "prompt": "attempt 1 exit 1\nwrite two.txt 2", "attempts": 3, "needs": ["one"]},
        {"id": "three", "prompt": "write three.txt 3", "needs": ["two"], "owns": ["three.txt"]},
    ]
    path = repository.configure(tasks)
    with anyio.fail_after(60):
        async with Council.open(path, environ=repository.environ, clock=JumpingClock(0, HOUR, -HOUR)) as council:
            report = await council.runs.run()
    ended = [(task.id, task.status, task.attempts) for task in report.tasks]
    assert ended == [("one", "landed", 1), ("two", "landed", 2), ("three", "landed", 1)]
    await repository.assert_invariants()
