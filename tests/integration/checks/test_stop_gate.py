"""Checks that run when a session is about to end (`stop_gate`)."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.fakes.script import ROOT


def ran(claude: Repository, prompt: str, **task: Any) -> CommandResult:
    """Run one task with a check that `a.txt` is right."""
    gated = {
        "stop_gate": True,
        "checks": ["echo looking; grep -qx right a.txt"],
        "attempts": 1,
        "allow_failing_base": True,
    }
    path = claude.configure(
        [{"id": "one", "prompt": prompt, **gated, **task}],
        adapters={"claude": {"use": "claude-code"}},
        readable=[str(claude.top.parent / "bin"), sys.prefix, str(ROOT / "tests")],
        sandbox="off",
    )
    return claude.council("run", str(path), "--json")


def said(claude: Repository) -> str:
    """Return the output of the session."""
    return claude.council("logs", "one", "--raw").stdout


async def test_session_with_a_failing_check_continues_until_it_succeeds(claude: Repository) -> None:
    """The agent gets the command and its output; the one session lands."""
    ended = ran(claude, "write a.txt wrong\nstopped a.txt close\nstopped a.txt right")
    assert ended.states == {"one": "landed"}, ended
    assert ended.result["tasks"][0]["attempts"] == 1
    assert said(claude).count("failed with exit code 1") == 2
    assert "grep -qx right a.txt" in said(claude)
    assert "looking" in said(claude)
    await claude.assert_invariants()


@pytest.mark.extended
def test_session_ends_after_a_few_continuations(claude: Repository) -> None:
    """The landing checks decide about its work."""
    ended = ran(claude, "write a.txt wrong")
    (task,) = ended.result["tasks"]
    assert (task["status"], task["failure"]) == ("failed", "checks_failed"), ended
    assert said(claude).count("failed with exit code 1") == 3


def test_check_that_does_not_end_is_stopped(claude: Repository) -> None:
    """After its time limit, and so are the programs that it started."""
    started = claude.top.parent / "started"
    check = f"grep -qx right a.txt || {{ sleep 600 & echo $! >{started}; wait; }}"
    ended = ran(claude, "write a.txt wrong\nstopped a.txt right", checks=[check], checks_timeout="500ms")
    assert ended.states == {"one": "landed"}, ended
    assert said(claude).count("did not end within 0.5 s") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


@pytest.mark.extended
def test_check_of_other_paths_is_left_out(claude: Repository) -> None:
    """The session did not change them, and a landing does not run it either."""
    checks = [{"run": "grep -qx right a.txt", "paths": ["a.txt"]}, {"run": "false", "paths": ["web/**"]}]
    ended = ran(claude, "write a.txt wrong\nstopped a.txt right", checks=checks)
    assert ended.states == {"one": "landed"}, ended
    assert said(claude).count("failed with exit code 1") == 1


@pytest.mark.extended
def test_session_without_a_gate_runs_no_check(claude: Repository) -> None:
    """The check runs only before landing."""
    ended = ran(claude, "write a.txt wrong\nstopped a.txt right", stop_gate=False)
    assert ended.result["tasks"][0]["status"] == "failed", ended
    assert "before you end" not in said(claude)


def test_gate_without_effect_is_a_warning(claude: Repository) -> None:
    """Without checks, and with an adapter whose CLI has no stop hook."""
    path = claude.configure([{"id": "one", "prompt": "write one.txt 1", "stop_gate": True}])
    shown = claude.council("validate", str(path))
    assert "`stop_gate` without checks" in shown.stdout + shown.stderr
    path = claude.configure([{"id": "one", "prompt": "-", "stop_gate": True, "checks": ["true"]}])
    shown = claude.council("validate", str(path))
    assert "do not support `stop_gate`" in shown.stdout + shown.stderr
