"""`council adapters test`: the contract and a small live task, for correct and for broken adapters."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from orchestrator.sessions.sandbox.policy import SandboxKind
from tests import distributions
from tests.conftest import CommandResult, Repository
from tests.distributions import ADAPTER, REGISTERS
from tests.fake_cli import __file__ as fake_cli
from tests.fakes.script import ROOT, install
from tests.sandboxes import require_sandbox

pytestmark = pytest.mark.extended_rest

PROMPT = ("--prompt", "write hello.txt hello")


@pytest.fixture
def claude(repository: Repository, tmp_path: Path) -> Repository:
    """A project with a council.yaml, and a fake Claude Code on PATH."""
    folder = tmp_path / "bin"
    install(folder, "claude", "tests.fakes.claude")
    repository.environ["PATH"] = f"{folder}{os.pathsep}{repository.environ['PATH']}"
    fake = {"use": "command", "argv": [sys.executable, "-S", fake_cli, "{prompt_file}"]}
    config = {
        "version": 1,
        "sandbox": "off",
        "readable": [str(folder), sys.prefix, str(ROOT / "tests")],
        "adapters": {"claude": {"use": "claude-code"}, "fake": fake},
        "defaults": {"adapter": "claude", "attempts": 1},
        "tasks": [{"id": "t", "prompt": "write a.txt a"}],
    }
    (repository.top / "council.yaml").write_text(json.dumps(config))
    return repository


def tried(repository: Repository, name: str, *options: str) -> CommandResult:
    return repository.council("adapters", "test", name, *options, "--json")


@pytest.mark.parametrize("name", ["claude", pytest.param("fake", marks=pytest.mark.slow)])
async def test_correct_adapter_keeps_its_contract_and_lands(claude: Repository, name: str) -> None:
    """Nothing is left in the current folder."""
    before = sorted(claude.top.iterdir())
    ended = tried(claude, name, *PROMPT)
    assert (ended.code, ended.result["live"]["status"]) == (0, "landed"), ended.result["live"]
    results = ended.result["contract"]["results"]
    assert len(results) > 30
    assert [one for one in results if not one["passed"]] == []
    assert sorted(claude.top.iterdir()) == before
    assert claude.git("branch", "--format=%(refname:short)") == "main"


async def test_script_of_the_repository_is_in_the_scratch_repository(claude: Repository) -> None:
    """As in a run, where a relative path in `argv` is a file of the worktree."""
    config = json.loads((claude.top / "council.yaml").read_text())
    config["adapters"] = {"own": {"use": "command", "argv": ["sh", "tools/agent.sh", "{prompt}"]}}
    config["defaults"] = {"adapter": "own"}
    (claude.top / "council.yaml").write_text(json.dumps(config))
    claude.commit({"tools/agent.sh": "echo hello > hello.txt\n"})
    ended = tried(claude, "own")
    assert (ended.code, ended.result["live"]["status"]) == (0, "landed"), ended.result["live"]


@pytest.mark.slow
async def test_unfinished_task_has_its_reason(claude: Repository) -> None:
    """The check failed, or the program reported a failure; the output is included."""
    ended = claude.council("adapters", "test", "fake", "--prompt", "print nothing to do")
    assert ended.code == 1
    assert "session   no_change" in ended.stdout
    assert "nothing to do" in ended.stdout
    ended = claude.council("adapters", "test", "claude", "--prompt", "fail auth")
    assert ended.code == 1
    assert "claude auth login" in ended.stdout


@pytest.mark.extended
async def test_contract_without_a_session_asks_no_program(claude: Repository, tmp_path: Path) -> None:
    """Only its version is queried; a missing program is reported, and the exit code is 1."""
    (tmp_path / "bin/claude").unlink()
    ended = tried(claude, "claude", "--no-live")
    assert (ended.code, ended.result["live"]) == (1, None), ended
    assert ended.result["programs"][0]["path"] is None


@pytest.mark.extended
async def test_broken_contract_is_named(claude: Repository, tmp_path: Path) -> None:
    """A plugin's adapter that keeps state between calls."""
    honest = "        return SessionCommand(["
    counts = "        self.asked = getattr(self, 'asked', 0) + 1\n        return SessionCommand([str(self.asked), "
    assert honest in ADAPTER
    registered = REGISTERS.format(kind="adapters", name="echo", type="Echo")
    distributions.install(tmp_path / "site", "echo", ADAPTER.replace(honest, counts) + registered)
    claude.environ["PYTHONPATH"] = str(tmp_path / "site")
    ended = claude.council("adapters", "test", "echo", "--no-live")
    assert ended.code == 1, ended
    assert "test_repeated_request_gives_the_same_command: The same request results in the same com" in ended.stdout


def test_hidden_program_of_the_file_gets_the_remedy_of_doctor(claude: Repository) -> None:
    """The file exists and has the adapter: `readable` is to be added there."""
    # Landlock hides this repository only from its own sessions, and the trial runs in another one.
    require_sandbox(SandboxKind.BUBBLEWRAP)
    tool = claude.top / "tool.sh"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    file = claude.configure([{"id": "t", "prompt": "x"}], adapters={"own": {"use": "command", "argv": [str(tool)]}})
    file.rename(claude.top / "council.yaml")
    ended = claude.council("adapters", "test", "own", "--json")
    findings = claude.council("doctor", "--json").result["findings"]
    [remedy] = [one["remedy"] for one in findings if one["name"] == "adapter own" and one["level"] == "problem"]
    assert remedy in ended.result["live"]["error"]
    assert "council init" not in remedy


async def test_unknown_adapter_is_rejected(claude: Repository) -> None:
    """The error lists the known adapters; a type that needs options must be defined in the file first."""
    ended = claude.council("adapters", "test", "cluade")
    assert (ended.code, "claude" in ended.stderr) == (2, True), ended
    ended = claude.council("adapters", "test", "acp")
    assert (ended.code, "argv" in ended.stderr) == (2, True), ended


async def test_last_failures_are_listed(claude: Repository) -> None:
    claude.council("run", "--task", "fail overloaded", "--adapter", "claude")
    listed = {one["name"]: one for one in claude.council("adapters", "--json").result["adapters"]}
    assert listed["claude"]["last_failure"]["failure"] == "overloaded"
    assert "529" in listed["claude"]["last_failure"]["reason"]
    assert listed["fake"]["last_failure"] is None
    assert "resume" in listed["claude"]["capabilities"]
    assert "overloaded: API Error: 529" in claude.council("adapters").stdout
