"""A task with a predicted conflict is held until the other task has landed or ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest

LINES = "".join(f"line {number}\n" for number in range(9))


class Gates:
    """Files that sessions wait for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def open(self, name: str) -> None:
        (self.folder / name).touch()

    def wait(self, name: str) -> str:
        """Return the step that waits for a gate."""
        return f"await {self.folder / name}"


@pytest.fixture
def gates(tmp_path: Path) -> Gates:
    return Gates(tmp_path / "gates")


def configure(
    repository: Repository, gates: Gates, action: str, *, then: str = "", more: Sequence[dict[str, Any]] = ()
) -> Path:
    """Return a file with two tasks that write the same file; each then waits for the gate of its name."""
    repository.commit({"a.txt": LINES})
    repository.remember()
    tasks = [
        *more,
        {"id": "auth", "prompt": f"write a.txt auth\n{gates.wait('auth')}\n{then}"},
        {"id": "web", "prompt": f"await a.txt\nwrite a.txt web\n{gates.wait('web')}"},
    ]
    return repository.configure(
        tasks,
        capacity=len(tasks),
        writable=[str(gates.folder)],
        merge={"on_predicted_conflict": action},
        defaults={"attempts": 1},
    )


def queue(repository: Repository) -> dict[str, dict[str, Any]]:
    return {one["task"]: one for one in repository.council("queue", "--json").result["queue"]}


@contextmanager
def running(repository: Repository, *args: str) -> Iterator[StartedCommand]:
    child = repository.start(*args)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=60)


def hold_web(repository: Repository, gates: Gates) -> None:
    """Wait until the conflict is predicted, then end the later session, and wait until its task is held."""
    wait_for(lambda: "a.txt" in repository.council("conflicts").stdout, 60)
    gates.open("web")
    wait_for(lambda: queue(repository).get("web", {}).get("waits_for") == "auth", 60)


def states(repository: Repository) -> dict[str, str]:
    return {one["id"]: one["status"] for one in repository.council("status", "--json").result["tasks"]}


async def test_held_task_lands_after_the_other(repository: Repository, gates: Gates) -> None:
    """The later session ends first; its task waits, also after a kill, and every view names the reason."""
    path = configure(repository, gates, "hold")
    with running(repository, "run", str(path)) as child:
        hold_web(repository, gates)
        assert "merge conflict with auth is predicted" in " ".join(repository.council("status").stdout.split())
        assert "held" in repository.council("queue").stdout
        child.kill()
        child.communicate(timeout=60)
    with running(repository, "resume") as child:
        wait_for(lambda: states(repository)["auth"] == "running", 60)
        assert queue(repository)["web"]["waits_for"] == "auth"
        gates.open("auth")
        child.communicate(timeout=90)
    assert states(repository) == {"auth": "landed", "web": "conflict"}
    await repository.assert_invariants()


async def test_hold_ends_with_the_conflict(repository: Repository, gates: Gates) -> None:
    """The other session, still running, changes its file back: the built work merges again, and lands first."""
    path = configure(repository, gates, "hold", then=f"git checkout a.txt\n{gates.wait('end')}\nwrite b.txt auth")
    with running(repository, "run", str(path)) as child:
        hold_web(repository, gates)
        gates.open("auth")
        wait_for(lambda: states(repository)["web"] == "landed", 60)
        assert states(repository)["auth"] == "running"
        gates.open("end")
        child.communicate(timeout=90)
    assert states(repository) == {"auth": "landed", "web": "landed"}


async def test_released_task_lands_before_the_other(repository: Repository, gates: Gates) -> None:
    path = configure(repository, gates, "hold")
    with running(repository, "run", str(path)):
        hold_web(repository, gates)
        released = repository.council("queue", "release", "web")
        assert released.code == 0, released
        wait_for(lambda: states(repository)["web"] == "landed", 60)
        assert states(repository)["auth"] == "running"


@pytest.mark.parametrize("end", ["exit 1", "discard b.txt"])
async def test_hold_ends_with_the_other_task(repository: Repository, gates: Gates, end: str) -> None:
    """The other task fails, or a user cancels it."""
    path = configure(repository, gates, "hold", then=end)
    with running(repository, "run", str(path)) as child:
        hold_web(repository, gates)
        if end == "exit 1":
            gates.open("auth")
        else:
            assert repository.council("cancel", "auth").code in {0, 1}
        child.communicate(timeout=90)
    assert states(repository) == {"auth": "failed" if end == "exit 1" else "cancelled", "web": "landed"}


async def test_task_waits_only_while_the_other_can_continue(repository: Repository, gates: Gates) -> None:
    """A process that only lands starts no session of the other task."""
    path = configure(repository, gates, "hold")
    with running(repository, "run", str(path)) as child:
        hold_web(repository, gates)
        child.kill()
        child.communicate(timeout=60)
    repository.council("merge")
    assert states(repository)["web"] == "landed"


async def test_notify_holds_nothing(repository: Repository, gates: Gates) -> None:
    path = configure(repository, gates, "notify")
    with running(repository, "run", str(path)):
        wait_for(lambda: "a.txt" in repository.council("conflicts").stdout, 60)
        gates.open("web")
        wait_for(lambda: states(repository)["web"] == "landed", 60)
        assert states(repository)["auth"] == "running"


async def test_off_predicts_nothing(repository: Repository, gates: Gates) -> None:
    """Although both sessions run for several looks; there is no repository for merges either."""
    path = configure(repository, gates, "off", more=[{"id": "clock", "prompt": "pause 6"}])
    with running(repository, "run", str(path)) as child:
        wait_for(repository.spawns.exists)
        wait_for(lambda: states(repository)["clock"] == "no_change", 60)
        # Path.glob raises FileNotFoundError if a session's folder is removed meanwhile.
        assert glob("**/*.merges-*", root_dir=repository.top.parent, recursive=True, include_hidden=True) == []  # noqa: PTH207
        gates.open("web")
        gates.open("auth")
        out, _ = child.communicate(timeout=90)
    assert "predicted" not in out
