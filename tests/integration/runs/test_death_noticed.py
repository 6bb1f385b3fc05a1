"""A process is killed on this machine: the others notice at once and take over all its tasks."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.claim_history import read_claims
from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.integration.runs.test_shared_runs import assert_each_landed_once, ended, states
from tests.waiting import wait_for

#: Seconds within which each task of a killed process has its next session, on an idle machine.
RESTARTED_WITHIN = 2.0


def limit() -> float:
    """Return that limit, up to doubled on a machine with more running processes than processors."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return RESTARTED_WITHIN * min(max(busy, 1.0), 2.0)


async def events(repository: Repository, type_: str) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    """Yield the wall-clock time and the data of each event of a type, oldest first."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        until = await store.position()
        async for record in store.watch(0):
            for event in record.events:
                if event.type == type_:
                    yield record.time, dict(event.data)
            if record.position == until:
                break


async def claimed_by(repository: Repository, pid: int) -> set[str]:
    """Return the tasks that a process has claimed."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        [run] = await store.list("run")
        claims = await read_claims(store, run.key.id)
        return {task for task, one in claims.items() if one.owner.pid == pid and one.released is None}


@pytest.mark.extended_variants
@pytest.mark.parametrize("victim", [pytest.param(0, id="leader"), pytest.param(2, id="worker")])
async def test_every_task_of_a_killed_process_restarts_at_once(repository: Repository, victim: int) -> None:
    """Thirty tasks, three processes, the default settings: no task waits for the reaper."""
    within = limit()
    gates = {f"t{number}": repository.spawns.parent / f"gate{number}" for number in range(12, 30)}
    tasks: list[dict[str, Any]] = [{"id": f"t{number}", "prompt": f"write t{number}.txt x"} for number in range(12)]
    tasks += [
        {"id": task, "prompt": f"await {gate}\nwrite {task}.txt x", "owns": [f"{task}.txt"]}
        for task, gate in gates.items()
    ]
    config = repository.configure(tasks, capacity=6, worktrees={"max": 40})
    children: list[StartedCommand] = []
    for command in (("run", str(config)), ("work",), ("work",)):
        children.append(repository.start(*command, "--json"))
        running = 6 * len(children)
        wait_for(lambda: Counter(states(repository).values())["running"] == running, 60)  # noqa: B023
    wait_for(lambda: repository.spawns.exists() and len(repository.spawns.read_text().splitlines()) == 30, 60)
    theirs = gates.keys() & await claimed_by(repository, children[victim].pid)  # others may still be landing
    for task in gates.keys() - theirs:
        gates[task].touch()
    wait_for(lambda: Counter(states(repository).values())["landed"] == 24, 60)
    killed = time.time()
    children[victim].send_signal(signal.SIGKILL)
    wait_for(lambda: len(repository.spawns.read_text().splitlines()) == 36, 60)
    for gate in gates.values():
        gate.touch()
    codes = ended(*children)
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [0, 0]
    again = {data["task"]: when - killed async for when, data in events(repository, "task.started") if when > killed}
    assert set(again) == theirs
    assert max(again.values()) < within
    await assert_each_landed_once(repository, [task["id"] for task in tasks])


@pytest.mark.extended
async def test_frozen_session_of_a_killed_process_is_ended(repository: Repository) -> None:
    """Its supervisor and its CLI are stopped: the new owner ends them before anybody else gets their paths."""
    gate = repository.spawns.parent / "gate"
    steps = f"await {gate}\nappend s.txt"
    tasks = [{"id": name, "prompt": f"{steps} {name}", "owns": ["s.txt"]} for name in ("first", "second")]
    killed = repository.start("run", str(repository.configure(tasks, capacity=2)), "--json")
    wait_for(repository.spawns.exists)
    status = repository.council("status", "--json").result
    session = Path(status["repository"]).parent / f"sessions/{status['run']}/first.1"
    supervisor = psutil.Process(json.loads((session / "lock").read_text())["pid"])
    frozen = [supervisor, *supervisor.children(recursive=True)]
    other = repository.start("work", "--json")
    wait_for(lambda: "run.joined" in repository.council("state", "log", "--json").stdout)
    for process in frozen:
        process.suspend()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    since = time.monotonic()
    wait_for(lambda: len(repository.spawns.read_text().splitlines()) == 2)
    assert not [process for process in frozen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert time.monotonic() - since < 4 * RESTARTED_WITHIN
    gate.touch()
    assert ended(other) == [0]
    assert states(repository) == {"first": "landed", "second": "landed"}
    await assert_each_landed_once(repository, ["first", "second"])
