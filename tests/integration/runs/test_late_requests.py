"""Requests that arrive while an ended attempt is processed or while its work is checked."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.domain.runs.model import RequestAction
from orchestrator.engine.reports.report import RunReport
from orchestrator.sessions.session import Session
from tests.conftest import CommandResult, Repository
from tests.integration.runs.test_scheduler import until_event
from tests.waiting import wait_for


async def states_after_request(
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    tasks: list[dict[str, Any]],
    end: str,
    action: RequestAction,
) -> dict[str, str]:
    """Run tasks and request `action` for `t` when its first end is recorded but its worktree not yet removed."""
    may_remove = anyio.Event()

    release = Session.release

    async def release_later(session: Session, *, saved: bool) -> None:
        await may_remove.wait()
        await release(session, saved=saved)

    monkeypatch.setattr(Session, "release", release_later)
    path = repository.configure(tasks)
    reports: list[RunReport] = []
    async with Council.open(path, environ=repository.environ) as council:
        run = await council.runs.create()

        async def execute(council: Council) -> None:
            reports.append(await council.runs.resume(run))

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(execute, council)
                await until_event(council, end, 1)
                group.start_soon(council.tasks.cancel if action is RequestAction.CANCEL else council.tasks.retry, "t")
                await until_event(council, "request.completed", 1)
                may_remove.set()
    await repository.assert_invariants()
    return {task.id: task.status for task in reports[0].tasks}


@pytest.mark.extended
async def test_retry_right_after_an_attempt_is_performed(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same run; the tasks that it blocked continue."""
    tasks: list[dict[str, Any]] = [
        {"id": "t", "prompt": "attempt 1 exit 1\nwrite t.txt x", "attempts": 1},
        {"id": "after", "prompt": "write a.txt x", "needs": ["t"]},
    ]
    states = await states_after_request(repository, monkeypatch, tasks, "task.failed", RequestAction.RETRY)
    assert states == {"t": "landed", "after": "landed"}


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("prompt", "end"), [("write t.txt x", "task.queued"), ("attempt 1 exit 1\nwrite t.txt x", "task.retrying")]
)
async def test_cancel_right_after_an_attempt_is_performed(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, prompt: str, end: str
) -> None:
    """Finished work does not land, and a failed attempt is not retried."""
    tasks: list[dict[str, Any]] = [
        {"id": "t", "prompt": prompt},
        {"id": "after", "prompt": "write a.txt x", "needs": ["t"]},
    ]
    states = await states_after_request(repository, monkeypatch, tasks, end, RequestAction.CANCEL)
    assert states == {"t": "cancelled", "after": "blocked"}


@pytest.mark.extended
async def test_task_cancelled_during_its_checks_lands_after_a_retry(repository: Repository) -> None:
    begun, free = (repository.spawns.parent / name for name in ("begun", "free"))
    tasks: list[dict[str, Any]] = [
        {
            "id": "t",
            "prompt": "write t.txt x",
            "allow_failing_base": True,
            "checks": [f"touch {begun}; test -e {free} || sleep 600"],
        },
        {"id": "long", "prompt": "hang"},
    ]
    path = repository.configure(tasks, writable=[str(repository.spawns.parent)])
    child = repository.start("run", str(path), "--json")
    wait_for(begun.exists)
    assert repository.council("cancel", "t").code == 0
    wait_for(lambda: repository.council("status", "--json").states["t"] == "cancelled")
    free.touch()
    assert repository.council("retry", "t").code == 0
    wait_for(lambda: repository.council("status", "--json").states["t"] == "landed")
    assert repository.council("cancel", "long").code == 0
    stdout, stderr = child.communicate(timeout=60)
    assert CommandResult(child.returncode, stdout, stderr).states == {"t": "landed", "long": "cancelled"}
    await repository.assert_invariants()
