"""Cancels, errors and failures while the merges of tasks are checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.integration.landing.test_batched_landings import recorded
from tests.integration.landing.test_merge_queue import GOOD, CheckLog, events, landed, queue
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest


@pytest.fixture
def log(tmp_path: Path) -> CheckLog:
    return CheckLog(tmp_path / "checks")


def wrap_git(repository: Repository, folder: Path, script: str) -> str:
    """Return a PATH with a git that first runs a script."""
    folder.mkdir()
    (folder / "git").write_text(f'#!/bin/sh\n{script}\nexec {shutil.which("git")} "$@"\n')
    (folder / "git").chmod(0o755)
    return f"{folder}:{repository.environ['PATH']}"


@pytest.mark.extended
async def test_task_is_checked_at_once_after_a_check_ahead_of_its_turn(repository: Repository, log: CheckLog) -> None:
    """The check ahead included a task that fails: it is stopped, and the new check waits until it has ended."""
    begun = log.folder / "begun"
    both = f"if test -e b && test -e bad; then touch {begun}; sleep 600; fi"
    alone = f"if test -e bad; then while ! test -e {begun}; do sleep 0.02; done; exit 1; fi"
    queue(repository, log, ["bad", "b", "c"], log.command(f"{both}; {alone}"), capacity=2)
    done = repository.council("resume", "--json")
    assert done.states == {"t0": "failed", "t1": "landed", "t2": "landed"}, done
    assert not [*events(done, "task.deferred"), *events(done, "task.requeued")]
    assert landed(repository) == ["Land t1", "Land t2"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_landing_stops_no_check_of_a_phase(repository: Repository, log: CheckLog) -> None:
    """The phase of the other task completes with its first session."""
    begun, free = log.folder / "begun", log.folder / "free"
    until = f"touch {begun}; while ! test -e {free}; do sleep 0.05; done"
    workflows = {"checked": [{"build": {"prompt": "{{ task.prompt }}", "until": [until]}}]}
    tasks: list[dict[str, Any]] = [
        {"id": "slow", "prompt": "write slow x", "workflow": "checked"},
        {"id": "quick", "prompt": f"await {begun}\nwrite quick x"},
        {"id": "next", "prompt": "write next x", "needs": ["quick"]},
    ]
    config = repository.configure(tasks, capacity=2, workflows=workflows, writable=[str(log.folder)])
    child = repository.start("run", str(config), "--json")
    wait_for(begun.exists)
    wait_for(lambda: recorded(repository, "task.started") == len(tasks))
    free.touch()
    done = CommandResult.of(child)
    assert set(done.states.values()) == {"landed"}, done
    assert not events(done, "task.interrupted")


async def test_joined_check_is_restarted_if_the_task_that_started_it_is_cancelled(
    repository: Repository, log: CheckLog
) -> None:
    """Both tasks have made the same change, so the second one waits for the check of the first one."""
    free, after = log.folder / "free", log.folder / "after"
    until = log.command(f"test -e {free} || sleep 600")
    tasks: list[dict[str, Any]] = [
        {"id": "t0", "prompt": "write a x", "workflow": "checked"},
        {"id": "t1", "prompt": f"await {log.folder}/runs\nwrite a x", "workflow": "checked"},
    ]
    config = repository.configure(
        tasks,
        capacity=2,
        workflows={"checked": [{"build": {"prompt": "{{ task.prompt }}", "until": [until]}}]},
        worktrees={"after_run": [f"echo x >> {after}"]},
        writable=[str(log.folder)],
    )
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: after.exists() and len(after.read_text().split()) == len(tasks))
    free.touch()
    assert repository.council("cancel", "t0").code == 0
    done = CommandResult.of(child)
    assert done.states == {"t0": "cancelled", "t1": "landed"}, done
    assert [line["task"] for line in events(done, "task.interrupted")] == ["t0"]
    assert log.runs == [["a"], ["a"]]


async def test_check_ahead_of_a_failed_batch_is_stopped(repository: Repository, log: CheckLog) -> None:
    """The merges after the batch contain its failure, so their checks have no use during the search for it."""
    begun, lock = log.folder / "begun", log.folder / "lock"
    ahead = f"if test -e bad && test -e e; then flock {lock} sh -c 'touch {begun}; sleep 600'; fi"
    whole = f"if test -e bad && test -e d; then while ! test -e {begun}; do sleep 0.02; done; fi"
    searched = f"if test -e b && ! test -e d; then flock {lock} true; fi"
    check = log.command(f"{ahead}; {whole}; {searched}; {GOOD}")
    queue(repository, log, ["a", "b", "bad", "d", "e"], check, capacity=2, merge={"batch": 4})
    done = repository.council("resume", "--json", timeout=50)
    assert done.states == {"t0": "landed", "t1": "landed", "t2": "failed", "t3": "landed", "t4": "landed"}, done
    await repository.assert_invariants()


@pytest.mark.extended
async def test_cancelled_task_leaves_its_batch(repository: Repository, log: CheckLog) -> None:
    """The check of the batch is stopped; the other tasks are checked and landed without it."""
    begun = log.folder / "begun"
    wait = f"if test -e b; then touch {begun}; sleep 600; fi"
    queue(repository, log, ["a", "b", "c"], log.command(wait), capacity=1, merge={"batch": 8})
    child = repository.start("resume", "--json")
    wait_for(begun.exists)
    assert repository.council("cancel", "t1").code == 0
    done = CommandResult.of(child)
    assert done.states == {"t0": "landed", "t1": "cancelled", "t2": "landed"}, done
    assert log.runs == [["a", "b", "c"], ["a", "c"]]
    assert landed(repository) == ["Land 2 tasks: t0, t2"]
    assert {line["reason"] for line in events(done, "task.requeued")} == {"the checks were stopped"}
    await repository.assert_invariants()


async def test_batch_with_a_task_cancelled_after_its_checks_is_checked_again(
    repository: Repository, log: CheckLog, tmp_path: Path
) -> None:
    """The tasks before the cancelled one were only checked together with it."""
    checked, reached, free = (log.folder / name for name in ("checked", "reached", "free"))
    queue(repository, log, ["a", "b", "c"], log.command(f"touch {checked}"), capacity=1, merge={"batch": 8})
    wait = f'touch "{reached}"; while [ ! -e "{free}" ]; do sleep 0.05; done'
    path = wrap_git(repository, tmp_path / "bin", f'[ ! -e "{checked}" ] || {{ {wait}; }}')
    own_path, repository.environ["PATH"] = repository.environ["PATH"], path
    child = repository.start("resume", "--json")
    repository.environ["PATH"] = own_path
    wait_for(reached.exists)
    asked = repository.start("cancel", "t1")
    wait_for(lambda: recorded(repository, "request.completed") == 1)
    free.touch()
    asked.communicate(timeout=60)
    done = CommandResult.of(child)
    assert done.states == {"t0": "landed", "t1": "cancelled", "t2": "landed"}, done
    assert log.runs == [["a", "b", "c"], ["a", "c"]]
    assert landed(repository) == ["Land 2 tasks: t0, t2"]
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize("number", [4, 5])
async def test_failed_git_command_during_checks_ends_no_run(
    repository: Repository, log: CheckLog, tmp_path: Path, number: int
) -> None:
    """The tasks keep their place in the queue, and land later."""
    queue(repository, log, ["a", "b"], log.command(), capacity=2)
    count = log.folder / "count"
    fail = f'echo x >> "{count}"; [ $(wc -l < "{count}") -ne {number} ] || {{ echo "fatal: no" >&2; exit 128; }}'
    repository.environ["PATH"] = wrap_git(repository, tmp_path / "bin", f'case "$*" in *"^{{tree}}") {fail};; esac')
    done = repository.council("resume", "--json")
    assert done.states == {"t0": "landed", "t1": "landed"}, done
    await repository.assert_invariants()


@pytest.mark.extended
async def test_batch_whose_checks_cannot_run_waits(repository: Repository, log: CheckLog, tmp_path: Path) -> None:
    """It is tried as often as a single task, with the reason."""
    queue(repository, log, ["a", "b"], log.command(), capacity=1, merge={"batch": 8})
    fail = 'echo "fatal: cannot write files" >&2; exit 128'
    repository.environ["PATH"] = wrap_git(repository, tmp_path / "bin", f'case "$*" in *read-tree*) {fail};; esac')
    done = repository.council("resume", "--json")
    assert done.states == {"t0": "queued", "t1": "queued"}, done
    assert 0 < len(events(done, "task.checking")) <= 2 * 5
