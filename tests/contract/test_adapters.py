"""The contract on the adapters that are shipped, with lines and ends as their programs were seen to print them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from adapters.acp import AcpAdapter
from adapters.aider import AiderAdapter
from adapters.claude_code import ClaudeCodeAdapter
from adapters.gemini import GeminiAdapter
from adapters.ollama import OllamaAdapter
from orchestrator.domain.failures import FailureClass
from orchestrator.domain.outcome import Failed
from orchestrator.protocols import (
    AdapterType,
    Concluded,
    Identified,
    Said,
    SessionEnd,
    SessionEvent,
    SessionRequest,
    Spent,
    UsedTool,
    Warned,
)
from orchestrator.testing.adapter_contract import AdapterContract, Recorded

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
SESSION = "e4176175-ef9d-4a2f-bffa-f270f179ef19"
OPENAI = "litellm.RateLimitError: RateLimitError: OpenAIException - stub says rate_limit_error"


def end(stdout: str, code: int | None = 1, stderr: str = "") -> SessionEnd:
    return SessionEnd(exit=code, signal=None, time=1_790_000_000.0, stdout=stdout, stderr=stderr)


def judged(adapter_type: AdapterType, options: dict[str, Any], stdout: str) -> Failed | None:
    adapter = adapter_type(adapter_type.Options.model_validate(options))
    events = [event for line in stdout.splitlines() for event in adapter.parse(line)]
    return adapter.verdict(SessionEnd(1, None, 1_790_000_000.0, stdout, "", events))


class TestAider(AdapterContract):
    """Plain text, and an exit code that says nothing."""

    adapter_type = AiderAdapter
    options: ClassVar = {"model": "openai/gpt-5", "args": ["--map-tokens", "0"], "env": ["MY_KEY", "OPENAI_API_BASE=x"]}
    lines: ClassVar = (
        ("Aider v0.86.1", (Said("Aider v0.86.1"),)),
        ("", ()),
        (
            "Tokens: 4.2k sent, 1.1k received. Cost: $0.01 message, $0.02 session.",
            (Spent(4200, 1100, 0.01), Concluded()),
        ),
        ("Tokens: 12k sent, 10k cache write, 5k cache hit, 300 received.", (Spent(12_000, 300), Concluded())),
        ("Cost: $0.00012 message, $1.25 session.", (Spent(cost=0.00012), Concluded())),
        ("Tokens: 1,234 sent, 5 received.", (Spent(1234, 5), Concluded())),
        ("Applied edit to src/a b.py", (UsedTool("edit", "src/a b.py", ("src/a b.py",)),)),
        ("Retrying in 0.2 seconds...", (Warned("Retrying in 0.2 seconds..."),)),
        ("Only 3 reflections allowed, stopping.", (Warned("Only 3 reflections allowed, stopping."),)),
        ("Only the tests change.", (Said("Only the tests change."),)),
        (OPENAI, (Concluded(OPENAI, Failed(FailureClass.RATE_LIMITED, OPENAI)),)),
    )
    ends: ClassVar = (
        (
            end("litellm.AuthenticationError: AuthenticationError: OpenAIException - x\nCheck your API key.", 0),
            FailureClass("auth"),
        ),
        (end("No LLM model was specified and no API keys were provided.\n"), FailureClass("auth")),
        (end(f"{OPENAI}\nRetrying in 0.2 seconds...\n{OPENAI}\n", 0), FailureClass("rate_limited")),
        (end(f"{OPENAI}\nRetrying in 0.2 seconds...\nTokens: 1k sent, 2 received.\n", 0), None),
        (end("Tokens: 9k sent, 0 received.\n\nModel openai/x has hit a token limit!\n", 0), FailureClass("limit")),
        (end("litellm.InternalServerError: x", 0), FailureClass("overloaded")),
        (end("litellm.Timeout: Timeout: x", 0), FailureClass("transient")),
        (end("litellm.BadRequestError: x", 0), FailureClass("invalid")),
        (end("litellm.SomethingNewError: x", 0), FailureClass("crashed")),
        (end("Aider v0.86.1\n", 0), None),
    )


def claude(type_: str, **fields: Any) -> str:
    return json.dumps({"type": type_, **fields, "session_id": SESSION, "uuid": "8ca0d5ea"})


def claude_result(**fields: Any) -> str:
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 300, "output_tokens": 4}
    usual = {"subtype": "success", "is_error": False, "api_error_status": None, "total_cost_usd": 0.25, "usage": usage}
    return claude("result", **{**usual, **fields})


def claude_error(status: int | None, text: str) -> str:
    return claude_result(is_error=True, api_error_status=status, result=text, usage=None)


UNAUTHORIZED = "Failed to authenticate. API Error: 401 stub says authentication_error"
REJECTED = claude(
    "rate_limit_event",
    rate_limit_info={"status": "rejected", "resetsAt": 1_790_003_600, "rateLimitType": "five_hour"},
)


class TestClaudeCode(AdapterContract):
    """JSON lines that tell everything."""

    adapter_type = ClaudeCodeAdapter
    options: ClassVar = {"model": "opus", "permission_mode": "bypassPermissions", "args": ["--max-turns", "3"]}
    lines: ClassVar = (
        (claude("system", subtype="init", cwd="/w", tools=["Edit"]), (Identified(SESSION),)),
        (
            claude("system", subtype="api_retry", attempt=1, max_retries=3, retry_delay_ms=504.9, error_status=401,
                   error="authentication_failed"),
            (Warned("authentication_failed (401), it tries again: 1 of 3"),),
        ),
        (claude("assistant", message={"content": [{"type": "text", "text": "Hi."}]}), (Said("Hi."),)),
        (
            claude("assistant", message={"content": [{"type": "tool_use", "id": "t", "name": "Edit",
                                                      "input": {"file_path": "/w/a.py", "old_string": "x"}}]}),
            (UsedTool("Edit", "/w/a.py", ("/w/a.py",)),),
        ),
        (
            claude("assistant", message={"content": [{"type": "tool_use", "id": "t", "name": "Bash",
                                                      "input": {"command": "make\n test"}}]}),
            (UsedTool("Bash", "make test"),),
        ),
        (claude("user", message={"content": [{"type": "tool_result", "content": "ok"}]}), ()),
        (claude_result(result="Done."), (Spent(321, 4, 0.25, in_all=True), Concluded("Done."))),
        (claude("rate_limit_event", rate_limit_info={"status": "allowed_warning", "resetsAt": 1}), ()),
        ('{"type": "assistant", "message": {"content": [{"type": "text"', ()),
        ('{"type":"result","total_cost_usd":1e999,"usage":{"output_tokens":-1}}',
         (Spent(0, 0, None, in_all=True), Concluded(""))),
        ("plain words", (Said("plain words"),)),
    )  # fmt: skip
    ends: ClassVar = (
        (end(claude_result(result="Done."), 0), None),
        (end(claude_error(401, UNAUTHORIZED)), FailureClass("auth")),
        (
            end(claude_error(429, "API Error: Request rejected (429) · stub says rate_limit_error")),
            FailureClass("rate_limited"),
        ),
        (end(claude_error(529, "API Error: 529 stub says overloaded_error.")), FailureClass("overloaded")),
        (end(claude_error(500, "API Error: 500 stub")), FailureClass("overloaded")),
        (end(claude_error(400, "API Error: 400 stub says invalid_request_error")), FailureClass("invalid")),
        (end(claude_error(400, "Credit balance is too low")), FailureClass("auth")),
        (end(claude_error(None, "Not logged in · Please run /login")), FailureClass("auth")),
        (end(claude_error(None, "Something else")), FailureClass("crashed")),
        (end(claude_result(subtype="error_max_turns", is_error=True)), FailureClass("limit")),
        (end(claude_result(subtype="error_max_budget_usd", is_error=True)), FailureClass("limit")),
        (end(claude_result(subtype="error_during_execution", is_error=True), 0), FailureClass("crashed")),
        (end(f"{REJECTED}\n{claude_result(result='Done.')}", 0), None),
        (end("--dangerously-skip-permissions cannot be used with root/sudo privileges"), FailureClass("invalid")),
        (end("", stderr="Error: Invalid API key · Please run /login"), FailureClass("auth")),
        (end(claude("system", subtype="init"), None), None),
    )


@pytest.mark.parametrize(
    "stdout",
    [
        f"{REJECTED}\n{claude_error(429, 'You have hit your session limit')}",
        claude_error(None, "Claude AI usage limit reached|1790003600"),
        "Claude AI usage limit reached|1790003600",
    ],
)
def test_claude_tells_when_its_limit_ends(stdout: str) -> None:
    """By an event before its result, or by the instant in its words."""
    failed = judged(ClaudeCodeAdapter, {}, stdout)
    assert failed is not None
    assert (failed.failure, failed.until) == (FailureClass.RATE_LIMITED, 1_790_003_600.0)


def gemini(type_: str, **fields: Any) -> str:
    return json.dumps({"type": type_, "timestamp": "2026-11-22T13:00:21.183Z", **fields})


def gemini_result(message: str | None = None, name: str = "unknown") -> str:
    """Return its result; with a message, it is an error."""
    stats = {"total_tokens": 330, "input_tokens": 300, "output_tokens": 20, "cached": 100, "input": 200}
    if message is None:
        return gemini("result", status="success", stats=stats)
    return gemini("result", status="error", error={"type": name, "message": message}, stats=stats)


def gemini_api_error(code: int, status: str, message: str) -> str:
    return f"[API Error: {json.dumps({'error': {'code': code, 'message': message, 'status': status}})}]"


# ai.google.dev/gemini-api/docs/troubleshooting, and what github.com/google-gemini/gemini-cli/issues show
GEMINI_BAD_KEY = gemini_api_error(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.")
GEMINI_TOO_LONG = gemini_api_error(
    400, "INVALID_ARGUMENT", "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."
)
GEMINI_QUOTA = "You have exhausted your capacity on this model. Your quota will reset after 3h20m30s."


class TestGemini(AdapterContract):
    """JSON lines, and errors that are told by their words."""

    adapter_type = GeminiAdapter
    options: ClassVar = {"model": "gemini-2.5-pro", "approval_mode": "yolo", "args": ["--debug"], "env": ["MY_KEY"]}
    lines: ClassVar = (
        (gemini("init", session_id=SESSION, model="gemini-2.5-pro"), (Identified(SESSION),)),
        (gemini("message", role="user", content="Fix it."), ()),
        (gemini("message", role="assistant", content="It is w", delta=True), (Said("It is w", part=True),)),
        (gemini("message", role="assistant", content="Whole."), (Said("Whole."),)),
        (
            gemini("tool_use", tool_name="write_file", tool_id="w", parameters={"file_path": "a b.py", "content": "x"}),
            (UsedTool("write_file", "a b.py", ("a b.py",)),),
        ),
        (
            gemini("tool_use", tool_name="run_shell_command", tool_id="r", parameters={"command": "make\n test"}),
            (UsedTool("run_shell_command", "make test"),),
        ),
        (gemini("tool_use", tool_name="odd", tool_id="o", parameters=None), (UsedTool("odd"),)),
        (gemini("tool_result", tool_id="w", status="success", output="ok"), ()),
        (
            gemini(
                "tool_result", tool_id="w", status="error", error={"type": "policy_violation", "message": "Denied."}
            ),
            (Warned("a tool failed: Denied."),),
        ),
        (
            gemini("error", severity="warning", message="Loop detected, stopping execution"),
            (Warned("Loop detected, stopping execution"),),
        ),
        (gemini_result(), (Spent(300, 20, in_all=True),)),
        (gemini("result", status="success", stats={"input_tokens": -1}), (Spent(0, 0, in_all=True),)),
        ("plain words", (Said("plain words"),)),
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
    transcripts = TRANSCRIPTS / "gemini"
    recorded: ClassVar = {
        "edit": Recorded(text="It is written.", tokens=(240, 68), paths=frozenset({"hello.txt"})),
        "tool": Recorded(text="Both done.", paths=frozenset({"out/b.txt"})),
        # The tool answered with an error; the program goes on, and says that all went well.
        "refused": Recorded(text="Done.", paths=frozenset({"../beside.txt"})),
        # Of what it may not do unasked, the model does not even hear.
        "no-shell": Recorded(paths=frozenset({"hello.txt"})),
        "limited": Recorded(FailureClass.RATE_LIMITED, paths=frozenset()),
        "limited-for-long": Recorded(FailureClass.RATE_LIMITED),
        "limited-then-well": Recorded(text="Done.", paths=frozenset({"hello.txt"})),
        "no-login": Recorded(FailureClass.AUTH),
        "no-key": Recorded(FailureClass.AUTH),
        "gateway": Recorded(FailureClass.AUTH),
        "untrusted": Recorded(FailureClass.INVALID),
        "wrong-request": Recorded(FailureClass.INVALID),
        "no-such-model": Recorded(FailureClass.INVALID),
        "turns": Recorded(FailureClass.LIMIT, tokens=(100, 10), paths=frozenset({"a.txt"})),
        "server-error": Recorded(FailureClass.OVERLOADED),
        "overloaded": Recorded(FailureClass.OVERLOADED),
        "dead-server": Recorded(FailureClass.TRANSIENT),
        "broken-stream": Recorded(FailureClass.TRANSIENT),
        # Both end it with 0 and without a result.
        "interrupted": Recorded(FailureClass.CRASHED),
        "terminated": Recorded(FailureClass.CRASHED),
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
def test_gemini_tells_when_its_limit_ends(text: str, seconds: float | None) -> None:
    """By how long to wait, counted from its end; if it says nothing, nobody knows."""
    failed = judged(GeminiAdapter, {}, gemini_result(f"[API Error: {text}]"))
    assert failed is not None
    until = None if seconds is None else 1_790_000_000.0 + seconds
    assert (failed.failure, failed.until) == (FailureClass.RATE_LIMITED, until)


BRIDGE_LINES: Sequence[tuple[str, Sequence[SessionEvent]]] = (
    ('{"type": "said", "text": "Hi."}', (Said("Hi."),)),
    ('{"type": "tool", "name": "edit", "detail": "x", "paths": ["a", 1]}', (UsedTool("edit", "x", ("a",)),)),
    ('{"type": "spent", "input_tokens": 1, "output_tokens": 2, "cost": null}', (Spent(1, 2, None, in_all=True),)),
    ('{"type": "spent", "input_tokens": 1, "output_tokens": 2, "cost": NaN}', (Spent(1, 2, None, in_all=True),)),
    ('{"type": "session", "id": "s"}', (Identified("s"),)),
    ('{"type": "warned", "text": "x"}', (Warned("x"),)),
    ('{"type": "alive"}', ()),
    ('{"type": "concluded", "text": "x", "failure": null, "reason": ""}', (Concluded("x"),)),
    (
        '{"type": "concluded", "text": "x", "failure": "auth", "reason": "y"}',
        (Concluded("x", Failed(FailureClass.AUTH, "y")),),
    ),
    (
        '{"type": "concluded", "text": "", "failure": "news", "reason": ""}',
        (Concluded("", Failed(FailureClass.CRASHED, "it failed")),),
    ),
    ('{"type": "said", "text": 1}', ()),
    ('{"type": "spent", "input_tokens": 1}', ()),
)
BRIDGE_ENDS: Sequence[tuple[SessionEnd, FailureClass | None]] = (
    (end('{"type": "concluded", "text": "x", "failure": "overloaded", "reason": "y"}'), FailureClass.OVERLOADED),
    (end('{"type": "concluded", "text": "", "failure": null, "reason": ""}', 0), None),
    (end('{"type": "said", "text": "x"}', None, "Traceback"), None),
)


class TestAcp(AdapterContract):
    """A conversation, through a bridge."""

    adapter_type = AcpAdapter
    options: ClassVar = {"argv": ["gemini", "--acp"], "model": "x", "env": ["GEMINI_API_KEY"]}
    lines = BRIDGE_LINES
    ends = BRIDGE_ENDS


class TestOllama(AdapterContract):
    """HTTP, through a bridge."""

    adapter_type = OllamaAdapter
    options: ClassVar = {"model": "qwen3-coder:30b", "host": "http://[::1]:11434", "context": 65536}
    lines = BRIDGE_LINES
    ends = BRIDGE_ENDS


@pytest.mark.parametrize(
    ("adapter_type", "options"),
    [
        (AiderAdapter, {"bin": "tools/aider"}),
        (AiderAdapter, {"bin": ""}),
        (AiderAdapter, {"model": "--yes"}),
        (AiderAdapter, {"args": ["a\0b"]}),
        (AiderAdapter, {"args": "--x"}),
        (ClaudeCodeAdapter, {"permission_mode": "plan"}),
        (ClaudeCodeAdapter, {"env": ["GIT_DIR=x"]}),
        (GeminiAdapter, {"approval_mode": "default"}),
        (GeminiAdapter, {"model": "--yolo"}),
        (AcpAdapter, {}),
        (AcpAdapter, {"argv": []}),
        (AcpAdapter, {"argv": ["./agent"]}),
        (OllamaAdapter, {}),
        (OllamaAdapter, {"model": "x", "host": "localhost:11434"}),
        (OllamaAdapter, {"model": "x", "host": "http://user:password@host"}),
        (OllamaAdapter, {"model": "x", "host": "http://host:99999"}),
        (OllamaAdapter, {"model": "x", "context": 100}),
    ],
)
def test_wrong_options(adapter_type: AdapterType, options: dict[str, Any]) -> None:
    """What no session could be started with is refused before anything runs."""
    with pytest.raises(ValidationError):
        adapter_type.Options.model_validate(options)


def test_what_a_file_says_of_a_variable_replaces_the_adapters_own(tmp_path: Any) -> None:
    """A preset variable can be set anew or passed on, and one that is passed on by itself can be set."""
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path)
    options = {"env": ["DISABLE_AUTOUPDATER", "CLAUDE_CODE_MAX_RETRIES=9", "HOME=/elsewhere"]}
    command = ClaudeCodeAdapter(ClaudeCodeAdapter.Options.model_validate(options)).command(request)  # type: ignore[arg-type]
    assert "DISABLE_AUTOUPDATER" not in command.env
    assert "DISABLE_AUTOUPDATER" in command.pass_env
    assert (command.env["CLAUDE_CODE_MAX_RETRIES"], command.env["HOME"]) == ("9", "/elsewhere")
    assert "HOME" not in command.pass_env
