"""Work that a user merges by hand is detected during the run and by `resume`."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.conftest import Repository
from tests.faults import PYTHON_ADAPTER
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest


@pytest.mark.parametrize("squashed", [True, pytest.param(False, marks=pytest.mark.slow)])
async def test_work_merged_by_a_person_counts_as_landed(repository: Repository, squashed: bool) -> None:
    """Although its checks failed and no trailer names it; tasks that depend on it continue."""
    tasks: list[dict[str, Any]] = [
        {"id": "built", "prompt": "write built.txt x", "allow_failing_base": True, "checks": ["false"], "attempts": 1},
        {"id": "more", "prompt": "write more.txt x", "needs": ["built"]},
        {"id": "long", "prompt": "hang"},
    ]
    child = repository.start(
        "run", str(repository.configure(tasks, coordination={"stale_check_interval": "200ms"})), "--json"
    )
    wait_for(lambda: repository.council("status", "--json").result.get("tasks", [{}])[0].get("status") == "failed")
    result = repository.council("status", "--json").result
    repository.git("fetch", "--quiet", result["repository"], result["tasks"][0]["branch"])
    if squashed:
        repository.git("merge", "--quiet", "--squash", "FETCH_HEAD")
        repository.git("commit", "--quiet", "--message", "by hand")
    else:
        repository.git("merge", "--quiet", "--no-ff", "--message", "by hand", "FETCH_HEAD")
    repository.remember()
    by_hand = repository.git("rev-parse", "HEAD")
    wait_for(lambda: repository.council("status", "--json").states["more"] == "landed")
    found = repository.council("status", "--json").result["tasks"][0]
    assert (found["status"], found["landed"], found["reason"]) == ("landed", by_hand, "landed externally")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    await repository.assert_invariants()


_FORGE = """
import os, subprocess
open("forged.txt", "w").close()
subprocess.run(["git", "add", "forged.txt"], check=True)
message = "work\\n\\nCouncil-Task: " + os.environ["COUNCIL_RUN"] + "/{label}"
subprocess.run(["git", "commit", "-qm", message], check=True)
"""


@pytest.mark.parametrize("label", ["pending", pytest.param("failed", marks=pytest.mark.slow)])
def test_commit_message_does_not_decide_what_landed(repository: Repository, label: str) -> None:
    """The user merges an agent's commit whose message claims to land another task."""
    tasks: list[dict[str, Any]] = [
        {
            "id": "forger",
            "prompt": _FORGE.format(label=label),
            "allow_failing_base": True,
            "checks": ["false"],
            "attempts": 1,
        },
        {"id": "failed", "prompt": "raise SystemExit(1)", "attempts": 1},
        {"id": "long", "prompt": "import time; time.sleep(1000)"},
        {"id": "pending", "prompt": "open('pending.txt', 'w')", "needs": ["long"]},
    ]
    config = repository.configure(
        tasks, adapters={"py": PYTHON_ADAPTER}, coordination={"stale_check_interval": "200ms"}
    )
    child = repository.start("run", str(config), "--json")

    def states() -> dict[str, str]:
        return {one["id"]: one["status"] for one in repository.council("status", "--json").result.get("tasks", [])}

    wait_for(lambda: (found := states()) and found["forger"] == found["failed"] == "failed")
    result = repository.council("status", "--json").result
    repository.git("fetch", "--quiet", result["repository"], result["tasks"][0]["branch"])
    repository.git("merge", "--quiet", "--ff-only", "FETCH_HEAD")
    said = repository.git("log", "-1", "--first-parent", "--format=%(trailers:key=Council-Task,valueonly)")
    assert said.strip() == f"{result['run']}/{label}"
    wait_for(lambda: states()["forger"] == "landed")
    assert states() == {"forger": "landed", "failed": "failed", "long": "running", "pending": "pending"}
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)


@pytest.mark.extended
def test_resume_with_tasks_to_retry_records_a_merged_conflict(repository: Repository) -> None:
    """A resume that runs other tasks also records user merges; no second resume is needed."""
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": "write README.md one"},
        {"id": "two", "prompt": "write README.md two"},
        {"id": "idle", "prompt": "none"},
    ]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    [task] = [one["id"] for one in ended.result["tasks"] if one["status"] == "conflict"]
    assert repository.council("salvage", "apply", f"{task}/conflict", "--branch", "fixed").code == 0
    repository.git("checkout", "--quiet", "fixed")
    repository.commit({"README.md": "both"}, "fixed")
    repository.git("checkout", "--quiet", "main")
    repository.git("merge", "--quiet", "--no-ff", "--no-edit", "fixed")
    assert repository.council("retry", "idle").code == 0
    resumed = repository.council("resume", "--json")
    assert (resumed.code, resumed.states) == (1, {"one": "landed", "two": "landed", "idle": "no_change"}), resumed


@pytest.mark.extended
def test_resume_without_a_session_checks_no_base(repository: Repository) -> None:
    """A merged conflict is recorded, and the only pending task needs a failed one."""
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": "write README.md one"},
        {"id": "two", "prompt": "write README.md two"},
        {"id": "failed", "prompt": "fail", "attempts": 1},
        {"id": "blocked", "prompt": "none", "needs": ["failed"]},
    ]
    config = repository.configure([{**task, "checks": ["true"]} for task in tasks])
    ended = repository.council("run", str(config), "--json")
    [task] = [one["id"] for one in ended.result["tasks"] if one["status"] == "conflict"]
    assert repository.council("salvage", "apply", f"{task}/conflict", "--branch", "fixed").code == 0
    repository.git("checkout", "--quiet", "fixed")
    repository.commit({"README.md": "both"}, "fixed")
    repository.git("checkout", "--quiet", "main")
    repository.git("merge", "--quiet", "--no-ff", "--no-edit", "fixed")
    resumed = repository.council("resume", "--json")
    assert resumed.states[task] == "landed", resumed
    assert "base.checking" not in [line["event"] for line in resumed.lines if "event" in line]


@pytest.mark.extended
@pytest.mark.parametrize("merge", ["--no-ff", "--ff-only", None])
async def test_conflict_merged_by_a_person_counts_as_landed(repository: Repository, merge: str | None) -> None:
    """With the printed commands, after the run has ended; `resume` records it and starts dependent tasks.

    A fast-forward also brings the commit with the conflict markers to the target: the resolution counts.
    """
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": "write README.md one"},
        {"id": "two", "prompt": "write README.md two", "attempts": 1},
        {"id": "more", "prompt": "write more.txt x", "needs": ["one", "two"]},
    ]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    [task] = [one["id"] for one in ended.result["tasks"] if one["status"] == "conflict"]
    run = ended.result["run"]
    steps = [line.strip() for line in repository.council("status").stdout.splitlines()]
    first = next(line for line in steps if line.startswith("next: council salvage apply"))
    assert f"then: fix, commit and merge it into main, then `council resume {run}`" in steps
    assert repository.council(*first.removeprefix("next: council ").split()).code == 0
    if merge is not None:
        repository.git("checkout", "--quiet", f"{task}-conflict")
        repository.commit({"README.md": "both"}, "fixed")
        repository.git("checkout", "--quiet", "main")
        repository.git("merge", "--quiet", merge, "--no-edit", f"{task}-conflict")
    by_hand = repository.git("rev-parse", "HEAD")
    repository.remember()
    resumed = repository.council("resume")
    tasks = repository.council("status", "--json").result["tasks"]
    states = {one["id"]: one["status"] for one in tasks}
    assert ("The run has ended. To retry a task: council retry TASK" in resumed.stdout) is (merge is None), resumed
    if merge is None:
        assert (resumed.code, states[task]) == (1, "conflict"), resumed
        return
    assert (resumed.code, set(states.values())) == (0, {"landed"}), resumed
    assert next(one["landed"] for one in tasks if one["id"] == task) == by_hand
    assert (repository.top / "README.md").read_text() == "both"
    assert repository.council("salvage", "list", "--json").result["preserved"] == []
    await repository.assert_invariants()
