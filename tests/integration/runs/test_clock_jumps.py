"""Runs while the wall clock jumps by hours, back and forth."""

from __future__ import annotations

import itertools
from typing import Any

import anyio
import pytest

from orchestrator import Council
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository
from tests.integration.runs.test_scheduler import until_event

pytestmark = pytest.mark.extended

HOUR = 3600.0


class JumpingClock(SystemClock):
    """The machine's clocks, with a wall clock that has another offset at each read."""

    def __init__(self, *offsets: float) -> None:
        """Take the offsets in seconds, in turn."""
        self._offsets = itertools.cycle(offsets)

    def now(self) -> float:
        """See `Clock.now`."""
        return super().now() + next(self._offsets)


class SettableClock(SystemClock):
    """The machine's clocks, with a wall clock that a test sets."""

    offset = 0.0
    """Seconds."""

    def now(self) -> float:
        """See `Clock.now`."""
        return super().now() + self.offset


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


@pytest.mark.parametrize("jump", [3 * HOUR, -3 * HOUR], ids=["forwards", "backwards"])
async def test_clock_jump_during_a_session_is_no_part_of_its_duration(repository: Repository, jump: float) -> None:
    """Neither of the time budgets is exhausted, and the reported usage is that of the session."""
    gate = repository.spawns.parent / "gate"
    budget = {"time": "30m"}
    task: dict[str, Any] = {"id": "t", "prompt": f"await {gate}\nwrite t.txt 1", "attempts": 1}
    path = repository.configure([{**task, "budget": budget, "session_budget": budget}], budget=budget)
    clock = SettableClock()

    async def set_clock() -> None:
        while not repository.spawns.exists():
            await anyio.sleep(0.02)
        clock.offset = jump
        await anyio.sleep(1.5)  # longer than the interval of the budget's checks
        gate.touch()

    with anyio.fail_after(60):
        async with (
            Council.open(path, environ=repository.environ, clock=clock) as council,
            anyio.create_task_group() as group,
        ):
            group.start_soon(set_clock)
            report = await council.runs.run()
            usage = await council.reports.usage(report.run)
    assert [(one.status, one.reason) for one in report.tasks] == [("landed", None)], report
    assert 1.0 < usage.total.seconds < 60, usage
    await repository.assert_invariants()


async def test_cooldown_recorded_before_the_clock_was_set_back_has_ended(repository: Repository) -> None:
    """It would last for hours more than the limit of the CLI; a small difference is another machine's clock."""
    prompt = "attempt 1 print limit reached, again in 3600 s\nattempt 1 exit 1\nwrite t.txt 1"
    failures = {"rate_limited": r"limit reached, again in (?P<seconds>\d+) s"}
    adapters = {"fake": repository.fake_adapter(failures=failures)}
    path = repository.configure([{"id": "t", "prompt": prompt}], adapters=adapters)
    clock = SettableClock()
    with anyio.fail_after(60):
        async with Council.open(path, environ=repository.environ, clock=clock) as council:
            run = await council.runs.create()
            async with anyio.create_task_group() as group:
                group.start_soon(council.runs.resume, run)
                await until_event(council, "adapter.cooling_down", 1)
                council.stop()
            clock.offset = -30.0
            [adapter] = (await council.runs.status(run)).adapters
            assert adapter.name == "fake"
            clock.offset = -3 * HOUR
            assert list((await council.runs.status(run)).adapters) == []
        async with Council.open(path, environ=repository.environ, clock=clock) as council:
            report = await council.runs.resume(run)
    assert [(one.status, one.attempts) for one in report.tasks] == [("landed", 1)], report
    await repository.assert_invariants()


async def test_peer_whose_clock_is_hours_ahead_takes_over_no_live_task(repository: Repository) -> None:
    """Its clock jumps while both are active: the owner's heartbeats continue, so both keep their tasks."""
    gate = repository.spawns.parent / "gate"
    tasks: list[dict[str, Any]] = [{"id": name, "prompt": f"await {gate}\nwrite {name}.txt x"} for name in "ab"]
    quick = {"heartbeat_interval": "200ms", "stale_after": "1s", "stale_check_interval": "200ms"}
    path = repository.configure(tasks, capacity=1, coordination=quick)
    clock = SettableClock()
    with anyio.fail_after(90):
        async with (
            Council.open(path, environ=repository.environ) as owner,
            Council.open(path, environ=repository.environ, clock=clock) as peer,
            anyio.create_task_group() as group,
        ):
            run = await owner.runs.create()
            group.start_soon(owner.runs.resume, run)
            await until_event(owner, "task.started", 1)
            group.start_soon(peer.runs.work, run)
            await until_event(owner, "task.started", 2)
            for offset in (3 * HOUR, -3 * HOUR):
                clock.offset = offset
                await anyio.sleep(2.5)  # longer than `stale_after`
            gate.touch()
        async with Council.open(path, environ=repository.environ) as council:
            report = await council.runs.status(run)
    assert [(one.status, one.attempts) for one in report.tasks] == [("landed", 1)] * 2, report
    assert report.claims.takeovers == 0
    await repository.assert_invariants()
