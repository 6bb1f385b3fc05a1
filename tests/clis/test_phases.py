"""A workflow task of each real CLI: its handoffs and their results."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from orchestrator.protocols import Capability
from tests.clis.conftest import Stage
from tests.clis.programs import Program
from tests.conftest import CommandResult
from tests.model_server import RecordedRequest

pytestmark = [pytest.mark.clis, pytest.mark.timeout(300)]

PLAN: Final = {
    "tasks": [{"id": "greet", "prompt": "Put the word MARMALADE into hello.txt."}],
    "dependencies": [],
    "timeline": [],
    "resources": [],
}
REVIEW: Final = {"verdict": "approve", "findings": [], "summary": "It is as it was planned."}
WORKFLOW: Final[list[dict[str, Any]]] = [
    {"plan": {"access": "read", "produces": "plan"}},
    {"build": {}},
    {"review": {"access": "read", "produces": "review"}},
]


def answer(data: Any) -> str:
    """Return the instructions for an answer that ends with a handoff."""
    return f"say Here it is.\nsay ```json\nsay {json.dumps(data)}\nsay ```"


def run(stage: Stage, *, plan: str, review: str, fixed: str = "") -> CommandResult:
    """Run one task through the phases; the model's script per phase is selected by the requested handoff."""
    prompt = (
        "write hello.txt MARMALADE\nsay It is written.\nusage 120 34\n"
        f"once your result (plan)\n{plan}\nusage 120 34\n"
        f"once your result (review)\n{review}\nusage 120 34\n"
        f"once that you submitted is invalid\n{fixed}\nusage 120 34"
    )
    return stage.run(prompt, {"workflows": {"three": WORKFLOW}}, workflow="three", attempts=1)


async def test_handoff_in_a_message_reaches_the_next_phase(stage: Stage, program: Program) -> None:
    """An invalid plan is repaired once, in the same conversation if possible."""
    ended = run(stage, plan=answer({"tasks": "all of it"}), fixed=answer(PLAN), review=answer(REVIEW))
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    assert stage.repository.git("show", "main:hello.txt").startswith("MARMALADE")
    task = await stage.task()
    assert [(one.phase, one.outcome) for one in task.attempts] == [
        ("plan", "invalid_handoff"),
        ("plan", "completed"),
        ("build", "built"),
        ("review", "completed"),
    ]
    wrong, right, *_ = task.attempts
    assert right.resumed is program.can(Capability.RESUME)
    if program.can(Capability.RESUME):
        assert wrong.session == right.session
    assert_handed_over(stage, via="message")
    await stage.assert_clean()


async def test_handoff_by_a_tool_reaches_the_next_phase(stage: Stage, program: Program) -> None:
    """The model gets violations immediately and may retry: no repair session is needed."""
    if not program.can(Capability.MCP):
        pytest.skip("it uses no servers")
    calls = [f"call submit_handoff {json.dumps({'data': data})}" for data in ({"tasks": "all of it"}, PLAN, REVIEW)]
    ended = run(stage, plan="\n".join(calls[:2]), review=calls[2])
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    assert [one.phase for one in (await stage.task()).attempts] == ["plan", "build", "review"]
    assert_handed_over(stage, via="tool")
    await stage.assert_clean()


def assert_handed_over(stage: Stage, *, via: str) -> None:
    """Assert that the build received the plan, and that both handoffs are recorded completely."""
    built = [one for one in stage.server.requests if _is_of_build(one)]
    assert built
    assert all("MARMALADE into hello.txt" in _prompt(one) for one in built)
    details = stage.repository.council("show", "task", "--json").result
    handed = {one["phase"]: one for one in details["handoffs"]}
    assert {phase: one["via"] for phase, one in handed.items()} == {"plan": via, "review": via}
    assert handed["plan"]["data"]["tasks"][0]["id"] == "greet"
    assert handed["review"]["data"]["verdict"] == "approve"
    checked = stage.repository.council("check", "--json")
    assert checked.code == 0, checked


def _is_of_build(request: RecordedRequest) -> bool:
    return request.dialect is not None and "Complete the whole task above in this worktree" in _prompt(request)


def _prompt(request: RecordedRequest) -> str:
    return json.dumps(request.body)
