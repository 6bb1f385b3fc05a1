"""Checks with `paths`, which only run for work that changes one of these paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.integration.landing.test_merge_queue import CheckLog, landed, queue

pytestmark = pytest.mark.extended_rest

#: A check of one folder, which a file named `bad` breaks.
NO_BAD = "! test -e src/b/bad"


@pytest.fixture
def log(tmp_path: Path) -> CheckLog:
    return CheckLog(tmp_path / "checks")


def outcomes(ended: CommandResult) -> dict[str, list[str]]:
    """Return the outcomes of the checks of each task."""
    return {task["id"]: [check["outcome"] for check in task["checks"]] for task in ended.result["tasks"]}


def checked(log: CheckLog, command: str = NO_BAD) -> dict[str, Any]:
    """Return a check of `src/b`, which notes its runs."""
    return {"run": log.command(command), "paths": ["src/b/**"]}


async def test_check_with_paths_runs_only_for_work_that_changes_them(repository: Repository, log: CheckLog) -> None:
    """The base runs all checks, and a task that no check applies to lands without one, as `show` says."""
    checks = [checked(log), {"run": "test -e README.md", "paths": ["docs/*.md"]}]
    tasks: list[dict[str, Any]] = [
        {"id": "b", "prompt": "write src/b/x x"},
        {"id": "other", "prompt": "write other.txt x", "needs": ["b"]},
    ]
    defaults = {"checks": checks, "attempts": 1, "timeout": "60s"}
    ended = repository.council(
        "run", str(repository.configure(tasks, defaults=defaults, writable=[str(log.folder)])), "--json"
    )
    assert ended.states == {"b": "landed", "other": "landed"}, ended
    assert outcomes(ended) == {"b": ["passed", "skipped"], "other": ["skipped", "skipped"]}
    assert log.runs == [[], []]  # on the base, and for one task
    shown = repository.council("show", "other").stdout
    assert f"skipped: {checks[1]['run']}" in shown
    assert "it changes none of docs/*.md" in shown
    assert "ran" not in shown.partition("checks\n")[2].partition("\n\n")[0]
    recorded = json.loads(repository.council("checks", "list", "--json").stdout)["checks"]
    assert {one["outcome"] for one in recorded} == {"passed"}
    await repository.assert_invariants()


async def test_deleted_and_renamed_files_select_a_check(repository: Repository, log: CheckLog) -> None:
    """Both sides of a rename count; a pattern that looks like an option of git is only compared with paths."""
    prompts = [
        "write src/b/x x\nwrite src/b/y y\nwrite src/b/z z",
        "delete src/b/y",
        "attempt 1 git mv src/b/x moved.txt",
        "write README.md new",
        "attempt 1 git mv moved.txt src/b/x",
    ]
    tasks = [
        {"id": f"t{at}", "prompt": prompt, "needs": [f"t{at - 1}"] if at else []} for at, prompt in enumerate(prompts)
    ]
    output = log.folder / "output"
    check = checked(log) | {"paths": ["--output=checks/output", ":(glob)*", "src/b/**"]}
    defaults = {"checks": [check], "attempts": 1, "timeout": "60s"}
    config = repository.configure(tasks, defaults=defaults, writable=[str(log.folder)])
    ended = repository.council("run", str(config), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert [outcome for (outcome,) in outcomes(ended).values()] == ["passed", "passed", "passed", "skipped", "passed"]
    assert not output.exists()


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        # The change of the first task selects the check for the batch, although that of the last one does not.
        (["src/b/bad", "a.txt"], ["Land t1"]),
        # The search for the failure finds that no check applies to the first task.
        (["a.txt", "src/b/bad"], ["Land t0"]),
        (["a.txt", "src/b/x", "c.txt"], ["Land 3 tasks: t0, t1, t2"]),
    ],
)
async def test_batch_runs_the_checks_that_any_of_its_tasks_selects(
    repository: Repository, log: CheckLog, names: list[str], titles: list[str]
) -> None:
    """A commit that breaks a check of its own changes never lands, and what the batch does not change is not run."""
    queue(repository, log, names, checked(log), merge={"batch": 4, "window": 1})
    ended = repository.council("resume", "--json")
    assert landed(repository) == titles, ended
    tasks = {task["id"]: task for task in ended.result["tasks"]}
    for at, name in enumerate(names):
        assert tasks[f"t{at}"]["status"] == ("failed" if name.endswith("bad") else "landed"), ended
    await repository.assert_invariants()


async def test_later_merge_is_checked_for_its_own_changes(repository: Repository, log: CheckLog) -> None:
    """Ahead of its turn, too: the changes of the merges before it do not select its checks."""
    queue(repository, log, ["src/b/x", "a.txt", "src/b/y", "c.txt"], checked(log), capacity=4, merge={"window": 4})
    before = len(log.runs)
    ended = repository.council("resume", "--json")
    assert landed(repository) == [f"Land t{at}" for at in range(4)], ended
    assert log.runs[before:] == [[], ["a.txt"]]
    assert outcomes(ended) == {"t0": ["passed"], "t1": ["skipped"], "t2": ["passed"], "t3": ["skipped"]}
    await repository.assert_invariants()
