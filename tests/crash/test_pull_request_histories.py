"""Random histories of a run and of people on a forge, with kills and faults: nothing is lost or done twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.testing.forge_servers import GitHubServer, GitLabServer
from orchestrator.testing.forge_servers.pull_requests import ForgePullRequest, PullRequestServer
from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.integration.plugins.test_pull_requests import beside, configure, give_token, push_by_hand
from tests.waiting import wait_for

#: The number of histories; more by the environment.
COUNT = int(os.environ.get("COUNCIL_HISTORIES", "2"))
TASKS = 4
#: A history is over after this many seconds; then all people merge, and the server recovers.
LENGTH = 12.0


class History:
    """One run, and what people did to its pull requests."""

    def __init__(self, seed: int, repository: Repository, forge: PullRequestServer, folder: Path) -> None:
        self.random, self.repository, self.forge, self.folder = random.Random(seed), repository, forge, folder
        self.closed: set[str] = set()
        self.by_hand: dict[int, str] = {}
        self.log: list[str] = []

    def start(self) -> StartedCommand:
        """Start the run, in which each further session of a task writes another number."""
        steps = "\n".join(f"attempt {number} write {{name}}.txt {number}" for number in range(1, 12))
        tasks: list[dict[str, Any]] = [
            {"id": f"t{index}", "prompt": steps.format(name=f"t{index}")} for index in range(TASKS)
        ]
        tasks[-1]["needs"] = ["t0"]
        config = configure(self.repository, self.forge, *tasks, rounds=9)
        self.log.append("run")
        child = self.repository.start("run", str(config), "--json")
        wait_for(self.repository.spawns.exists)  # otherwise there may be no run to resume
        return child

    def act(self, child: StartedCommand) -> StartedCommand:
        """Let a person, the server or the kernel do something; return the running command."""
        found = [self.forge.pull_request(number) for number in list(self.forge.pull_requests)]
        unmerged = [one for one in found if one.state == "open"]
        if unmerged and self.random.random() < 0.7:
            self._direct(self.random.choice(unmerged))
            return child
        match self.random.randrange(4):
            case 0:
                self.log.append("503")
                self.forge.fail_next(
                    self.random.randint(1, 8), self.random.choice([500, 503, 429]), {"retry-after": "0"}
                )
            case 1:
                self.log.append("lost answers")
                self.forge.lose_answers(1)
            case 2:
                child = self.restart(child)
        return child

    def restart(self, child: StartedCommand) -> StartedCommand:
        """Kill the command, and resume the run."""
        self.log.append("kill")
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        return beside(self.repository).start("resume", "--json")

    def _direct(self, one: ForgePullRequest) -> None:
        task, action = one.branch.rpartition("/")[2], self.random.randrange(10)
        self.log.append(f"{action} {task}")
        match action:
            case 0 | 1 | 2:
                self.forge.merge(one.number, self.random.choice(["merge", "squash", "rebase"]))
            case 3 if task != "t0" and len(self.closed) < TASKS - 2:
                self.closed.add(task)
                self.forge.close_pull_request(one.number)
            case 4 | 5:
                self.forge.review(one.number, "another number, please")
            case 6 | 7:
                self.forge.set_check(one.number, "unit tests", passed=False, output="wrong number")
            case 8 if one.number not in self.by_hand:
                folder = self.folder / f"clone-{one.number}"
                name = f"by-hand-{one.number}.txt"
                self.by_hand[one.number] = push_by_hand(self.repository, self.forge, one, folder, name)

    def finish(self, child: StartedCommand) -> dict[str, str]:
        """Let the server recover and people merge everything; return the states of the tasks."""
        self.forge.recover()
        deadline = time.monotonic() + 90
        while child.poll() is None and time.monotonic() < deadline:
            for number in list(self.forge.pull_requests):
                if self.forge.pull_request(number).state == "open":
                    self.forge.merge(number)
            time.sleep(0.1)
        assert child.poll() is not None, self.log
        self.log.extend(child.communicate(timeout=60))
        status = beside(self.repository).council("status", "--json")
        assert "tasks" in status.result, (status, self.log)
        return status.states


@pytest.fixture(params=["github", "gitlab"])
def forge(request: pytest.FixtureRequest, repository: Repository, tmp_path: Path) -> Iterator[PullRequestServer]:
    """Yield a server with a bare clone of the repository."""
    give_token(repository)
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(tmp_path / "forge.git"))
    servers: dict[str, type[PullRequestServer]] = {"github": GitHubServer, "gitlab": GitLabServer}
    with servers[request.param](git_dir=tmp_path / "forge.git") as server:
        yield server


@pytest.mark.extended
@pytest.mark.parametrize("seed", range(COUNT))
def test_histories_end_correctly(seed: int, repository: Repository, forge: PullRequestServer, tmp_path: Path) -> None:
    """Nothing is landed that is not merged; closed pull requests end their tasks; no commit by hand is lost."""
    history = History(seed, repository, forge, tmp_path)
    child, end = history.start(), time.monotonic() + LENGTH
    while time.monotonic() < end and child.poll() is None:
        time.sleep(history.random.uniform(0.05, 0.8))
        child = history.act(child)
    states = history.finish(child if child.poll() is None else history.restart(child))
    found = list(forge.pull_requests.values())
    for task in (f"t{index}" for index in range(TASKS)):
        own = [one for one in found if one.branch.endswith(f"/{task}")]
        assert len(own) <= 1, (task, own, history.log)
        expected = "cancelled" if task in history.closed else "landed"
        assert states[task] == expected, (task, states, history.log)
        if expected == "landed":
            assert own[0].state == "merged", (task, own, history.log)
            assert forge.git("show", f"main:{task}.txt"), history.log
    for number, commit in history.by_hand.items():
        one = forge.pull_requests[number]
        assert forge.git("merge-base", commit, one.head) == commit, (one, history.log)
