"""Tasks that start on the built, unlanded work of other tasks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.faults import SHELL_ADAPTER
from tests.waiting import wait_for


class Gates:
    """Files that checks and sessions wait for, and that report what they see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def open(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    def wait(self, name: str) -> str:
        """Return the command that waits for a gate."""
        return f"while ! test -e {self.folder / name}; do sleep 0.05; done"


@pytest.fixture
def gates(tmp_path: Path) -> Gates:
    return Gates(tmp_path / "gates")


def on(*needs: str) -> list[dict[str, str]]:
    """Return needs of which built work suffices."""
    return [{"task": need, "at": "built"} for need in needs]


def files(repository: Repository) -> dict[str, str]:
    """Return the files of the target, without those of the base."""
    names = repository.git("ls-tree", "-r", "--name-only", "main").split()
    return {name: repository.git("show", f"main:{name}") for name in names if not name.startswith(("src", "README"))}


def configure(repository: Repository, gates: Gates, *tasks: dict[str, Any], **settings: Any) -> Path:
    """Return a file with tasks that run their prompts as shell scripts, `attempt` being the number of the session."""
    defaults = {"attempts": 3, "backoff": {"initial": "10ms"}, "allow_failing_base": True}
    defaults |= settings.pop("defaults", {})
    repository.remember()
    listed = [{**task, "prompt": f"attempt=$COUNCIL_ATTEMPT\n{task['prompt']}"} for task in tasks]
    return repository.configure(
        listed, adapters={"sh": SHELL_ADAPTER}, defaults=defaults, writable=[str(gates.folder)], **settings
    )


@contextmanager
def running(repository: Repository, *args: str, failpoints: str = "") -> Iterator[StartedCommand]:
    child = repository.start(*args, failpoints=failpoints)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=60)


def tasks_of(repository: Repository) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in repository.council("status", "--json").result.get("tasks", ())}


def states(repository: Repository) -> dict[str, str]:
    return {name: one["status"] for name, one in tasks_of(repository).items()}


def is_queued(repository: Repository, task: str) -> bool:
    return states(repository).get(task) == "queued"


async def test_task_starts_on_built_work_and_lands_after_it(repository: Repository, gates: Gates) -> None:
    """The check of the first task ends only once the second one waits, and the queue names the reason."""
    config = configure(
        repository,
        gates,
        {"id": "base", "prompt": "echo a > a.txt", "checks": [gates.wait("go")]},
        {"id": "top", "prompt": f"cat a.txt > {gates.folder}/seen; echo b >> a.txt", "needs": on("base")},
    )
    with running(repository, "run", str(config)) as child:
        wait_for(lambda: is_queued(repository, "top"), 60)
        waiting = {one["task"]: one for one in repository.council("queue", "--json").result["queue"]}["top"]
        assert (waiting["status"], waiting["waits_for"], waiting["stacked"]) == ("queued", "base", True)
        assert tasks_of(repository)["top"]["reason"] == "it is built on the work of base, which has not landed yet"
        gates.open("go")
        child.communicate(timeout=90)
    assert states(repository) == {"base": "landed", "top": "landed"}
    assert (gates.folder / "seen").read_text() == "a\n"
    assert files(repository) == {"a.txt": "a\nb"}
    await repository.assert_invariants()


def rebuilding(repository: Repository, gates: Gates, script: str, on_conflict: str = "keep") -> Path:
    """Return a file whose task `base` conflicts with a commit of the user, so that it is built again from scratch."""
    repository.commit({"a.txt": "old\n"}, "old")
    base = {
        "id": "base",
        "prompt": "if [ $attempt = 1 ]; then echo draft > a.txt; echo draft > d.txt; else echo final >> a.txt; fi",
        "checks": [gates.wait("go")],
        "on_conflict": "rebase",
    }
    top = {"id": "top", "prompt": script, "needs": on("base"), "on_conflict": on_conflict}
    return configure(repository, gates, base, top)


def commit_of_user(repository: Repository, gates: Gates) -> None:
    """Commit a conflicting change while the dependent task waits, then let the checks end."""
    wait_for(lambda: is_queued(repository, "top"), 60)
    repository.commit({"a.txt": "users\n"}, "users")
    repository.remember()
    gates.open("go")


async def test_work_is_rebased_when_the_work_below_is_built_again(repository: Repository, gates: Gates) -> None:
    """Nothing of the first version lands, not even in the history, and no session is repeated."""
    config = rebuilding(repository, gates, "echo top > b.txt")
    with running(repository, "run", str(config)) as child:
        commit_of_user(repository, gates)
        child.communicate(timeout=90)
    assert {name: (one["status"], one["attempts"]) for name, one in tasks_of(repository).items()} == {
        "base": ("landed", 2),
        "top": ("landed", 1),
    }
    assert files(repository) == {"a.txt": "users\nfinal", "b.txt": "top"}
    assert "draft" not in repository.git("log", "--patch", "-m", "main")
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize("failpoint", ["stack.rebased", "stack.recorded"])
async def test_rebase_killed_at_a_failpoint_lands_once(repository: Repository, gates: Gates, failpoint: str) -> None:
    config = rebuilding(repository, gates, "echo top > b.txt")
    with running(repository, "run", str(config), failpoints=f"{failpoint}=kill") as child:
        commit_of_user(repository, gates)
        child.communicate(timeout=90)
        assert child.poll() == -signal.SIGKILL
    ended = repository.council("resume", "--json")
    assert ended.states == {"base": "landed", "top": "landed"}, ended
    assert files(repository) == {"a.txt": "users\nfinal", "b.txt": "top"}
    assert "draft" not in repository.git("log", "--patch", "-m", "main")
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize(
    ("action", "status", "text"),
    [
        ("rebase", "landed", "users\nfinal\ntop"),
        ("resolve", "landed", "users\nfinal\ntop"),
        ("keep", "conflict", "users\nfinal"),
    ],
)
async def test_work_that_conflicts_with_the_new_work_below_follows_on_conflict(
    repository: Repository, gates: Gates, action: str, status: str, text: str
) -> None:
    """It is repeated from the new work, or preserved."""
    config = rebuilding(repository, gates, "echo top >> a.txt", action)
    with running(repository, "run", str(config)) as child:
        commit_of_user(repository, gates)
        child.communicate(timeout=90)
    top = tasks_of(repository)["top"]
    assert top["status"] == status, top
    assert files(repository) == {"a.txt": text}
    if status == "conflict":
        assert top["reason"] == "conflict with the new work of base in a.txt"
        kept = repository.council("salvage", "list", "--json").result["preserved"]
        assert {"top/1", "top/conflict"} <= {one["name"] for one in kept}
    assert "draft" not in repository.git("log", "--patch", "-m", "main")
    await repository.assert_invariants()


def failing(repository: Repository, gates: Gates) -> Path:
    """Return a file whose task `base` fails its check, once the one that is built on it waits."""
    base = {
        "id": "base",
        "prompt": "if [ $attempt = 1 ]; then touch bad; else echo a > a.txt; fi",
        "checks": [f"{gates.wait('go')}; ! test -e bad"],
        "on_checks_failed": "fail",
    }
    return configure(repository, gates, base, {"id": "top", "prompt": "echo top > b.txt", "needs": on("base")})


@pytest.mark.extended
@pytest.mark.parametrize("failpoint", ["", "stack.withdrawn=kill"])
async def test_work_waits_for_the_retry_of_a_failed_task_below(
    repository: Repository, gates: Gates, failpoint: str
) -> None:
    """It is blocked, its work is preserved, and lands after the retry without another session."""
    with running(repository, "run", str(failing(repository, gates)), failpoints=failpoint) as child:
        wait_for(lambda: is_queued(repository, "top"), 60)
        gates.open("go")
        child.communicate(timeout=90)
    if failpoint:
        assert child.poll() == -signal.SIGKILL
        repository.council("resume")
    assert states(repository) == {"base": "failed", "top": "blocked"}
    kept = {one["name"]: one for one in repository.council("salvage", "list", "--json").result["preserved"]}
    assert {"base/1", "top/1"} <= kept.keys()
    shown = repository.council("salvage", "show", "top/1").stdout
    assert "b.txt" in shown
    assert "bad" not in shown
    assert repository.council("retry", "base").code == 0
    ended = repository.council("resume", "--json")
    assert ended.states == {"base": "landed", "top": "landed"}, ended
    assert files(repository) == {"a.txt": "a", "b.txt": "top"}
    sessions = repository.council("show", "top", "--json").result["sessions"]
    assert len(sessions) == 1
    await repository.assert_invariants()


@pytest.mark.extended
async def test_cancelled_task_below_blocks_the_work(repository: Repository, gates: Gates) -> None:
    with running(repository, "run", str(failing(repository, gates))) as child:
        wait_for(lambda: is_queued(repository, "top"), 60)
        repository.council("cancel", "base")
        gates.open("go")
        child.communicate(timeout=90)
    assert states(repository) == {"base": "cancelled", "top": "blocked"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_chain_of_stacked_tasks_is_checked_once(repository: Repository, gates: Gates) -> None:
    """The batch has all of them, each behind the one below; the last one needs both others."""
    tasks: list[dict[str, Any]] = [
        {"id": "first", "prompt": "echo 1 > 1.txt"},
        {"id": "second", "prompt": "test -e 1.txt && echo 2 > 2.txt", "needs": on("first")},
        {"id": "third", "prompt": "cat 1.txt 2.txt > 3.txt", "needs": on("first", "second")},
    ]
    check = {"run": f"echo $(ls *.txt) >> {gates.folder}/runs", "cache": False}
    config = configure(repository, gates, *tasks, merge={"batch": 3}, defaults={"checks": [check]})
    readme = repository.top / "README.md"
    before = readme.read_text()
    readme.write_text("not committed, so nothing lands\n")
    killed = repository.council("run", str(config), "--allow-deferred", failpoints="work.recorded=kill@3")
    assert killed.code == -signal.SIGKILL, killed
    readme.write_text(before)
    repository.remember()
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert files(repository) == {"1.txt": "1", "2.txt": "2", "3.txt": "1\n2"}
    assert (gates.folder / "runs").read_text().splitlines() == ["1.txt 2.txt 3.txt"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_look_ahead_checks_a_stack_behind_its_base(repository: Repository, gates: Gates) -> None:
    """The check of both ends before the one of the task below."""
    check = f"{gates.wait('go')}; if test -e b.txt; then touch {gates.folder}/ahead; else {gates.wait('ahead')}; fi"
    tasks: list[dict[str, Any]] = [
        {"id": "base", "prompt": "echo a > a.txt", "checks": [check]},
        {"id": "top", "prompt": "echo b > b.txt", "needs": on("base"), "checks": [check]},
    ]
    config = configure(repository, gates, *tasks, capacity=2)
    with running(repository, "run", str(config)) as child:
        wait_for(lambda: is_queued(repository, "top"), 60)
        gates.open("go")
        child.communicate(timeout=90)
    assert states(repository) == {"base": "landed", "top": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_reader_of_built_work_ends_before_its_landing(repository: Repository, gates: Gates) -> None:
    defaults = {"attempts": 1, "allow_failing_base": True}
    base = {"id": "base", "prompt": "write a.txt a", "checks": [gates.wait("go")]}
    scout = {"id": "scout", "prompt": "await a.txt", "needs": on("base"), "workflow": "scout"}
    workflows = {"scout": [{"look": {"access": "read"}}]}
    folder = [str(gates.folder)]
    config = repository.configure([base, scout], workflows=workflows, writable=folder, defaults=defaults)
    with running(repository, "run", str(config)) as child:
        wait_for(lambda: states(repository).get("scout") == "done", 60)
        assert states(repository)["base"] == "checking"
        gates.open("go")
        child.communicate(timeout=90)
    assert states(repository) == {"base": "landed", "scout": "done"}


@pytest.mark.extended
async def test_checkpoint_before_a_rebase_is_restored_with_its_base(repository: Repository, gates: Gates) -> None:
    """The restored work is on the first version of the task below, and is rebased again."""
    config = rebuilding(repository, gates, "echo top > b.txt")
    with running(repository, "run", str(config), failpoints="stack.recorded=kill") as child:
        wait_for(lambda: is_queued(repository, "top"), 60)
        checkpoint = repository.council("checkpoint", "create", "--json").result["id"]
        commit_of_user(repository, gates)
        child.communicate(timeout=90)
        assert child.poll() == -signal.SIGKILL
    assert repository.council("checkpoint", "restore", checkpoint).code == 0
    ended = repository.council("resume", "--json")
    assert ended.states == {"base": "landed", "top": "landed"}, ended
    assert files(repository) == {"a.txt": "users\nfinal", "b.txt": "top"}
    assert "draft" not in repository.git("log", "--patch", "-m", "main")


@pytest.mark.extended
async def test_task_of_another_process_is_rebased_and_lands_after_the_one_below(
    repository: Repository, gates: Gates
) -> None:
    """The leader starts nothing while its queue is full, so a worker starts the one that is built on the other."""
    repository.commit({"a.txt": "old\n"}, "old")
    draft = "echo draft > a.txt; echo draft > d.txt"
    config = configure(
        repository,
        gates,
        {
            "id": "base",
            "prompt": f"{gates.wait('base')}; if [ $attempt = 1 ]; then {draft}; else echo final >> a.txt; fi",
            "checks": [gates.wait("go")],
            "on_conflict": "rebase",
        },
        {"id": "top", "prompt": "echo top > b.txt", "needs": on("base")},
        capacity=1,
    )
    with running(repository, "run", str(config)) as leader:
        wait_for(lambda: states(repository).get("base") == "running", 60)
        with running(repository, "work") as worker:
            wait_for(lambda: len(repository.council("status", "--json").result["orchestrators"]) == 2, 60)
            gates.open("base")
            wait_for(lambda: is_queued(repository, "top"), 60)
            repository.commit({"a.txt": "users\n"}, "users")
            repository.remember()
            gates.open("go")
            leader.communicate(timeout=120)
            worker.communicate(timeout=60)
    assert set(states(repository).values()) == {"landed"}
    assert files(repository) == {"a.txt": "users\nfinal", "b.txt": "top"}
    assert "draft" not in repository.git("log", "--patch", "-m", "main")
    await repository.assert_invariants()
