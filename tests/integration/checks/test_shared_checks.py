"""Processes that share a store run an equal check once, and take over from a process that ends during it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.gated_checks import GatedChecks, outcome
from tests.waiting import wait_for


class Runs(GatedChecks):
    """Runs with an equal check, each with its own target, from the same base."""

    def __init__(self, repository: Repository) -> None:
        super().__init__(repository)
        self.logs, self.runs = repository.top / ".council" / "logs", list[str]()
        repository.git("branch", "start")

    def start(
        self,
        name: str,
        *prompts: str,
        failpoints: str = "",
        cache: bool = True,
        event: str = "base.checking",
        **more: Any,
    ) -> None:
        """Start a run that lands on a new branch; return when it is about to run the check."""
        check = {"run": self.command, "cache": cache}
        defaults = {"checks": [check], "attempts": 1, "timeout": "60s", "allow_failing_base": event != "base.checking"}
        tasks = [{"id": f"{name}{number}", "prompt": prompt} for number, prompt in enumerate(prompts)]
        config = self.repository.configure(
            tasks, defaults=defaults, base="start", target=name, writable=[str(self.folder)], **more
        )
        begun = self.count(event)
        self.children.append(self.repository.start("run", str(config), "--json", failpoints=failpoints))
        wait_for(lambda: self.count(event) > begun)
        self.runs += [path.name for path in self.logs.iterdir() if path.name not in self.runs]

    def count(self, event: str) -> int:
        """Return how often an event is recorded."""
        return "".join(path.read_text() for path in self.repository.log.glob("*.jsonl")).count(f'"{event}"')

    def end(self, index: int) -> CommandResult:
        """Return the exit code and the output of a run that has ended."""
        return outcome(self.children[index])


@pytest.fixture
def runs(repository: Repository) -> Iterator[Runs]:
    """Yield runs to start; kill their processes afterwards."""
    with Runs(repository) as made:
        yield made


@pytest.mark.parametrize("cache", [True, pytest.param(False, marks=pytest.mark.extended)])
async def test_equal_check_of_two_processes_runs_once(runs: Runs, cache: bool) -> None:
    """Unless its result does not depend on the files alone: then both run it, concurrently."""
    for name in ("a", "b"):
        runs.start(name, "print nothing", cache=cache)
        wait_for(lambda: runs.checks >= 1)
    if not cache:
        wait_for(lambda: runs.checks == 2)
    runs.open()
    assert [runs.end(index).states for index in range(2)] == [{"a0": "no_change"}, {"b0": "no_change"}]
    assert runs.checks == (1 if cache else 2)
    await runs.repository.assert_invariants()


@pytest.mark.parametrize(
    ("failpoint", "checks"),
    [
        ("check.leased", 1),
        pytest.param("check.ended", 2, marks=pytest.mark.extended),
        pytest.param("check.recorded", 1, marks=pytest.mark.extended),
    ],
)
async def test_check_of_a_process_killed_at_a_failpoint_is_taken_over(runs: Runs, failpoint: str, checks: int) -> None:
    """Its result is used if it was recorded; the killed run repeats nothing either."""
    runs.start("a", "write a x", failpoints=f"{failpoint}=kill")
    if failpoint != "check.leased":
        wait_for(lambda: runs.checks == 1)
        runs.start("b", "write b x")
        runs.open()
    assert runs.end(0).code == -signal.SIGKILL
    if failpoint == "check.leased":
        runs.start("b", "write b x")
        wait_for(lambda: runs.checks == 1)
        runs.open()
    assert runs.end(1).states == {"b0": "landed"}
    assert runs.checks == checks + 1  # that of the base, and that of the work
    ended = runs.repository.council("resume", runs.runs[0], "--json")
    assert ended.states == {"a0": "landed"}, ended
    assert runs.checks == checks + 2
    await runs.repository.assert_invariants()


@pytest.mark.extended
async def test_process_takes_over_a_check_that_another_stops(runs: Runs) -> None:
    runs.start("a", "print nothing")
    wait_for(lambda: runs.checks == 1)
    runs.start("b", "print nothing")
    runs.children[0].send_signal(signal.SIGTERM)
    wait_for(lambda: runs.checks == 2)
    runs.open()
    assert runs.end(1).states == {"b0": "no_change"}
    assert runs.end(0).states == {"a0": "pending"}
    await runs.repository.assert_invariants()


@pytest.mark.extended
async def test_no_slot_is_held_while_another_process_runs_the_check(runs: Runs) -> None:
    """The awaited check ends only once a command of a session has had the only slot."""
    runs.start("a", "write a x", event="task.checking")
    wait_for(lambda: runs.checks == 1)
    shell = {"fake": {"use": "command", "argv": ["sh", "{prompt_file}"]}}
    slot = f"while ! test -e {runs.folder}/built; do sleep 0.02; done; council slot -- touch {runs.folder}/open"
    runs.start("b", "printf 'x\\n' > a", slot, event="task.checking", adapters=shell, capacity=2, checks_capacity=1)
    (runs.folder / "built").touch()
    assert runs.end(1).states == {"b0": "landed", "b1": "no_change"}
    assert runs.end(0).states == {"a0": "landed"}
    assert runs.checks == 1
    await runs.repository.assert_invariants()
