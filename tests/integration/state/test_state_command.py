"""`council state` and the metrics of `council runs` on real runs: active and ended."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.protocols import Commit, Key, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository
from tests.recorded_run import RUN, recorded_project
from tests.waiting import wait_for


def status_of(repository: Repository, task: str) -> str | None:
    """Return the recorded state of a task of the newest run."""
    reported = repository.council("state", "at", "now", f"task/{task}", "--json").result
    return None if "documents" not in reported else str(reported["documents"][0]["value"]["status"])


@pytest.mark.extended
async def test_active_run_is_shown_and_followed(repository: Repository) -> None:
    """Its live session has a worktree; a follower sees each commit at once, and Ctrl-C ends only the follower."""
    tasks: list[dict[str, Any]] = [
        {"id": "quick", "prompt": "write q.txt q"},
        {"id": "held", "prompt": "write h.txt h\nhang"},
    ]
    child = repository.start("run", str(repository.configure(tasks)), "--json")
    wait_for((repository.top / ".council/state/identity").exists)
    wait_for(lambda: status_of(repository, "held") == "running" and status_of(repository, "quick") == "landed", 60)
    follower = repository.start("state", "log", "--follow", "--json", "--limit", "1")
    assert follower.stdout is not None
    begun = json.loads(follower.stdout.readline())["position"]

    reported = repository.council("state", "show", "--json").result
    [session] = reported["sessions"]
    assert (reported["status"], session["task"], session["attempt"]) == ("running", "held", 1)
    assert wait_for((Path(session["worktree"]) / "h.txt").exists)
    assert session["branch"] == f"council/{reported['run']}/held/1"
    [active] = repository.council("runs", "--active", "--json").result["runs"]
    assert (active["run"], active["metrics"]["completed"], active["metrics"]["in_progress"]) == (reported["run"], 1, 1)
    shown = repository.council("state", "show").stdout
    assert "active sessions" in shown
    assert session["worktree"] in shown

    assert repository.council("cancel", "held").code == 0
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 1, (stdout, stderr)
    seen: list[dict[str, Any]] = []
    while "run.finished" not in [one["event"] for record in seen for one in record["events"]]:
        seen.append(json.loads(follower.stdout.readline()))
    assert [record["position"] for record in seen] == list(range(begun + 1, begun + 1 + len(seen)))
    follower.send_signal(signal.SIGINT)
    rest, _ = follower.communicate(timeout=20)
    assert follower.returncode == 130
    assert json.loads(rest.splitlines()[-1]) == {"status": "interrupted", "exit": 130}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_ended_run_has_metrics_and_history(repository: Repository) -> None:
    tasks: list[dict[str, Any]] = [
        {"id": "good", "prompt": "write g.txt g"},
        {"id": "bad", "prompt": "exit 1", "attempts": 2},
        {"id": "late", "prompt": "write l.txt l", "needs": ["bad"]},
    ]
    repository.council("run", str(repository.configure(tasks)))
    reported = repository.council("state", "show", "--json").result
    assert reported["status"] == "incomplete"
    assert {task["id"]: task["status"] for task in reported["tasks"]} == {
        "good": "landed",
        "bad": "failed",
        "late": "blocked",
    }
    good, bad, _ = reported["tasks"]
    assert (good["landed"], good["phases"][0]["status"]) == (repository.git("rev-parse", "main"), "completed")
    assert [attempt["outcome"] for attempt in bad["phases"][0]["attempts"]] == ["crashed"] * 2
    metrics = reported["metrics"]
    counts = [metrics[name] for name in ("total_tasks", "completed", "in_progress", "failed", "pending")]
    assert counts == [3, 1, 0, 1, 1]
    assert metrics["average_time_minutes"] == good["time_minutes"] > 0
    assert (reported["events"][0]["event"], reported["events"][-1]["event"]) == ("run.created", "run.finished")

    line = " ".join(repository.council("runs").stdout.split())
    assert line.startswith(f"{reported['run']} incomplete 1 of 3 landed on main, 1 failed, 1 blocked, ")
    assert repository.council("runs", "--active").stdout == ""
    assert repository.council("retry", "bad").code == 0
    assert repository.council("runs", "--active").stdout.startswith(reported["run"])

    landed = next(one["position"] for one in reported["events"] if one["event"] == "task.landed")
    before = repository.council("state", "at", str(landed - 1), "task/good", "--json").result
    assert before["documents"][0]["value"]["landed"] is None
    [newest, *_] = repository.council("state", "history", "task/good", "--json").result["versions"]
    assert (newest["position"], newest["new"]["landed"]) == (landed, good["landed"])
    await repository.assert_invariants()


@pytest.mark.extended
async def test_follower_ends_when_its_output_is_closed(repository: Repository) -> None:
    """As with `| head -1`: at the next commit."""
    repository.council("run", str(repository.configure([{"id": "a", "prompt": "write a.txt a"}])))
    follower = repository.start("state", "log", "--follow")
    assert follower.stdout is not None
    assert "run.created" in follower.stdout.readline()
    follower.stdout.close()
    repository.council("run", str(repository.configure([{"id": "b", "prompt": "write b.txt b"}])))
    assert follower.wait(timeout=20) == 0
    assert follower.stderr is not None
    follower.stderr.close()


@pytest.mark.extended
async def test_unreadable_run_is_reported(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of another version in one sentence, by commands that need it and in the list of runs.

    A damaged one as well.
    """
    async with recorded_project(repository.top, monkeypatch):
        pass
    newer = Key("run", "29990101-000000-ffff")
    async with FileStore.open(repository.log, SystemClock()) as store:
        await store.commit(Commit([Write(newer, 0, {"id": newer.id, "started": 4e9, "invented": True})]))
    for words in (["status"], ["state", "show"]):
        ended = repository.council(*words, "--json")
        assert (ended.code, ended.result["status"]) == (2, "refused"), (words, ended)
        assert newer.id in ended.result["error"]
    listed = repository.council("runs", "--json").result
    assert [one["run"] for one in listed["runs"]] == [RUN]
    assert newer.id in listed["damage"][0]
    assert repository.council("state", "compact").code == 0
    health = repository.council("state", "health")
    assert (health.code, f"document {newer}" in health.stdout) == (1, True)
    assert repository.council("clean", "--runs", "1s", "--dry-run").code == 0
    async with FileStore.open(repository.log, SystemClock()) as store:
        await store.commit(Commit([Write(newer, 1, None)]))
    listed = repository.council("runs", "--json").result
    assert [(one["run"], one["status"]) for one in listed["runs"]] == [(RUN, "interrupted")]  # without repositories
    assert listed["damage"] == []
    (log,) = repository.log.glob("*.jsonl")
    log.write_bytes(log.read_bytes().replace(b'"fixer"', b'"Fixer"', 1))
    (repository.log / "snapshot").unlink(missing_ok=True)
    reported = repository.council("runs", "--json")
    assert (reported.code, reported.result["runs"]) == (0, [])
    assert RUN in reported.result["damage"][0]
    assert "The state log is damaged" in repository.council("runs").stderr
