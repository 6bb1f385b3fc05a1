"""Several processes in one run: each task has one owner, and a dead process is replaced."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.domain.runs.statuses import ReleaseReason, TaskStatus
from orchestrator.engine.reports.report import RunReport
from orchestrator.engine.scheduler import peers
from orchestrator.engine.state.change_feed import ExternalChange, follow_changes
from orchestrator.engine.state.ledger import Ledger
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.protocols import Event, Store
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests import postgres_server, redis_server
from tests.claim_history import read_claims
from tests.command_server import StartedCommand
from tests.conftest import FAKE_CLI, Repository
from tests.faults import SHELL_ADAPTER
from tests.integration.runs.test_scheduler import until_event
from tests.printed_commands import printed_commands
from tests.stores import open_store
from tests.waiting import wait_for

#: A process silent for this long counts as dead, even without proof of its end.
QUICK = {
    "heartbeat_interval": "200ms",
    "stale_after": "1500ms",
    "owner_stale_after": "1500ms",
    "stale_check_interval": "300ms",
}


def shared(count: int) -> list[dict[str, Any]]:
    """Return tasks of which every fourth declares the same file."""
    return [
        {"id": f"t{one}", "prompt": f"append s{one % 4}.txt {one}", "owns": [f"s{one % 4}.txt"]} for one in range(count)
    ]


def states(repository: Repository) -> dict[str, str]:
    """Return the state of each task; nothing before there is a run."""
    result = repository.council("status", "--json").result
    return {task["id"]: task["status"] for task in result.get("tasks", ())}


@asynccontextmanager
async def opened_store(repository: Repository) -> AsyncIterator[Store]:
    """Open the store of the repository's runs."""
    async with open_store(repository.environ.get("COUNCIL_STATE") or str(repository.log)) as store:
        yield store


async def happened(repository: Repository) -> list[Event]:
    """Return all events of the repository's runs."""
    async with opened_store(repository) as store:
        until = await store.position()
        found: list[Event] = []
        async for record in store.watch(0):
            found += record.events
            if record.position == until:
                break
        return found


def ended(*children: StartedCommand) -> list[int]:
    """Return the outcomes of the processes."""
    for child in children:
        child.communicate(timeout=120)
    return [child.wait() for child in children]


async def assert_each_landed_once(repository: Repository, tasks: Sequence[str]) -> None:
    """Check that each task landed by one merge, and had one process at a time."""
    landed = Counter(
        line.rpartition("/")[2]
        for line in repository.git("log", "--format=%(trailers:key=Council-Task,valueonly)", "main").splitlines()
        if line
    )
    assert landed == dict.fromkeys(tasks, 1)
    async with opened_store(repository) as store:
        [run] = await store.list("run")
        claims = await read_claims(store, run.key.id)
        assert {one.released for one in claims.values()} == {ReleaseReason.COMPLETE}
    await repository.assert_invariants()


@pytest.mark.parametrize(
    ("count", "killed"),
    [(24, 0), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((24, 1), (60, 0), (60, 1)))],
)
async def test_three_processes_finish_one_queue_despite_a_kill(repository: Repository, count: int, killed: int) -> None:
    """Its tasks are taken over; tasks with declared paths never conflict."""
    tasks = shared(count)
    config = repository.configure(tasks, capacity=2, coordination=QUICK)
    children = [repository.start("run", str(config), "--json")]
    wait_for(lambda: repository.council("status", "--json").result.get("status") == "running")
    children += [repository.start("work", "--json") for _ in range(2)]
    wait_for(lambda: Counter(states(repository).values())["landed"] >= count // 4, 60)
    children[killed].send_signal(signal.SIGKILL)
    codes = ended(*children)
    assert codes.pop(killed) == -signal.SIGKILL
    assert codes == [0, 0]
    assert set(states(repository).values()) == {"landed"}
    await assert_each_landed_once(repository, [task["id"] for task in tasks])
    names = Counter(event.type for event in await happened(repository))
    assert names["task.conflict"] == 0
    assert names["run.joined"] == 2
    lines = [int(line) for path in repository.top.glob("s?.txt") for line in path.read_text().split()]
    assert sorted(lines) == list(range(count))


@pytest.mark.extended
async def test_additional_process_begins_with_its_share_of_the_tasks(repository: Repository) -> None:
    """The first process starts tasks in the order of the file; a claim of the same task would be rejected."""
    gate = repository.spawns.parent / "gate"
    tasks = [{"id": f"t{number}", "prompt": f"await {gate}\nwrite {number}.txt x"} for number in range(10)]
    leader = repository.start("run", str(repository.configure(tasks, capacity=1)), "--json")
    wait_for(lambda: states(repository).get("t0") == "running")
    worker = repository.start("work", "--capacity", "2", "--json")
    wait_for(lambda: Counter(states(repository).values())["running"] == 3)
    assert {task for task, status in states(repository).items() if status == "running"} == {"t0", "t1", "t9"}
    gate.touch()
    assert ended(leader, worker) == [0, 0]
    await assert_each_landed_once(repository, [f"t{number}" for number in range(10)])


@pytest.mark.extended
@pytest.mark.parametrize("make_url", [lambda: "", redis_server.empty_store_url, postgres_server.empty_store_url])
async def test_process_stopped_past_its_lease_is_rejected_with_the_reason(
    repository: Repository, make_url: Callable[[], str]
) -> None:
    """Another process takes over and lands; later writes of the stopped one do not count, and it exits by itself."""
    repository.environ["COUNCIL_STATE"] = make_url()
    tasks: list[dict[str, Any]] = [
        {"id": "slow", "prompt": "attempt 1 hang\nwrite slow.txt x"},
        {"id": "next", "prompt": "write next.txt x", "needs": ["slow"]},
    ]
    owner = repository.start("run", str(repository.configure(tasks, coordination=QUICK)))
    wait_for(repository.spawns.exists)
    helper = repository.start("work", "--json")
    wait_for(lambda: "run.joined" in repository.council("state", "log", "--json").stdout)
    owner.send_signal(signal.SIGSTOP)
    try:
        assert ended(helper) == [0]
    finally:
        owner.send_signal(signal.SIGCONT)
    _, error = owner.communicate(timeout=60)
    assert owner.wait() == 1
    *outage, line = error.splitlines()
    # A call that waited for its answer while the process was stopped has timed out.
    assert all("no answer in" in one or "can be read and written again" in one for one in outage), error
    assert "was removed from run" in line
    assert "council.log" not in line
    assert "no heartbeat for" in line
    assert states(repository) == {"slow": "landed", "next": "landed"}
    for path in Path(repository.environ["COUNCIL_HOME"]).glob("*/indexes/*"):
        os.utime(path, (0, 0))  # it has ended without cleanup, as if killed a day ago
    assert repository.council("clean", "--yes").code == 0
    await assert_each_landed_once(repository, ["slow", "next"])


@pytest.mark.extended
async def test_process_stopped_past_its_merge_lease_requests_it_again(repository: Repository) -> None:
    """Another process lands meanwhile; the stopped one still owns its tasks, and finishes them."""
    begun, free, gate = (repository.spawns.parent / name for name in ("begun", "free", "gate"))
    check = f"touch {begun}; while [ ! -e {free} ]; do sleep 0.05; done"
    tasks: list[dict[str, Any]] = [
        {"id": "checked", "prompt": "write checked.txt x", "checks": [check], "allow_failing_base": True},
        {"id": "other", "prompt": f"await {gate}\nwrite other.txt x"},
    ]
    config = repository.configure(
        tasks,
        capacity=1,
        coordination={**QUICK, "stale_check_interval": "60s"},
        writable=[str(repository.spawns.parent)],
    )
    owner = repository.start("run", str(config), "--json")
    wait_for(begun.exists)
    other = repository.start("work", "--json")
    wait_for(lambda: states(repository)["other"] == "running")
    owner.send_signal(signal.SIGSTOP)
    try:
        gate.touch()
        wait_for(lambda: states(repository)["other"] == "landed")
    finally:
        owner.send_signal(signal.SIGCONT)
    free.touch()
    assert ended(owner, other) == [0, 0]
    await assert_each_landed_once(repository, ["checked", "other"])


@pytest.mark.extended_variants
@pytest.mark.parametrize("role", ["auto", "leader", "worker"])
async def test_cancelled_task_of_another_process_ends_there(repository: Repository, role: str) -> None:
    """Its claim is overridden by the user's request; the other process continues with the remaining tasks."""
    tasks = [{"id": name, "prompt": f"write {name}.txt x\nhang"} for name in ("a", "b")]
    config = repository.configure(tasks, capacity=1, coordination={**QUICK, "role": role})
    leader = repository.start("run", str(config), "--json")
    wait_for(lambda: "running" in states(repository).values())
    helper = repository.start("work", "--json")
    wait_for(lambda: list(states(repository).values()) == ["running", "running"])
    assert repository.council("cancel", "a", "b").code == 0
    ended(leader, helper)
    assert states(repository) == {"a": "cancelled", "b": "cancelled"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_paths_of_a_cancelled_session_are_free_at_its_end(repository: Repository) -> None:
    """Its process is frozen and can't stop it: other tasks wait for its paths until it ends."""
    tasks: list[dict[str, Any]] = [
        {"id": "long", "prompt": "hang"},
        {"id": "first", "prompt": "hang", "owns": ["s.txt"]},
        {"id": "second", "prompt": "append s.txt x", "owns": ["s.txt"]},
    ]
    leader = repository.start("run", str(repository.configure(tasks, capacity=1)), "--json")
    wait_for(repository.spawns.exists)
    owner = repository.start("work", "--json")
    wait_for(lambda: len(repository.spawns.read_text().splitlines()) == 2)
    third = repository.start("work", "--json")
    wait_for(lambda: repository.council("state", "log", "--json").stdout.count("run.joined") == 2)
    owner.send_signal(signal.SIGSTOP)
    try:
        assert repository.council("cancel", "first").code == 0
        wait_for(lambda: states(repository)["first"] == "cancelled")
        time.sleep(1.5)  # three attempts
        assert len(repository.spawns.read_text().splitlines()) == 2
    finally:
        owner.send_signal(signal.SIGCONT)
    wait_for(lambda: states(repository)["second"] == "landed")
    assert repository.council("cancel", "long").code == 0
    ended(leader, owner, third)
    assert states(repository) == {"long": "cancelled", "first": "cancelled", "second": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_process_stopped_during_setup_starts_nothing_after_losing_its_task(repository: Repository) -> None:
    """It counted as dead meanwhile, and another process has done the task."""
    tasks = [{"id": "t", "prompt": "write t.txt x"}, {"id": "next", "prompt": "write n.txt x"}]
    config = repository.configure(tasks, capacity=1, coordination=QUICK)
    owner = repository.start("run", str(config), "--json", failpoints="attempt.recorded=stop")
    wait_for(lambda: states(repository).get("t") == "running")
    other = repository.start("work", "--json")
    try:
        assert ended(other) == [0]
        assert len(repository.spawns.read_text().splitlines()) == 2
    finally:
        owner.send_signal(signal.SIGCONT)
    assert ended(owner) == [1]
    assert len(repository.spawns.read_text().splitlines()) == 2
    await assert_each_landed_once(repository, ["t", "next"])


@pytest.mark.extended
async def test_task_landed_elsewhere_ends_before_a_request_about_it(repository: Repository) -> None:
    """A request to ignore it is answered as soon as it has landed, and other requests are performed meanwhile."""
    begun, free = (repository.spawns.parent / name for name in ("begun", "free"))
    hook = repository.top / ".git/hooks/pre-receive"
    hook.write_text(f"#!/bin/sh\ntouch {begun}\nwhile [ ! -e {free} ]; do sleep 0.05; done\n")
    hook.chmod(0o755)
    repository.remember()
    tasks = [{"id": "long", "prompt": "hang"}, {"id": "t", "prompt": "write t.txt x"}]
    owner = repository.start("run", str(repository.configure(tasks, capacity=1)), "--json")
    wait_for(repository.spawns.exists)
    helper = repository.start("work", "--json")
    wait_for(begun.exists)
    asked = repository.start("task", "ignore", "t", "--reason", "not wanted")
    wait_for(lambda: "request.submitted" in repository.council("state", "log", "--json").stdout)
    free.touch()
    wait_for(lambda: "request.completed" in repository.council("state", "log", "--json").stdout)
    assert repository.council("cancel", "long").code == 0
    ended(asked, owner, helper)
    assert states(repository) == {"long": "cancelled", "t": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_leftovers_of_a_killed_process_are_removed_by_the_sweep(repository: Repository) -> None:
    """Its task was released already, so no process takes it over and its session's leftovers are useless."""
    tasks = [{"id": "long", "prompt": "hang"}, {"id": "t", "prompt": "attempt 1 exit 1\nwrite t.txt x"}]
    owner = repository.start("run", str(repository.configure(tasks, capacity=1, coordination=QUICK)), "--json")
    wait_for(repository.spawns.exists)
    assert repository.council("work", failpoints="attempt.ended=kill").code == -signal.SIGKILL
    result = repository.council("status", "--json").result
    trusted = Path(result["repository"])
    session, index = trusted.parent / f"sessions/{result['run']}/t.1", trusted.parent / f"indexes/{result['run']}-t.1"
    wait_for(lambda: not session.exists() and not index.exists())
    assert (trusted.parent / f"sessions/{result['run']}/long.1").exists()
    assert repository.council("cancel", "long").code == 0
    ended(owner)
    assert states(repository) == {"long": "cancelled", "t": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize("stale_check_interval", ["300ms", "60s"], ids=["found", "unnoticed"])
@pytest.mark.parametrize("action", ["retry", pytest.param("cancel", marks=pytest.mark.slow)])
async def test_request_after_the_leader_is_gone_is_performed(
    repository: Repository, action: str, stale_check_interval: str
) -> None:
    """By the replacement leader, or by the requesting process if no other has noticed yet."""
    gate = repository.spawns.parent / "gate"
    tasks: list[dict[str, Any]] = [
        {"id": "failed", "prompt": "attempt 1 exit 1\nwrite failed.txt x", "attempts": 1},
        *({"id": name, "prompt": f"await {gate}\nwrite {name}.txt x"} for name in ("a", "b")),
    ]
    config = repository.configure(
        tasks, capacity=1, coordination={**QUICK, "stale_check_interval": stale_check_interval}
    )
    leader = repository.start("run", str(config), "--json")
    wait_for(lambda: states(repository) == {"failed": "failed", "a": "running", "b": "pending"})
    worker = repository.start("work", "--json")
    wait_for(lambda: states(repository)["b"] == "running")
    leader.send_signal(signal.SIGKILL)
    leader.communicate()
    if stale_check_interval == "300ms":
        while [event.type for event in await happened(repository)].count("run.leader_elected") < 2:
            pass
    task = {"cancel": "b", "retry": "failed"}[action]
    asked = repository.council(action, task)
    gate.touch()
    assert asked.code == 0, asked
    assert ended(worker) == [int(action == "cancel")]
    other = {"cancel": ("failed", "cancelled"), "retry": ("landed", "landed")}[action]
    assert states(repository) == {"failed": other[0], "a": "landed", "b": other[1]}
    assert repository.council("status", "--json").result["status"] in {"landed", "incomplete"}
    assert [event.type for event in await happened(repository)].count("run.finished") == 1
    await repository.assert_invariants()


@pytest.mark.extended
async def test_process_that_reads_the_end_late_does_not_end_the_run_again(repository: Repository) -> None:
    """The leader has recorded the end, reported it to its sinks, and exited."""
    gate = repository.spawns.parent / "gate"
    config = repository.configure(
        [{"id": "a", "prompt": f"await {gate}\nwrite a.txt x"}],
        coordination={**QUICK, "stale_after": "1m", "owner_stale_after": "1m"},
    )
    leader = repository.start("run", str(config), "--json")
    wait_for(repository.spawns.exists)
    worker = repository.start("work", "--json")
    wait_for(lambda: "run.joined" in repository.council("state", "log", "--json").stdout)
    worker.send_signal(signal.SIGSTOP)
    gate.touch()
    assert ended(leader) == [0]
    worker.send_signal(signal.SIGCONT)
    assert ended(worker) == [0]
    names = Counter(event.type for event in await happened(repository))
    assert (names["run.finished"], names["run.leader_elected"]) == (1, 1)
    await assert_each_landed_once(repository, ["a"])


@pytest.mark.extended
async def test_leader_stopped_while_a_worker_continues_reports_a_running_run(repository: Repository) -> None:
    """It names the process that continues; `run.interrupted` would end all followers of the run."""
    gate = repository.spawns.parent / "gate"
    tasks = [{"id": task, "prompt": f"await {gate}\nwrite {task}.txt x"} for task in ("a", "b")]
    leader = repository.start("run", str(repository.configure(tasks, capacity=1, coordination=QUICK)), "--json")
    wait_for(repository.spawns.exists)
    worker = repository.start("work", "--json")
    wait_for(lambda: len(repository.spawns.read_text().splitlines()) == len(tasks))
    leader.send_signal(signal.SIGINT)
    stdout, stderr = leader.communicate(timeout=60)
    *events, result = [json.loads(line) for line in stdout.splitlines()]
    assert (result["status"], result["exit"], leader.returncode) == ("running", 1, 1), (result, stderr)
    assert [one["pid"] for one in result["orchestrators"] if one["ended"] is None] == [worker.pid]
    [left] = [event for event in events if event.get("event") == "run.worker_left"]
    assert {one["pid"]: one["id"] for one in result["orchestrators"]}[left["pid"]] == left["orchestrator"]
    assert (left["pid"], f"continues in process {worker.pid} on" in left["reason"]) == (leader.pid, True)
    gate.touch()
    assert ended(worker) == [0]
    assert "run.interrupted" not in {event.type for event in await happened(repository)}
    await assert_each_landed_once(repository, ["a", "b"])


@pytest.mark.extended
async def test_unshared_run_can_not_be_joined(repository: Repository) -> None:
    """Without `shared` there are no claims; the message names the setting."""
    config = repository.configure([{"id": "a", "prompt": "hang"}], coordination={"enabled": False})
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: states(repository) == {"a": "running"})
    run = repository.council("status", "--json").result["run"]
    refused = repository.council("work", "--run", run)
    assert (refused.code, "enabled: true" in refused.stderr) == (2, True)
    active = repository.council("resume", run)
    assert (active.code, printed_commands(active.stderr)) == (2, [["watch", run]]), active
    child.send_signal(signal.SIGINT)
    ended(child)
    async with FileStore.open(repository.log, SystemClock()) as store:
        assert await read_claims(store, run) == {}
        [one] = (await read_orchestrators(store, run)).values()
        assert one.ended is not None


@pytest.mark.extended
@pytest.mark.parametrize("by", ["option", "environment"])
async def test_exclusive_process_can_not_be_joined(repository: Repository, by: str) -> None:
    """It makes no claims, so both could run one task: the new process is rejected, and the first continues."""
    config = repository.configure([{"id": "a", "prompt": "hang"}, {"id": "b", "prompt": "hang"}], capacity=1)
    if by == "option":  # a fact of that process, in no record
        stopped = repository.start("run", str(config), "--json")
        wait_for(lambda: "running" in states(repository).values())
        stopped.send_signal(signal.SIGINT)
        ended(stopped)
        alone = repository.start("resume", "--no-coordination", "--json")
    else:  # which decides when a process joins
        alone = repository.start("run", str(config), "--no-coordination", "--json")
        repository.environ["SHARED_STATE_ENABLED"] = "true"
    wait_for(lambda: "running" in states(repository).values())
    run = repository.council("status", "--json").result["run"]
    refused = repository.council("work", "--run", run, timeout=30)  # a joined process stays
    assert (refused.code, f"process {alone.pid} on" in refused.stderr) == (2, True), refused
    assert f"SHARED_STATE_ENABLED=true council resume {run}" in refused.stderr
    assert len(repository.council("status", "--json").result["orchestrators"]) == (2 if by == "option" else 1)
    assert sorted(states(repository).values()) == ["pending", "running"]
    alone.send_signal(signal.SIGINT)
    assert ended(alone) == [130]
    await repository.assert_invariants()


@pytest.mark.extended
def test_worker_can_not_choose_to_be_exclusive(repository: Repository) -> None:
    """There is no such option, and a variable that requests it is named."""
    assert "--no-coordination" not in repository.council("work", "--help").stdout
    config = repository.configure([{"id": "a", "prompt": "write a.txt x"}])
    run = repository.council("run", str(config), "--json").result["run"]
    repository.environ["SHARED_STATE_ENABLED"] = "false"
    refused = repository.council("work", "--run", run)
    assert (refused.code, "unset SHARED_STATE_ENABLED" in refused.stderr) == (2, True), refused


@pytest.mark.extended
async def test_single_worker_finishes_a_run(repository: Repository) -> None:
    """Its leader was killed before: the worker becomes leader, and records the end."""
    config = repository.configure(shared(4), coordination=QUICK)
    killed = repository.council("run", str(config), failpoints="attempt.recorded=kill")
    assert killed.code == -signal.SIGKILL
    run = repository.council("status", "--json").result["run"]
    ended_well = repository.council("work", "--run", run, "--json")
    assert ended_well.code == 0, ended_well
    status = repository.council("status", "--json").result
    assert status["status"] == "landed"
    await assert_each_landed_once(repository, [f"t{one}" for one in range(4)])


@pytest.mark.extended
async def test_process_without_a_program_does_not_end_the_run(repository: Repository) -> None:
    """It is the only process and leads.

    A missing program here does not end the run, since another process may have it.
    """
    program = repository.spawns.parent / "an-agent"
    script = f'#!/bin/sh\nexec {sys.executable} -S {FAKE_CLI} "$@"\n'
    program.write_text(script)
    program.chmod(0o755)
    repository.environ["PATH"] = f"{program.parent}:{repository.environ['PATH']}"
    agent = {
        "use": "command",
        "argv": [program.name, "{prompt_file}"],
        "env": {"FAKE_CLI_LEDGER": str(repository.spawns)},
    }
    adapters = {"agent": {**agent, "writable": [str(repository.spawns.parent)]}}
    config = repository.configure([{"id": "t", "prompt": "write t.txt x"}], adapters=adapters, coordination=QUICK)
    assert repository.council("run", str(config), failpoints="attempt.recorded=kill").code == -signal.SIGKILL
    run = repository.council("status", "--json").result["run"]
    program.unlink()
    repository.council("work", "--run", run)
    assert "run.finished" not in repository.council("state", "log", "--json").stdout
    assert repository.council("status", "--json").result["status"] == "interrupted"
    program.write_text(script)
    program.chmod(0o755)
    assert repository.council("work", "--run", run).code == 0
    assert states(repository) == {"t": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_last_process_records_the_end_of_a_run(repository: Repository) -> None:
    """Its leader was killed after the last task; sinks receive the end."""
    sink = repository.top.parent / "events.jsonl"
    config = repository.configure(shared(1), sinks={"log": {"use": "jsonlines", "file": str(sink)}})
    killed = repository.council("run", str(config), failpoints="landing.recorded=kill")
    assert killed.code == -signal.SIGKILL
    run = repository.council("status", "--json").result["run"]
    assert repository.council("work", "--run", run, "--json").code == 0
    assert repository.council("status", "--json").result["status"] == "landed"
    assert sink.read_text().count('"run.finished"') == 1
    await repository.assert_invariants()


async def test_no_active_run_can_be_joined(repository: Repository) -> None:
    repository.council("run", str(repository.configure(shared(1))))
    ended_at_once = repository.council("work")
    assert ended_at_once.code == 0
    assert "no active run" in ended_at_once.stderr


@pytest.mark.extended
async def test_task_ended_elsewhere_before_its_claim_ends_here(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep reads the record before the event arrives; the run still ends."""
    claimed = anyio.Event()
    changes, claim = follow_changes, Ledger.claim

    async def told_late(ledger: Ledger) -> AsyncIterator[ExternalChange]:
        async for change in changes(ledger):
            yield change
            if change.task == "there" and not claimed.is_set():
                await claimed.wait()

    async def claim_and_tell(ledger: Ledger, task: str, *, is_requested: bool = False) -> bool:
        is_ours = await claim(ledger, task, is_requested=is_requested)
        if ledger.task(task).status is TaskStatus.FAILED:
            claimed.set()
        return is_ours

    monkeypatch.setattr(peers, "follow_changes", told_late)
    monkeypatch.setattr(Ledger, "claim", claim_and_tell)
    tasks: list[dict[str, Any]] = [{"id": "here", "prompt": "hang"}, {"id": "there", "prompt": "exit 1", "attempts": 1}]
    path = repository.configure(tasks, capacity=1, coordination=QUICK)
    reports: list[RunReport] = []
    async with Council.open(path, environ=repository.environ) as council:
        run = await council.runs.create()

        async def execute() -> None:
            reports.append(await council.runs.resume(run))

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(execute)
                await until_event(council, "task.started", 1)
                other = repository.start("work", "--run", run)
                await claimed.wait()
                await council.tasks.cancel("here")
        ended(other)
    assert {task.id: task.status for task in reports[0].tasks} == {"here": "cancelled", "there": "failed"}
    await repository.assert_invariants()


@pytest.mark.extended
def test_processes_waiting_for_the_target_do_not_wait_for_each_other(repository: Repository) -> None:
    """Each has a task that can't land while the user has changes in the checkout; both exit, and nothing is lost."""
    folder = repository.spawns.parent
    waits = f"until [ -e {folder}/go ]; do sleep 0.02; done"
    tasks = [{"id": one, "prompt": f"touch {folder}/{one}; {waits}; echo 1 > {one}.txt"} for one in ("a", "b")]
    adapter = {**SHELL_ADAPTER, "writable": [str(folder)]}
    config = repository.configure(tasks, adapters={"sh": adapter}, capacity=1)
    processes = [repository.start("run", str(config))]
    wait_for((folder / "a").exists)
    processes.append(repository.start("work"))
    wait_for((folder / "b").exists)
    (repository.top / "README.md").write_text("mine\n")
    (folder / "go").touch()
    for one in processes:
        said = one.communicate(timeout=60)
        assert one.returncode == 1, said
    assert repository.council("status", "--json").states == {"a": "queued", "b": "queued"}
    repository.git("checkout", "--quiet", "README.md")
    assert repository.council("resume", "--json").states == {"a": "landed", "b": "landed"}
