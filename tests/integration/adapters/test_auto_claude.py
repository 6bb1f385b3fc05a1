"""Runs with Auto-Claude: a real program that behaves as the published one (`tests.fakes.auto_claude`)."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.fakes import auto_claude
from tests.waiting import wait_for

ROOT = Path(__file__).parents[3]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return the folder of a fake clone."""
    return auto_claude.install(tmp_path / "Auto-Claude")


def configure(repository: Repository, clone: Path, *prompt: str, token: bool = True, **options: Any) -> Path:
    """Write the config of a task."""
    if token:
        repository.environ["CLAUDE_CODE_OAUTH_TOKEN"] = "t"
    entry = {"use": "auto-claude", "path": str(clone), "python": sys.executable, **options}
    task = {"id": "t", "prompt": "\n".join(prompt), "adapter": "auto"}
    return repository.configure([task], adapters={"auto": entry}, readable=[sys.prefix, str(ROOT)])


def run(repository: Repository, clone: Path, *prompt: str, **options: Any) -> CommandResult:
    """Run a task."""
    return repository.council("run", str(configure(repository, clone, *prompt, **options)), "--json")


async def test_only_the_work_of_the_agent_lands(repository: Repository, clone: Path) -> None:
    """Committed and uncommitted files, but nothing of its own; phases, verdict, tools and tokens are reported."""
    prompt = ("say Hi there", "write a.txt hello", "spend 107 20", "leave b.txt bye", "spend 50 5", "qa approved")
    ended = run(repository, clone, *prompt)
    assert ended.states == {"t": "landed"}, (ended, repository.council("logs", "t").stdout)
    assert repository.git("ls-tree", "-r", "--name-only", "main").splitlines() == [
        *("README.md", "a.txt", "b.txt", "src/app.py")
    ]
    assert repository.git("worktree", "list").count("\n") == 0
    assert "auto-claude" not in repository.git("for-each-ref", "--format=%(refname)")
    shown = repository.council("logs", "t").stdout
    for line in ("Hi there", "coding: Starting implementation", "qa_review: Starting QA validation"):
        assert line in shown, shown
    assert "a.txt" in shown
    usage = repository.council("show", "t", "--json").result["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (157, 25)
    await repository.assert_invariants()


@pytest.mark.parametrize(
    ("steps", "failure", "reason"),
    [
        (("write a.txt x", "qa rejected Missing test"), "crashed", "QA: rejected; Missing test"),
        pytest.param(("write a.txt x", "stuck"), "crashed", "it completed 1 of 2 subtasks", marks=pytest.mark.extended),
        pytest.param(("spend 9 1",), "crashed", "it completed 0 of 0 subtasks", marks=pytest.mark.extended),
        pytest.param(
            ("write a.txt x", "error 401 Bad token"), "auth", "Error: 401 Bad token", marks=pytest.mark.extended
        ),
        pytest.param(
            ("write a.txt x", "attempt 1 error 529 Busy", "qa approved"),
            *("overloaded", "API Error: 529 Busy"),
            marks=pytest.mark.extended,
        ),
    ],
)
async def test_failed_build_is_not_landed(
    repository: Repository, clone: Path, steps: tuple[str, ...], failure: str, reason: str
) -> None:
    """Its exit code is 0, or it retries without a limit."""
    ended = run(repository, clone, *steps)
    sessions = repository.council("show", "t", "--json").result["sessions"]
    assert (sessions[0]["outcome"], reason in sessions[0]["reason"]) == (failure, True), sessions
    assert ended.states["t"] == ("landed" if failure == "overloaded" else ended.states["t"])
    assert ("a.txt" in repository.git("ls-tree", "--name-only", "main")) == (failure == "overloaded")


@pytest.mark.extended
async def test_retried_error_is_not_a_failure(repository: Repository, clone: Path) -> None:
    """If a model call succeeds afterwards; without QA its verdict does not count."""
    ended = run(repository, clone, "error once 529 Overloaded", "spend 9 1", "write a.txt x", "qa rejected x", qa=False)
    assert ended.states == {"t": "landed"}, (ended, repository.council("logs", "t").stdout)


@pytest.mark.extended
async def test_missing_token_is_reported_with_the_fix(repository: Repository, clone: Path) -> None:
    """An API key does not help: it accepts none."""
    repository.environ["ANTHROPIC_API_KEY"] = "k"
    ended = run(repository, clone, "write a.txt x", token=False)
    assert ended.states["t"] != "landed"
    assert "No OAuth token found: set CLAUDE_CODE_OAUTH_TOKEN" in ended.stdout, ended


@pytest.mark.extended
async def test_interrupted_session_reports_its_tokens(repository: Repository, clone: Path) -> None:
    """It asks no question at a signal; the next session has a spec of its own."""
    prompt = ("spend 100 7", "attempt 1 hang", "write a.txt x", "qa approved")
    child = repository.start("run", str(configure(repository, clone, *prompt)))
    wait_for(lambda: "Spent." in repository.council("logs", "t").stdout, 60)
    child.send_signal(signal.SIGINT)
    child.communicate()
    usage = repository.council("show", "t", "--json").result["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (100, 7)
    assert repository.council("resume", "--json").states == {"t": "landed"}
