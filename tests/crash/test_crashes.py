"""A run killed at any point and resumed lands each task once and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from orchestrator.system.failpoints import FAILPOINTS
from tests.conftest import CommandResult, Repository
from tests.waiting import wait_for

#: Reached by a request from another process; see below.
REQUEST_FAILPOINTS = frozenset(name for name in FAILPOINTS if name.startswith("request."))
#: Reached by attaching to a task; see tests/integration/sessions/test_attach.py.
ATTACHMENT_FAILPOINTS = frozenset({"attachment.recorded"})
#: Those of the store, which has tests of its own; see test_file_store_kills.py, test_compaction.py and test_copying.py
#: in tests/integration.
STORE_FAILPOINTS = frozenset(name for name in FAILPOINTS if name.startswith("state."))
#: Reached by creating or restoring a checkpoint; see tests/crash/test_checkpoints.py.
CHECKPOINT_FAILPOINTS = frozenset({"run.taken_over", "checkpoint.created", "checkpoint.restored"})
#: Reached by writing the readable copies; see tests/integration/state/test_views.py.
VIEW_FAILPOINTS = frozenset({"views.written", "views.replaced"})
#: Reached by importing state in earlier formats, and by forgetting runs; see tests/integration, test_legacy.py in
#: stores/embedded and test_clean_runs.py in repository.
RECORD_FAILPOINTS = frozenset({"legacy.begun", "legacy.imported", "run.removed"})
#: Reached by tasks with a workflow; see tests/crash/test_phases.py and tests/integration/workflows/test_expansion.py.
PHASE_FAILPOINTS = frozenset({"phase.checked", "phase.finished", "handoff.taken", "plan.subtasks"})
#: Reached by tasks that start on built work; see tests/integration/landing/test_stacked_work.py.
STACK_FAILPOINTS = frozenset(name for name in FAILPOINTS if name.startswith("stack."))
#: Reached by runs that span machines; see tests/integration/coordination/test_machines.py.
MACHINE_FAILPOINTS = frozenset({"shared_work.pushed"})
#: Never reached by a run.
UNREACHED_FAILPOINTS = (
    REQUEST_FAILPOINTS
    | ATTACHMENT_FAILPOINTS
    | STORE_FAILPOINTS
    | CHECKPOINT_FAILPOINTS
    | VIEW_FAILPOINTS
    | RECORD_FAILPOINTS
    | PHASE_FAILPOINTS
    | STACK_FAILPOINTS
    | MACHINE_FAILPOINTS
)
#: Reached only once by the tasks of `chain_and_sides`.
SINGLE_HIT_FAILPOINTS = frozenset(
    {"run.seeded", "run.leader_elected", "run.finished", "adapter.cooling_down", "landing.rejected"}
)
RECOVERY_FAILPOINTS = frozenset(name for name in FAILPOINTS if name.startswith("recovery."))
#: Reached by every process with a few tasks.
FAILPOINTS_IN_TURN = sorted(
    FAILPOINTS - RECOVERY_FAILPOINTS - UNREACHED_FAILPOINTS - SINGLE_HIT_FAILPOINTS - {"slot.partly_made"}
)
#: Enough tasks for the last failpoint.
TASKS_IN_TURN = 12
#: The kill of the first process after which a recovery reaches each failpoint.
FIRST_KILL_FOR = {
    "recovery.session_reaped": "session.spawned",
    "recovery.attempt_returned": "attempt.recorded",
    "recovery.landing_settled": "landing.pushed",
}


def chain_and_sides(count: int) -> list[dict[str, object]]:
    """Return tasks of which every third needs the one before, with most kinds of events.

    One reaches a limit, one fails once, one leaves a daemon behind, one first fails its checks. Each changes an
    existing file, so that there is something to clean.
    """
    tasks: list[dict[str, object]] = []
    for index in range(count):
        prompt = f"append shared-{index % 3}.txt line {index}\nwrite own/{index}.txt {index}\nappend old/{index}.txt x"
        if index == 0:
            prompt = f"attempt 1 print limit, again in 0 s\nattempt 1 exit 1\n{prompt}"
        if index == 3:
            prompt = f"discard own/bad.txt\nattempt 1 write own/bad.txt x\n{prompt}"
        if index == 1:
            prompt = f"attempt 1 exit 3\n{prompt}"
        if index == 2:
            prompt = f"{prompt}\ndaemon own/daemon.txt"
        tasks.append({"id": f"t{index}", "prompt": prompt, "needs": [f"t{index - 3}"] if index >= 3 else []})
    return tasks


def configure(repository: Repository, tasks: list[dict[str, object]]) -> Path:
    repository.commit({f"old/{index}.txt": "old\n" for index in range(len(tasks))}, "what tasks change")
    repository.remember()
    path = repository.configure(tasks)
    config = json.loads(path.read_text())
    config["adapters"]["fake"]["failures"] = {"rate_limited": "limit, again in (?P<seconds>0) s"}
    config["defaults"]["checks"] = ["test ! -e own/bad.txt"]
    config["sinks"] = {"lines": {"use": "jsonlines", "file": "events.jsonl"}}
    path.write_text(json.dumps(config))
    return path


async def assert_sink_complete(repository: Repository) -> None:
    """Assert that the sink's file, if any, has every event once and in order."""
    file = repository.top.parent / "events.jsonl"
    async with FileStore.open(repository.log, SystemClock()) as store:
        last, recorded = await store.position(), []
        async for record in store.watch():
            recorded += [(record.position, event.type) for event in record.events if "sink." not in event.type]
            if record.position == last:
                break
    reported = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert [(line["position"], line["event"]) for line in reported] == (recorded if file.exists() else [])


async def resume_and_check(repository: Repository, count: int) -> CommandResult:
    """Resume until the run ended; assert that each task landed once, and that another resume changes nothing."""
    ended = repository.council("resume", "--json")
    assert ended.code == 0, ended
    assert set(ended.states.values()) == {"landed"}
    assert len(ended.states) == count
    await repository.assert_invariants()
    await assert_sink_complete(repository)
    log = {path: path.read_bytes() for path in repository.log.iterdir()}
    head = repository.git("rev-parse", "main")
    assert repository.council("resume", "--json").code == 0
    assert {path: path.read_bytes() for path in repository.log.iterdir()} == log
    assert repository.git("rev-parse", "main") == head
    return ended


@pytest.mark.slow
async def test_run_killed_at_each_step_in_turn_lands_every_task_once(repository: Repository) -> None:
    """Each kill acts on the leftovers of the one before."""
    config = configure(repository, chain_and_sides(TASKS_IN_TURN))
    command = ["run", str(config)]
    for name in ("run.seeded", "run.leader_elected", "adapter.cooling_down", *FAILPOINTS_IN_TURN):
        killed = repository.council(*command, "--json", failpoints=f"{name}=kill")
        assert killed.code == -signal.SIGKILL, (name, killed)
        command = ["resume"]
    await resume_and_check(repository, TASKS_IN_TURN)


@pytest.mark.parametrize(
    ("name", "hit"),
    [
        pytest.param(name, hit, marks=() if name == "run.finished" else pytest.mark.slow)
        for name in sorted(FAILPOINTS - RECOVERY_FAILPOINTS - UNREACHED_FAILPOINTS)
        for hit in ((1,) if name in SINGLE_HIT_FAILPOINTS else (1, 3))
    ],
)
async def test_run_killed_at_a_failpoint_lands_every_task_once(repository: Repository, name: str, hit: int) -> None:
    """After each persisted or external step."""
    config = configure(repository, chain_and_sides(4))
    killed = repository.council("run", str(config), "--json", failpoints=f"{name}=kill@{hit}")
    assert killed.code == -signal.SIGKILL, killed
    await resume_and_check(repository, 4)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("name", "again"),
    [
        pytest.param(name, again, marks=() if (name, again) == ("recovery.landing_settled", "") else pytest.mark.slow)
        for name in sorted(RECOVERY_FAILPOINTS)
        for again in ("", "landing.intended", "worktree.removed")
    ],
)
async def test_recovery_killed_at_a_failpoint_is_repeated(repository: Repository, name: str, again: str) -> None:
    """Recoveries are killed twice in a row."""
    tasks = chain_and_sides(4)
    # Starts after the third landing, so that each process below has a session and a landing.
    tasks[3]["needs"] = ["t0", "t1", "t2"]
    config = configure(repository, tasks)
    assert repository.council("run", str(config), failpoints=f"{FIRST_KILL_FOR[name]}=kill@2").code == -signal.SIGKILL
    assert repository.council("resume", failpoints=f"{name}=kill").code == -signal.SIGKILL
    if again:
        assert repository.council("resume", failpoints=f"{again}=kill").code == -signal.SIGKILL
    await resume_and_check(repository, 4)


@pytest.mark.parametrize("action", ["cancel", pytest.param("retry", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if number else ())
        for number, name in enumerate(sorted(REQUEST_FAILPOINTS))
    ],
)
async def test_request_killed_while_handled_is_completed(repository: Repository, name: str, action: str) -> None:
    """Both the requesting and the handling process are killed; the request takes effect once."""
    tasks: list[dict[str, object]] = [
        {"id": "failed", "prompt": "attempt 1 exit 1\nwrite f.txt x", "attempts": 1},
        {"id": "pending", "prompt": "write p.txt x", "needs": ["failed"]},
    ]
    assert repository.council("run", str(repository.configure(tasks))).code == 1
    task = {"cancel": "pending", "retry": "failed"}[action]
    assert repository.council(action, task, failpoints=f"{name}=kill").code == -signal.SIGKILL
    ended = repository.council("resume", "--json")
    if action == "cancel":
        assert ended.states == {"failed": "failed", "pending": "cancelled"}, ended
    else:
        assert ended.states == {"failed": "landed", "pending": "landed"}, ended
    await repository.assert_invariants()


@pytest.mark.extended
async def test_resume_waits_until_a_stubborn_agent_is_dead(repository: Repository) -> None:
    """The agent ignores TERM, leaves its process session and keeps writing; nothing is touched before it is dead."""
    prompt = "stubborn\nwrite file.txt first\ndaemon file.txt\nattempt 1 hang"
    config = repository.configure([{"id": "stubborn", "prompt": prompt}])
    child = repository.start("run", str(config))
    wait_for(lambda: repository.spawns.exists() and is_daemon_running(repository))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    killed_at = time.monotonic()
    ended = repository.council("resume", "--json")
    assert ended.states == {"stubborn": "landed"}, ended
    reaped = next(line for line in ended.lines if line.get("event") == "task.interrupted")
    assert time.monotonic() - killed_at < 30
    assert reaped["reason"] == "the orchestrator exited before the session ended"
    await repository.assert_invariants()


def is_daemon_running(repository: Repository) -> bool:
    """Return whether an agent's daemon runs in a session of the repository."""
    homes = repository.top.parent / "council-home"
    return any(len(path.read_bytes()) > 10 for path in homes.glob("*/sessions/*/*/slot/tree/file.txt"))


async def test_signal_preserves_the_work_for_resume(repository: Repository) -> None:
    """The first SIGINT ends sessions, preserves their work on branches and exits 130; resume continues."""
    prompt = "write half.txt half\nattempt 1 hang"
    config = repository.configure([{"id": "long", "prompt": prompt}])
    child = repository.start("run", str(config), "--json")
    homes = repository.top.parent / "council-home"
    wait_for(lambda: list(homes.glob("*/sessions/*/*/slot/tree/half.txt")))
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=30)
    ended = CommandResult(child.returncode, stdout, stderr)
    assert (ended.code, ended.result["status"], ended.result["exit"]) == (130, "interrupted", 130)
    task = ended.result["tasks"][0]
    assert task["status"] == "pending"
    where = repository.council("where", "--json").result
    show = ["git", "show", f"{task['branch']}:half.txt"]
    assert subprocess.run(show, check=True, cwd=where["trusted"], capture_output=True).stdout == b"half\n"
    await resume_and_check(repository, 1)


async def test_killed_supervisor_costs_one_attempt_and_leaves_no_process(repository: Repository) -> None:
    """Its session ends: processes are killed, files preserved, other sessions continue."""
    tasks = [
        {"id": "victim", "prompt": "write half.txt half\nattempt 1 hang\nwrite whole.txt w"},
        {"id": "neighbour", "prompt": "write n.txt n"},
    ]
    config = repository.configure(tasks)
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: "victim" in (repository.spawns.read_text() if repository.spawns.exists() else ""))
    cli = wait_for(lambda: [pid for pid in psutil.process_iter() if is_session(pid, "victim")])[0]
    supervisor = cli.parent()
    assert supervisor is not None
    supervisor.kill()
    stdout, stderr = child.communicate(timeout=60)
    ended = CommandResult(child.returncode, stdout, stderr)
    assert ended.states == {"victim": "landed", "neighbour": "landed"}, ended
    assert not [pid for pid in psutil.process_iter() if is_session(pid, "victim")]


def is_session(process: psutil.Process, task: str) -> bool:
    """Return whether a process is the fake CLI of a task's session."""
    try:
        return any("fake_cli.py" in part for part in process.cmdline()) and process.environ()["COUNCIL_TASK"] == task
    except (psutil.Error, KeyError):
        return False


@pytest.mark.extended_variants
@pytest.mark.parametrize("at", [-3, pytest.param(30, marks=pytest.mark.slow)], ids=["payload", "header"])
@pytest.mark.parametrize("line", [-1, 0, pytest.param(1, marks=pytest.mark.slow)])
async def test_damaged_log_is_reported(repository: Repository, line: int, at: int) -> None:
    """A flipped byte in any record is reported by the next command, in text and JSON, without a crash."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(config), failpoints="work.recorded=kill").code == -signal.SIGKILL
    log = next((repository.top / ".council/state").glob("*/*.jsonl"))
    lines = log.read_bytes().splitlines(keepends=True)
    flipped = bytearray(lines[line])
    flipped[at] ^= 1
    lines[line] = bytes(flipped)
    log.write_bytes(b"".join(lines))
    status = repository.council("status", "--json")
    assert status.code in {1, 2, 130}, status
    assert str(log) in json.dumps(status.result)
    assert repository.council("resume", "--json").code in {0, 1, 2}
