"""Random histories of three machines: losses, suspensions, and outages of the remote and the store, at random times."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from tests.conftest import CommandResult
from tests.machines import Cluster, signal_machine, work
from tests.store_kinds import Server
from tests.waiting import wait_for

SEEDS = range(int(os.environ.get("COUNCIL_HISTORIES", "2")))


def random_tasks(chance: random.Random, count: int) -> list[dict[str, Any]]:
    """Return tasks with needs, built needs, phases, owned paths, and checks that fail once."""
    tasks = []
    for one in range(count):
        steps = [f"pause {chance.random() / 2:.2f}", f"write own/{one}.txt {one}", f"append s{one % 3}.txt {one}"]
        task: dict[str, Any] = {"id": f"t{one}", "owns": [f"own/{one}.txt", f"s{one % 3}.txt"], "on_conflict": "rebase"}
        if chance.random() < 0.3:
            task["workflow"] = "two"
            steps = [*(f"in build {step}" for step in steps), f"in polish append own/{one}.txt polished"]
        elif chance.random() < 0.3:
            steps = [f"discard own/bad{one}.txt", f"attempt 1 write own/bad{one}.txt x", *steps]
            task["owns"] += [f"own/bad{one}.txt"]
        if one >= 3 and chance.random() < 0.4:
            need = f"t{chance.randrange(one)}"
            task["needs"] = [{"task": need, "at": "built"} if chance.random() < 0.5 else need]
        tasks.append({**task, "prompt": "\n".join(steps), "checks": ["sh -c '! ls own/bad*'"]})
    return tasks


class History:
    """Machines that work in one run, to which things happen at random times."""

    def __init__(self, cluster: Cluster, server: Server, chance: random.Random, config: Mapping[str, Any]) -> None:
        self.cluster, self.server, self.chance = cluster, server, chance
        self.machines = [cluster.machine(name) for name in ("first", "second", "third")]
        path = cluster.configure(self.machines[0], *config["tasks"], capacity=2, workflows=config["workflows"])
        self.processes = {self.machines[0].top: self.machines[0].start("run", path, "--json")}
        wait_for(cluster.attempts)
        for machine in self.machines[1:]:
            self.processes[machine.top] = work(machine, cluster)

    def pause(self, most: float) -> None:
        """Wait for a random time."""
        time.sleep(self.chance.random() * most)

    def happen(self, event: str) -> None:
        """Let something happen to a random machine, or to what they share."""
        machine = self.chance.choice(self.machines)
        match event:
            case "lose":
                signal_machine(machine, signal.SIGKILL)
                self.processes[machine.top].communicate()
                machine.top.parent.rename(machine.top.parent.with_name("lost"))
                self.machines.remove(machine)
            case "kill":
                self.processes[machine.top].kill()
                self.processes[machine.top].communicate()
                self.processes[machine.top] = work(machine, self.cluster)
            case "suspend":
                signal_machine(machine, signal.SIGSTOP)
                self.pause(3)
                signal_machine(machine, signal.SIGCONT)
            case "remote":
                gone = self.cluster.remote.rename(self.cluster.remote.with_name("gone.git"))
                self.pause(4)
                gone.rename(self.cluster.remote)
            case "store":
                self.server.kill()
                self.pause(2)
                self.server.start()

    def end(self) -> CommandResult:
        """Wait for the end of all processes, and continue the run if they were all fenced; return the last result."""
        for machine in self.machines:
            ended = CommandResult.of(self.processes[machine.top], timeout=120)
            assert ended.code in {0, 1, 2, 5}, ended
        last = CommandResult.of(work(self.machines[0], self.cluster), timeout=120)
        return last if last.code == 0 else CommandResult.of(work(self.machines[0], self.cluster), timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_random_history_of_machines(cluster: Cluster, server: Server, seed: int) -> None:
    """Each task lands exactly once and completely, and nothing is left at the remote."""
    chance = random.Random(seed)
    tasks = random_tasks(chance, 14)
    config = {"tasks": tasks, "workflows": {"two": [{"build": {}}, {"polish": {}}]}}
    history = History(cluster, server, chance, config)
    for event in chance.sample(["lose", "suspend", "remote", "store", "kill"], 4):
        history.pause(2)
        history.happen(event)
    last = history.end()
    states = history.machines[0].council("status", "--state", cluster.store, "--json").states
    assert Counter(states.values()) == {"landed": len(tasks)}, last
    trailers = cluster.git("log", "--format=%(trailers:key=Council-Task,valueonly)", "main").split()
    assert sorted(line.rpartition("/")[2] for line in trailers) == sorted(states)
    for one, task in enumerate(tasks):
        expected = {str(one), "polished"} if "workflow" in task else {str(one)}
        assert {*cluster.git("show", f"main:own/{one}.txt").split()} == expected
    for part in range(3):  # a repeated attempt appends its line again
        assert {*cluster.git("show", f"main:s{part}.txt").split()} == {str(one) for one in range(part, len(tasks), 3)}
    assert cluster.shared() == []
