"""Session input besides the prompt, and whether the next session resumes the last conversation."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.fakes.script import ROOT, install

pytestmark = pytest.mark.extended_rest

#: It passes if the file contains `right`.
CHECK = "grep -q right a.txt"


@pytest.fixture
def bin_folder(repository: Repository, tmp_path: Path) -> Path:
    """A fake Claude Code on PATH."""
    folder = tmp_path / "bin"
    install(folder, "claude", "tests.fakes.claude")
    repository.environ["PATH"] = f"{folder}:{repository.environ['PATH']}"
    return folder


def run(
    repository: Repository, folder: Path, prompt: str, adapter: dict[str, Any] | None = None, **more: Any
) -> CommandResult:
    """Run one sandboxed task with Claude Code, whose work is checked."""
    task = {"id": "t", "prompt": prompt, "attempts": 3, **more.pop("task", {})}
    config = repository.configure(
        [task],
        adapters={"claude": {"use": "claude-code", **(adapter or {})}},
        readable=[str(folder), sys.prefix, str(ROOT / "tests")],
        defaults={
            "allow_failing_base": True,
            "checks": [CHECK],
            "backoff": {"initial": "10ms", "max": "10ms", "jitter": False},
        },
        **more,
    )
    return repository.council("run", str(config), "--json")


def attempts(repository: Repository, ended: CommandResult) -> list[dict[str, Any]]:
    """Return the recorded attempts of the task."""
    shown = repository.council("state", "history", f"task/{ended.result['run']}/t", "--json")
    found: list[dict[str, Any]] = shown.result["versions"][0]["new"]["attempts"]
    return found


def input_of(repository: Repository, name: str) -> dict[str, Any]:
    """Return the input of an attempt's program, from the file that it wrote."""
    found: dict[str, Any] = json.loads((repository.top / name).read_text())
    return found


@pytest.mark.extended
async def test_failed_checks_are_repaired_in_the_same_conversation(repository: Repository, bin_folder: Path) -> None:
    """Only the new feedback: the conversation has the rest."""
    ended = run(repository, bin_folder, "attempt 1 write a.txt wrong\nattempt 1 tell one.json")
    assert ended.states == {"t": "failed"}, ended  # the feedback has no step for the fake: nothing is repaired
    first, second = attempts(repository, ended)[:2]
    assert (first["resumed"], second["resumed"]) == (False, True)
    assert first["folder"] == second["folder"]
    homes = repository.top / ".council/logs" / ended.result["run"] / "homes/t/claude"
    (kept,) = homes.rglob("*.jsonl")
    prompts = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(prompts) == 2 + (len(attempts(repository, ended)) > 2 and attempts(repository, ended)[2]["resumed"])
    assert "attempt 1 write" in prompts[0]
    assert "attempt 1 write" not in prompts[1]
    assert "grep -q right" in prompts[1]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_session_without_a_home_gets_the_full_prompt(repository: Repository, bin_folder: Path) -> None:
    """It has no conversation to resume."""
    prompt = "attempt 1 write a.txt wrong\nattempt 2 write a.txt right\nattempt 2 tell two.json"
    ended = run(repository, bin_folder, prompt, {"home": "shared"})
    assert ended.states == {"t": "landed"}, ended
    assert [one["resumed"] for one in attempts(repository, ended)] == [False, False]
    assert prompt in input_of(repository, "two.json")["prompt"]


async def test_home_is_removed_when_its_task_landed(repository: Repository, bin_folder: Path) -> None:
    ended = run(repository, bin_folder, "write a.txt right")
    assert ended.states == {"t": "landed"}, ended
    assert not list((repository.top / ".council/logs" / ended.result["run"] / "homes").glob("*"))
    await repository.assert_invariants()


async def test_instructions_servers_and_limits_reach_the_program(repository: Repository, bin_folder: Path) -> None:
    """By the program's own options."""
    servers = {"files": {"command": ["mcp-files", "."], "env": ["MY_TOKEN"]}, "docs": {"url": "http://127.0.0.1:9/mcp"}}
    ended = run(
        repository,
        bin_folder,
        "write a.txt right\ntell it.json",
        {"max_turns": 7},
        mcp_servers=servers,
        task={"instructions": "Speak plainly.", "session_budget": {"cost": 2}, "budget": {"cost": 1.5}},
    )
    assert ended.states == {"t": "landed"}, ended
    argv = input_of(repository, "it.json")["argv"]
    given = dict(pairwise(argv))
    assert given["--append-system-prompt"] == "Speak plainly."
    assert (given["--max-turns"], given["--max-budget-usd"]) == ("7", "1.5")
    assert given["--mcp-config"].endswith("/homes/t/claude/council-mcp.json")


async def test_login_of_the_user_is_found_and_renewed(repository: Repository, bin_folder: Path, tmp_path: Path) -> None:
    """The task's home has links to it; nothing else of the user's is writable there."""
    user = tmp_path / "user"
    (user / ".claude").mkdir(parents=True)
    (user / ".claude/.credentials.json").write_text("login\n")
    (user / ".claude/settings.json").write_text("{}\n")
    repository.environ["HOME"] = str(user)
    program = bin_folder / "claude"
    renew = 'echo new >> "$CLAUDE_CONFIG_DIR/.credentials.json"; echo bad >> "$CLAUDE_CONFIG_DIR/settings.json"'
    program.write_text(program.read_text().replace("PYTHONPATH", f'[ "$1" = -p ] && {{ {renew}; }}\nPYTHONPATH', 1))
    ended = run(repository, bin_folder, "write a.txt right")
    assert ended.states == {"t": "landed"}, ended
    assert (user / ".claude/.credentials.json").read_text() == "login\nnew\n"
    assert (user / ".claude/settings.json").read_text() == "{}\n"


#: The handoff of a phase.
NUMBER = {"kind": "number", "schema": {"type": "object", "required": ["n"]}}


def prompts_of(repository: Repository, ended: CommandResult) -> list[str]:
    """Return the prompts of a program from its conversation."""
    (kept,) = (repository.top / ".council/logs" / ended.result["run"] / "homes/t/claude").rglob("*.jsonl")
    return [json.loads(line) for line in kept.read_text().splitlines()]


async def test_invalid_handoff_is_repaired_in_its_conversation(repository: Repository, bin_folder: Path) -> None:
    """Only the error is reported: the conversation has the rest."""
    workflow = [{"ask": {"access": "read", "produces": NUMBER}}]
    prompt = """attempt 1 run printf '{"m": 1}' > $COUNCIL_HANDOFF"""
    ended = run(repository, bin_folder, prompt, task={"workflow": "one"}, workflows={"one": workflow})
    assert ended.states == {"t": "failed"}, ended  # then the prompt has no step for the fake
    first, second = attempts(repository, ended)
    assert (first["outcome"], second["outcome"]) == ("invalid_handoff", "invalid_handoff")
    assert (first["resumed"], second["resumed"]) == (False, True)
    whole, errors = prompts_of(repository, ended)
    assert prompt in whole
    assert prompt not in errors
    assert "'n' is a required property" in errors
    await repository.assert_invariants()


async def test_continuing_phase_resumes_an_earlier_conversation(repository: Repository, bin_folder: Path) -> None:
    """It gets its own prompt; another adapter could not resume the conversation."""
    workflow = [{"ask": {"access": "read", "produces": NUMBER}}, {"build": {"session": {"continue": "ask"}}}]
    prompt = """attempt 1 run printf '{"n": 1}' > $COUNCIL_HANDOFF\nattempt 2 tell two.json\nwrite a.txt right"""
    ended = run(repository, bin_folder, prompt, task={"workflow": "two"}, workflows={"two": workflow})
    assert ended.states == {"t": "landed"}, ended
    assert [(one["phase"], one["resumed"]) for one in attempts(repository, ended)] == [("ask", False), ("build", True)]
    assert prompt in input_of(repository, "two.json")["prompt"]
    await repository.assert_invariants()
