"""Any one of several processes of a run is killed: the others finish without lost, repeated or leftover work."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from orchestrator.engine.state.records import read_requests
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from orchestrator.system.failpoints import FAILPOINTS
from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.crash.test_crashes import (
    FIRST_KILL_FOR,
    RECOVERY_FAILPOINTS,
    UNREACHED_FAILPOINTS,
    assert_sink_complete,
    chain_and_sides,
    configure,
)
from tests.integration.runs.test_shared_runs import QUICK, assert_each_landed_once, ended, happened, states
from tests.waiting import wait_for

#: Reached by the leader only.
LEADER_FAILPOINTS: Final = frozenset({"run.seeded", "run.leader_elected", "run.finished", "sink.sent"})
#: Reached by a replacement leader only.
TAKEOVER_FAILPOINTS: Final = RECOVERY_FAILPOINTS | {"claims.taken_over"}
#: Reached by a process before the session of its first task runs.
EARLY_FAILPOINTS: Final = frozenset(
    {
        "attempt.recorded",
        "slot.partly_made",
        "slot.moved",
        "worktree.partly_made",
        "worktree.created",
        "session.spawned",
    }
)
#: Commits, of which each process makes many.
COMMIT_FAILPOINTS: Final = frozenset({"state.appended", "state.published"})
WORKER_FAILPOINTS: Final = (
    FAILPOINTS - UNREACHED_FAILPOINTS - LEADER_FAILPOINTS - TAKEOVER_FAILPOINTS | COMMIT_FAILPOINTS
)
#: The short form: the leader is killed, then its replacement.
QUICK_CASES: Final = {("replacement", "claims.taken_over", 1)}

#: Death is detected by the lock, and slow processes are not taken over.
SLOW_EXPIRY: Final = {**QUICK, "stale_after": "60s", "owner_stale_after": "60s"}

#: Tasks that wait for a signal of the test; they use all the capacity of their process.
GATED: Final = ("first", "second", "third")
COUNT: Final = 5


@dataclass
class RunProcesses:
    """Processes of one run, each starting with a task that waits for a signal."""

    repository: Repository
    processes: list[StartedCommand] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Write the config."""
        tasks: list[dict[str, object]] = [
            {
                "id": task,
                "prompt": f"await {self._gate(task)}\nwrite {task}.txt x",
                "priority": 10,
                "owns": [f"{task}.txt"],
            }
            for task in GATED
        ]
        self.tasks = [*GATED, *(f"t{one}" for one in range(COUNT))]
        path = configure(self.repository, [*tasks, *chain_and_sides(COUNT)])
        config = {**json.loads(path.read_text()), "capacity": 1, "coordination": SLOW_EXPIRY}
        path.write_text(json.dumps(config))
        self.config = path

    def _gate(self, task: str) -> Path:
        return self.repository.spawns.parent / f"gate-{task}"

    def open(self, *tasks: str) -> None:
        """Signal waiting tasks to end."""
        for task in tasks:
            self._gate(task).touch()

    def run(self, failpoints: str = "") -> StartedCommand:
        """Start the run; return once its process has a session or is dead."""
        child = self.repository.start("run", str(self.config), "--json", failpoints=failpoints)
        return self._added(child)

    def work(self, failpoints: str = "") -> StartedCommand:
        """Start another worker; return once it has a session or is dead."""
        child = self.repository.start("work", "--run", self.id, "--json", failpoints=failpoints)
        return self._added(child)

    def _added(self, child: StartedCommand) -> StartedCommand:
        self.processes.append(child)
        before = self.count_started()
        wait_for(lambda: self.count_started() > before or child.poll() is not None)
        return child

    def count_started(self) -> int:
        """Return the number of started sessions."""
        spawns = self.repository.spawns
        return len(spawns.read_text().splitlines()) if spawns.exists() else 0

    @property
    def id(self) -> str:
        """Return the id of the run."""
        return str(self.repository.council("status", "--json").result["run"])

    async def claimed(self) -> int:
        """Return how often the leader role was claimed."""
        return sum(event.type == "run.leader_elected" for event in await happened(self.repository))


def is_killed(child: StartedCommand) -> bool:
    """Return whether a process was killed."""
    return child.poll() == -signal.SIGKILL


def kill_cases() -> list[object]:
    """Return the process to kill, its failpoint, and the number of its hit."""
    found = [
        ("leader", name, 1 + (name in EARLY_FAILPOINTS - {"slot.partly_made"}))
        for name in WORKER_FAILPOINTS | LEADER_FAILPOINTS
    ]
    found += [("worker", name, 1) for name in WORKER_FAILPOINTS]
    found += [("replacement", name, 1) for name in TAKEOVER_FAILPOINTS | LEADER_FAILPOINTS - {"run.seeded"}]
    found += [(who, name, hit) for who in ("leader", "worker") for name in COMMIT_FAILPOINTS for hit in (20, 33)]
    return [pytest.param(*one, marks=() if one in QUICK_CASES else pytest.mark.slow) for one in sorted(found)]


@pytest.mark.extended
@pytest.mark.parametrize(("who", "name", "hit"), kill_cases())
async def test_tasks_of_a_killed_worker_are_finished_by_the_others(
    repository: Repository, who: str, name: str, hit: int
) -> None:
    """The others have running sessions meanwhile; each task lands once, nothing is left over."""
    crew = RunProcesses(repository)
    spec = f"{name}=kill@{hit}"
    if who == "replacement":
        first = crew.run(f"{FIRST_KILL_FOR[name]}=kill" if FIRST_KILL_FOR.get(name) == "landing.pushed" else "")
        victim = crew.work(spec)
        if FIRST_KILL_FOR.get(name) == "landing.pushed":
            crew.open("first")
        else:
            first.send_signal(signal.SIGKILL)
        wait_for(lambda: is_killed(first))
        while await crew.claimed() < 2 and not is_killed(victim):
            pass
        crew.work()
        crew.open(*GATED)
    else:
        own = GATED[who == "worker"]
        children = [crew.run(spec if who == "leader" else ""), crew.work(spec if who == "worker" else "")]
        crew.work()
        crew.open(own)
        victim = children[who == "worker"]
        if name == "run.finished":
            crew.open(*GATED)
    wait_for(lambda: victim.poll() is not None, 60)
    assert is_killed(victim), victim.communicate()
    crew.open(*GATED)
    codes = ended(*crew.processes)
    assert {code for code in codes if code != -signal.SIGKILL} <= {0}, [one.communicate() for one in crew.processes]
    is_finished = name == "run.finished"
    if is_finished:  # events without a remaining process reach sinks in the next one
        assert repository.council("resume").code == 0
    await assert_finished(repository, crew.tasks, unended=int(is_finished))


async def assert_finished(repository: Repository, tasks: Sequence[str], *, unended: int = 0) -> None:
    """Assert that the run ended with every task landed once, and no leftovers of its processes.

    `unended` is the number of killed processes that nobody recorded as dead.
    """
    status = repository.council("status", "--json").result
    assert (status["status"], set(states(repository).values())) == ("landed", {"landed"})
    await assert_each_landed_once(repository, tasks)
    await assert_sink_complete(repository)
    async with FileStore.open(repository.log, SystemClock()) as store:
        crew = (await read_orchestrators(store, status["run"])).values()
        assert sum(one.ended is None for one in crew) == unended
        assert await read_requests(store, status["run"]) == []
    assert repository.council("locks", "--json").result["locks"] == []
    left = repository.council("clean", "--dry-run", "--json").result["found"]
    assert [one for one in left if one["status"] != "ready"] == []
    assert repository.council("state", "verify").code == 0
