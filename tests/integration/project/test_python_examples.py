"""Each example works as described."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CommandResult, Repository
from tests.sandboxes import needs_sandbox

pytestmark = pytest.mark.extended_rest

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(repository: Repository, name: str, *arguments: str) -> CommandResult:
    """Run an example in the repository."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=repository.top,
        env=repository.environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["run_file.py", pytest.param("from_sync_code.py", marks=pytest.mark.slow)])
def test_example_runs_a_file(name: str, repository: Repository) -> None:
    """The work lands, and the exit code is that of `council run`."""
    path = repository.configure([{"id": "a", "prompt": "write a.txt a"}])
    ended = run(repository, name, str(path))
    assert (ended.code, ended.stderr) == (0, "")
    assert "landed" in ended.stdout
    assert repository.git("show", "main:a.txt") == "a"


def test_example_reports_an_invalid_file(repository: Repository) -> None:
    """Mistakes are printed with their lines, and nothing starts."""
    path = repository.configure([{"id": "a", "prompt": "x", "needs": ["b"]}])
    ended = run(repository, "run_file.py", str(path))
    assert ended.code == 2
    assert f"{path}:1:" in ended.stdout


@needs_sandbox
def test_example_runs_typed_objects(repository: Repository) -> None:
    repository.commit({"one.py": "x = 1\n", "two.py": "x = 2\n"})
    ended = run(repository, "typed_run.py")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.startswith("landed: 3 landed on council/")
    target = ended.stdout.split()[-1]
    assert repository.git("show", f"{target}:tests/INDEX").split() == ["INDEX", "test_one.py", "test_two.py"]


def test_example_follows_events_and_cancels_a_task(repository: Repository) -> None:
    """The example receives each event of the run and controls it from the same process."""
    bad = {"id": "bad", "prompt": "exit 1", "attempts": 9}
    path = repository.configure([{"id": "good", "prompt": "write a.txt a"}, bad])
    ended = run(repository, "follow_events.py", str(path))
    assert (ended.code, ended.stderr) == (1, "")
    seen = [line.split()[1:] for line in ended.stdout.splitlines()]
    assert ["task.landed", "good"] in seen
    assert ["task.cancelled", "bad"] in seen
    assert seen[-1] == ["run.finished"]


def test_example_repairs_a_run(repository: Repository) -> None:
    fails_first = "attempt 1 print no\nattempt 1 exit 1\nwrite a.txt a"
    path = repository.configure([{"id": "a", "prompt": fails_first, "attempts": 1}])
    assert repository.council("run", str(path)).code == 1
    ended = run(repository, "retry_failed_tasks.py")
    assert (ended.code, ended.stderr) == (0, "")
    assert "a stdout: no" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "landed"
