"""Tasks that are ready at the same time land by one push, with the same result as alone."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.engine.landing.merge_queue import MAX_MERGE_ROUNDS
from orchestrator.project import Project
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.worktrees.hub import locate_hub
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from orchestrator.system.file_lock import FileLock
from tests.conftest import CommandResult, Repository
from tests.merge_leases import join_merge_queue
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest


def files(count: int) -> list[dict[str, Any]]:
    """Return tasks that each write a file of their own."""
    return [{"id": f"t{one}", "prompt": f"write f{one}.txt x"} for one in range(count)]


def moves(repository: Repository) -> int:
    """Return how often the target has moved."""
    return len(repository.git("reflog", "show", "--format=%H", "main").splitlines())


def queue(repository: Repository, tasks: Sequence[Mapping[str, Any]], **settings: Any) -> int:
    """Queue tasks that can't land because of a user's change, then undo the change; return the moves so far.

    The run is killed: otherwise it would wait some seconds for the change to go.
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
    """Return the subjects of the target's first-parent history, newest first, without the first commit."""
    return repository.git("log", "--first-parent", "--format=%s", "main").splitlines()[:-1]


async def test_waiting_tasks_land_with_one_push(repository: Repository) -> None:
    """Each by its own merge, in file order, and all task branches are deleted."""
    before = queue(repository, files(3))
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert moves(repository) == before + 1
    assert landed(repository) == [f"Land t{one}" for one in reversed(range(3))]
    assert len({task["landed"] for task in ended.result["tasks"]}) == 3
    await repository.assert_invariants()


@pytest.mark.extended
async def test_conflict_is_found_against_landed_work(repository: Repository) -> None:
    """Only the conflicting task fails; the tasks behind it land."""
    prompts = ["write same.txt a", "write other.txt x", "write same.txt b", "write last.txt x"]
    before = queue(repository, [{"id": f"t{one}", "prompt": prompt} for one, prompt in enumerate(prompts)])
    ended = repository.council("resume", "--json")
    assert ended.states == {"t0": "landed", "t1": "landed", "t2": "conflict", "t3": "landed"}, ended
    assert moves(repository) == before + 2
    await repository.assert_invariants()


async def test_same_change_twice_lands_once(repository: Repository) -> None:
    """The second task is landed with the commit that the target already has."""
    before = queue(repository, [{"id": f"t{one}", "prompt": "write same.txt x"} for one in range(2)])
    ended = repository.council("resume", "--json")
    first, second = ended.result["tasks"]
    assert (first["status"], second["status"]) == ("landed", "landed"), ended
    assert first["landed"] == second["landed"] == repository.git("rev-parse", "main")
    assert moves(repository) == before + 1
    await repository.assert_invariants()


@pytest.mark.extended
async def test_rejected_task_blocks_no_other(repository: Repository) -> None:
    """A rejected push of several tasks is retried one by one."""
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


@pytest.mark.extended
async def test_target_moved_by_each_push_is_reported(repository: Repository, tmp_path: Path) -> None:
    """A hook commits to the target before each push: the task waits for a stated reason, and lands when that stops."""
    count, hook = tmp_path / "count", repository.top / ".git/hooks/pre-receive"
    commit = f'env -u GIT_DIR -u GIT_QUARANTINE_PATH git -C "{repository.top}" commit --quiet --allow-empty -m theirs'
    hook.write_text(f'#!/bin/sh\necho x >> "{count}"\n[ $(wc -l < "{count}") -gt {MAX_MERGE_ROUNDS} ] || {commit}\n')
    hook.chmod(0o755)
    queue(repository, files(1))
    ended = repository.council("resume", "--json")
    rounds, newest = MAX_MERGE_ROUNDS, repository.git("rev-parse", "--short=10", "main^")
    (deferred,) = [line["reason"] for line in ended.lines if line.get("event") == "task.deferred"]
    moved = f"others added commits to 'main' ({rounds}, newest {newest}) during {rounds} landing attempts: pause"
    assert deferred.startswith(moved)
    assert ended.states == {"t0": "landed"}, ended
    assert landed(repository).count("theirs") == MAX_MERGE_ROUNDS


async def test_final_retries_of_one_task_leave_others_theirs(repository: Repository, tmp_path: Path) -> None:
    """A task that a hook always rejects uses up its own retries before another task is rejected once."""
    hook, once = repository.top / ".git/hooks/update", tmp_path / "once"
    hook.write_text(
        f"""#!/bin/sh
files=$(git ls-tree --name-only "$3")
case $files in *bad.txt*) exit 1 ;; *late.txt*) [ -e "{once}" ] || {{ touch "{once}"; exit 1; }} ;; esac
"""
    )
    hook.chmod(0o755)
    repository.remember()
    backoff = {"initial": "6s", "max": "6s", "jitter": False}
    tasks: list[dict[str, Any]] = [
        {"id": "bad", "prompt": "write bad.txt x"},
        {"id": "late", "prompt": "attempt 1 exit 1\nattempt 2 write late.txt x", "backoff": backoff, "attempts": 2},
    ]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert ended.states == {"bad": "queued", "late": "landed"}, ended
    await repository.assert_invariants()


@pytest.mark.extended
async def test_push_reverted_by_a_hook_is_reported(repository: Repository) -> None:
    """The task's reason is complete although git reports success."""
    hook = repository.top / ".git/hooks/post-receive"
    hook.write_text(f'#!/bin/sh\nunset GIT_DIR\ncd "{repository.top}" && git reset --quiet --hard HEAD~1\n')
    hook.chmod(0o755)
    queue(repository, files(1))
    ended = repository.council("resume", "--json")
    assert ended.states == {"t0": "queued"}, ended
    moved_back = "can't move the target: it was moved back immediately, possibly by a repository hook"
    assert ended.result["tasks"][0]["reason"] == moved_back


@pytest.mark.extended
async def test_tasks_with_checks_land_one_by_one(repository: Repository) -> None:
    """Each is checked on its future target commit; the others still land together in order."""
    checked = {"checks": ["test -e f0.txt"], "allow_failing_base": True}
    tasks = [
        {"id": f"t{one}", "prompt": f"write f{one}.txt x", **(checked if one in {2, 3} else {})} for one in range(6)
    ]
    before = queue(repository, tasks)
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert moves(repository) == before + 4
    assert landed(repository) == [f"Land t{one}" for one in reversed(range(6))]
    await repository.assert_invariants()


@pytest.mark.parametrize(
    "failpoint",
    [
        "landing.pushed=kill",
        *(pytest.param(f"landing.{step}", marks=pytest.mark.slow) for step in ("intended=kill", "recorded=kill")),
        pytest.param("landing.merged=kill@3", marks=pytest.mark.slow),
    ],
)
async def test_batch_killed_at_a_failpoint_lands_once(repository: Repository, failpoint: str) -> None:
    queue(repository, files(4))
    assert repository.council("resume", failpoints=failpoint).code == -signal.SIGKILL
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert landed(repository) == [f"Land t{one}" for one in reversed(range(4))]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_batch_killed_during_the_push_lands_once(repository: Repository, tmp_path: Path) -> None:
    """No files are left ahead of the branch, and all tasks land once."""
    pid, armed = tmp_path / "pid", tmp_path / "armed"
    queue(repository, files(3))
    hook = repository.top / ".git/hooks/reference-transaction"
    # Files and index are written, the branch has not moved.
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


def states(repository: Repository) -> Mapping[str, str]:
    """Return the state of each task of the newest run."""
    shown = repository.council("status", "--json")
    return {task["id"]: task["status"] for task in shown.result.get("tasks", [])}


def recorded(repository: Repository, event: str) -> int:
    """Return how often an event was recorded."""
    log = b"".join(path.read_bytes() for path in (repository.top / ".council/state").glob("*/*.jsonl"))
    return log.count(f'["{event}",'.encode())


async def landing_lock(repository: Repository) -> FileLock:
    """Return the lock for landings on `main`."""
    site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
    hub = locate_hub(site.identity, Path(repository.environ["COUNCIL_HOME"]))
    hub.root.joinpath("locks").mkdir(parents=True, exist_ok=True)
    return hub.landing_lock(site.location, "main")


@pytest.mark.extended
async def test_task_waiting_for_a_landing_of_another_run_can_be_cancelled(repository: Repository) -> None:
    """The task ends at once; its batch lands in its turn."""
    config = repository.configure(files(2))
    project, clock = Project(repository.top), SystemClock()
    await anyio.to_thread.run_sync(project.create)
    async with FileStore.open(repository.log, clock) as store, AsyncExitStack() as stack:
        site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
        await stack.enter_async_context((await join_merge_queue(store, clock, site.location, "main")).hold())
        child = repository.start("run", str(config), "--json")
        wait_for(lambda: states(repository) == {"t0": "queued", "t1": "queued"})
        assert repository.council("cancel", "t0").code == 0
        assert states(repository) == {"t0": "cancelled", "t1": "queued"}
    assert CommandResult.of(child).states == {"t0": "cancelled", "t1": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize(
    ("failpoint", "state"),
    [pytest.param("landing.intended", "cancelled", marks=pytest.mark.slow), ("landing.pushed", "landed")],
)
async def test_interrupted_task_is_cancelled_only_if_not_landed(
    repository: Repository, failpoint: str, state: str
) -> None:
    """The landing is resolved first, together with all interrupted ones."""
    queue(repository, files(3))
    assert repository.council("resume", failpoints=f"{failpoint}=kill").code == -signal.SIGKILL
    async with (await landing_lock(repository)).hold():
        child = repository.start("resume", "--json")
        wait_for(lambda: recorded(repository, "run.leader_elected") == 3)
        asked = repository.start("cancel", "t1")
        wait_for(lambda: recorded(repository, "request.completed") == 1)
    asked.communicate(timeout=60)
    assert CommandResult.of(child).states == {"t0": "landed", "t1": state, "t2": "landed"}
    await repository.assert_invariants()


@pytest.mark.slow
async def test_unmergeable_task_blocks_no_other(repository: Repository) -> None:
    """The user rewrote the history while it waited; a task built on the new history lands."""
    config = repository.configure(files(3), capacity=1)
    readme = repository.top / "README.md"
    before = readme.read_text()
    readme.write_text("not committed\n")
    first = repository.council("run", str(config), "--allow-deferred", failpoints="work.recorded=kill")
    repository.git("commit", "--quiet", "--amend", "--message", "another first commit")
    second = repository.council("resume", failpoints="work.recorded=kill@2")
    assert (first.code, second.code) == (-signal.SIGKILL, -signal.SIGKILL)
    readme.write_text(before)
    resumed = repository.council("resume", "--json")
    assert resumed.states == {"t0": "queued", "t1": "landed", "t2": "landed"}, resumed
    assert "no commit in common" in resumed.result["tasks"][0]["reason"]


@pytest.mark.extended
async def test_remote_outage_ends_nothing(repository: Repository, tmp_path: Path) -> None:
    """One of several single pushes has an unknown outcome: it is resolved before the others."""
    remote, count = tmp_path / "remote.git", tmp_path / "count"
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(remote))
    hook = remote / "hooks/pre-receive"
    # The batch and then the first task are rejected; at the second task the remote is briefly unreachable.
    hook.write_text(
        f'#!/bin/sh\necho x >> "{count}"\ncase $(wc -l < "{count}") in\n1|2) exit 1;;\n'
        f'3) mv "{remote}/HEAD" "{remote}/away"; (sleep 0.7; mv "{remote}/away" "{remote}/HEAD") > /dev/null 2>&1 &\n'
        "exit 1;;\nesac\n"
    )
    hook.chmod(0o755)
    config = repository.configure(files(3), repo=f"file://{remote}", capacity=3)
    assert set(repository.council("run", str(config), "--json").states.values()) == {"landed"}


@pytest.mark.extended
async def test_signal_prevents_a_new_push(repository: Repository, tmp_path: Path) -> None:
    """A rejected push of several tasks is not retried one by one after the signal."""
    count = tmp_path / "count"
    hook = repository.top / ".git/hooks/pre-receive"
    hook.write_text(f'#!/bin/sh\necho x >> "{count}"\nsleep 1\nexit 1\n')
    hook.chmod(0o755)
    repository.remember()
    queue(repository, files(3))
    child = repository.start("resume", "--json")
    wait_for(count.exists)
    child.send_signal(signal.SIGINT)
    assert CommandResult.of(child).code == 130
    assert count.read_text().count("x") <= 2
    await repository.assert_invariants()


@pytest.mark.extended
async def test_slow_rejected_pushes_are_retried_a_few_times(repository: Repository, tmp_path: Path) -> None:
    """Also if a push of one task takes longer than the pause before another one is retried."""
    count, hook = tmp_path / "count", repository.top / ".git/hooks/pre-receive"
    # The hook accepts the pushes of a run that does not end.
    hook.write_text(f'#!/bin/sh\necho x >> "{count}"\nsleep 1.2\ntest $(wc -l < "{count}") -gt 20\n')
    hook.chmod(0o755)
    repository.remember()
    config = repository.configure(files(2), capacity=2)
    ended = repository.council("run", str(config), "--json", timeout=110)
    assert set(ended.states.values()) == {"queued"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_task_left_for_the_next_batch_can_be_cancelled(repository: Repository, tmp_path: Path) -> None:
    """Also before the turn that left it has ended."""
    queue(repository, [{"id": f"t{one}", "prompt": f"write {name}.txt x"} for one, name in enumerate(("a", "a", "c"))])
    git, programs, begun, free = shutil.which("git"), tmp_path / "bin", tmp_path / "begun", tmp_path / "free"
    programs.mkdir()
    wait = f'touch "{begun}"; while [ ! -e "{free}" ]; do sleep 0.05; done'
    (programs / "git").write_text(f'#!/bin/sh\ncase "$*" in *"update-ref --stdin"*) {wait};; esac\nexec {git} "$@"\n')
    (programs / "git").chmod(0o755)
    repository.environ["PATH"] = f"{programs}:{repository.environ['PATH']}"
    child = repository.start("resume", "--json")
    wait_for(begun.exists)
    asked = repository.start("cancel", "t2")
    wait_for(lambda: recorded(repository, "request.completed") == 1)
    free.touch()
    asked.communicate(timeout=60)
    assert CommandResult.of(child).states == {"t0": "landed", "t1": "landed", "t2": "cancelled"}
    await repository.assert_invariants()


@pytest.mark.slow
async def test_missing_target_worktree_ends_no_session(repository: Repository, tmp_path: Path) -> None:
    """Waiting tasks keep their work, with the fix as the reason, and land after the fix."""
    place = tmp_path / "linked"
    repository.git("branch", "land")
    repository.git("worktree", "add", "--quiet", str(place), "land")
    long = {"id": "long", "prompt": "tick 30 0.1\nwrite long.txt x"}
    config = repository.configure([*files(1), long], target="land")
    child = repository.start("run", str(config), "--json")
    wait_for(repository.spawns.exists)
    shutil.rmtree(place)
    wait_for(lambda: states(repository).get("t0") == "queued")
    first = CommandResult.of(child)
    assert first.states == {"t0": "queued", "long": "queued"}, first
    assert "git worktree prune" in first.result["tasks"][0]["reason"]
    repository.git("worktree", "prune")
    assert set(repository.council("resume", "--json").states.values()) == {"landed"}
