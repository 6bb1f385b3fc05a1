"""Restoring checkpoints of real runs: a restored run can resume, and each task lands once."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.domain.documents.stored import CheckpointOrigin
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.claims import Role
from orchestrator.engine.reports.report import RunStatus
from orchestrator.engine.scheduler.monitor import CHECKPOINT_INTERVAL
from orchestrator.engine.state.records import read_task
from orchestrator.engine.state.writer import take_leadership
from orchestrator.locking.orchestrators import create_owner
from orchestrator.protocols import Commit, Key, Store, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from orchestrator.testing.clock import ManualClock
from tests.conftest import FAKE_CLI, Repository
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest


def flag(repository: Repository) -> Path:
    """Return a file that prompts can test for."""
    return repository.spawns.parent / "flag"


def killed_with(repository: Repository, tasks: list[dict[str, Any]], failpoint: str, **settings: Any) -> None:
    """Start a run and kill it at a step."""
    path = repository.configure(tasks, **settings)
    assert repository.council("run", str(path), failpoints=f"{failpoint}=kill").code == -signal.SIGKILL


def made(repository: Repository) -> dict[str, Any]:
    """Create a checkpoint of the newest run."""
    ended = repository.council("checkpoint", "create", "--json")
    assert ended.code == 0, ended
    return ended.result


@pytest.mark.extended
def test_checkpoint_of_an_unknown_run_suggests_a_reason(repository: Repository) -> None:
    """A user may expect that a checkpoint has a name."""
    assert repository.council("run", str(repository.configure([{"id": "t", "prompt": "write a.txt 1"}]))).code == 0
    refused = repository.council("checkpoint", "create", "before merge", "--json")
    assert (refused.code, refused.result["error"]) == (2, "there is no run 'before merge'")
    assert "--reason 'before merge'" in refused.result["remedy"]


def restored(repository: Repository, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Restore it, and return the printed result."""
    ended = repository.council("checkpoint", "restore", checkpoint["id"], "--json")
    assert ended.code == 0, ended
    return ended.result


async def document(repository: Repository, task: str) -> TaskDocument:
    """Return a task's document."""
    async with Council.open(repository.top, environ=repository.environ) as council:
        return await read_task(council._context.store, await council.runs.newest(), task)


@pytest.mark.extended
async def test_running_task_is_restored_as_after_a_kill(repository: Repository) -> None:
    """Its later attempts stay recorded and keep their numbers and branches; landed tasks stay landed."""
    tasks: list[dict[str, Any]] = [
        {"id": "fails", "prompt": f"write work.txt x\nwithout {flag(repository)} exit 1", "attempts": 2},
        {"id": "lands", "prompt": "write l.txt x"},
    ]
    killed_with(repository, tasks, "session.spawned", capacity=1)
    checkpoint = made(repository)
    sessions = [(one["task"], one["attempt"], one["status"]) for one in checkpoint["sessions"]]
    assert (checkpoint["status"], sessions) == ("interrupted", [("fails", 1, "running")])
    assert repository.council("resume", "--json").states == {"fails": "failed", "lands": "landed"}
    result = restored(repository, checkpoint)
    run = checkpoint["run"]
    assert result["written"] == [f"run/{run}", f"task/{run}/fails"]
    assert result["skipped"] == [{"document": f"task/{run}/lands", "reason": "it has landed"}]
    back = await document(repository, "fails")
    assert (back.status, back.failures) == ("running", 0)
    assert [one.outcome for one in back.attempts] == ["interrupted", "crashed", "crashed"]
    status = repository.council("status", "--json")
    assert (status.result["status"], status.states) == ("interrupted", {"fails": "running", "lands": "landed"})
    shown = repository.council("show", "fails").stdout
    assert shown.splitlines()[0].endswith(": interrupted"), shown
    assert "(state: interrupted)" in repository.council("retry", "fails").stderr
    flag(repository).touch()
    ended = repository.council("resume", "--json")
    assert ended.states == {"fails": "landed", "lands": "landed"}, ended
    kept = {one["name"] for one in repository.council("salvage", "list", "--json").result["preserved"]}
    assert {"fails/2", "fails/3"} <= kept
    after = await document(repository, "fails")
    assert [one.outcome for one in after.attempts] == ["interrupted", "crashed", "crashed", "built"]
    await repository.assert_invariants()
    # The state before the restore is a checkpoint as well, with the landed task landed.
    assert restored(repository, {"id": result["before"]})["runs"] == []


@pytest.mark.extended
async def test_queued_work_lands_after_a_later_attempt(repository: Repository) -> None:
    """A checkpoint from before a failed check restores the queued work, with its base and branch."""
    tasks = [{"id": "one", "prompt": "attempt 1 write one.txt 1\nattempt 2 exit 1", "attempts": 2}]
    readable = [sys.prefix, str(FAKE_CLI.parents[1]), str(repository.spawns.parent)]
    checks = {"allow_failing_base": True, "checks": [f"test -e {flag(repository)}"]}
    killed_with(repository, tasks, "landing.checking", defaults=checks, readable=readable)
    checkpoint = made(repository)
    assert checkpoint["sessions"][0]["status"] == "checking"
    assert repository.council("resume", "--json").states == {"one": "failed"}
    built = await document(repository, "one")
    assert [one.outcome for one in built.attempts] == ["checks_failed", "crashed"]
    assert repository.council("salvage", "drop", "--yes", "one/1").code == 0
    restored(repository, checkpoint)
    assert (await document(repository, "one")).status == "checking"
    assert "one/1" in repository.council("salvage", "list").stdout
    flag(repository).touch()
    ended = repository.council("resume", "--json")
    assert ended.states == {"one": "landed"}, ended
    assert (repository.top / "one.txt").read_text() == "1\n"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_ended_task_is_retried_after_its_later_attempts(repository: Repository) -> None:
    """A restored task is at its final attempt; retried, at a new one."""
    path = repository.configure(
        [{"id": "one", "prompt": f"without {flag(repository)} exit 1\nwrite one.txt 1", "attempts": 1}]
    )
    assert repository.council("run", str(path)).code == 1
    checkpoint = made(repository)
    assert (repository.council("retry", "one").code, repository.council("resume").code) == (0, 1)
    restored(repository, checkpoint)
    back = await document(repository, "one")
    assert (back.status, back.attempt.number, len(back.attempts)) == ("failed", 1, 2)
    flag(repository).touch()
    assert repository.council("retry", "one").code == 0
    assert repository.council("resume", "--json").states == {"one": "landed"}
    assert [one.outcome for one in (await document(repository, "one")).attempts] == ["crashed", "crashed", "built"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_landing_in_progress_is_repeated(repository: Repository) -> None:
    """Its push was resolved since, and user files that look like the landing's are not touched."""
    killed_with(repository, [{"id": "one", "prompt": "write README.md new"}], "landing.intended")
    checkpoint = made(repository)
    assert checkpoint["sessions"][0]["status"] == "landing"
    (repository.top / "README.md").write_text("new\n")
    assert repository.council("resume", "--json").states == {"one": "queued"}
    restored(repository, checkpoint)
    assert (await document(repository, "one")).status == "queued"
    assert repository.council("resume", "--json").states == {"one": "queued"}
    assert (repository.top / "README.md").read_text() == "new\n"
    repository.git("checkout", "--", "README.md")
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_work_on_the_target_is_adopted_and_lands_once(repository: Repository) -> None:
    """The push was made, and its end never recorded: an older checkpoint does not undo it."""
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(path), failpoints="attempt.recorded=kill").code == -signal.SIGKILL
    checkpoint = made(repository)
    assert repository.council("resume", failpoints="landing.pushed=kill").code == -signal.SIGKILL
    result = restored(repository, checkpoint)
    assert result["written"] == []
    assert "may have landed" in result["skipped"][0]["reason"]
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()
    assert restored(repository, checkpoint)["written"] == []


async def test_cancel_can_be_undone(repository: Repository) -> None:
    """A checkpoint is created first; after the restore the run continues as if not cancelled."""
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "write a.txt x"},
        {"id": "b", "prompt": "write b.txt x", "needs": ["a"]},
    ]
    killed_with(repository, tasks, "attempt.recorded")
    assert repository.council("cancel", "--yes").code == 0
    found = repository.council("checkpoint", "list", "--json").result["checkpoints"]
    assert [(one["reason"], one["created_by"]) for one in found] == [("before cancel", "command")]
    restored(repository, found[0])
    assert repository.council("resume", "--json").states == {"a": "landed", "b": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_active_run_is_restored_only_by_force(repository: Repository) -> None:
    """Rejected with the active process; forced, the old owner's next write is rejected, it ends, and a resume works."""
    tasks: list[dict[str, Any]] = [
        {"id": "first", "prompt": f"without {flag(repository)} exit 1\nwrite f.txt x", "attempts": 1},
        {"id": "long", "prompt": f"write half.txt x\nwithout {flag(repository)} hang"},
    ]
    killed_with(repository, tasks, "run.leader_elected")
    checkpoint = made(repository)
    owner = repository.start("resume", "--json")
    wait_for(lambda: repository.council("status", "--json").states == {"first": "failed", "long": "running"})
    wait_for(lambda: "half.txt" in repository.council("diff", "long").stdout)
    refused = repository.council("checkpoint", "restore", "1")
    assert refused.code == 2
    assert "is active in process" in refused.stderr
    assert f"stop it with `kill {owner.pid}`" in refused.stderr
    assert "--force" in refused.stderr
    position = repository.council("checkpoint", "create", "--json").result["position"]
    forced = repository.council("checkpoint", "restore", "1", "--force", "--json")
    assert forced.code == 0, forced
    assert forced.result["before"] == f"{checkpoint['run']}/3"
    states = repository.council("status", "--json").states
    assert states == {"first": "pending", "long": "pending"}
    # The request wakes the old owner, which would record its reaction. Nobody answers while it lives.
    asking = repository.start("cancel", "first")
    assert owner.wait(timeout=60) == 1
    assert "was removed from run" in (output := owner.communicate()[0])
    assert "a checkpoint of the run was restored" in output
    assert asking.wait(timeout=60) == 0
    asking.communicate()
    flag(repository).touch()
    ended = repository.council("resume", "--json")
    assert ended.states == {"first": "cancelled", "long": "landed"}, ended
    assert "long/1" in repository.council("salvage", "list").stdout
    await repository.assert_invariants()
    assert position < repository.council("checkpoint", "show", "3", "--json").result["position"]


async def test_active_run_creates_checkpoints_by_the_clock(repository: Repository) -> None:
    """One every five minutes, of which the newest twelve are kept; manual ones are also kept."""
    path = repository.configure(
        [{"id": "long", "prompt": "hang", "attempts": 1, "timeout": "10h", "idle_timeout": "10h"}]
    )
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()
        by_hand = await council.checkpoints.create(run)
        async with anyio.create_task_group() as group:
            group.start_soon(council.runs.resume, run)
            await until(council, "task.started")
            await anyio.wait_all_tasks_blocked()
            for count in range(1, 15):
                clock.advance(CHECKPOINT_INTERVAL - 1)
                await anyio.wait_all_tasks_blocked()
                clock.advance(1)
                await until(council, "checkpoint.created", count + 1)
                while len(await council.checkpoints.list(run)) > 13:
                    await anyio.sleep(0.01)
                await anyio.wait_all_tasks_blocked()
            found = await council.checkpoints.list(run)
            council.stop()
    assert by_hand.id == found[0].id
    assert [one.number for one in found[1:]] == list(range(4, 16))
    assert {(one.created_by, one.status) for one in found[1:]} == {(CheckpointOrigin.TIMER, "running")}
    assert found[-1].time - found[-2].time == CHECKPOINT_INTERVAL
    assert [one.task for one in found[-1].sessions] == ["long"]


async def until(council: Council, name: str, count: int = 1) -> None:
    """Return when an event was recorded that many times."""
    async for record in council.history.follow(0):
        count -= sum(event.type == name for event in record.events)
        if count <= 0:
            return


async def test_event_follower_ends_after_a_restore(repository: Repository) -> None:
    """A checkpoint or restore of a finished run does not make a follower wait for more."""
    path = repository.configure([{"id": "one", "prompt": "exit 1", "attempts": 1}])
    async with Council.open(path, environ=repository.environ) as council:
        run = await council.runs.create()
        before = await council.checkpoints.create(run, reason="start")
        assert (await council.runs.resume(run)).status is RunStatus.INCOMPLETE
        assert (await council.checkpoints.restore(before.id)).runs == [run]
        with anyio.fail_after(20):
            types = [one.event.type async for one in council.runs.events(run)]
        assert types[-3:] == ["run.taken_over", "checkpoint.created", "checkpoint.restored"]
        assert [one.reason for one in await council.checkpoints.list(run)] == ["start", "before restore"]


@pytest.mark.extended
async def test_clean_creates_a_checkpoint_of_each_run_first(repository: Repository) -> None:
    """Only of runs that it removes something of."""
    path = repository.configure([{"id": "one", "prompt": "append one.txt 1"}])
    for _ in range(2):
        assert repository.council("run", str(path)).code == 0
    run = repository.council("runs", "--json").result["runs"][0]["run"]
    async with Council.open(repository.top, environ=repository.environ) as council:
        found = [one for one in await council.cleaner.find(logs=0.0) if one.run == run]
        assert [one.error for one in await council.cleaner.remove(found)] == [None]
        assert [(one.run, one.reason) for one in await council.checkpoints.list()] == [(run, "before clean")]


async def test_restore_names_the_command_that_continues_waiting_tasks(repository: Repository) -> None:
    """The checkpoint was created after a retry, in a run without an active process."""
    path = repository.configure([{"id": "one", "prompt": "exit 1 no", "attempts": 1}])
    assert repository.council("run", str(path)).code == 1
    assert repository.council("retry", "one").code == 0
    created = repository.council("checkpoint", "create").stdout.split()[-1]
    assert repository.council("cancel", "--yes").code == 0
    restored = repository.council("checkpoint", "restore", created)
    run = created.partition("/")[0]
    assert (restored.code, restored.stdout.splitlines()[-1]) == (0, f"`council resume {run}` continues it"), restored
    assert repository.council("resume", "--json").states == {"one": "failed"}


async def test_all_runs_are_restored_with_readable_output(repository: Repository) -> None:
    """The whole store has its own checkpoints; every command prints text for people."""
    idle = {"id": "two", "prompt": "exit 0"}
    path = repository.configure([{"id": "one", "prompt": f"without {flag(repository)} exit 1", "attempts": 1}, idle])
    assert repository.council("run", str(path)).code == 1
    assert repository.council("checkpoint", "list").stdout == "no checkpoints\n"
    created = repository.council("checkpoint", "create", "--all", "--reason", "a\x1bb").stdout
    assert created == "created checkpoint all/1\n"
    assert repository.council("retry", "one").code == 0
    assert repository.council("run", str(path)).code == 1
    listed = repository.council("checkpoint", "list", "--all").stdout
    assert "1 failed, 1 no change; a\N{REPLACEMENT CHARACTER}b" in " ".join(listed.split())
    shown = repository.council("checkpoint", "show", "all/1")
    old, new = [one["run"] for one in repository.council("runs", "--json").result["runs"]]
    assert f"would be restored: task/{old}/one" in shown.stdout
    assert f"would stay unchanged: run/{new}: it started after the checkpoint" in shown.stdout
    done = repository.council("checkpoint", "restore", "all/1")
    assert done.code == 0, done
    assert "the previous state is checkpoint all/2" in done.stdout
    assert "there is nothing to resume" in done.stdout
    assert repository.council("checkpoint", "show", "all/1").stdout.endswith("restoring it would change nothing\n")
    assert "nothing to restore" in repository.council("checkpoint", "restore", "all/1").stdout
    assert repository.council("status", old, "--json").states == {"one": "failed", "two": "no_change"}
    await repository.assert_invariants()


async def test_impossible_restore_is_rejected(repository: Repository) -> None:
    """Exit code 2, the reason and the available checkpoints."""
    assert repository.council("run", str(repository.configure([{"id": "a", "prompt": "write a.txt x"}]))).code == 0
    refusals = {
        ("show", "7"): "there is no checkpoint",
        ("restore", "nonsense/1"): "council checkpoint list",
        ("create", "--run", "nonsense"): "there is no run 'nonsense'",
        ("list", "--run", "nonsense"): "there is no run 'nonsense'",
        ("create", "--run", "x", "--all"): "cannot be combined",
    }
    for command, fragment in refusals.items():
        refused = repository.council("checkpoint", *command)
        assert (refused.code, fragment in refused.stderr) == (2, True), refused


@pytest.mark.extended
async def test_landed_task_keeps_its_handoffs(repository: Repository) -> None:
    """Its phases are recorded as completed, so their handoffs since the checkpoint are not deleted."""
    review = {"access": "read", "produces": "review", "prompt": "{{ task.prompt }}"}
    steps = 'in build write a.txt 1\nin review hand-over {"verdict": "approve", "findings": []}'
    path = repository.configure(
        [
            {"id": "a", "prompt": steps, "workflow": "reviewed"},
            {"id": "b", "prompt": "attempt 1 exit 1", "attempts": 1},
        ],
        workflows={"reviewed": [{"build": {"prompt": "{{ task.prompt }}"}}, {"review": review}]},
    )
    assert repository.council("run", str(path), failpoints="run.leader_elected=kill").code == -signal.SIGKILL
    checkpoint = repository.council("checkpoint", "create", "--json").result["id"]
    assert repository.council("resume", "--json").states == {"a": "landed", "b": "failed"}
    restored = repository.council("checkpoint", "restore", checkpoint, "--json")
    assert restored.code == 0, restored
    assert not [one for one in restored.result["deleted"] if one.startswith("handoff/")]
    checked = repository.council("check")
    assert checked.code == 0, checked
    await repository.assert_invariants()


class _Renewed:
    """A store in which a process renews its record right after the first read of it."""

    def __init__(self, store: Store) -> None:
        self._store, self._is_renewed = store, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def list(self, kind: str, prefix: str = "") -> Any:
        found = await self._store.list(kind, prefix)
        if not self._is_renewed:
            self._is_renewed = True
            await self._store.commit(Commit([Write(one.key, one.version, one.value) for one in found]))
        return found


async def test_run_is_taken_over_despite_concurrent_heartbeats(repository: Repository) -> None:
    """The record is read again: a heartbeat is not a failure."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        key = Key("orchestrator", "run/other")
        await store.commit(Commit([Write(key, 0, {"ended": None, "epoch": 1})]))
        renewed = cast("Store", _Renewed(store))
        guard = await take_leadership(renewed, SystemClock(), "run", create_owner(Role.LEADER))
        assert guard.epoch == 1
        found = await store.get(key)
        assert found is not None
        assert (found.version, found.value["epoch"]) == (3, 2)


async def test_halted_run_has_one_status_everywhere(repository: Repository) -> None:
    """The final report, `status`, `runs`, `state show` and a checkpoint use one word; `resume` names the run."""
    repository.commit({"code": "bad\n"}, "broken")
    tasks = [{"id": "t", "prompt": "write t.txt x", "checks": ["grep -q good code"]}]
    config = str(repository.configure(tasks))
    run = repository.council("run", config, "--json").result
    made = repository.council("checkpoint", "create", "--json").result
    [listed] = repository.council("runs", "--active", "--json").result["runs"]
    states = [one["status"] for one in (repository.council(*args, "--json").result for args in (
        ("status",), ("state", "show")))]  # fmt: skip
    assert [run["status"], listed["status"], made["status"], *states] == ["halted"] * 5
    repository.council("run", config, "--only", "t")
    assert f"also interrupted or halted: {run['run']}" in repository.council("resume").stderr
