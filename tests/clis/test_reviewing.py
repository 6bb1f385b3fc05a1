"""A real CLI reviews the work of others: it reads the diff, runs the tests, and changes nothing."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from tests.clis.conftest import Stage
from tests.clis.programs import Program
from tests.clis.test_phases import PLAN, REVIEW, answer

pytestmark = [pytest.mark.clis, pytest.mark.timeout(300)]

SCOUT: Final[dict[str, Any]] = {"scout_findings": ["there is a.txt"], "requirements": ["hello.txt"], "constraints": []}
#: Writes a cache like test runners, and prints text that no prompt contains.
TEST: Final = "mkdir -p cache && touch cache/seen && test -s hello.txt && printf 'tests: %d passed' 42"


def prompt(review: str) -> str:
    """Return the model's script for each phase of `adw`, selected by the requested handoff."""
    build = "write hello.txt MARMALADE\n" + answer({"artifacts": [], "summary": "It is there."})
    parts = {"scout": answer(SCOUT), "plan": answer(PLAN), "build": build, "review": f"{review}\n{answer(REVIEW)}"}
    return "\n".join(f"once your result ({name})\n{part}" for name, part in parts.items())


def sent_texts(stage: Stage) -> list[str]:
    """Return everything sent to the model."""
    return [json.dumps(one.body) for one in stage.server.requests if one.dialect]


async def test_reviewer_reads_the_diff_and_runs_the_tests(stage: Stage, program: Program) -> None:
    """With its default permissions; the prompt has the diff, and files written by its tests are discarded."""
    if not program.has_shell:
        pytest.skip("it runs no commands")
    review = f"run git diff --no-ext-diff HEAD~1 -- hello.txt | tr A-Z a-z\nrun {TEST}"
    ended = stage.run(prompt(review), workflow="adw", attempts=1)
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    sent = sent_texts(stage)
    assert any("diff begins]" in one and "+MARMALADE" in one for one in sent)
    assert any("+marmalade" in one for one in sent), "the reviewer received no output of git"
    assert any("tests: 42 passed" in one for one in sent), "the reviewer received no output of the tests"
    names = stage.repository.git("ls-tree", "-r", "--name-only", "main").splitlines()
    assert ("hello.txt" in names, "cache/seen" in names) == (True, False)
    task = await stage.task()
    assert [one.phase for one in task.attempts] == ["scout", "plan", "build", "review"]
    assert task.attempts[-1].discarded == ("cache/seen",)
    assert [one.denied_tools.count for one in task.attempts] == [0, 0, 0, 0]
    await stage.assert_clean()


async def test_denied_tool_is_the_reason_for_no_change(stage: Stage, name: str) -> None:
    """With the tool, its argument, and the setting that allows it."""
    if name != "claude-code":
        pytest.skip("the others deny nothing in a mode of theirs that they offer a shell in")
    stage.programs[name].adapter["permission_mode"] = "acceptEdits"  # type: ignore[index]
    try:
        ended = stage.run("run python3 -c 'print(1)'\nsay Tried.", attempts=1)
    finally:
        stage.programs[name].adapter["permission_mode"] = "bypassPermissions"  # type: ignore[index]
    (task,) = ended.result["tasks"]
    assert task["failure"] == "no_change", stage.diagnostics(ended)
    reported = "1 tool denied: Bash(python3 -c 'print(1)'): set `permission_mode: bypassPermissions`"
    assert reported in task["reason"]
    (event,) = [line for line in ended.lines if line.get("event") == "task.tools_denied"]
    assert (event["count"], event["tools"]) == (1, ["Bash(python3 -c 'print(1)')"])
    assert reported in " ".join(stage.repository.council("show", "task").stdout.split())
    await stage.assert_clean()
