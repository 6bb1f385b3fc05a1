"""Requests to a run from another terminal: cancel, retry, logs, diff, and preserved work."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from orchestrator import Council, RequestTimeout
from orchestrator.api.execution import control
from orchestrator.domain.events.runs import describe_file_changes
from orchestrator.errors import describe_shortage
from tests.command_server import StartedCommand
from tests.conftest import CommandResult, Repository
from tests.printed_commands import printed_commands
from tests.terminal import Terminal
from tests.waiting import wait_for


def spawned(repository: Repository) -> str:
    """Return the fake CLI's records of its starts."""
    return repository.spawns.read_text() if repository.spawns.exists() else ""


def has_begun(repository: Repository, *tasks: str) -> None:
    """Wait until these tasks have a session."""
    wait_for(lambda: all(f" {task} " in spawned(repository) for task in tasks))


async def test_cancel_on_a_live_run_ends_a_session_and_preserves_its_work(repository: Repository) -> None:
    """The task ends as cancelled, its dependents are blocked, the rest lands; the exit codes say so."""
    tasks: list[dict[str, Any]] = [
        {"id": "long", "prompt": "write half.txt half\nhang"},
        {"id": "after", "prompt": "write after.txt x", "needs": ["long"]},
        {"id": "other", "prompt": "write other.txt x"},
    ]
    child = repository.start("run", str(repository.configure(tasks)), "--json")
    has_begun(repository, "long")
    wait_for(lambda: "half.txt" in repository.council("diff", "long").stdout)
    cancelled = repository.council("cancel", "long", "--json")
    assert cancelled.code == 0, cancelled
    stdout, stderr = child.communicate(timeout=60)
    ended = CommandResult(child.returncode, stdout, stderr)
    assert (ended.code, ended.states) == (1, {"long": "cancelled", "after": "blocked", "other": "landed"}), ended
    assert "half" in repository.council("salvage", "show", "long/1").stdout
    await repository.assert_invariants()


@pytest.mark.extended
def test_command_behind_a_stopped_writer_of_the_state_names_it(repository: Repository) -> None:
    config = str(repository.configure([{"id": "a", "prompt": "write f x"}]))
    child = repository.start("run", config, failpoints="state.appended=stop@4")
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
    asking = repository.start("checkpoint", "create")
    try:
        assert asking.stderr is not None
        line = asking.stderr.readline()
        assert asking.poll() is None
    finally:
        child.send_signal(signal.SIGCONT)
        asking.communicate(timeout=60)
        child.communicate(timeout=60)
    assert line.startswith(f"waiting for the lock of the state log, held by process {child.pid}, which is stopped: ")
    assert (asking.returncode, child.returncode) == (0, 0)


@pytest.mark.extended
@pytest.mark.parametrize(
    "command", [("cancel", "long"), ("retry", "failed"), ("task", "ignore", "long", "--reason", "no")]
)
def test_request_to_a_stopped_process_names_what_it_waits_for(repository: Repository, command: tuple[str, ...]) -> None:
    """After a few seconds a line names the process; the request is performed when that continues."""
    tasks: list[dict[str, Any]] = [
        {"id": "long", "prompt": "hang"},
        {"id": "failed", "prompt": "attempt 1 exit 1\nwrite f x", "attempts": 1},
    ]
    child = repository.start("run", str(repository.configure(tasks)))
    has_begun(repository, "long")
    wait_for(lambda: repository.council("status", "--json").states["failed"] == "failed")
    child.send_signal(signal.SIGSTOP)
    try:
        asking = repository.start(*command)
        assert asking.stderr is not None
        line = asking.stderr.readline()
        assert asking.poll() is None
    finally:
        child.send_signal(signal.SIGCONT)
    what = "the request is recorded, and will be performed when that process continues, or by `council resume`"
    assert line == f"waiting for process {child.pid}, which is stopped: {what}\n"
    assert (asking.communicate(timeout=60)[1], asking.returncode) == ("", 0)
    repository.council("cancel", "--yes")
    child.communicate(timeout=60)


@pytest.mark.extended
def test_unanswered_request_stays_recorded(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends with exit code 1; the process performs the request when it continues."""
    monkeypatch.setattr(control, "_REQUEST_TIMEOUT", 0.3)
    child = repository.start("run", str(repository.configure([{"id": "a", "prompt": "hang"}])))
    has_begun(repository, "a")
    child.send_signal(signal.SIGSTOP)

    async def cancel() -> None:
        async with Council.open(repository.top, environ=repository.environ) as council:
            await council.tasks.cancel("a")

    try:
        with pytest.raises(RequestTimeout) as unanswered:
            anyio.run(cancel)
    finally:
        child.send_signal(signal.SIGCONT)
    what, remedy = describe_shortage(unanswered.value) or ("", "")
    assert what == f"no answer within 0.3 s from process {child.pid}, which is stopped"
    assert "the request is recorded" in remedy
    stdout, _ = child.communicate(timeout=60)
    assert (child.returncode, "a cancelled: on request" in stdout) == (1, True)


def run_until_push(repository: Repository, free: Path) -> StartedCommand:
    """Start a run, and return when its push waits in a hook for a file `free`."""
    hook, begun = repository.top / ".git/hooks/pre-receive", free.with_name("begun")
    hook.write_text(f"#!/bin/sh\ntouch {begun}\nwhile ! test -e {free}; do sleep 0.05; done\n")
    hook.chmod(0o755)
    repository.remember()
    child = repository.start("run", str(repository.configure([{"id": "a", "prompt": "write a.txt x"}])))
    wait_for(begun.exists)
    return child


@pytest.mark.extended
def test_interrupted_process_in_a_hook_is_reported(repository: Repository, tmp_path: Path) -> None:
    """The first Ctrl-C lets the push end; the second ends the process at once."""
    free = tmp_path / "free"
    child = run_until_push(repository, free)
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None
    lines = [child.stderr.readline(), child.stderr.readline()]
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    free.touch()
    assert child.returncode == 130
    (found,) = [
        line for line in lines if line.startswith("waiting for a push to the target of this process (a repository hook")
    ]
    assert found.endswith("hook may be delaying it): press Ctrl-C again to exit now\n")
    assert repository.council("resume", "--json").states == {"a": "landed"}


@pytest.mark.extended
async def test_task_with_a_push_in_progress_can_not_be_cancelled(repository: Repository, tmp_path: Path) -> None:
    """Its hook continues after a kill: a line reports it after a few seconds, and the exit code is 1."""
    free = tmp_path / "free"
    child = run_until_push(repository, free)
    child.kill()
    child.communicate()
    cancelling = repository.start("cancel", "a")
    assert cancelling.stderr is not None
    line = cancelling.stderr.readline()
    free.touch()
    assert line.startswith(f"waiting for a git command of process {child.pid} (ended, but a child process holds it")
    stdout, stderr = cancelling.communicate(timeout=60)
    assert (cancelling.returncode, "1 interrupted" in stdout) == (1, True), stdout
    assert stderr == "a was not cancelled: it is landing, and `council resume` completes that first\n"
    ignored = repository.council("task", "ignore", "a", "--reason", "no", "--json")
    assert (ignored.code, ignored.result["exit"], ignored.states) == (1, 1, {"a": "landing"})
    assert repository.council("resume", "--json").states == {"a": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
def test_dropped_work_is_not_listed(repository: Repository) -> None:
    """Neither by `status` nor by `show`; its name is rejected because nothing is left."""
    repository.council(
        "run", str(repository.configure([{"id": "a", "prompt": "write a.txt x\nexit 1", "attempts": 1}]))
    )
    assert "council salvage apply a/1" in repository.council("status").stdout
    assert "saved as" in repository.council("show", "a").stdout
    assert repository.council("salvage", "drop", "a/1", "--yes").code == 0
    for shown in (repository.council("status"), repository.council("show", "a")):
        assert "a/1" not in shown.stdout
    assert repository.council("status", "--json").result["tasks"][0]["branch"] is None
    assert "no unmerged work" in repository.council("salvage", "list").stderr
    cancelled = repository.council("cancel")
    assert (cancelled.code, "nothing to cancel" in cancelled.stderr) == (0, True)
    assert repository.council("checkpoint", "list", "--json").result["checkpoints"] == []
    refused = repository.council("salvage", "apply", "a/1")
    assert refused.code == 2
    assert "preserved work 'a/1' not found: this run has no preserved work; for another run add --run" in refused.stderr


@pytest.mark.extended
async def test_cancel_of_all_tasks_ends_a_live_run(repository: Repository) -> None:
    """Without a name every unfinished task is cancelled, also those that wait for capacity."""
    tasks: list[dict[str, Any]] = [{"id": f"t{n}", "prompt": f"write {n}.txt x\nhang"} for n in range(3)]
    child = repository.start("run", str(repository.configure(tasks, capacity=1)), "--json")
    has_begun(repository, "t0")
    cancelled = repository.council("cancel", "--yes", "--json")
    assert cancelled.code == 0
    child.communicate(timeout=60)
    assert child.returncode == 1
    after = repository.council("status", "--json")
    assert (after.result["status"], set(after.states.values())) == ("incomplete", {"cancelled"})
    await repository.assert_invariants()


@pytest.mark.extended
async def test_cancel_of_an_ended_task_is_not_an_error(repository: Repository) -> None:
    """Exit code 0 if all tasks have ended, named or not; 2 for an unknown task."""
    tasks = [{"id": "done", "prompt": "write d.txt x"}, {"id": "long", "prompt": "hang"}]
    child = repository.start("run", str(repository.configure(tasks)))
    has_begun(repository, "done", "long")
    wait_for(lambda: repository.council("status", "--json").states["done"] == "landed")
    ended = "nothing to cancel: task 'done' has already ended (state: landed)\n"
    unknown = repository.council("cancel", "done", "nonsense")
    assert (unknown.code, "no task 'nonsense'" in unknown.stderr) == (2, True), unknown
    one = repository.council("cancel", "done")
    assert (one.code, one.stderr) == (0, ended)
    both = repository.council("cancel", "done", "long")
    assert (both.code, both.stderr) == (0, ended)
    child.communicate(timeout=60)
    for names in (["done"], ["long"], ["done", "long"], []):
        again = repository.council("cancel", *names, "--json")
        assert (again.code, again.result["exit"], again.states) == (0, 0, {"done": "landed", "long": "cancelled"})


@pytest.mark.extended
@pytest.mark.parametrize("keys", [{}, {"workflow": "one"}], ids=["plain", "workflow"])
async def test_retry_on_a_live_run_unblocks_dependents(repository: Repository, keys: dict[str, Any]) -> None:
    """It gets all of its attempts again, and its dependents continue."""
    tasks: list[dict[str, Any]] = [
        {"id": "flaky", "prompt": "attempt 1 exit 1\nwrite f.txt x", "attempts": 1, **keys},
        {"id": "after", "prompt": "write after.txt x", "needs": ["flaky"]},
        {"id": "long", "prompt": "hang"},
    ]
    workflows: dict[str, Any] = {"workflows": {"one": [{"build": {}}]}} if keys else {}
    child = repository.start("run", str(repository.configure(tasks, **workflows)), "--json")
    has_begun(repository, "long")
    wait_for(lambda: repository.council("status", "--json").states["flaky"] == "failed")
    assert repository.council("retry", "flaky", "--json").code == 0
    wait_for(lambda: repository.council("status", "--json").states["after"] == "landed")
    assert repository.council("cancel", "long").code == 0
    stdout, stderr = child.communicate(timeout=60)
    assert CommandResult(child.returncode, stdout, stderr).states == {
        "flaky": "landed",
        "after": "landed",
        "long": "cancelled",
    }
    await repository.assert_invariants()


@pytest.mark.extended
async def test_cancel_and_retry_work_on_an_inactive_run(repository: Repository) -> None:
    """Without an owner the command does it itself, after the killed process's leftovers are recovered."""
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "write a.txt x\nattempt 1 hang"},
        {"id": "b", "prompt": "write b.txt x\nattempt 1 hang"},
    ]
    child = repository.start("run", str(repository.configure(tasks)))
    has_begun(repository, "a", "b")
    child.kill()
    child.communicate()
    cancelled = repository.council("cancel", "a", "--json")
    assert cancelled.states == {"a": "cancelled", "b": "pending"}, cancelled
    await repository.assert_invariants()
    assert repository.council("resume", "--json").states == {"a": "cancelled", "b": "landed"}
    retried = repository.council("retry", "a", "--json")
    assert retried.states == {"a": "pending", "b": "landed"}, retried
    assert (retried.result["status"], retried.result["exit"]) == ("incomplete", 0)
    assert repository.council("resume", "--json").states == {"a": "landed", "b": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("command", "fragment"),
    [
        (("retry", "done"), "has landed"),
        (("retry", "nonsense"), "no task 'nonsense'"),
        (("cancel", "don"), "done"),
        (("logs", "nonsense"), "no task 'nonsense'"),
        (("logs", "done", "--session", "7"), "no session 7"),
        (("salvage", "show", "done/7"), "preserved work 'done/7' not found"),
        (("salvage", "apply", "failed/7"), "failed/1"),
    ],
)
async def test_impossible_request_is_rejected(repository: Repository, command: tuple[str, ...], fragment: str) -> None:
    """Exit code 2 with the reason and the possible values."""
    tasks: list[dict[str, Any]] = [
        {"id": "done", "prompt": "write d.txt x"},
        {"id": "failed", "prompt": "write f.txt x\nexit 1", "attempts": 1},
    ]
    assert repository.council("run", str(repository.configure(tasks))).code == 1
    refused = repository.council(*command)
    assert refused.code == 2
    assert fragment in refused.stderr


@pytest.mark.extended
async def test_logs_of_a_live_session_are_followed_to_the_end(repository: Repository) -> None:
    """`logs -f` prints the existing and then each new line, attempt by attempt, and ends with the task."""
    prompt = "attempt 1 print first\nattempt 1 exit 1\nprint second\ntick 3 0.2\nwrite a.txt x"
    child = repository.start("run", str(repository.configure([{"id": "t", "prompt": prompt}])))
    has_begun(repository, "t")
    followed = repository.council("logs", "t", "-f", "--json")
    child.communicate(timeout=60)
    assert followed.code == 0, followed
    lines = [line["text"] for line in followed.lines if line["kind"] == "line"]
    assert lines[-4:] == ["second", "tick", "tick", "tick"]
    assert {line["attempt"] for line in followed.lines} >= {2}
    assert [line["outcome"] for line in followed.lines if line["kind"] == "ended"][-1] == "built"
    assert repository.council("logs", "t", "--raw").stdout == "second\ntick\ntick\ntick\n"
    assert repository.council("logs", "t", "--raw", "--session", "1").stdout == "first\n"


@pytest.mark.extended
async def test_task_without_sessions_has_its_reason(repository: Repository) -> None:
    """A task cancelled before its start never had a session; for one that may still start: `council status`.

    Every command that shows a session's output or changes does the same, also with --follow.
    """
    gate = repository.spawns.parent / "gate"
    tasks: list[dict[str, Any]] = [
        {"id": "first", "prompt": f"await {gate}\nexit 1", "attempts": 1},
        {"id": "never", "prompt": "write n.txt x", "needs": ["first"]},
        {"id": "later", "prompt": "write l.txt x", "needs": ["first"]},
    ]
    child = repository.start("run", str(repository.configure(tasks)))
    has_begun(repository, "first")
    assert repository.council("cancel", "never").code == 0
    assert repository.council("task", "ignore", "later", "--reason", "done by hand").code == 0
    views = (("logs",), ("logs", "-f"), ("logs", "--raw"), ("logs", "--phase", "build"), ("diff",))
    for view in views:
        refused = repository.council(*view, "never")
        assert (refused.code, refused.stdout) == (2, ""), refused
        assert "task 'never' never started: it was cancelled (on request): `council retry never --run" in refused.stderr
    assert "it was cancelled (ignored: done by hand)" in repository.council("logs", "later").stderr
    assert repository.council("retry", "later").code == 0
    waits = repository.council("logs", "later").stderr
    assert "task 'later' has not started yet: `council status --run" in waits
    assert "later  pending    waits for 'first'\n" in repository.council("status").stdout
    assert repository.council("queue", "hold", "later").code == 0
    reason = "waits for 'first'; held by a user; `council queue release later` lets it land"
    assert repository.council("status", "--json").result["tasks"][2]["reason"] == reason
    assert repository.council("queue", "release", "later").code == 0
    gate.touch()
    child.communicate(timeout=60)
    for follow in ([], ["-f"]):  # its dependency did not land
        blocked = repository.council("logs", "later", *follow)
        assert (blocked.code, blocked.stderr) == (2, waits), blocked


async def test_logs_have_both_streams_and_checks(repository: Repository) -> None:
    """The readable log is on standard output, --raw keeps the streams apart; the output of checks follows."""
    shell = {"use": "command", "argv": ["sh", "-c", "echo out; echo err >&2; echo x > x.txt"]}
    tasks = [{"id": "t", "prompt": "x", "checks": ["echo checked"]}]
    assert repository.council("run", str(repository.configure(tasks, adapters={"sh": shell}))).code == 0
    raw = repository.council("logs", "t", "--raw")
    assert (raw.stdout, raw.stderr) == ("out\nchecked\n", "err\n")
    shown = repository.council("logs", "t")
    begin, *output, end, check, checked = shown.stdout.splitlines()
    assert (sorted(output), check, checked, shown.stderr) == (["err", "out"], "check 1:", "checked", "")
    assert begin.startswith("session 1, sh, started ")
    assert end.startswith("session 1 ended after ")


@pytest.mark.extended
async def test_diff_shows_landed_and_failed_work(repository: Repository) -> None:
    """Only the task's own changes, wherever its work is now."""
    tasks: list[dict[str, Any]] = [
        {"id": "done", "prompt": "write d.txt landed-text"},
        {"id": "failed", "prompt": "write f.txt failed-text\nexit 1", "attempts": 1},
        {"id": "idle", "prompt": "print nothing"},
    ]
    repository.council("run", str(repository.configure(tasks)))
    assert "+landed-text" in repository.council("diff", "done").stdout
    assert "+failed-text" in repository.council("diff", "failed").stdout
    assert "1 file changed" in repository.council("diff", "failed", "--stat").stdout
    assert repository.council("diff", "idle").code == 2


async def test_preserved_work_is_listed_shown_applied_and_dropped(repository: Repository) -> None:
    """Failed work is found by name, applied to files or to a branch, and deleted on request.

    Output for people names no branch that the user's repository does not have.
    """
    tasks: list[dict[str, Any]] = [
        {"id": "failed", "prompt": "write f.txt kept-text\nexit 1", "attempts": 1},
        {"id": "stasher", "prompt": "write s.txt s\ngit add s.txt\ngit stash --quiet\nwrite t.txt t\nexit 1",
         "attempts": 1},
        {"id": "tried", "prompt": "write t.txt t\nattempt 1 exit 1", "attempts": 2},
    ]  # fmt: skip
    ran = repository.council("run", str(repository.configure(tasks)))
    printed = [repository.council(*words) for words in (("status",), ("show", "failed"), ("state", "show"))]
    heads = repository.git("for-each-ref", "--format=%(refname:short)", "refs/heads").split()
    for one in (ran, *printed):
        assert {*re.findall(r"(?<![.\w])council/[\w./-]+", one.stdout)} <= {*heads}, one.stdout
    assert all("saved as" in one.stdout and "failed/1" in one.stdout for one in printed)
    listed = repository.council("salvage", "list", "--json").result["preserved"]
    assert [one["name"] for one in listed] == ["failed/1", "stasher/1", "stasher/1/stash", "tried/1"]
    run, *rows = repository.council("salvage", "list").stdout.splitlines()
    assert run == f"run {listed[0]['run']}"
    assert all(len(line) <= 80 for line in rows)
    assert [line.split()[:3] for line in rows if not line.startswith("      ")] == [
        ["failed/1", "task", "failed"],
        ["stasher/1", "task", "failed"],
        ["stasher/1/stash", "task", "failed"],
        ["tried/1", "task", "landed"],
    ]
    assert "+kept-text" in repository.council("salvage", "show", "failed/1").stdout
    assert "s.txt" in repository.council("salvage", "show", "stasher/1/stash", "--stat").stdout
    assert repository.council("salvage", "apply", "failed/1", "--branch", "rescued").code == 0
    assert repository.git("show", "rescued:f.txt") == "kept-text"
    applied = repository.council("salvage", "apply", "failed/1", "--json")
    assert applied.result["paths"] == ["f.txt"]
    assert (repository.top / "f.txt").read_text() == "kept-text\n"
    assert repository.council("salvage", "drop", "--yes", "failed/1", "stasher/1/stash").code == 0
    left = repository.council("salvage", "list", "--json").result["preserved"]
    assert [one["name"] for one in left] == ["stasher/1", "tried/1"]


@pytest.mark.extended
async def test_worktree_with_a_secret_is_preserved_and_can_be_dropped(repository: Repository) -> None:
    """A `.env` is never committed; the rest is, the folder is named, and can be dropped."""
    tasks = [{"id": "env", "prompt": "do it\nwrite src/.env API_TOKEN=s3cr3t-value-77\nwrite good.txt g"}]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    task = ended.result["tasks"][0]
    assert (task["status"], task["failure"]) == ("failed", "refused")
    assert "src/.env" in task["reason"]
    kept = repository.council("salvage", "list", "--json").result["preserved"]
    assert [one["name"] for one in kept] == ["env/1", "env/1/worktree"]
    assert (Path(kept[1]["worktree"]) / "src/.env").exists()
    assert task["preserved_worktree"] == "env/1/worktree"
    for view in ("status",), ("show", "env"), ("resume",), ("state", "show"):
        assert "saved as env/1 and env/1/worktree" in " ".join(repository.council(*view).stdout.split()), view
    assert (
        "or: copy files from env/1/worktree: `council salvage list` has its folder"
        in repository.council("status").stdout
    )
    assert "choose one of env/1, env/1/worktree" in repository.council("salvage", "apply", "env").stderr
    shown = repository.council("salvage", "show", "env/1").stdout
    assert "good.txt" in shown
    assert ".env" not in shown
    assert f"copy files from {kept[1]['worktree']}" in repository.council("salvage", "apply", "env/1/worktree").stderr
    assert repository.council("salvage", "drop", "--yes", "env/1/worktree").code == 0
    assert not Path(kept[1]["worktree"]).exists()
    assert "env/1/worktree" not in repository.council("status").stdout
    for repository_path in (repository.top / ".git", Path(ended.result["repository"])):
        objects = subprocess.run(
            ["git", "cat-file", "--batch-all-objects", "--batch"], cwd=repository_path, capture_output=True, check=True
        ).stdout
        assert b"s3cr3t-value-77" not in objects
    await repository.assert_invariants()


@pytest.mark.extended
def test_unsafe_worktree_of_a_finished_run_is_named_without_resume(repository: Repository) -> None:
    """Its repositories could not be disabled: nothing saves it any more, and the listing warns of git."""
    tasks = [{"id": "env", "prompt": "do it\nwrite src/.env API_TOKEN=s3cr3t-value-77", "attempts": 1}]
    repository.council("run", str(repository.configure(tasks)))
    (preserved_mark,) = Path(repository.environ["COUNCIL_HOME"]).glob("*/sessions/*/env.1/preserved")
    preserved_mark.unlink()
    (kept,) = repository.council("salvage", "list", "--json").result["preserved"]
    unsafe = "a worktree that could not be collected completely: git in it may run the agent's programs"
    assert kept["subject"] == unsafe
    assert (Path(kept["worktree"]) / "src/.env").exists()


@pytest.mark.extended
async def test_request_of_a_killed_command_is_performed(repository: Repository) -> None:
    """The request was recorded before the command was killed; the run's next owner performs it."""
    tasks = [{"id": "a", "prompt": "attempt 1 hang\nwrite a.txt x"}, {"id": "b", "prompt": "write b.txt x"}]
    child = repository.start("run", str(repository.configure(tasks)), failpoints="landing.recorded=kill")
    child.communicate(timeout=60)
    assert repository.council("cancel", "a", failpoints="request.recorded=kill").code == -9
    ended = repository.council("resume", "--json")
    assert ended.states == {"a": "cancelled", "b": "landed"}, ended
    await repository.assert_invariants()


@pytest.mark.extended
async def test_request_answer_is_json(repository: Repository) -> None:
    """`cancel --json` prints the current result of the run, one object."""
    child = repository.start("run", str(repository.configure([{"id": "t", "prompt": "hang"}])))
    has_begun(repository, "t")
    answered = repository.council("cancel", "t", "--json")
    assert json.loads(answered.stdout.splitlines()[-1])["tasks"][0]["id"] == "t"
    child.communicate(timeout=60)


@pytest.mark.extended
async def test_rejected_request_stays_rejected(repository: Repository) -> None:
    """A resume without the secret's variable neither commits the secret's file nor removes it."""
    repository.environ["MY_TOKEN"] = "zzz-my-own-secret-1234567890"
    shell = {"use": "command", "argv": ["sh", "{prompt_file}"], "env": ["MY_TOKEN"]}
    tasks = [
        {"id": "leaks", "prompt": 'echo "is $MY_TOKEN" > leaked.txt; echo ok > fine.txt'},
        {"id": "cut-off", "prompt": 'echo "is $MY_TOKEN" > leaked.txt; sleep 600'},
    ]
    config = repository.configure(tasks, adapters={"sh": shell}, target="out")
    child = repository.start("run", str(config))
    homes = repository.top.parent / "council-home"
    wait_for(lambda: len(list(homes.glob("*/sessions/*/*/slot/tree/leaked.txt"))) == 2)
    wait_for(lambda: repository.council("status", "--json").states["leaks"] == "failed")
    child.kill()
    child.communicate()
    del repository.environ["MY_TOKEN"]
    cancelled = repository.council("cancel", "--yes", "--json")
    assert cancelled.states == {"leaks": "failed", "cut-off": "cancelled"}, cancelled
    kept = {one["name"] for one in repository.council("salvage", "list", "--json").result["preserved"]}
    assert kept == {"leaks/1", "leaks/1/worktree", "cut-off/1/worktree"}
    for place in homes.glob("*/*.git"):
        objects = subprocess.run(
            ["git", "cat-file", "--batch-all-objects", "--batch"], cwd=place, capture_output=True, check=True
        ).stdout
        assert b"zzz-my-own-secret" not in objects
    await repository.assert_invariants(target_checked_out=False)


async def test_blocked_task_names_what_to_retry(repository: Repository) -> None:
    """`retry` of a blocked task names the failed tasks and the run; with these it is accepted."""
    tasks: list[dict[str, Any]] = [
        {"id": "broken", "prompt": "exit 1", "attempts": 1},
        {"id": "bad", "prompt": "exit 1", "attempts": 1},
        {"id": "late", "prompt": "write l.txt l", "needs": ["broken"]},
        {"id": "last", "prompt": "write m.txt m", "needs": ["bad", "late"]},
    ]
    run = repository.council("run", str(repository.configure(tasks)), "--json").result["run"]
    for named, missing in (["last"], "broken bad"), (["last", "bad", "late"], "broken"):
        refused = repository.council("retry", *named)
        assert (refused.code, f"`council retry {missing} --run {run}`" in refused.stderr) == (2, True), refused
    retried = repository.council("retry", "last", "late", "broken", "bad", "--json")
    assert (retried.code, {*retried.states.values()}) == (0, {"pending"}), retried


@pytest.mark.extended
async def test_all_runs_are_listed(repository: Repository) -> None:
    """Each with its outcome; an earlier run's preserved work is also listed, and found by the run's name."""
    repository.council(
        "run", str(repository.configure([{"id": "bad", "prompt": "write b.txt b\nexit 1", "attempts": 1}]))
    )
    repository.council("run", str(repository.configure([{"id": "good", "prompt": "write g.txt g"}])))
    first, second = repository.council("runs", "--json").result["runs"]
    assert (first["status"], second["status"]) == ("incomplete", "landed")
    assert first["run"] in repository.council("runs").stdout
    [kept] = repository.council("salvage", "list", "--json").result["preserved"]
    assert "b.txt" in repository.council("salvage", "show", kept["name"], "--run", kept["run"]).stdout


@pytest.mark.extended
async def test_durations_exclude_pauses(repository: Repository) -> None:
    """An average time counts active processes only, not the time between an interrupt and a resume."""
    child = repository.start("run", str(repository.configure([{"id": "t", "prompt": "write a x\nattempt 1 hang"}])))
    has_begun(repository, "t")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    before = repository.council("runs", "--json").result["runs"][0]["orchestrators"]
    assert repository.council("resume").code == 0
    [run] = repository.council("runs", "--json").result["runs"]
    first, second = run["orchestrators"]
    assert first["ended"] == before[0]["ended"]
    shown = repository.council("state", "show", "--json").result
    [task] = shown["tasks"]
    times = {one["event"]: one["time"] for one in shown["events"]}
    started = task["phases"][0]["attempts"][0]["started"]
    pause = second["since"] - first["ended"]
    assert pause > 0.1
    expected = times["task.landed"] - started - pause
    assert run["metrics"]["average_time_minutes"] * 60 == pytest.approx(expected, abs=0.02)
    assert task["time_minutes"] * 60 == pytest.approx(expected, abs=0.02)


def steps(shown: str) -> list[str]:
    """Return the next commands that a command printed."""
    lines = [line.strip() for line in shown.splitlines()]
    return [line.partition(": ")[2] for line in lines if line.lower().startswith("next: ")]


@pytest.mark.extended
@pytest.mark.parametrize(
    ("tasks", "settings", "expected"),
    [
        ([{"id": "t", "prompt": "write t x\nexit 1", "attempts": 1}], {}, ["council logs t"]),
        ([{"id": "t", "prompt": "hang"}], {}, ["council resume RUN"]),
        ([{"id": "t", "prompt": "tick 2000 0.01"}], {"budget": {"time": "1s"}}, ["council resume RUN --budget LIMITS"]),
        ([{"id": "t", "prompt": "write t x"}], {"target": "council/RUN"}, ["council merge RUN"]),
    ],
)
async def test_next_command_is_the_same_everywhere(
    repository: Repository, tasks: list[dict[str, Any]], settings: dict[str, Any], expected: list[str]
) -> None:
    """In the final report, `status`, `runs`, `show` and the final report of `resume`, for a task and for a run."""
    config = repository.configure(tasks, **settings)
    if "target" in settings:
        made = json.loads(config.read_text())
        del made["target"]
        config.write_text(json.dumps(made))
    child = repository.start("run", str(config))
    if tasks[0]["prompt"] == "hang":
        has_begun(repository, "t")
        child.send_signal(signal.SIGINT)
    final, _ = child.communicate(timeout=60)
    name = repository.council("status", "--json").result["run"]
    wanted = [command.replace("RUN", name) for command in expected]
    assert steps(final) == wanted, final
    assert steps(repository.council("status").stdout) == wanted
    of_run = [command for command in wanted if name in command]
    assert steps(repository.council("runs").stdout) == of_run
    if "merge" not in wanted[0]:  # a landed task has no next command
        assert steps(repository.council("show", "t").stdout) == wanted
    if tasks[0]["prompt"] != "hang":
        assert steps(repository.council("resume").stdout) == wanted


@pytest.mark.extended
async def test_long_name_is_shortened_in_tables_only(repository: Repository) -> None:
    """Only commands and paths exceed 80 columns; commands and JSON have the full name."""
    name = "a-task-whose-name-is-as-long-as-names-of-tasks-may-be-or-nearly"
    task = {"id": name, "prompt": "write a x\nexit 1", "attempts": 1}
    config = str(repository.configure([task, {"id": "b", "prompt": "write b x", "needs": [name]}]))
    planned = repository.council("run", config, "--dry-run").stdout.partition("\nwarning ")[0]
    shown = [repository.council("run", config).stdout]
    for command in (("status",), ("runs",), ("usage",), ("state", "show")):
        ended = repository.council(*command)
        shown.append(ended.stdout.partition("newest events")[0])
        assert name in repository.council(*command, "--json").stdout or command == ("runs",)
    for text in shown:
        lines = text.splitlines()
        wide = [line for line in lines if len(line) > 80 and "council " not in line and "/" not in line]
        assert not [line for line in wide if not re.match(r"\d\d:\d\d:\d\d ", line)], text
    assert not [line for line in planned.splitlines() if len(line) > 80 and "/" not in line], planned
    assert f"next: council logs {name}\n" in shown[0]
    assert f"next: council logs {name}\n" in shown[1]
    assert "  a-task-whose…" in shown[1]


def of(ended: CommandResult, task: str) -> dict[str, Any]:
    """Return a field of a task's result."""
    return next(one for one in ended.result["tasks"] if one["id"] == task)


@pytest.mark.extended
async def test_ignored_task_is_not_started_until_retried(repository: Repository) -> None:
    """With an active session, waiting, or without a process; `status` has the reason."""
    tasks: list[dict[str, Any]] = [
        {"id": "long", "prompt": "write half.txt half\nattempt 1 hang"},
        {"id": "waits", "prompt": "write waits.txt x", "needs": ["long"]},
        {"id": "other", "prompt": "write other.txt x\nattempt 1 hang"},
    ]
    child = repository.start("run", str(repository.configure(tasks)), "--json")
    has_begun(repository, "long", "other")
    ignored = repository.council("task", "ignore", "long", "waits", "--reason", "done by hand", "--json")
    assert ignored.code == 0, ignored
    for task in ("long", "waits"):
        assert (of(ignored, task)["status"], of(ignored, task)["reason"]) == ("cancelled", "ignored: done by hand")
    assert "half" in repository.council("salvage", "show", "long/1").stdout
    child.kill()
    child.communicate()
    resumed = repository.council("resume", "--json")
    assert resumed.states == {"long": "cancelled", "waits": "cancelled", "other": "landed"}, resumed
    assert of(resumed, "waits")["reason"] == "ignored: done by hand"
    assert repository.council("retry", "long", "--json").code == 0
    resumed = repository.council("resume", "--json")
    assert resumed.states == {"long": "landed", "waits": "cancelled", "other": "landed"}, resumed
    assert of(resumed, "long")["reason"] is None
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("done", "--reason", "x"), "task 'done' has already ended (state: landed): there is nothing to ignore"),
        (("a", "--reason", " "), "the reason is empty: enter the reason"),
        (("a", "--reason", f"sk-ant-api03-{'aB3' * 30}"), "seems to contain a secret key"),
        (("a",), "Missing option '--reason'"),
        (("nonsense", "--reason", "x"), "no task 'nonsense'"),
    ],
)
async def test_impossible_ignore_is_rejected(repository: Repository, arguments: tuple[str, ...], fragment: str) -> None:
    """Exit code 2 with the reason."""
    tasks: list[dict[str, Any]] = [
        {"id": "done", "prompt": "write d.txt x"},
        {"id": "a", "prompt": "exit 1", "attempts": 1},
    ]
    assert repository.council("run", str(repository.configure(tasks))).code == 1
    refused = repository.council("task", "ignore", *arguments)
    assert refused.code == 2
    assert fragment in refused.stderr


def _file(repository: Repository, tasks: list[dict[str, Any]], **settings: Any) -> str:
    return str(repository.configure(tasks, **settings))


async def test_changed_file_is_reported_and_adopted_by_reload(repository: Repository) -> None:
    """`retry` and `resume` name the changes that the run does not use; `retry --reload` records and uses them."""
    broken: list[dict[str, Any]] = [
        {"id": "t", "prompt": "exit 1", "attempts": 1},
        {"id": "u", "prompt": "write u.txt x\nexit 1", "attempts": 1},
    ]
    file = _file(repository, broken)
    assert repository.council("run", file).code == 1
    repaired = [{**broken[0], "prompt": "write t.txt repaired", "timeout": "7m"}, {**broken[1], "attempts": 2}]
    _file(repository, repaired, capacity=7)
    kept = repository.council("retry", "t")
    assert f"{file} has changed; the run keeps its recorded settings: t (timeout, prompt)" in kept.stderr, kept
    assert "council retry t --reload`" in kept.stderr
    resumed = repository.council("resume", "--json")
    assert resumed.states["t"] == "failed"
    [event] = [line for line in resumed.lines if line.get("event") == "run.file_changed"]
    assert (event["tasks"], event["keys"]) == ({"t": ["timeout", "prompt"], "u": ["attempts"]}, ["capacity"])
    reloaded = repository.council("retry", "t", "--reload")
    assert (reloaded.code, "settings: capacity; to use them, start a new run" in reloaded.stderr) == (0, True), reloaded
    assert f"t: reloaded timeout, prompt from {file}" in reloaded.stderr
    unchanged = repository.council("retry", "t", "--reload")
    assert f"t: {file} has no changes" in unchanged.stderr
    resumed = repository.council("resume", "--json")
    assert resumed.states == {"t": "landed", "u": "failed"}
    assert (repository.top / "t.txt").read_text().strip() == "repaired"
    [event] = [line for line in resumed.lines if line.get("event") == "run.file_changed"]
    assert event["tasks"] == {"u": ["attempts"]}
    assert repository.council("retry", "u", "--reload").code == 0
    _file(repository, broken)  # differs from the recorded file since
    [event] = [line for line in repository.council("resume", "--json").lines if line.get("event") == "run.file_changed"]
    assert event["tasks"] == {"u": ["attempts"]}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_reload_adopts_adapters_and_pending_tasks(repository: Repository) -> None:
    """A new adapter becomes one of the run; a task that never began need not fail first."""
    tasks: list[dict[str, Any]] = [
        {"id": "t", "prompt": "exit 1", "attempts": 1},
        {"id": "later", "prompt": "write later.txt old", "needs": ["first"]},
        {"id": "first", "prompt": "exit 1", "attempts": 1},
    ]
    assert repository.council("run", _file(repository, tasks)).code == 1
    shell = {"use": "command", "argv": ["sh", "-c", "echo x > shell.txt"]}
    now = [{**one, "adapter": "fake"} for one in tasks]
    now[0]["adapter"], now[1]["prompt"], now[2]["prompt"] = "sh", "write later.txt new", "write f x"
    _file(repository, now, adapters={"sh": shell, "fake": repository.fake_adapter()})
    assert repository.council("retry", "first", "later", "t", "--reload").code == 0
    assert set(repository.council("resume", "--json").states.values()) == {"landed"}
    assert (repository.top / "later.txt").read_text().strip() == "new"
    assert (repository.top / "shell.txt").exists()
    await repository.assert_invariants()


@pytest.mark.extended
def test_printed_reload_of_a_blocked_task_works(repository: Repository) -> None:
    """It stays blocked, and uses the new settings once the task that it needs has landed."""
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "exit 1", "attempts": 1},
        {"id": "b", "prompt": "write b.txt old", "needs": ["a"]},
        {"id": "c", "prompt": "write c.txt c", "needs": ["a"]},
    ]
    repository.council("run", _file(repository, tasks))
    changed = [tasks[0], {**tasks[1], "prompt": "write b.txt new"}, {**tasks[2], "owns": ["c.txt"]}]
    _file(repository, changed)
    assert repository.council("retry", "a").code == 0
    resumed = repository.council("resume")
    [event] = [line for line in resumed.stdout.splitlines() if "has changed" in line]
    [reload] = printed_commands(event)
    assert (reload[0], reload[-1]) == ("resume", "--reload"), event
    assert event.endswith("; to use changes of `owns`, start a new run")
    reloaded = repository.council(*reload)
    assert (reloaded.code, "b: reloaded prompt from" in reloaded.stderr) == (1, True), reloaded
    assert repository.council("status", "--json").states["b"] == "blocked"
    _file(repository, [{**tasks[0], "prompt": "write a.txt a"}, *changed[1:]])
    assert repository.council("retry", "a", "--reload").code == 0
    assert set(repository.council("resume", "--json").states.values()) == {"landed"}
    assert (repository.top / "b.txt").read_text() == "new\n"


@pytest.mark.extended
def test_printed_reload_of_a_resume_works_after_a_stop(repository: Repository) -> None:
    """For a task that the resume has started, and one that has landed since; a retry of a live run says the same."""
    gate = repository.spawns.parent / "gate"
    tasks: list[dict[str, Any]] = [
        {"id": "t", "prompt": f"await {gate}\nwrite t.txt old"},
        {"id": "landing", "prompt": "attempt 1 exit 1\nwrite landing.txt old", "attempts": 1},
        {"id": "failing", "prompt": "exit 1", "attempts": 1},
    ]
    child = repository.start("run", _file(repository, tasks))
    has_begun(repository, "t")
    wait_for(lambda: repository.council("status", "--json").states["failing"] == "failed")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert repository.council("retry", "landing").code == 0
    changed = [
        {**tasks[0], "prompt": "write t.txt new"},
        {**tasks[1], "timeout": "50s"},
        {**tasks[2], "timeout": "50s"},
    ]
    _file(repository, changed)
    child = repository.start("resume")
    wait_for(lambda: repository.council("status", "--json").states["landing"] == "landed")
    retried = repository.council("retry", "failing")
    assert printed_commands(retried.stderr)[0] == ["resume", "--reload"], retried
    child.send_signal(signal.SIGINT)
    stdout, _ = child.communicate(timeout=60)
    [event] = [line for line in stdout.splitlines() if "has changed" in line]
    assert "to adopt them: stop the run, then `council resume " in event
    [reload] = printed_commands(event)
    resumed = repository.council(*reload, "--json")
    assert resumed.states == {"t": "landed", "landing": "landed", "failing": "failed"}, resumed
    assert (repository.top / "t.txt").read_text() == "new\n"
    assert "run.file_changed" not in resumed.stdout


@pytest.mark.extended
def test_printed_reload_of_a_task_that_a_resume_does_not_start_works(repository: Repository) -> None:
    """While the run is active."""
    gate = repository.spawns.parent / "gate"
    tasks: list[dict[str, Any]] = [
        {"id": "t", "prompt": f"await {gate}\nwrite t.txt t"},
        {"id": "failing", "prompt": "exit 1", "attempts": 1},
    ]
    child = repository.start("run", _file(repository, tasks))
    has_begun(repository, "t", "failing")
    wait_for(lambda: repository.council("status", "--json").states["failing"] == "failed")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    _file(repository, [tasks[0], {**tasks[1], "prompt": "write failing.txt x"}])
    child = repository.start("resume", "--json")
    assert child.stdout is not None
    events = (json.loads(line) for line in child.stdout)
    changed = next(line for line in events if line.get("event") == "run.file_changed")
    assert (changed["tasks"], changed["stop_first"]) == ({"failing": ["prompt"]}, [])
    [reload] = printed_commands(describe_file_changes(changed["file"], changed["tasks"], [], changed["run"]))
    assert repository.council(*reload).code == 0
    gate.touch()
    child.communicate(timeout=60)
    assert set(repository.council("status", "--json").states.values()) == {"landed"}


@pytest.mark.extended
def test_remedy_of_a_refused_retry_names_an_older_run(repository: Repository) -> None:
    """The printed command works as it is, although a newer run exists."""
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "attempt 1 exit 1\nwrite a.txt a", "attempts": 1},
        {"id": "b", "prompt": "write b.txt b", "needs": ["a"]},
    ]
    older = repository.council("run", _file(repository, tasks), "--json").result["run"]
    repository.council("run", _file(repository, [{"id": "a", "prompt": "write x.txt x"}]))
    [retry] = printed_commands(repository.council("retry", "b", "--run", older).stderr)
    retried = repository.council(*retry, "--json")
    assert (retried.code, retried.result["run"]) == (0, older), retried
    assert repository.council("resume", older, "--json").states == {"a": "landed", "b": "landed"}


@pytest.mark.extended
def test_reload_adopts_a_waiting_task_of_a_live_run(repository: Repository) -> None:
    """It waits as before, and starts with the new settings."""
    gate = repository.spawns.parent / "gate"
    tasks: list[dict[str, Any]] = [
        {"id": "first", "prompt": f"await {gate}\nwrite a.txt a"},
        {"id": "later", "prompt": "write later.txt old", "needs": ["first"]},
    ]
    child = repository.start("run", _file(repository, tasks), "--json")
    wait_for(repository.spawns.exists)
    _file(repository, [tasks[0], {**tasks[1], "prompt": "write later.txt new"}])
    reloaded = repository.council("retry", "later", "--reload", "--json")
    assert (reloaded.code, reloaded.states["later"]) == (0, "pending"), reloaded
    gate.touch()
    child.communicate(timeout=60)
    assert (repository.top / "later.txt").read_text() == "new\n"


@pytest.mark.extended
def test_reload_adopts_the_checks_of_a_queued_task(repository: Repository) -> None:
    """Its work stays queued; its landing runs the new checks."""
    task: dict[str, Any] = {"id": "built", "prompt": "write README.md changed", "attempts": 1}
    (repository.top / "README.md").write_text("my own change")
    assert (
        repository.council("run", _file(repository, [task]), "--allow-deferred", "--json").states["built"] == "queued"
    )
    _file(repository, [{**task, "checks": ["test -e missing"]}])
    reloaded = repository.council("retry", "built", "--reload", "--json")
    assert (reloaded.code, reloaded.states["built"]) == (0, "queued"), reloaded
    repository.git("checkout", "--quiet", "README.md")
    [landed] = repository.council("merge", "--json").result["tasks"]
    assert (landed["status"], "test -e missing" in landed["reason"]) == ("failed", True), landed


@pytest.mark.extended
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"owns": ["src/**"]}, "`owns` of task 't' can't change"),
        ({"needs": ["other"]}, "`needs` of task 't' can't change"),
        ({"id": "renamed"}, "no longer has a task 't'"),
        ({"nonsense": 1}, "can't reload the file: "),
    ],
    ids=str,
)
async def test_reload_rejects_unchangeable_keys(repository: Repository, change: dict[str, Any], words: str) -> None:
    tasks: list[dict[str, Any]] = [
        {"id": "t", "prompt": "exit 1", "attempts": 1},
        {"id": "other", "prompt": "write o x"},
    ]
    repository.council("run", _file(repository, tasks))
    _file(repository, [{**tasks[0], **change}, tasks[1]])
    refused = repository.council("retry", "t", "--reload")
    assert (refused.code, words in refused.stderr) == (2, True), refused
    assert repository.council("status", "--json").states["t"] == "failed"


@pytest.mark.extended
async def test_reload_of_inline_tasks_is_rejected(repository: Repository) -> None:
    """A file with a task of the same name changes nothing, and --reload says so; changed defaults are reported."""
    tasks = [{"id": "task-1", "prompt": "write other.txt x"}]
    defaults = {"adapter": "fake"}
    repository.council("run", _file(repository, tasks, defaults=defaults), "--task", "exit 1")
    kept = repository.council("retry", "task-1")
    assert (kept.code, "has changed" in kept.stderr) == (0, False), kept
    refused = repository.council("retry", "task-1", "--reload")
    assert refused.code == 2
    assert "run.file_changed" not in repository.council("resume", "--json").stdout
    assert repository.council("retry", "task-1").code == 0
    _file(repository, tasks, defaults={**defaults, "checks": ["true"]})
    [event] = [one for one in repository.council("resume", "--json").lines if one.get("event") == "run.file_changed"]
    assert (event["tasks"], event["keys"]) == ({}, ["defaults.checks"])


def _two_failed(repository: Repository, command: tuple[str, ...]) -> None:
    """Fail two tasks; they wait for a retry if the command is `cancel`."""
    tasks = [{"id": name, "prompt": f"write {name} x\nexit 1", "attempts": 1} for name in ("a", "b")]
    assert repository.council("run", _file(repository, tasks)).code == 1
    if command == ("cancel",):
        assert repository.council("retry", "a", "b").code == 0


@pytest.mark.extended_variants
@pytest.mark.extended_variants
@pytest.mark.parametrize("command", [("cancel",), ("salvage", "drop", "a/1")], ids=" ".join)
async def test_irreversible_command_needs_confirmation(repository: Repository, command: tuple[str, ...]) -> None:
    """Without a terminal it is rejected with the option that allows it, and nothing has changed."""
    _two_failed(repository, command)
    before = repository.council("status", "--json").states, repository.council("salvage", "list").stdout
    for more in ((), ("--json",)):
        refused = repository.council(*command, *more)
        assert refused.code == 2
        assert "add --yes" in refused.stderr + refused.stdout
    assert (repository.council("status", "--json").states, repository.council("salvage", "list").stdout) == before
    assert repository.council(*command, "--yes").code == 0
    assert (repository.council("status", "--json").states, repository.council("salvage", "list").stdout) != before


@pytest.mark.extended
@pytest.mark.parametrize("answer", ["y", "n"])
@pytest.mark.parametrize("command", [("cancel",), ("salvage", "drop", "a/1")], ids=" ".join)
async def test_person_at_a_terminal_is_asked(repository: Repository, command: tuple[str, ...], answer: str) -> None:
    """Only `yes` continues; a `cancel` with named tasks does not ask."""
    _two_failed(repository, command)
    before = repository.council("status", "--json").states, repository.council("salvage", "list").stdout
    terminal = Terminal(command, repository.top, repository.environ)
    try:
        wait_for(lambda: "[y/N]" in terminal.text)
        terminal.type(f"{answer}\n")
        assert terminal.wait() == (0 if answer == "y" else 1)
    finally:
        terminal.close()
    now = repository.council("status", "--json").states, repository.council("salvage", "list").stdout
    assert (now == before) is (answer == "n")
    if now == before and command == ("cancel",):
        assert repository.council("cancel", "b").code == 0


async def test_resumed_interruption_is_not_an_attempt(repository: Repository) -> None:
    """Status, report, `show` and summary count alike; session numbers still distinguish the logs."""
    child = repository.start("run", _file(repository, [{"id": "t", "prompt": "attempt 1 hang\nwrite t.txt x"}]))
    has_begun(repository, "t")
    child.kill()
    child.communicate()
    report = repository.council("resume", "--json").result
    status, details = (repository.council(*words, "--json").result for words in (("status",), ("show", "t")))
    [overview] = repository.council("state", "show", "--json").result["tasks"]
    assert [one["attempts"] for one in (report["tasks"][0], status["tasks"][0], details)] == [1, 1, 1]
    assert overview["attempts"] == 1, overview
    assert len(details["sessions"]) == 2
    assert re.search(r"^  t +landed +1 attempt ", repository.council("state", "show").stdout, re.MULTILINE)
    assert re.search(r"^  attempts +1$", repository.council("show", "t").stdout, re.MULTILINE)


def killed_with_work(repository: Repository) -> str:
    """Run a task until it has changed something, kill the run, and return its id."""
    child = repository.start("run", _file(repository, [{"id": "t", "prompt": "write half.txt half\nhang"}]))
    has_begun(repository, "t")
    wait_for(lambda: "half.txt" in repository.council("diff", "t").stdout)
    child.kill()
    child.communicate()
    return str(repository.council("status", "--json").result["run"])


@pytest.mark.extended
def test_diff_shows_the_worktree_of_a_killed_run(repository: Repository) -> None:
    """The same diff as of the running session; `salvage list` names that worktree and that it is interrupted."""
    run = killed_with_work(repository)
    assert "t/1/worktree  task interrupted" in repository.council("salvage", "list").stdout
    applied = repository.council("salvage", "apply", "t/1/worktree")
    assert (applied.code, f"`council resume {run}` saves it" in applied.stderr) == (2, True), applied
    shown = repository.council("diff", "t")
    assert (shown.code, "+half" in shown.stdout) == (0, True), shown


@pytest.mark.extended
def test_logs_of_a_killed_session_are_marked_interrupted(repository: Repository) -> None:
    """As `show` does; nothing is running."""
    killed_with_work(repository)
    assert "interrupted" in repository.council("show", "t").stdout
    assert repository.council("logs", "t").stdout.splitlines()[-1] == "session 1 interrupted"
    assert repository.council("logs", "t", "--json").lines[-1]["kind"] == "interrupted"


@pytest.mark.extended
def test_show_names_no_log_of_a_session_ended_by_setup(repository: Repository) -> None:
    """Its program never started, so that it wrote none."""
    config = _file(repository, [{"id": "t", "prompt": "write x x", "attempts": 1}], worktrees={"setup": ["exit 3"]})
    assert repository.council("run", config, "--json").result["tasks"][0]["failure"] == "setup_failed"
    [session] = repository.council("show", "t", "--json").result["sessions"]
    assert session["log"] is None
    assert ".stdout" not in repository.council("show", "t").stdout


@pytest.mark.extended
def test_show_of_a_blocked_task_names_the_failed_one(repository: Repository) -> None:
    """Also through a task that is blocked itself; the printed command unblocks both."""
    tasks: list[dict[str, Any]] = [
        {"id": "need", "prompt": "attempt 1 exit 3\nwrite n n", "attempts": 1},
        {"id": "after", "prompt": "write a a", "needs": ["need"]},
        {"id": "last", "prompt": "write l l", "needs": ["after"]},
    ]
    repository.council("run", _file(repository, tasks))
    for task in ("after", "last"):
        assert repository.council("show", task).stdout.splitlines()[-1] == "next: council retry need"
    assert [one["blocked_by"] for one in repository.council("status", "--json").result["tasks"]] == [
        None,
        "need",
        "need",
    ]
    assert repository.council("retry", "need").code == 0
    assert set(repository.council("resume", "--json").states.values()) == {"landed"}


@pytest.mark.extended
def test_failed_setup_suggests_a_new_run(repository: Repository) -> None:
    """The run keeps the recorded setup, which a retry reports, also with `--reload`; the printed command works."""
    tasks: list[dict[str, Any]] = [{"id": "t", "prompt": "write t.txt x", "attempts": 1}]
    config = _file(repository, tasks, worktrees={"setup": ["exit 3"]})
    repository.council("run", config)
    shown = [line.strip() for line in repository.council("status").stdout.splitlines()]
    assert f"next: correct the setup in {config}, then `council run {config}`" in shown, shown
    _file(repository, tasks, worktrees={"setup": ["true"]})
    for more in ([], ["--reload"]):
        retried = repository.council("retry", "t", *more)
        assert (retried.code, "worktrees; to use them, start a new run" in retried.stderr) == (0, True), retried
        assert repository.council("resume", "--json").states == {"t": "failed"}
    assert repository.council("run", config, "--json").states == {"t": "landed"}
