"""Show the merge queue from another process; hold, release and bump its tasks."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.protocols import Guard
from tests.conftest import CommandResult, Repository
from tests.integration.landing.test_merge_queue import CheckLog, events, landed, queue
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest


@pytest.fixture
def log(tmp_path: Path) -> CheckLog:
    return CheckLog(tmp_path / "checks")


def shown(repository: Repository) -> dict[str, dict[str, Any]]:
    """Return the merge queue by task, as another process prints it."""
    return {one["task"]: one for one in repository.council("queue", "--json").result["queue"]}


def gated(log: CheckLog) -> str:
    """Return a check that ends once a file `go` exists."""
    return log.command(f"while ! test -e {log.folder}/go; do sleep 0.02; done")


async def test_queue_shows_the_merges_that_another_process_checks(repository: Repository, log: CheckLog) -> None:
    """The second merge contains the first task; the last one waits outside of the window."""
    queue(repository, log, ["a", "b", "c"], gated(log), capacity=2, merge={"window": 2})
    assert "no process is active" in shown(repository)["t0"]["reason"]
    child = repository.start("resume", "--json")
    found = wait_for(lambda: found if (found := shown(repository)).get("t1", {}).get("check") else None)
    assert found is not None
    assert [(name, one["position"], one["status"]) for name, one in found.items()] == [
        ("t0", 1, "checking"),
        ("t1", 2, "queued"),
        ("t2", 3, "queued"),
    ]
    first, second = found["t0"]["check"], found["t1"]["check"]
    assert (first["onto"], first["ahead"], first["state"]) == (repository.git("rev-parse", "main"), [], "running")
    assert (second["onto"], second["ahead"], second["state"]) == (first["commit"], ["t0"], "running")
    assert (found["t2"]["check"], found["t2"]["reason"]) == (None, "it waits for t0, t1 to land")
    text = repository.council("queue").stdout
    assert f"on {first['commit'][:10]} with t0, running since" in text
    (log.folder / "go").touch()
    child.communicate(timeout=60)
    assert child.returncode == 0
    assert repository.council("queue").stdout == "no tasks are queued to land\n"


async def test_task_held_during_its_check_lands_only_after_its_release(repository: Repository, log: CheckLog) -> None:
    """The hold is requested while another process checks the task; the next task lands, and the run waits."""
    queue(repository, log, ["a", "b"], gated(log), capacity=1)
    child = repository.start("resume", "--json")
    wait_for(lambda: shown(repository).get("t0", {}).get("status") == "checking")
    held = repository.council("queue", "hold", "t0", "--reason", "not now", "--json")
    assert held.code == 0, held
    assert held.result["tasks"][0]["reason"] == ("held by a user: not now; `council queue release t0` lets it land"), (
        held
    )
    again = repository.council("queue", "hold", "t0", "--json")
    assert again.result["tasks"][0]["reason"] == held.result["tasks"][0]["reason"], "the first reason stays"
    (log.folder / "go").touch()
    wait_for(lambda: landed(repository) == ["Land t1"])
    found = wait_for(lambda: found if list(found := shown(repository)) == ["t0"] else None)
    assert found is not None
    assert (found["t0"]["held"], found["t0"]["status"]) == (True, "queued")
    assert child.poll() is None
    assert repository.council("queue", "release", "t0").code == 0
    stdout, stderr = child.communicate(timeout=60)
    ended = CommandResult(child.returncode, stdout, stderr)
    assert ended.states == {"t0": "landed", "t1": "landed"}, ended
    assert landed(repository) == ["Land t1", "Land t0"]
    assert [one["held"] for one in events(ended, "run.waiting")] == [["t0"]]
    assert [one["reason"] for one in events(ended, "task.held")] == ["not now"]
    await repository.assert_invariants()


async def test_hold_and_bump_survive_a_kill(repository: Repository, log: CheckLog) -> None:
    """Without a process, the commands record them; the killed process and the next one apply them."""
    queue(repository, log, ["a", "b", "c"], log.command(), capacity=1)
    held = repository.council("queue", "hold", "t0")
    assert (held.code, "t0 is held until `council queue release t0`\n" in held.stdout + held.stderr) == (0, True), held
    assert repository.council("queue", "bump", "t2").code == 0
    assert list(shown(repository)) == ["t2", "t1", "t0"]
    assert repository.council("resume", failpoints="landing.pushed=kill").code == -signal.SIGKILL
    child = repository.start("resume", "--json")
    wait_for(lambda: list(shown(repository)) == ["t0"])
    assert landed(repository) == ["Land t2", "Land t1"]
    assert repository.council("queue", "release", "t0").code == 0
    child.communicate(timeout=60)
    assert landed(repository) == ["Land t2", "Land t1", "Land t0"]
    await repository.assert_invariants()


async def test_task_held_when_its_intent_is_recorded_is_not_moved(
    repository: Repository, log: CheckLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holds are read after the intent is recorded, so that none is lost between the two."""
    queue(repository, log, ["a"], log.command(), capacity=1)
    change, holds = Ledger.change_all, ["t0"]

    async def held_next(ledger: Ledger, updates: Mapping[str, TaskUpdate], permits: Sequence[Guard] = ()) -> None:
        await change(ledger, updates, permits)
        if any(update.trigger is Trigger.INTEND for update in updates.values()) and holds:
            await ledger.run_state.hold(holds.pop(), None)

    monkeypatch.setattr(Ledger, "change_all", held_next)
    async with Council.open(repository.top, environ=repository.environ) as council, anyio.create_task_group() as group:
        group.start_soon(council.runs.resume)
        with anyio.fail_after(60):
            while not any(one.held and one.status == "queued" for one in await council.runs.queue()):
                await anyio.sleep(0.02)
        assert landed(repository) == []
        await council.tasks.release("t0")
    assert landed(repository) == ["Land t0"]
    await repository.assert_invariants()


async def test_requests_that_make_no_sense_are_refused(repository: Repository, log: CheckLog) -> None:
    queue(repository, log, ["a"], log.command(), capacity=1)
    refused = repository.council("queue", "release", "t0")
    assert (refused.code, "task 't0' is not held" in refused.stderr) == (2, True), refused
    assert "unknown command 'hodl'" in repository.council("queue", "hodl", "t0").stderr
    run = repository.council("queue", "--json").result["run"]
    assert repository.council("queue", run, "--json").result["run"] == run
