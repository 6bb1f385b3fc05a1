"""Enable a disabled adapter during a run, by the command that the run prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest

#: Fails with a missing login, as long as the file does not exist.
LOGIN = 'test -e {login} || {{ echo "invalid api key" >&2; exit 1; }}; echo x > "$COUNCIL_TASK.txt"'


def configured(repository: Repository, tmp_path: Path, *tasks: dict[str, Any], **settings: Any) -> str:
    """Return a file whose adapter `locked` needs a login that does not exist yet, next to the fake CLI."""
    locked = {
        "use": "command",
        "argv": ["sh", "-c", LOGIN.format(login=tmp_path / "login")],
        "failures": {"auth": "invalid api key"},
        "readable": [str(tmp_path)],
    }
    keeps_busy = {"id": "busy", "prompt": f"await {tmp_path / 'gate'}\nwrite busy.txt x", "adapter": "fake"}
    adapters = {"fake": repository.fake_adapter(readable=[str(tmp_path)]), "locked": locked}
    return str(repository.configure([keeps_busy, *tasks], adapters=adapters, sandbox="off", **settings))


def command_in(text: str) -> list[str]:
    """Return the command that a text asks a person to run."""
    found = re.findall(r"`council (adapters enable [^`]+)`", text)
    assert found, text
    return shlex.split(found[-1])


def is_disabled(repository: Repository) -> bool:
    ended = repository.council("status", "--json")
    return ended.code in {0, 1} and any(one["disabled_reason"] for one in ended.result["adapters"])


def has_landed(repository: Repository, task: str) -> bool:
    return repository.council("status", "--json").states.get(task) == "landed"


def finish(child: StartedCommand, tmp_path: Path) -> str:
    (tmp_path / "gate").touch()
    return child.communicate(timeout=60)[0]


async def test_printed_command_enables_an_adapter_of_an_active_run(repository: Repository, tmp_path: Path) -> None:
    """The key is fixed, the printed command is run, and the same process starts the task again."""
    tasks = ({"id": name, "prompt": "x", "adapter": "locked", "attempts": 1} for name in ("one", "two"))
    child = repository.start("run", configured(repository, tmp_path, *tasks))
    try:
        wait_for(lambda: is_disabled(repository), 60)
        printed = repository.council("status").stdout
        (tmp_path / "login").touch()
        enabled = repository.council(*command_in(printed))
        assert enabled.code == 0, enabled
        wait_for(lambda: has_landed(repository, "one") and has_landed(repository, "two"), 60)
        again = repository.council(*command_in(printed))
        assert (again.code, "there is nothing to enable" in again.stderr) == (2, True)
    finally:
        output = finish(child, tmp_path)
    assert child.returncode == 0, output
    assert command_in(output) == command_in(printed)
    assert has_landed(repository, "busy")
    await repository.assert_invariants()


@pytest.mark.extended
async def test_worker_starts_tasks_of_an_enabled_adapter(repository: Repository, tmp_path: Path) -> None:
    """Either of two processes of a run may then run its tasks."""
    tasks = ({"id": name, "prompt": "x", "adapter": "locked", "attempts": 1} for name in ("one", "two", "three"))
    path = configured(repository, tmp_path, *tasks, capacity=1)
    child = repository.start("run", path)
    wait_for(lambda: any(repository.top.glob(".council/logs/*/busy.1.*")), 60)
    worker = repository.start("work", "--capacity", "1")
    try:
        wait_for(lambda: is_disabled(repository), 60)
        (tmp_path / "login").touch()
        assert repository.council("adapters", "enable", "locked").code == 0
        # The other process is busy.
        wait_for(lambda: all(has_landed(repository, name) for name in ("one", "two", "three")), 60)
    finally:
        output = finish(child, tmp_path)
        worker.communicate(timeout=60)
    assert child.returncode == 0, output
    await repository.assert_invariants()


@pytest.mark.extended
async def test_enabled_adapter_of_an_ended_run_applies_to_resume(repository: Repository, tmp_path: Path) -> None:
    """A command printed during the run is no error after it, and says how to continue."""
    (tmp_path / "gate").touch()
    ended = repository.council(
        "run", configured(repository, tmp_path, {"id": "one", "prompt": "x", "adapter": "locked"})
    )
    assert ended.code == 1, ended
    assert "is disabled" in ended.stdout
    (tmp_path / "login").touch()
    enabled = repository.council(*command_in(ended.stdout))
    assert enabled.code == 0, enabled
    assert "is disabled" not in enabled.stdout
    resume = re.findall(r"council (resume \S+)", enabled.stdout)
    assert repository.council(*shlex.split(resume[-1])).code == 0
    assert has_landed(repository, "one")
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("names", [["locke"], ["fake"], []])
def test_enabling_a_usable_adapter_is_rejected(repository: Repository, tmp_path: Path, names: list[str]) -> None:
    """So is an adapter that the run does not have; the error lists its adapters."""
    (tmp_path / "gate").touch()
    assert repository.council("run", configured(repository, tmp_path)).code == 0
    refused = repository.council("adapters", "enable", *names)
    assert refused.code == 2
    assert ("fake, locked" in refused.stderr) == (names == ["locke"])


def test_disabled_adapter_of_an_ended_run_has_a_remedy(repository: Repository, tmp_path: Path) -> None:
    """`resume` if a task waits for it (`runs --active` lists the run); none once all tasks have ended."""
    (tmp_path / "gate").touch()
    tasks = ({"id": name, "prompt": "x", "adapter": "locked", "attempts": 1} for name in ("one", "two"))
    repository.council("run", configured(repository, tmp_path, *tasks))
    name = repository.council("status", "--json").result["run"]
    assert f"Next: council resume {name}" in repository.council("status").stdout
    assert name in repository.council("runs", "--active").stdout
    health = repository.council("state", "health").stdout
    assert f"council resume {name}" in health, health
    assert repository.council("cancel", "--yes").code == 0
    status = repository.council("status")
    assert "council resume" not in status.stdout, status
    assert repository.council("runs", "--active").stdout == ""
    assert "council resume" not in repository.council("state", "health").stdout
