"""Base checks while their process is killed or stopped, or while the base moves: no session starts unchecked."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.gated_checks import LIMIT, GatedChecks, outcome
from tests.integration.checks.test_base_checks import sessions, types
from tests.integration.runs.test_shared_runs import QUICK
from tests.waiting import wait_for


class Gated(GatedChecks):
    """A run whose check passes, once it is open, unless the base has a file `bad`."""

    def start(self, command: str, *others: dict[str, Any], **settings: Any) -> StartedCommand:
        """Start the run, or one more process, and return when its check waits."""
        if command == "run":
            tasks = [{"id": "t1", "prompt": "write a.txt a", "checks": [f"{self.command}; test ! -e bad"]}, *others]
            config = self.repository.configure(tasks, writable=[str(self.folder)], **settings)
            self.children.append(self.repository.start("run", str(config), "--json"))
            wait_for((self.folder / "begun").exists)
        else:
            self.children.append(self.repository.start(command, "--json"))
            wait_for(lambda: "run.joined" in self.repository.council("state", "log", "--json").stdout)
        return self.children[-1]

    @property
    def folders(self) -> list[Path]:
        """Return the existing folders of sessions and checks."""
        return list(Path(self.repository.environ["COUNCIL_HOME"]).glob("*/sessions/*/*"))


@pytest.fixture
def gated(repository: Repository) -> Iterator[Gated]:
    """Yield a run to start; kill its processes afterwards."""
    with Gated(repository) as made:
        yield made


@pytest.mark.extended
async def test_waiting_process_checks_the_base_when_the_other_is_killed(gated: Gated) -> None:
    """Leftovers of the killed check are removed, and it does not count as passed."""
    gated.repository.commit({"bad": "x\n"}, "broken")
    gated.repository.remember()
    first, second = gated.start("run"), gated.start("work")
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=LIMIT)
    wait_for(lambda: gated.checks == 2 and len(gated.folders) == 1)
    gated.open()
    ended = outcome(second)
    assert (ended.code, ended.result["status"], ended.result["halt_cause"]) == (1, "halted", "base"), ended
    assert "fails on main" in ended.result["halted"]
    assert sessions(gated.repository) == 0
    logs = list((gated.repository.top / ".council/logs").glob("*/t1.0.check1*"))
    assert len(logs) == 2, logs  # one per process
    await gated.repository.assert_invariants()


@pytest.mark.slow  # under load a folder of the stopped process may stay in the trash: open
async def test_process_does_not_wait_for_base_checks_of_a_stopped_one(gated: Gated) -> None:
    """The other takes over and finishes; the stopped one ends by itself when it continues, and disturbs nothing."""
    first = gated.start("run", coordination=QUICK)
    second = gated.start("work")
    first.send_signal(signal.SIGSTOP)
    gated.open()
    ended = outcome(second)
    first.send_signal(signal.SIGCONT)
    assert ended.states == {"t1": "landed"}, ended
    last = outcome(first)
    assert (last.code, last.result["status"]) == (1, "taken_over"), last
    assert gated.repository.council("clean", "--yes").code == 0
    await gated.repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("broken", [False, True])
async def test_base_that_moves_during_its_checks_is_checked_again(gated: Gated, broken: bool) -> None:
    """Only the commit that sessions start from counts, whichever of the two passes."""
    if broken:
        gated.repository.commit({"bad": "x\n"}, "broken")
    run = gated.start("run")
    if broken:
        gated.repository.git("rm", "--quiet", "bad")
        gated.repository.git("commit", "--quiet", "--message", "fixed")
    else:
        gated.repository.commit({"bad": "x\n"}, "broken")
    gated.repository.remember()
    gated.open()
    ended = outcome(run)
    assert types(ended).count("base.checking") == 2
    assert (ended.result["halt_cause"], ended.states["t1"]) == ((None, "landed") if broken else ("base", "pending"))
    assert sessions(gated.repository) == int(broken)
    await gated.repository.assert_invariants()


@pytest.mark.extended
async def test_unrunnable_base_checks_start_no_session(gated: Gated) -> None:
    """A file that is copied to each worktree is missing, and exists again for the resumed run."""
    gated.repository.commit({".gitignore": "local\n"}, "ignored")
    gated.repository.remember()
    (gated.repository.top / "local").touch()
    other = {"id": "t2", "prompt": "write b.txt b", "checks": ["true"]}
    run = gated.start("run", other, worktrees={"copy": ["local"]})
    (gated.repository.top / "local").unlink()
    gated.open()
    ended = outcome(run)
    assert (ended.code, ended.result["halt_cause"]) == (1, "base"), ended
    assert "checks could not run on main" in ended.result["halted"]
    assert sessions(gated.repository) == 0
    (gated.repository.top / "local").touch()
    assert set(gated.repository.council("resume", "--json").states.values()) == {"landed"}
