"""The reaction to each failure class, in real runs; hours of cooldown on a clock that the test drives."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.cli.render.events import event_text
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.protocols import Event
from orchestrator.system.clock import format_local_time
from orchestrator.testing.clock import ManualClock
from tests.conftest import FAKE_CLI, Repository
from tests.integration.runs.test_scheduler import until_event

FAILURES = {
    "auth": "not logged in",
    "rate_limited": r"limit reached(, again in (?P<seconds>\d+) s)?",
    "overloaded": "overloaded",
    "refused": "that is declined",
    "limit": "out of turns",
}


def fake(repository: Repository, **more: Any) -> dict[str, Any]:
    """Return the entry of an adapter whose output is classified."""
    return repository.fake_adapter(**{"failures": FAILURES, **more})


async def test_failure_class_decides_about_a_retry(repository: Repository) -> None:
    """A temporary failure is retried, a permanent one is not; the result has the class."""
    expected = {
        "print overloaded\nexit 1": ("overloaded", 2),
        "print that is declined\nexit 1": ("refused", 1),
        "print that is declined": ("refused", 1),
        "print out of turns\nexit 1": ("limit", 1),
        "exit 1": ("crashed", 2),
        "write .env SECRET=1": ("refused", 1),
    }
    tasks = [{"id": f"t{number}", "prompt": prompt, "attempts": 2} for number, prompt in enumerate(expected)]
    ended = repository.council("run", str(repository.configure(tasks, adapters={"fake": fake(repository)})), "--json")
    assert set(ended.states.values()) == {"failed"}, ended
    assert [(task["failure"], task["attempts"]) for task in ended.result["tasks"]] == [*expected.values()], ended


@pytest.mark.extended
async def test_retried_classes_can_be_chosen(repository: Repository) -> None:
    """`retry_on` replaces the classes that are worth another attempt, for all tasks or for one."""
    tasks: list[dict[str, Any]] = [
        {"id": "idle", "prompt": "attempt 2 write idle.txt x", "retry_on": ["no_change"]},
        {"id": "crash", "prompt": "attempt 1 exit 1\nwrite c.txt x"},
    ]
    defaults = {"retry_on": [], "backoff": {"initial": "10ms", "max": "10ms"}}
    ended = repository.council("run", str(repository.configure(tasks, defaults=defaults)), "--json")
    assert ended.states == {"idle": "landed", "crash": "failed"}, ended
    await repository.assert_invariants()


@pytest.mark.extended
async def test_conflict_with_rebase_repeats_the_work_from_the_target(repository: Repository) -> None:
    """With `on_conflict: rebase` the work is repeated on top of the conflicting commit."""
    repository.commit({"a.txt": "1\n"}, "a")
    repository.remember()
    tasks = [{"id": name, "prompt": f"append a.txt {name}", "on_conflict": "rebase"} for name in ("left", "right")]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert ended.states == {"left": "landed", "right": "landed"}, ended
    assert sorted((repository.top / "a.txt").read_text().split()) == ["1", "left", "right"]
    assert sorted(task["attempts"] for task in ended.result["tasks"]) == [1, 2]
    await repository.assert_invariants()


async def test_failed_login_disables_its_adapter_only(repository: Repository) -> None:
    """Its tasks wait, with no attempt counted, for a login and a resume; the others land."""
    flag = repository.spawns.parent / "logged-in"
    shell = {"use": "command", "argv": ["sh", "{prompt_file}"], "failures": FAILURES}
    prompt = f"test -e {flag} || {{ echo 'not logged in: run x login'; exit 1; }}; echo ok > $COUNCIL_TASK.txt"
    tasks: list[dict[str, Any]] = [
        {"id": name, "prompt": prompt, "adapter": "locked", "attempts": 1} for name in ("a", "b")
    ]
    tasks.append({"id": "free", "prompt": "write free.txt x", "adapter": "fake"})
    adapters = {"locked": {**shell, "capacity": 1}, "fake": fake(repository)}
    config = repository.configure(
        tasks, adapters=adapters, readable=[str(repository.spawns.parent), sys.prefix, str(FAKE_CLI.parents[1])]
    )
    ended = repository.council("run", str(config), "--json")
    assert (ended.code, ended.states) == (1, {"a": "blocked", "b": "blocked", "free": "landed"}), ended
    assert "run x login" in ended.result["tasks"][0]["reason"]
    assert [one["name"] for one in ended.result["adapters"]] == ["locked"]
    assert [task["attempts"] for task in ended.result["tasks"]] == [0, 0, 1]
    assert repository.council("status", "--json").states == ended.states
    flag.touch()
    resumed = repository.council("resume", "--json")
    assert (resumed.code, resumed.states) == (0, dict.fromkeys(ended.states, "landed")), resumed
    assert resumed.result["adapters"] == []
    await repository.assert_invariants()


async def test_usage_limit_starts_a_cooldown_until_the_reset_time(repository: Repository) -> None:
    """Five hours pass on the clock; no attempt is counted, and another adapter continues meanwhile."""
    tasks: list[dict[str, Any]] = [
        {"id": "limited", "prompt": "attempt 1 print limit reached, again in 18000 s\nattempt 1 exit 1\nwrite a.txt a",
         "adapter": "limited", "attempts": 1},
        {"id": "behind", "prompt": "write b.txt b", "adapter": "limited", "priority": -1},
        {"id": "other", "prompt": "write c.txt c", "adapter": "other"},
    ]  # fmt: skip
    adapters = {"limited": fake(repository, capacity=1), "other": fake(repository)}
    path = repository.configure(tasks, adapters=adapters)
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()
        reports: list[RunReport] = []

        async def execute() -> None:
            reports.append(await council.runs.resume(run))

        async with anyio.create_task_group() as group:
            group.start_soon(execute)
            await until_event(council, "adapter.cooling_down", 1)
            await until_event(council, "task.landed", 1)
            await anyio.wait_all_tasks_blocked()
            clock.advance(17_999)
            await anyio.wait_all_tasks_blocked()
            parked = await council.runs.status(run)
            assert [(task.status, task.attempts) for task in parked.tasks] == [
                ("pending", 0), ("pending", 0), ("landed", 1),
            ]  # fmt: skip
            assert [one.cooldown_until for one in parked.adapters] == [clock.now() + 1]
            clock.advance(1)
    assert reports[0].status is RunStatus.LANDED, reports
    assert [task.attempts for task in reports[0].tasks] == [1, 1, 1]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_task_with_a_fallback_does_not_wait_for_a_limit(repository: Repository) -> None:
    """It continues with its first usable fallback, and so do the waiting tasks behind it."""
    tasks: list[dict[str, Any]] = [
        {"id": "limited", "prompt": "attempt 1 print limit reached, again in 18000 s\nattempt 1 exit 1\nwrite a.txt a",
         "attempts": 1},
        {"id": "behind", "prompt": "write b.txt b", "owns": ["b.txt"], "priority": -1},
        {"id": "alone", "prompt": "write c.txt c", "priority": -2, "fallback": []},
    ]  # fmt: skip
    adapters = {"first": fake(repository, capacity=1), "locked": fake(repository), "third": fake(repository)}
    defaults = {"adapter": "first", "fallback": ["locked", "third"]}
    lock = {"id": "lock", "prompt": "print not logged in\nexit 1", "adapter": "locked", "priority": 9, "fallback": []}
    path = repository.configure([lock, *tasks], adapters=adapters, defaults=defaults, capacity=1)
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()
        reports: list[RunReport] = []

        async def execute() -> None:
            reports.append(await council.runs.resume(run))

        async with anyio.create_task_group() as group:
            group.start_soon(execute)
            await until_event(council, "task.landed", 2)
            await anyio.wait_all_tasks_blocked()
            status = await council.runs.status(run)
            assert {task.id: (task.status, task.adapter) for task in status.tasks} == {
                "lock": ("pending", "locked"),
                "limited": ("landed", "third"),
                "behind": ("landed", "third"),
                "alone": ("pending", "first"),
            }
            clock.advance(18_000)
    assert {task.id: (task.status, task.attempts) for task in reports[0].tasks} == {
        "lock": ("blocked", 0),
        "limited": ("landed", 1),
        "behind": ("landed", 1),
        "alone": ("landed", 1),
    }
    await repository.assert_invariants()


@pytest.mark.extended
async def test_cooldown_survives_the_process(repository: Repository) -> None:
    """A resume keeps the adapter in cooldown until the same time."""
    tasks = [{"id": "t", "prompt": "attempt 1 print limit reached, again in 7200 s\nattempt 1 exit 1\nwrite a.txt a"}]
    path = repository.configure(tasks, adapters={"fake": fake(repository)})
    clock = ManualClock()

    async def opened(run: str | None, advance: float) -> str:
        async with Council.open(path, clock=clock, environ=repository.environ) as council:
            name = run or await council.runs.create()
            async with anyio.create_task_group() as group:
                group.start_soon(council.runs.resume, name)
                await until_event(council, "adapter.cooling_down", 1)
                await wait_for_claims(council, name, 1 if run is None else 2)
                await anyio.wait_all_tasks_blocked()
                clock.advance(advance)
                await anyio.wait_all_tasks_blocked()
                council.stop()
            return name

    run = await opened(None, 3600)
    before = repository.spawns.read_text()
    await opened(run, 3599)
    assert repository.spawns.read_text() == before
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        clock.advance(1)
        assert (await council.runs.resume(run)).status is RunStatus.LANDED
    await repository.assert_invariants()


async def wait_for_claims(council: Council, run: str, times: int) -> None:
    """Return when a run has had that many owners."""
    await until_event(council, "run.leader_elected", times)


@pytest.mark.extended
async def test_idle_timeout_ends_a_silent_session(repository: Repository) -> None:
    """Output or changes keep it alive; without both it is ended, with its work preserved."""
    tasks: list[dict[str, Any]] = [
        {"id": "silent", "prompt": "write half.txt x\nhang", "idle_timeout": "1s", "attempts": 1},
        {"id": "busy", "prompt": "tick 8 0.25\nwrite b.txt b", "idle_timeout": "1s"},
    ]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert ended.states == {"silent": "failed", "busy": "landed"}, ended
    silent = ended.result["tasks"][0]
    assert silent["failure"] == "idle_timeout"
    assert silent["branch"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_priority_decides_the_start_order(repository: Repository) -> None:
    """With capacity one, the higher priority starts first, regardless of the order of the file."""
    tasks = [{"id": f"p{value}", "prompt": f"write {value}.txt x", "priority": value} for value in (1, 3, 2)]
    ended = repository.council("run", str(repository.configure(tasks, capacity=1)), "--json")
    started = [line["task"] for line in ended.lines if line.get("event") == "task.started"]
    assert started == ["p3", "p2", "p1"]


async def test_tasks_with_the_same_paths_run_in_turn(repository: Repository) -> None:
    """They never run concurrently, and the later one starts from the earlier one's landing: no conflict."""
    tasks: list[dict[str, Any]] = [
        {"id": name, "prompt": f"append src/app.py # {name}", "owns": ["src/**"]} for name in ("one", "two", "three")
    ]
    tasks.append({"id": "docs", "prompt": "append README.md docs", "owns": ["*.md"]})
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    live: set[str] = set()
    for line in ended.lines:
        if line.get("event") == "task.started" and line["task"] != "docs":
            assert not live
            live.add(line["task"])
        elif line.get("event") == "task.landed":
            live.discard(line["task"])
    await repository.assert_invariants()


async def test_adapter_capacity_is_respected(repository: Repository) -> None:
    """Even if the run may have more sessions in all."""
    tasks = [{"id": f"t{n}", "prompt": f"write {n}.txt x"} for n in range(6)]
    adapters = {"fake": fake(repository, capacity=2)}
    ended = repository.council("run", str(repository.configure(tasks, adapters=adapters, capacity=6)), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    running = most = 0
    for line in ended.lines:
        running += {"task.started": 1, "task.queued": -1}.get(line.get("event", ""), 0)
        most = max(most, running)
    assert most == 2


@pytest.mark.extended
async def test_program_in_a_hidden_folder_is_distinguished_from_a_missing_one(repository: Repository) -> None:
    """A tool in the user's own repository is hidden from sessions; the error has the fix, and the fix works."""
    tool = repository.top / "tool.sh"
    tool.write_text("#!/bin/sh\necho x > x.txt\n")
    tool.chmod(0o755)
    repository.git("add", "--all")
    repository.git("commit", "--quiet", "--message", "tool")
    shell = {"use": "command", "argv": [str(tool)]}
    tasks = [{"id": "t", "prompt": "x"}]
    refused = repository.council("run", str(repository.configure(tasks, adapters={"sh": shell})), "--json")
    assert refused.code == 2, refused
    assert f"add {repository.top} to `readable`" in refused.result["remedy"]
    shell["readable"] = [str(tool)]
    ended = repository.council("run", str(repository.configure(tasks, adapters={"sh": shell})), "--json")
    assert ended.states == {"t": "landed"}, ended


@pytest.mark.extended
async def test_machine_without_capacity_is_waited_for(repository: Repository) -> None:
    """A session that can't start for lack of space costs no attempt: nothing starts for a while, then it does."""
    path = repository.configure([{"id": "t", "prompt": "write a.txt x", "attempts": 1}])
    clock = ManualClock()
    full = repository.top / ".council" / "logs"
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()
        logs = full / run
        logs.mkdir(mode=0o700)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "none", str(logs)], check=False)
        if mounted.returncode:
            pytest.skip("only root can make a file system that is full")
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(council.runs.resume, run)
                await until_event(council, "run.paused", 1)
                subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(logs)], check=True)
                await anyio.wait_all_tasks_blocked()
                clock.advance(5)
                await until_event(council, "task.landed", 1)
        finally:
            subprocess.run(["umount", str(logs)], check=True)
        report = await council.runs.status(run)
    assert [(task.status, task.attempts) for task in report.tasks] == [("landed", 1)]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_concurrent_limits_are_one_cooldown(repository: Repository) -> None:
    """Concurrent sessions hit it once, and it is reported again only if the limit ends later."""
    gate = repository.spawns.parent / "gate"
    prompt = f"attempt 1 meet {gate} 4\nattempt 1 print limit reached{{}}\nattempt 1 exit 1\nwrite {{}}.txt x"
    says = [", again in 18000 s", "", ", again in 18000 s", ", again in 19000 s"]
    tasks = [{"id": f"t{n}", "prompt": prompt.format(said, n), "attempts": 1} for n, said in enumerate(says)]
    path = repository.configure(tasks, adapters={"fake": fake(repository)})
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()
        async with anyio.create_task_group() as group:
            group.start_soon(council.runs.resume, run)
            await until_event(council, "run.waiting", 1)
            until = clock.now() + 19_000
            clock.advance(19_000)
        times = [event.data["until"] for event in await events_of(council, run, "adapter.cooling_down")]
        assert times == sorted(set(times))
        assert times[-1] == until
        report = await council.runs.status(run)
    assert {task.id: task.status for task in report.tasks} == {f"t{n}": "landed" for n in range(4)}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_run_that_only_waits_for_adapters_reports_it_once(repository: Repository) -> None:
    """First adapter disabled, second in cooldown: a task has the time; the run reports each wait once."""
    limited = "attempt {0} print limit reached, again in {1} s\nattempt {0} exit 1\n"
    prompt = "attempt 1 print not logged in\nattempt 1 exit 1\n" + limited.format(2, 600) + limited.format(3, 7200)
    tasks: list[dict[str, Any]] = [
        {"id": "t", "prompt": f"{prompt}write a.txt a", "attempts": 1},
        *({"id": f"after{n}", "prompt": "write b.txt b", "needs": ["t"]} for n in (1, 2)),
        {"id": "other", "prompt": "write c.txt c", "adapter": "other", "fallback": []},
    ]
    adapters = {name: fake(repository) for name in ("locked", "limited", "other")}
    path = repository.configure(tasks, adapters=adapters, defaults={"adapter": "locked", "fallback": ["limited"]})
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()
        instants = []
        async with anyio.create_task_group() as group:
            group.start_soon(council.runs.resume, run)
            for count, seconds in enumerate((600, 7200), 1):
                await until_event(council, "run.waiting", count)
                instants.append(clock.now() + seconds)
                reasons = {task.id: task.reason for task in (await council.runs.status(run)).tasks}
                waits = f"waits for adapter 'limited' until {format_local_time(instants[-1])}; 'locked' is disabled: "
                assert str(reasons["t"]).startswith(waits)
                assert (reasons["after2"], reasons["other"]) == ("waits for 't'", None)
                await council.tasks.cancel(f"after{count}", run=run)  # it checks again for ready tasks
                await anyio.wait_all_tasks_blocked()
                clock.advance(seconds)
        waited = await events_of(council, run, "run.waiting")
    assert [event.data["until"] for event in waited] == instants
    assert {tuple(event.data["adapters"]) for event in waited} == {("limited",)}
    assert event_text(waited[0]) == (
        f"waiting for limited (cooling down), at least until {format_local_time(instants[0])}"
    )
    await repository.assert_invariants()


async def events_of(council: Council, run: str, name: str) -> list[Event]:
    """Return all events of a name of a finished run."""
    found: list[Event] = []
    async for record in council.history.follow(0):
        found += [event for event in record.events if event.type == name]
        if any(event.type == "run.finished" and event.data["run"] == run for event in record.events):
            break
    return found
