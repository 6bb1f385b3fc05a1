"""The contract of the Gemini CLI adapter, with recorded output."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest

from adapters.gemini import _POLICY, GeminiAdapter
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import (
    AgentMessage,
    CliWarning,
    ConversationStarted,
    ToolCall,
    ToolDenied,
    ToolResult,
    UsageReport,
)
from orchestrator.testing.adapter_contract import AdapterContract, ExpectedResult
from tests.contract.verdicts import SESSION, TRANSCRIPTS, end, get_verdict


def gemini(type_: str, **fields: Any) -> str:
    return json.dumps({"type": type_, "timestamp": "2026-11-22T13:00:21.183Z", **fields})


def gemini_result(message: str | None = None, name: str = "unknown") -> str:
    """Return its result; with a message, an error."""
    stats = {"total_tokens": 330, "input_tokens": 300, "output_tokens": 20, "cached": 100, "input": 200}
    if message is None:
        return gemini("result", status="success", stats=stats)
    return gemini("result", status="error", error={"type": name, "message": message}, stats=stats)


def gemini_api_error(code: int, status: str, message: str) -> str:
    return f"[API Error: {json.dumps({'error': {'code': code, 'message': message, 'status': status}})}]"


# ai.google.dev/gemini-api/docs/troubleshooting, and issues of github.com/google-gemini/gemini-cli
GEMINI_BAD_KEY = gemini_api_error(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.")
GEMINI_TOO_LONG = gemini_api_error(
    400, "INVALID_ARGUMENT", "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."
)
GEMINI_QUOTA = "You have exhausted your capacity on this model. Your quota will reset after 3h20m30s."


class TestGemini(AdapterContract):
    """JSON lines, and errors classified by their messages."""

    adapter_type = GeminiAdapter
    options: ClassVar = {"model": "gemini-2.5-pro", "approval_mode": "yolo", "args": ["--debug"], "env": ["MY_KEY"]}
    lines: ClassVar = (
        (gemini("init", session_id=SESSION, model="gemini-2.5-pro"), (ConversationStarted(SESSION),)),
        (gemini("message", role="user", content="Fix it."), ()),
        (gemini("message", role="assistant", content="It is w", delta=True), (AgentMessage("It is w", part=True),)),
        (gemini("message", role="assistant", content="Whole."), (AgentMessage("Whole."),)),
        (
            gemini("tool_use", tool_name="write_file", tool_id="w", parameters={"file_path": "a b.py", "content": "x"}),
            (ToolCall("write_file", "a b.py", ("a b.py",), "w", "+x"),),
        ),
        (
            gemini("tool_use", tool_name="run_shell_command", tool_id="r", parameters={"command": "make\n test"}),
            (ToolCall("run_shell_command", "make test", call="r"),),
        ),
        (gemini("tool_use", tool_name="odd", tool_id="o", parameters=None), (ToolCall("odd", call="o"),)),
        (gemini("tool_result", tool_id="w", status="success", output="ok"), (ToolResult("w", output="ok"),)),
        (
            gemini(
                "tool_result", tool_id="w", status="error", error={"type": "policy_violation", "message": "Denied."}
            ),
            (ToolDenied("w", "Denied.", _POLICY, "w"), ToolResult("w", "Denied.")),
        ),
        (
            gemini("error", severity="warning", message="Loop detected, stopping execution"),
            (CliWarning("Loop detected, stopping execution"),),
        ),
        (gemini_result(), (UsageReport(300, 20, is_cumulative=True, cached_tokens=100, model="gemini-2.5-pro"),)),
        (
            gemini("result", status="success", stats={"input_tokens": -1}),
            (UsageReport(0, 0, is_cumulative=True, model="gemini-2.5-pro"),),
        ),
        ("plain words", (AgentMessage("plain words"),)),
    )
    ends: ClassVar = (
        (end(gemini_result(), 0), None),
        (end(gemini_result(GEMINI_BAD_KEY), 144), FailureClass("auth")),
        (end(gemini_result(gemini_api_error(403, "PERMISSION_DENIED", "x")), 147), FailureClass("auth")),
        (end(gemini_result(GEMINI_TOO_LONG), 144), FailureClass("limit")),
        (end(gemini_result(gemini_api_error(503, "UNAVAILABLE", "x")), 247), FailureClass("overloaded")),
        (end(gemini_result("[API Error: This model is experiencing high demand.]")), FailureClass("overloaded")),
        (end(gemini_result(f"[API Error: {GEMINI_QUOTA}]"), 173), FailureClass("rate_limited")),
        (end(gemini_result("[API Error: x]"), 1, "  cause: {\n    code: 429,\n  }"), FailureClass("crashed")),
        (end(gemini_result("Operation cancelled.", "FatalCancellationError"), 130), FailureClass("crashed")),
        (end(gemini_result("No such file", "FatalInputError"), 42), FailureClass("invalid")),
        (
            end(
                gemini("error", severity="error", message="Maximum session turns exceeded")
                + f"\n{gemini_result()}\n", 0
            ),
            FailureClass("limit"),
        ),
        (
            end(
                gemini("error", severity="error", message="The model response was blocked due to safety settings.")
                + "\n" + gemini("result", status="error", stats={}) + "\n", 0
            ),
            FailureClass("refused"),
        ),
        (end(gemini("result", status="error", stats={}), 1), FailureClass("crashed")),
        (
            end(gemini("init", session_id=SESSION), 0, "Attempt 1 failed: Resource has been exhausted.. Retrying\n"),
            FailureClass("crashed"),
        ),
        (
            end(
                gemini("init", session_id=SESSION) + "\n" + gemini_result("[API Error: models/x gone]"), 1,
                "Error when talking to Gemini API Full report available at: /x.json ModelNotFoundError: models/x gone\n"
                "    at main (file:///gemini.js:1:2)\n  code: 404\n}\n",
            ),
            FailureClass("invalid"),
        ),
        (end("Loaded cached credentials.\n", 41, "Authentication failed: x"), FailureClass("auth")),
        (end("", 42, "Unknown argument: frobnicate"), FailureClass("invalid")),
        (
            end("", 1, "An unexpected critical error occurred:Error: EROFS: read-only file system, open "
                "'/home/x/.gemini/projects.json.4d599ce4.tmp'\n    at async main (file:///gemini.js:17457:5)\n"),
            FailureClass("invalid"),
        ),
        (end("", 41, ""), None),
    )  # fmt: skip
    limits: ClassVar = ((end(gemini_result(f"[API Error: {GEMINI_QUOTA}]"), 173), 1_790_012_030.0),)
    transcripts = TRANSCRIPTS / "gemini"
    recorded: ClassVar = {
        "resumed": ExpectedResult(
            session="4e5f5457-0b1e-4832-9f0c-ca8359ded3b8",
            text="Both are there.",
            tokens=(2 * 20, 2 * 4),
            paths=frozenset({"/work/b.txt"}),
        ),
        "read-only": ExpectedResult(text="It is looked at.", paths=frozenset({"/work/hello.txt"})),
        "edit": ExpectedResult(text="It is written.", tokens=(240, 68), paths=frozenset({"hello.txt"})),
        "tool": ExpectedResult(text="Both done.", paths=frozenset({"out/b.txt"})),
        # The tool failed; the program continues and reports success.
        "refused": ExpectedResult(text="Done.", paths=frozenset({"../beside.txt"})),
        "denied": ExpectedResult(text="Tried."),
        # Tools that need permission are not offered to the model.
        "no-shell": ExpectedResult(paths=frozenset({"hello.txt"})),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED, paths=frozenset()),
        "limited-for-long": ExpectedResult(FailureClass.RATE_LIMITED),
        "limited-then-well": ExpectedResult(text="Done.", paths=frozenset({"hello.txt"})),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "no-key": ExpectedResult(FailureClass.AUTH),
        "gateway": ExpectedResult(FailureClass.AUTH),
        "untrusted": ExpectedResult(FailureClass.INVALID),
        "wrong-request": ExpectedResult(FailureClass.INVALID),
        "no-such-model": ExpectedResult(FailureClass.INVALID),
        "turns": ExpectedResult(FailureClass.LIMIT, tokens=(100, 10), paths=frozenset({"a.txt"})),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "overloaded": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
        # Both exit with 0 and without a result.
        "interrupted": ExpectedResult(FailureClass.CRASHED),
        "terminated": ExpectedResult(FailureClass.CRASHED),
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (GEMINI_QUOTA, 3 * 3600 + 20 * 60 + 30),
        ("Quota exceeded.\nPlease retry in 34.5s.", 34.5),
        ("Quota exceeded.\nPlease retry in 500ms.", 0.5),
        ("Quota exceeded.\nSuggested retry after 4000s.", 4000),
        ("You have exhausted your daily quota on this model.", None),
    ],
)
def test_gemini_usage_limit_has_reset_time(text: str, seconds: float | None) -> None:
    """The wait counts from the end of the session; without one the end is unknown."""
    failed = get_verdict(GeminiAdapter, {}, gemini_result(f"[API Error: {text}]"))
    assert failed is not None
    until = None if seconds is None else 1_790_000_000.0 + seconds
    assert (failed.failure, failed.until) == (FailureClass.RATE_LIMITED, until)
