"""The contract of bundled adapters, with recorded lines and exits of their programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from adapters.acp import AcpAdapter
from adapters.auto_claude import AutoClaudeAdapter
from adapters.claude_code import ClaudeCodeAdapter, ClaudeCodeOptions
from adapters.codex import CodexAdapter
from adapters.gemini import GeminiAdapter
from adapters.ollama import OllamaAdapter
from adapters.opencode import OpencodeAdapter
from orchestrator.client.commands import MCP_SERVER_NAME
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.plugins import load_plugins
from orchestrator.protocols import (
    AdapterType,
    AgentMessage,
    Capability,
    CliWarning,
    ConversationStarted,
    FinalResult,
    McpServer,
    SessionRequest,
    ToolCall,
    ToolResult,
    UsageReport,
)
from orchestrator.testing.adapter_contract import AdapterContract, ExpectedResult
from tests.contract.verdicts import SESSION, TRANSCRIPTS, end, get_verdict

TYPES = load_plugins({"COUNCIL_PLUGINS": ""}).adapters
AIDER = TYPES["aider"]


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
    """JSON lines with a complete result."""

    adapter_type = ClaudeCodeAdapter
    options: ClassVar = {"model": "opus", "permission_mode": "bypassPermissions", "args": ["--max-turns", "3"]}
    lines: ClassVar = (
        (claude("system", subtype="init", cwd="/w", tools=["Edit"]), (ConversationStarted(SESSION),)),
        (
            claude("system", subtype="api_retry", attempt=1, max_retries=3, retry_delay_ms=504.9, error_status=401,
                   error="authentication_failed"),
            (CliWarning("authentication_failed (401), retry 1 of 3"),),
        ),
        (claude("assistant", message={"content": [{"type": "text", "text": "Hi."}]}), (AgentMessage("Hi."),)),
        (
            claude("assistant", message={"content": [{"type": "tool_use", "id": "t", "name": "Edit",
                                                      "input": {"file_path": "/w/a.py", "old_string": "x"}}]}),
            (ToolCall("Edit", "/w/a.py", ("/w/a.py",), "t", "-x"),),
        ),
        (
            claude("assistant", message={"content": [{"type": "tool_use", "id": "t", "name": "Bash",
                                                      "input": {"command": "make\n test"}}]}),
            (ToolCall("Bash", "make test", call="t"),),
        ),
        (
            claude("assistant", message={"id": "msg_1", "model": "claude-opus-4-8", "content": [], "usage":
                                         {"input_tokens": 7, "cache_read_input_tokens": 2, "output_tokens": 1}}),
            (UsageReport(9, 1, cached_tokens=2, model="claude-opus-4-8", call="msg_1"),),
        ),
        (claude("user", message={"content": [{"type": "tool_result", "content": "ok"}]}), ()),
        (
            claude("user", message={"content": [{"type": "tool_result", "tool_use_id": "t", "content": "ok"}]}),
            (ToolResult("t", output="ok"),),
        ),
        (
            claude("user", message={"content": [{"type": "tool_result", "tool_use_id": "t", "is_error": True,
                                                 "content": [{"type": "text", "text": "Exit code 1\nno"}, 7]}]}),
            (ToolResult("t", "Exit code 1 no", "Exit code 1\nno"),),
        ),
        (
            claude_result(result="Done."),
            (UsageReport(321, 4, 0.25, is_cumulative=True, cached_tokens=300), FinalResult("Done.")),
        ),
        (
            claude_result(result="Done.", modelUsage={"a": {"inputTokens": 21, "outputTokens": 4,
                                                            "cacheReadInputTokens": 700}, "b": {}, "c": None}),
            (UsageReport(321, 4, 0.25, is_cumulative=True, cached_tokens=300, priced_tokens=725), FinalResult("Done.")),
        ),
        (
            claude_result(result="Done.", modelUsage={"a": {"inputTokens": 900}},
                          model_usage_since_last_result={"a": {"costUSD": 0.0625}, "b": {"costUSD": 0.125}}),
            (
                UsageReport(321, 4, is_cumulative=True, cached_tokens=300),
                UsageReport(cost=0.1875),
                FinalResult("Done."),
            ),
        ),
        (claude("rate_limit_event", rate_limit_info={"status": "allowed_warning", "resetsAt": 1}), ()),
        ('{"type": "assistant", "message": {"content": [{"type": "text"', ()),
        ('{"type":"result","total_cost_usd":1e999,"usage":{"output_tokens":-1}}',
         (UsageReport(0, 0, None, is_cumulative=True), FinalResult(""))),
        ("plain words", (AgentMessage("plain words"),)),
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
    limits: ClassVar = (
        (end(claude_error(None, "Claude AI usage limit reached|1790003600")), 1_790_003_600.0),
        (end(claude_error(429, "You've hit your limit · resets 5pm (UTC)")), 1_790_010_000.0),
    )
    transcripts = TRANSCRIPTS / "claude-code"
    recorded: ClassVar = {
        "resumed": ExpectedResult(
            session="af571613-75db-40bd-83d9-e050c6c1020c",
            text="Both are there.",
            tokens=(2 * 20, 2 * 4),
            paths=frozenset({"/work/b.txt"}),
        ),
        "resumed-total-cost": ExpectedResult(text="Both are there.", tokens=(2 * 20, 2 * 4)),
        "resumed-both-costs": ExpectedResult(text="Both are there.", tokens=(2 * 20, 2 * 4)),
        "denied": ExpectedResult(text="Tried.", tokens=(300, 30)),
        "read-only": ExpectedResult(text="It is looked at.", paths=frozenset({"/work/hello.txt"})),
        "edit": ExpectedResult(
            session="4bed88d2-6f82-4d37-b63d-09e23746405d",
            text="It is written.",
            tokens=(2 * 120, 2 * 34),
            paths=frozenset({"/work/hello.txt"}),
        ),
        "tool": ExpectedResult(text="Both done.", paths=frozenset({"/work/out/b.txt"})),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED),
        "limited-until": ExpectedResult(FailureClass.RATE_LIMITED),
        "limited-then-well": ExpectedResult(text="Done.", paths=frozenset({"/work/hello.txt"})),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "overloaded": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "refused": ExpectedResult(text="It is not written."),
        "turns": ExpectedResult(FailureClass.LIMIT, paths=frozenset({"/work/a.txt"})),
        "interrupted": ExpectedResult(FailureClass.CRASHED),
        "interrupted-tool": ExpectedResult(FailureClass.CRASHED, tokens=(120, 34)),
        "terminated": ExpectedResult(),
    }


def test_claude_on_a_terminal_opens_the_conversation_without_questions(tmp_path: Path) -> None:
    """Without its introduction, and for this worktree and the configured permission mode only."""
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home", "s", interactive=True)
    command = ClaudeCodeAdapter(ClaudeCodeOptions(permission_mode="bypassPermissions")).command(request)
    assert command.home is not None
    state = json.loads(command.home.files[".claude.json"])
    assert state == {
        "hasCompletedOnboarding": True,
        "projects": {str(tmp_path): {"hasTrustDialogAccepted": True}},
    }
    settings = json.loads(command.home.files["council-settings.json"])
    assert settings == {"skipDangerousModePermissionPrompt": True}
    cautious = ClaudeCodeAdapter(ClaudeCodeOptions()).command(request)
    assert cautious.home is not None
    assert "council-settings.json" not in cautious.home.files
    headless = ClaudeCodeAdapter(ClaudeCodeOptions()).command(replace(request, interactive=False))
    assert headless.home is not None
    assert ".claude.json" not in headless.home.files


@pytest.mark.parametrize(
    "stdout",
    [
        f"{REJECTED}\n{claude_error(429, 'You have hit your session limit')}",
        claude_error(None, "Claude AI usage limit reached|1790003600"),
        "Claude AI usage limit reached|1790003600",
    ],
)
def test_claude_usage_limit_has_reset_time(stdout: str) -> None:
    """From an event before its result, or from the time in its message."""
    failed = get_verdict(ClaudeCodeAdapter, {}, stdout)
    assert failed is not None
    assert (failed.failure, failed.until) == (FailureClass.RATE_LIMITED, 1_790_003_600.0)


@pytest.mark.parametrize(
    ("adapter_type", "options"),
    [
        (AIDER, {"bin": "tools/aider"}),
        (AIDER, {"bin": ""}),
        (AIDER, {"model": "--yes"}),
        (AIDER, {"args": ["a\0b"]}),
        (AIDER, {"args": "--x"}),
        (ClaudeCodeAdapter, {"permission_mode": "plan"}),
        (ClaudeCodeAdapter, {"env": ["GIT_DIR=x"]}),
        (GeminiAdapter, {"approval_mode": "default"}),
        (GeminiAdapter, {"model": "--yolo"}),
        (CodexAdapter, {"sandbox": "danger-full-access"}),
        (CodexAdapter, {"provider": "my.own"}),
        (OpencodeAdapter, {"model": "gpt-5"}),
        (OpencodeAdapter, {"config": {"provider": {"x": {"options": {"apiKey": "sk-proj-" + "aB3dE5" * 8}}}}}),
        (OpencodeAdapter, {"config": {"x": {1, 2}}}),
        (AcpAdapter, {}),
        (AcpAdapter, {"argv": []}),
        (AcpAdapter, {"argv": ["./agent"]}),
        (AutoClaudeAdapter, {}),
        (AutoClaudeAdapter, {"path": "Auto-Claude/apps/backend"}),
        (AutoClaudeAdapter, {"path": "/opt/x", "complexity": "hard"}),
        (OllamaAdapter, {}),
        (OllamaAdapter, {"model": "x", "host": "localhost:11434"}),
        (OllamaAdapter, {"model": "x", "host": "http://user:password@host"}),
        (OllamaAdapter, {"model": "x", "host": "http://host:99999"}),
        (OllamaAdapter, {"model": "x", "context": 100}),
    ],
)
def test_invalid_options_are_rejected(adapter_type: AdapterType, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        adapter_type.Options.model_validate(options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("claude-code", {"permission_mode": "bypassPermissions"}),
        ("claude-code", {}),
        ("cline", {}),
        ("codex", {}),
        ("gemini", {"approval_mode": "yolo"}),
        ("opencode", {}),
        ("qwen-code", {}),
    ],
)
def test_reader_has_the_tools_of_a_writer(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    """In a mode that only plans, a reviewer could run neither `git diff` nor the tests."""
    adapter = TYPES[name](TYPES[name].Options.model_validate(options))
    assert Capability.READ_ONLY not in adapter.capabilities()
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home")
    writer, reader = (adapter.command(replace(request, read_only=flag)) for flag in (False, True))
    assert reader == writer
    assert "plan" not in reader.argv


@pytest.mark.parametrize(("name", "key"), [("claude-code", "alwaysLoad"), ("qwen-code", "alwaysLoadTools")])
def test_council_tools_are_not_deferred_behind_a_search(name: str, key: str, tmp_path: Any) -> None:
    """Tools of the user's servers are deferred if the program does so."""
    servers = (McpServer(MCP_SERVER_NAME, ("council", "mcp")), McpServer("docs", ("docs",)))
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home", mcp_servers=servers)
    home = TYPES[name](TYPES[name].Options()).command(request).home
    assert home is not None
    (written,) = home.files.values()
    known = json.loads(written)["mcpServers"]
    assert {server for server, one in known.items() if one.get(key)} == {MCP_SERVER_NAME}


def test_variable_in_the_file_overrides_the_adapter(tmp_path: Any) -> None:
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home")
    options = {"env": ["DISABLE_AUTOUPDATER", "CLAUDE_CODE_MAX_RETRIES=9", "HOME=/elsewhere"]}
    command = ClaudeCodeAdapter(ClaudeCodeAdapter.Options.model_validate(options)).command(request)  # type: ignore[arg-type]
    assert "DISABLE_AUTOUPDATER" not in command.env
    assert "DISABLE_AUTOUPDATER" in command.pass_env
    assert (command.env["CLAUDE_CODE_MAX_RETRIES"], command.env["HOME"]) == ("9", "/elsewhere")
    assert "HOME" not in command.pass_env
