"""The scheduler on a clock that the test drives: hours of waiting in seconds."""

from __future__ import annotations

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository

HOUR = 3600.0


async def until_event(council: Council, name: str, count: int) -> None:
    """Wait until an event has happened that many times in the project."""
    seen = 0
    async for record in council.history.follow(0):
        seen += sum(event.type == name for event in record.events)
        if seen >= count:
            return


async def test_backoff_waits_on_the_clock(repository: Repository) -> None:
    """A failed task is retried exactly when its backoff ends, however long that is."""
    path = repository.configure(
        [{"id": "late", "prompt": "attempt 1 exit 1\nattempt 2 exit 1\nwrite late.txt x"}],
        defaults={"backoff": {"initial": "1h", "factor": 3, "max": "2h", "jitter": False}},
    )
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()
        reports: list[RunReport] = []

        async def execute() -> None:
            reports.append(await council.runs.resume(run))

        async with anyio.create_task_group() as group:
            group.start_soon(execute)
            await until_event(council, "task.retrying", 1)
            await clock.wait_until_awaited(HOUR)
            clock.advance(HOUR - 1)
            await anyio.wait_all_tasks_blocked()
            assert (await council.runs.status(run)).tasks[0].attempts == 1
            clock.advance(1)
            await until_event(council, "task.retrying", 2)
            await clock.wait_until_awaited(3 * HOUR)
            clock.advance(2 * HOUR)
    assert reports[0].status is RunStatus.LANDED
    assert reports[0].tasks[0].attempts == 3
    await repository.assert_invariants()


async def test_dirty_target_is_retried_while_sessions_run(repository: Repository) -> None:
    """A landing blocked by user changes is made as soon as they are gone, without a resume."""
    path = repository.configure(
        [{"id": "quick", "prompt": "write quick.txt q"}, {"id": "long", "prompt": "hang", "attempts": 1}]
    )
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()
        (repository.top / "README.md").write_text("mine\n")
        async with anyio.create_task_group() as group:
            group.start_soon(council.runs.resume, run)
            await until_event(council, "task.deferred", 1)
            repository.git("checkout", "--", "README.md")
            await anyio.wait_all_tasks_blocked()
            clock.advance(30)
            await until_event(council, "task.landed", 1)
            council.stop()
    assert (repository.top / "quick.txt").exists()
    await repository.assert_invariants()


@pytest.mark.extended
async def test_dirty_target_and_backoff_end(repository: Repository) -> None:
    """While a landing waits for the user and another task for its backoff, the run still ends."""
    path = repository.configure(
        [{"id": "built", "prompt": "write b.txt b"}, {"id": "failing", "prompt": "exit 1", "attempts": 2}],
        defaults={"backoff": {"initial": "9s", "max": "9s", "jitter": False}},
    )
    (repository.top / "README.md").write_text("mine\n")
    ended = repository.council("run", str(path), "--json", "--allow-deferred", timeout=60)
    assert (ended.code, ended.states) == (1, {"built": "queued", "failing": "failed"})
