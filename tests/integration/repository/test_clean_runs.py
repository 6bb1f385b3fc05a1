"""`council clean --runs` removes old runs with a way to restore them; unlanded work stays."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from orchestrator.api.council import Council
from orchestrator.api.run_index import RunIndex
from orchestrator.engine.state.records import read_run
from orchestrator.errors import LeaseLost, RefusedError
from orchestrator.protocols import Commit, Guard, Key
from orchestrator.system.clock import SystemClock
from orchestrator.testing.clock import ManualClock
from tests.conftest import CommandResult, Repository
from tests.recorded_run import recorded_project

pytestmark = pytest.mark.extended_rest

DAY = 86400.0
LANDS: dict[str, Any] = {"id": "a", "prompt": "write a.txt a"}
FAILS: dict[str, Any] = {"id": "f", "prompt": "write f.txt f\nexit 1", "attempts": 1}


def run_once(repository: Repository, *tasks: dict[str, Any], failpoints: str = "") -> str:
    """Run tasks, and return the run's id."""
    repository.council("run", str(repository.configure(tasks)), failpoints=failpoints)
    return str(repository.council("status", "--json").result["run"])


@asynccontextmanager
async def later(repository: Repository, days: float) -> AsyncIterator[Council]:
    """Open the project some days from now."""
    clock = ManualClock(SystemClock().now() + days * DAY)
    async with Council.open(repository.top, clock=clock, environ=repository.environ) as council:
        yield council


async def statuses(council: Council, **wanted: Any) -> dict[str, str]:
    """Return the status of each old run's record."""
    found = await council.cleaner.find(runs=7 * DAY, **wanted)
    return {str(one.run): str(one.status) for one in found if one.kind == "run"}


async def removed(council: Council, **wanted: Any) -> list[str | None]:
    """Remove the records of old runs, and return the error of each."""
    cleaner = council.cleaner
    found = [one for one in await cleaner.find(runs=7 * DAY, **wanted) if one.kind == "run"]
    return [one.error for one in await cleaner.remove(found)]


async def documents(council: Council, run: str) -> set[str]:
    """Return the kinds of a run's existing documents."""
    return {key.kind for key in (await council.history.at(await council.history.position(), run=run)).documents}


async def test_old_runs_are_removed_and_restored(repository: Repository) -> None:
    """After 7 days and not before, by the printed commands; the restored record is equal."""
    run = run_once(repository, LANDS)
    logs = repository.top / ".council/logs" / run
    assert list(logs.iterdir())
    async with later(repository, 6.9) as council:
        assert await statuses(council) == {}
    async with later(repository, 7.1) as council:
        before = (await council.reports.summary(run)).to_json()
        assert await statuses(council) == {run: "left_over"}
        position = await council.history.position()
        assert await removed(council) == [None]
        # A checkpoint, and all documents in one commit.
        created, gone = [
            one async for one in council.history.commits(after=position, until=await council.history.position())
        ]
        checkpoint = created.events[0].data["checkpoint"]
        assert [(event.type, event.data) for event in gone.events] == [
            ("run.removed", {"run": run, "checkpoint": checkpoint})
        ]
        assert all(value is None for _, value in gone.documents.values())
        assert await documents(council, run) == {"lease", "claim", "checkpoint"}
        assert (await council.runs.ids(), logs.exists()) == ([], False)
        assert [one.id for one in await council.checkpoints.list(run)] == [checkpoint]
        with pytest.raises(RefusedError, match="there is no run"):
            await council.runs.status(run)
        assert [one.event.type async for one in council.runs.events(run, after=position)][-1] == "run.removed"
        restored = await council.checkpoints.restore(checkpoint)
        assert (restored.runs, f"run/{run}" in restored.written) == ([], True)
        after = (await council.reports.summary(run)).to_json()
        assert {**after, "events": []} == {**before, "events": []}
    await repository.assert_invariants()


async def test_unlanded_work_stays_without_force(repository: Repository) -> None:
    """Its branch: dropped, the record may be removed; forced, the branch still exists after a restore."""
    run = run_once(repository, FAILS)
    async with later(repository, 8) as council:
        assert await statuses(council) == {run: "preserved"}
        [kept] = await council.changes.preserved(run)
        assert await removed(council) == [None]  # as with --preserved
        [checkpoint] = await council.checkpoints.list(run)
        await council.checkpoints.restore(checkpoint.id)
        assert await council.changes.preserved(run) == [kept]
        await council.changes.drop([kept.name], run)
        assert await statuses(council) == {run: "left_over"}
        # A restored run can be resumed.
        assert [task.status for task in (await council.tasks.retry("f")).tasks] == ["pending"]
        assert [(task.status, task.attempts) for task in (await council.runs.resume()).tasks] == [("failed", 1)]


async def test_resumable_run_stays_without_an_option(repository: Repository) -> None:
    """An interrupted run, and one with a task to retry."""
    interrupted = run_once(repository, LANDS, failpoints="run.leader_elected=kill")
    retried = run_once(repository, FAILS)
    assert repository.council("retry", "f").code == 0
    async with later(repository, 8) as council:
        assert await statuses(council) == {interrupted: "needed", retried: "needed"}
        assert await statuses(council, include_interrupted=True) == {interrupted: "left_over", retried: "preserved"}
        found = await council.cleaner.find(runs=7 * DAY, include_interrupted=True)
        [run] = [one for one in found if (one.kind, one.run) == ("run", interrupted)]
        assert run.reason.startswith("interrupted on ")
    async with later(repository, 6) as council:
        assert await statuses(council, include_interrupted=True) == {}


async def test_restored_run_has_a_new_epoch(repository: Repository) -> None:
    """Writes under a lease from before the removal are rejected after the restore, and the task can be claimed."""
    run = run_once(repository, LANDS, failpoints="session.spawned=kill")
    claim, old = Key("claim", f"{run}/a"), 1
    async with later(repository, 8) as council:
        assert (before := await council.state.get(claim)) is not None
        assert (before.value["epoch"], before.value["released"]) == (old, None)
        assert await removed(council, include_interrupted=True) == [None]
        assert await documents(council, run) == {"lease", "claim", "checkpoint"}
        [checkpoint] = await council.checkpoints.list(run)
        assert (await council.checkpoints.restore(checkpoint.id)).runs == [run]
        assert [task.status for task in (await council.runs.resume(run)).tasks] == ["landed"]
        assert (after := await council.state.get(claim)) is not None
        assert (after.value["epoch"], after.value["released"]) == (after.version, "complete")
        with pytest.raises(LeaseLost):
            await council._context.store.commit(Commit([], [], [Guard(claim, old)]))
    await repository.assert_invariants()


async def test_active_run_is_never_removed(repository: Repository) -> None:
    """It is not listed; a run that becomes active after the list was made stays too."""
    run = run_once(repository, LANDS)
    async with later(repository, 8) as council:
        hub = await RunIndex(council._context).hub(await read_run(council._context.store, run))
        cleaner = council.cleaner
        found = [one for one in await cleaner.find(runs=7 * DAY) if one.kind == "run"]
        # The leader, and a worker that runs tasks concurrently or continues after a kill.
        for lock in (hub.run_lock(run), hub.liveness_locks.of(run, "box-1-ab12cd")):
            async with lock.hold(0):
                assert await statuses(council, include_interrupted=True) == {}
                [removal] = await cleaner.remove(found)
                assert removal.error is not None
        assert await council.runs.ids() == [run]


async def test_run_changed_since_listing_stays(repository: Repository) -> None:
    """A finished run that is retried."""
    run = run_once(repository, FAILS)
    async with later(repository, 8) as council:
        cleaner = council.cleaner
        found = [one for one in await cleaner.find(runs=7 * DAY, include_interrupted=True) if one.kind == "run"]
        await council.tasks.retry("f")
        [removal] = await cleaner.remove(found)
        assert removal.error == "it is in use again, or has changed"
        assert await council.runs.ids() == [run]


@pytest.mark.extended
async def test_killed_removal_can_be_repeated(repository: Repository) -> None:
    """With the logs gone and the record deleted, only its checkpoints, its lease and its claims are left."""
    run = run_once(repository, LANDS)
    words = ("clean", "--runs", "1ms", "--yes")
    assert repository.council(*words, failpoints="run.removed=kill").code == -signal.SIGKILL
    assert repository.council(*words, "--json").result["found"][0]["kind"] != "run"
    async with later(repository, 0) as council:
        assert await documents(council, run) == {"lease", "claim", "checkpoint"}
        assert await council._context.store.get(Key("lease", f"run/{run}")) is not None


async def test_command_lists_first(repository: Repository) -> None:
    """Without --yes and without a terminal it only lists; seven days are the default."""
    run = run_once(repository, LANDS)
    assert run not in repository.council("clean", "--runs", "--yes").stdout
    shown = repository.council("clean", "--runs", "1ms")
    assert f"run        {run}: ended on " in shown.stdout
    assert "add --yes to remove them" in shown.stdout
    assert repository.council("runs").stdout.startswith(run)
    done: CommandResult = repository.council("clean", "--runs", "1ms", "--yes", "--json")
    [facts] = [one for one in done.result["found"] if one["kind"] == "run"]
    assert (facts["name"], facts["status"], facts["removed"]) == (run, "left_over", True)
    assert facts["bytes"] > 0
    assert repository.council("runs").stdout == ""
    assert run in repository.council("checkpoint", "list").stdout
    refused = repository.council("clean", "--interrupted")
    assert (refused.code, "requires --runs" in refused.stderr) == (2, True)


async def test_record_without_a_checkpoint_is_kept(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk, which is reported."""
    async with recorded_project(repository.top, monkeypatch):
        pass
    (log,) = (repository.top / ".council/state").glob("*/*.jsonl")
    before = log.read_bytes()
    command = [sys.executable, "-m", "orchestrator.cli.main", "clean", "--runs", "1s", "--interrupted", "--yes"]
    limited = f"ulimit -f {len(before) // 512}; exec {shlex.join(command)}"
    environ = {**repository.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # it would be cut as well
    ended = subprocess.run(
        ["sh", "-c", limited], cwd=repository.top, env=environ, capture_output=True, text=True, check=False
    )
    assert "its checkpoint could not be created: free some disk space" in ended.stdout + ended.stderr
    assert log.read_bytes() == before
