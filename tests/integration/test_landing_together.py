"""What is ready together lands by one push, and each of them as if it had landed alone."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.repo.hub import hub_of
from orchestrator.repo.site import find_site
from tests.conftest import Ended, Repository
from tests.waiting import wait_for


def moves(repository: Repository) -> int:
    """Return how often the target has moved."""
    return len(repository.git("reflog", "show", "--format=%H", "main").splitlines())


def queue(repository: Repository, tasks: Sequence[Mapping[str, Any]], **settings: Any) -> int:
    """Have tasks built that can't land, because of a change of the user's, which is undone; return the moves so far.

    The run is killed: otherwise it would hope for some seconds that the change goes.
    """
    config = repository.configure(tasks, capacity=1, **settings)
    readme = repository.top / "README.md"
    before = readme.read_text()
    readme.write_text("not committed\n")
    killed = repository.council("run", str(config), "--allow-deferred", failpoints=f"work.recorded=kill@{len(tasks)}")
    assert killed.code == -signal.SIGKILL, killed
    readme.write_text(before)
    return moves(repository)


def landed(repository: Repository) -> list[str]:
    """Return the subjects of the target's first-parent line, the newest first, without the first commit."""
    return repository.git("log", "--first-parent", "--format=%s", "main").splitlines()[:-1]


async def test_what_waits_lands_by_one_push(repository: Repository) -> None:
    """Each by a merge of its own, in the order of the file, and none of their branches is left."""
    before = queue(repository, [{"id": f"t{one}", "prompt": f"write f{one}.txt x"} for one in range(5)])
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert moves(repository) == before + 1
    assert landed(repository) == [f"Land t{one}" for one in reversed(range(5))]
    assert len({task["landed"] for task in ended.result["tasks"]}) == 5
    await repository.assert_invariants()


async def test_a_conflict_is_judged_against_what_has_landed(repository: Repository) -> None:
    """The one that conflicts ends alone, and those behind it land all the same."""
    prompts = ["write same.txt a", "write other.txt x", "write same.txt b", "write last.txt x"]
    before = queue(repository, [{"id": f"t{one}", "prompt": prompt} for one, prompt in enumerate(prompts)])
    ended = repository.council("resume", "--json")
    assert ended.states == {"t0": "landed", "t1": "landed", "t2": "conflict", "t3": "landed"}, ended
    assert moves(repository) == before + 2
    await repository.assert_invariants()


async def test_the_same_change_twice_lands_once(repository: Repository) -> None:
    """The second task is told the commit on the target that holds it already."""
    before = queue(repository, [{"id": f"t{one}", "prompt": "write same.txt x"} for one in range(2)])
    ended = repository.council("resume", "--json")
    first, second = ended.result["tasks"]
    assert (first["state"], second["state"]) == ("landed", "landed"), ended
    assert first["landed"] == second["landed"] == repository.git("rev-parse", "main")
    assert moves(repository) == before + 1
    await repository.assert_invariants()


async def test_one_that_the_repository_refuses_holds_up_no_other(repository: Repository) -> None:
    """A push of several that is refused is tried again one by one."""
    hook = repository.top / ".git/hooks/update"
    hook.write_text('#!/bin/sh\n! git ls-tree --name-only "$3" | grep -q bad.txt\n')
    hook.chmod(0o755)
    repository.remember()
    prompts = ["write a.txt x", "write bad.txt x", "write b.txt x"]
    queue(repository, [{"id": f"t{one}", "prompt": prompt} for one, prompt in enumerate(prompts)])
    ended = repository.council("resume", "--json")
    assert ended.states == {"t0": "landed", "t1": "queued", "t2": "landed"}, ended
    assert landed(repository) == ["Land t2", "Land t0"]
    assert "hook declined" in ended.result["tasks"][1]["reason"]
    await repository.assert_invariants()


async def test_those_with_checks_land_one_by_one(repository: Repository) -> None:
    """Each is checked on what is to be the target, and the others still land together and in their order."""
    checks = ["test -e f0.txt"]
    tasks = [
        {"id": f"t{one}", "prompt": f"write f{one}.txt x", "checks": checks if one in {2, 3} else []}
        for one in range(6)
    ]
    before = queue(repository, tasks)
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert moves(repository) == before + 4
    assert landed(repository) == [f"Land t{one}" for one in reversed(range(6))]
    await repository.assert_invariants()


@pytest.mark.parametrize(
    "failpoint", ["landing.merged=kill@3", "landing.intended=kill", "landing.pushed=kill", "landing.recorded=kill"]
)
async def test_killed_while_several_land(repository: Repository, failpoint: str) -> None:
    """All of them land once, wherever it was."""
    queue(repository, [{"id": f"t{one}", "prompt": f"write f{one}.txt x"} for one in range(4)])
    assert repository.council("resume", failpoints=failpoint).code == -signal.SIGKILL
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert landed(repository) == [f"Land t{one}" for one in reversed(range(4))]
    await repository.assert_invariants()


async def test_killed_in_the_middle_of_the_push_of_several(repository: Repository, tmp_path: Path) -> None:
    """Nobody's files are left ahead of the branch, and all of them land once."""
    pid, armed = tmp_path / "pid", tmp_path / "armed"
    queue(repository, [{"id": f"t{one}", "prompt": f"write f{one}.txt x"} for one in range(3)])
    hook = repository.top / ".git/hooks/reference-transaction"
    # Files and index are written by then; the branch is yet to move.
    once = f'[ -e "{armed}" ] || exit 0\nrm "{armed}"\nkill -9 "$(cat "{pid}")" "$PPID"\nexit 1\n'
    hook.write_text(f'#!/bin/sh\n[ "$1" = prepared ] || exit 0\ngrep -q refs/heads/main || exit 0\n{once}')
    hook.chmod(0o755)
    repository.remember()
    killed = repository.start("resume")
    pid.write_text(str(killed.pid))
    armed.touch()
    killed.communicate(timeout=60)
    assert (killed.returncode, armed.exists()) == (-signal.SIGKILL, False)
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert repository.git("status", "--porcelain") == ""
    await repository.assert_invariants()


async def test_a_task_that_waits_for_another_runs_landing_can_be_cancelled(repository: Repository) -> None:
    """It is over at once; what waits with it lands when its turn has come."""
    site = await find_site(str(repository.top), is_url=False, environ=repository.environ)
    hub = hub_of(site.identity, Path(repository.environ["COUNCIL_HOME"]))
    config = repository.configure([{"id": f"t{one}", "prompt": f"write f{one}.txt x"} for one in range(2)])
    assert repository.council("run", str(config), "--dry-run").code == 0

    def states() -> Mapping[str, str]:
        shown = repository.council("status", "--json")
        return {task["id"]: task["state"] for task in shown.result.get("tasks", [])}

    hub.root.joinpath("locks").mkdir(parents=True, exist_ok=True)
    async with hub.landing_lock(site.location, "main").hold():
        child = repository.start("run", str(config), "--json")
        wait_for(lambda: states() == {"t0": "queued", "t1": "queued"})
        assert repository.council("cancel", "t0").code == 0
        assert states() == {"t0": "cancelled", "t1": "queued"}
    stdout, stderr = child.communicate(timeout=60)
    assert Ended(child.returncode, stdout, stderr).states == {"t0": "cancelled", "t1": "landed"}
    await repository.assert_invariants()
