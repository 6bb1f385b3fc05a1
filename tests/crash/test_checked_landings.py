"""Forty tasks on a real project with its own tests as checks, in batches, under kills of two processes.

Every commit of the target is checked again without the cache: each is green, and only the tasks at fault are rejected.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.crash.sdists import download, unpack
from tests.faults import SHELL_ADAPTER
from tests.waiting import wait_for

pytestmark = [pytest.mark.timeout(1800)]

PROJECT = "colorama==0.4.6"
CHECK = f"{sys.executable} -m unittest discover -q -p '*_test.py'"
#: Failpoints of checks and landings, with the hit that kills.
QUEUE_FAILPOINTS = {
    "work.recorded": 9,
    "landing.merged": 7,
    "landing.checking": 2,
    "check.leased": 3,
    "check.ended": 3,
    "check.recorded": 3,
    "landing.checked": 3,
    "landing.joined": 2,
    "landing.intended": 3,
    "landing.pushed": 3,
    "landing.recorded": 3,
    "landing.rejected": 1,
    "recovery.landing_settled": 1,
}


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source archive of the project."""
    return download(PROJECT, tmp_path_factory.mktemp("archive"))


@pytest.fixture
def project(archive: Path, repository: Repository) -> Repository:
    """Return a repository with the files of the archive."""
    unpack(archive, repository)
    return repository


def adding(number: int) -> dict[str, Any]:
    """Return a task that adds a module with its test, and edits a file that others edit too."""
    test = (
        f"import unittest\\nfrom colorama.extra{number} import code\\n\\n\\nclass Test{number}(unittest.TestCase):\\n"
    )
    test += f"    def test_code(self):\\n        self.assertEqual(code(), {number})\\n"
    prompt = (
        f"printf 'def code():\\n    return {number}\\n' > colorama/extra{number}.py\n"
        f"printf '{test}' > colorama/tests/extra{number}_test.py\n"
    )
    return {"id": f"good{number}", "prompt": prompt}


def breaking(number: int, color: str) -> dict[str, Any]:
    """Return a task that breaks a test of the project."""
    return {"id": f"bad{number}", "prompt": f"sed -i 's/^    {color} .*=.*/    {color} = 1/' colorama/ansi.py\n"}


def excluding(one: str, other: str) -> dict[str, Any]:
    """Return a task whose work passes the tests, but not together with the work of another."""
    test = f"import importlib.util\\nimport unittest\\n\\n\\nclass Test{one.title()}(unittest.TestCase):\\n"
    test += f'    def test_alone(self):\\n        self.assertIsNone(importlib.util.find_spec("colorama.{other}"))\\n'
    prompt = f"touch colorama/{one}.py\nprintf '{test}' > colorama/tests/{one}_test.py\n"
    return {"id": one, "prompt": prompt}


def configure(project: Repository, count: int) -> tuple[Path, list[str]]:
    """Write tasks of which three break the tests, and two each other's; return the ids of the others, too."""
    bad = [breaking(number, color) for number, color in enumerate(("RED", "CYAN", "LIGHTBLUE_EX"))]
    good = [adding(number) for number in range(count - 5)]
    tasks = [*good, *bad, excluding("left", "right"), excluding("right", "left")]
    random.Random(count).shuffle(tasks)
    defaults = {"checks": [CHECK], "attempts": 1, "backoff": {"initial": "10ms"}}
    readable = [sys.prefix, sys.base_prefix]
    config = project.configure(
        tasks,
        adapters={"sh": SHELL_ADAPTER},
        defaults=defaults,
        merge={"batch": 5, "wait": "1s"},
        capacity=4,
        readable=readable,
    )
    return config, [task["id"] for task in good]


async def judge(project: Repository, good: list[str]) -> None:
    """Assert that each commit of the target passes, that the right tasks landed, and that nothing is lost."""
    shown = project.council("status", "--json").result
    states = {task["id"]: task["status"] for task in shown["tasks"]}
    assert {states[task] for task in good} == {"landed"}, states
    assert all(task["attempts"] == 1 for task in shown["tasks"] if task["id"] in good), shown
    assert {status for task, status in states.items() if task.startswith("bad")} == {"failed"}, states
    assert sorted((states["left"], states["right"])) == ["failed", "landed"], states
    folder = project.top.parent / "verified"
    commits = project.git("rev-list", "--first-parent", "--reverse", "main").split()
    for commit in commits:
        folder.mkdir()
        archived = subprocess.run(["git", "archive", commit], cwd=project.top, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "x"], cwd=folder, input=archived.stdout, check=True)
        if (folder / "colorama").exists():  # not the first commit
            checked = subprocess.run(CHECK, shell=True, cwd=folder, capture_output=True, text=True, check=False)
            assert checked.returncode == 0, (commit, checked.stderr)
        shutil.rmtree(folder)
    await project.assert_invariants()


def is_over(project: Repository) -> bool:
    """Return whether every task of the run has ended."""
    tasks = project.council("status", "--json").result.get("tasks", [{"status": "pending"}])
    return {task["status"] for task in tasks} <= {"landed", "failed"}


def end_under_kills(project: Repository, config: Path, kills: int, dice: random.Random) -> None:
    """Run with two processes, kill one of them at random times, and replace it."""
    processes = {"resume": project.start("run", str(config))}
    wait_for(lambda: project.council("status", "--json").result.get("tasks"), 60)
    while not is_over(project):
        for command in ("resume", "work"):
            if command in processes and processes[command].poll() is not None:
                processes.pop(command).communicate(timeout=60)
            if command not in processes:
                processes[command] = project.start(command)
        time.sleep(dice.uniform(0.2, 3.0))
        if kills:
            kill(processes[dice.choice(list(processes))])
            kills -= 1
    for process in processes.values():
        process.communicate(timeout=120)
    assert project.council("resume").code == 1  # some tasks failed


def kill(process: StartedCommand) -> None:
    """Kill a process, if it has not ended."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("count", "kills", "seed"),
    [
        pytest.param(14, 6, 1, marks=pytest.mark.extended),
        *(pytest.param(40, 100, seed, marks=pytest.mark.slow) for seed in (2, 3)),
    ],
)
async def test_target_is_green_at_every_commit_despite_random_kills(
    project: Repository, count: int, kills: int, seed: int
) -> None:
    """No innocent task is sent back, and no work is lost."""
    config, good = configure(project, count)
    end_under_kills(project, config, kills, random.Random(seed))
    await judge(project, good)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUEUE_FAILPOINTS)
async def test_target_is_green_at_every_commit_despite_a_kill_at_each_step(project: Repository, name: str) -> None:
    """The other process or the next one continues."""
    config, good = configure(project, 40)
    if name.startswith("recovery."):
        killed = project.council("run", str(config), failpoints="landing.pushed=kill@3")
        assert killed.code == -signal.SIGKILL, killed
    command = ["resume"] if name.startswith("recovery.") else ["run", str(config)]
    first = project.start(*command, failpoints=f"{name}=kill@{QUEUE_FAILPOINTS[name]}")
    first.communicate(timeout=300)
    assert first.returncode == -signal.SIGKILL
    resume(project)
    await judge(project, good)


def resume(project: Repository) -> None:
    """Finish the run with two processes."""
    processes = [project.start("resume"), project.start("work")]
    for process in processes:
        process.communicate(timeout=600)
