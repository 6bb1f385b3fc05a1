"""The contract of the bridge adapters, with output recorded with real agents."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from pydantic import ValidationError

from adapters.acp import AcpAdapter
from adapters.auto_claude import AutoClaudeAdapter
from adapters.ollama import OllamaAdapter
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.plugins import load_plugins
from orchestrator.protocols import (
    AgentMessage,
    CliWarning,
    ConversationStarted,
    FinalResult,
    SessionEnd,
    SessionEvent,
    ToolCall,
    ToolDenied,
    ToolResult,
    UsageReport,
)
from orchestrator.testing.adapter_contract import AdapterContract, ExpectedResult, plain_requests
from orchestrator.testing.recordings import read_recordings
from tests.contract.verdicts import TRANSCRIPTS, end

_TYPES: Final = load_plugins({"COUNCIL_PLUGINS": ""}).adapters

BRIDGE_LINES: Sequence[tuple[str, Sequence[SessionEvent]]] = (
    ('{"type": "message", "text": "Hi."}', (AgentMessage("Hi."),)),
    ('{"type": "tool", "name": "edit", "detail": "x", "paths": ["a", 1]}', (ToolCall("edit", "x", ("a",)),)),
    ('{"type": "tool", "name": "x", "detail": "", "paths": [], "call": "c"}', (ToolCall("x", call="c"),)),
    ('{"type": "tool_ended", "call": "c", "failed": null}', (ToolResult("c"),)),
    ('{"type": "tool_ended", "call": "c", "failed": "no"}', (ToolResult("c", "no"),)),
    (
        '{"type": "spent", "input_tokens": 1, "output_tokens": 2, "cost": null}',
        (UsageReport(1, 2, None, is_cumulative=True),),
    ),
    (
        '{"type": "spent", "input_tokens": 1, "output_tokens": 2, "cost": NaN}',
        (UsageReport(1, 2, None, is_cumulative=True),),
    ),
    ('{"type": "session", "id": "s"}', (ConversationStarted("s"),)),
    ('{"type": "warned", "text": "x"}', (CliWarning("x"),)),
    ('{"type": "denied", "tool": "x", "detail": "y", "call": ""}', (ToolDenied("x", "y"),)),
    ('{"type": "alive"}', ()),
    ('{"type": "concluded", "text": "x", "failure": null, "reason": ""}', (FinalResult("x"),)),
    (
        '{"type": "concluded", "text": "x", "failure": "auth", "reason": "y"}',
        (FinalResult("x", Failed(FailureClass.AUTH, "y")),),
    ),
    (
        '{"type": "concluded", "text": "", "failure": "news", "reason": ""}',
        (FinalResult("", Failed(FailureClass.CRASHED, "it failed")),),
    ),
    ('{"type": "message", "text": 1}', ()),
    ('{"type": "spent", "input_tokens": 1}', ()),
)


def limited(reason: str) -> SessionEnd:
    return end(json.dumps({"type": "concluded", "text": reason, "failure": "rate_limited", "reason": reason}))


LIMITS: Sequence[tuple[SessionEnd, float]] = (
    (limited("Resource has been exhausted (e.g. check quota). Suggested retry after 4000s."), 1_790_004_000.0),
    (limited("You exceeded your current quota. Please retry in 901.5s."), 1_790_000_901.5),
    (limited("Claude AI usage limit reached|1790003600"), 1_790_003_600.0),
    (limited("You've hit your limit: resets 5pm (UTC)"), 1_790_010_000.0),
    (limited("usage limit reached, resets at 2026-09-21T17:00:00Z"), 1_790_010_000.0),
)
BRIDGE_ENDS: Sequence[tuple[SessionEnd, FailureClass | None]] = (
    (end('{"type": "concluded", "text": "x", "failure": "overloaded", "reason": "y"}'), FailureClass.OVERLOADED),
    (end('{"type": "concluded", "text": "", "failure": null, "reason": ""}', 0), None),
    (end('{"type": "message", "text": "x"}', None, "Traceback"), None),
)


#: The common results of all agents in the standard scenarios.
_AGENTS: Mapping[str, ExpectedResult] = {
    "tool": ExpectedResult(text="Both done."),
    "limited": ExpectedResult(FailureClass.RATE_LIMITED),
    "limited-then-well": ExpectedResult(text="Done.", paths=frozenset({"/work/hello.txt"})),
    "no-login": ExpectedResult(FailureClass.AUTH),
    "server-error": ExpectedResult(FailureClass.OVERLOADED),
    "overloaded": ExpectedResult(FailureClass.OVERLOADED),
    "dead-server": ExpectedResult(FailureClass.TRANSIENT),
    "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
    "unknown-model": ExpectedResult(FailureClass.INVALID),
    "out-of-tokens": ExpectedResult(tokens=(100, 10)),  # they report the end of the turn and nothing else
    "interrupted": ExpectedResult(),
    "terminated": ExpectedResult(),
    "read-only": ExpectedResult(text="It is looked at."),
}


class TestAcp(AdapterContract):
    """Gemini CLI in a bridged conversation; it asks for permission for everything."""

    adapter_type = AcpAdapter
    options: ClassVar = {"argv": ["gemini", "--acp"], "model": "x", "env": ["GEMINI_API_KEY"]}
    lines = BRIDGE_LINES
    ends = BRIDGE_ENDS
    limits = LIMITS
    transcripts = TRANSCRIPTS / "acp-gemini"
    recorded: ClassVar = {
        **_AGENTS,
        "edit": ExpectedResult(
            session="5957b2fb-b08e-4bcf-b6d1-3062d25e682e",
            text="It is written.",
            tokens=(2 * 120, 2 * 34),
            paths=frozenset({"/work/hello.txt"}),
        ),
        "resumed": ExpectedResult(
            session="b0b76deb-32df-4659-b447-42897f325ffa",
            text="Both are there.",
            tokens=(2 * 20, 2 * 4),
            paths=frozenset({"/work/b.txt"}),  # replayed messages are not repeated
        ),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "no-key": ExpectedResult(FailureClass.AUTH),
        "not-installed": ExpectedResult(FailureClass.INVALID),
        "limited-for-long": ExpectedResult(FailureClass.RATE_LIMITED),
        "too-long": ExpectedResult(FailureClass.LIMIT),
        "outside": ExpectedResult(text="It is not written.", paths=frozenset()),  # it rejects that by itself
    }


class TestAcpOpencode(AdapterContract):
    """The same with opencode, which asks for permission as configured and reports no status."""

    adapter_type = AcpAdapter
    options: ClassVar = {"argv": ["opencode", "acp"], "env": ["ANTHROPIC_API_KEY"]}
    transcripts = TRANSCRIPTS / "acp-opencode"
    limits: ClassVar = (
        (end("", None, 'opencode\n{"type":"council.limited","message":"No.","until":1790003600000}'), 1_790_003_600.0),
    )
    recorded: ClassVar = {
        "limited-for-long": ExpectedResult(FailureClass.RATE_LIMITED),
        **_AGENTS,
        "edit": ExpectedResult(
            session="ses_df60b8be3ffelymAhaWpKaVZd7",
            text="It is written.",
            tokens=(120, 34),  # from its last answer
            paths=frozenset({"/work/hello.txt"}),
        ),
        "resumed": ExpectedResult(
            session="ses_df60a4719ffeonBmdhPR9d3Aob",
            text="Both are there.",
            tokens=(20, 4),
            paths=frozenset({"/work/b.txt"}),  # replayed messages are not repeated
        ),
        "asking": ExpectedResult(text="Done.", paths=frozenset({"/work", "/work/hello.txt"})),
        "outside": ExpectedResult(FailureClass.REFUSED),
        "invalid": ExpectedResult(FailureClass.CRASHED),
        "too-long": ExpectedResult(text="Done.Done."),  # it compacts and continues
    }


class TestAcpClaude(AdapterContract):
    """The same with Claude Code, which asks for permission for everything."""

    adapter_type = AcpAdapter
    options: ClassVar = {"argv": ["claude-agent-acp"], "env": ["ANTHROPIC_API_KEY"], "home": "own", "resumes": True}
    transcripts = TRANSCRIPTS / "acp-claude"
    recorded: ClassVar = {
        **_AGENTS,
        "edit": ExpectedResult(
            session="2cde79db-c2f8-4569-93b8-5c3634bf1923",
            text="It is written.",
            tokens=(2 * 120, 2 * 34),
            paths=frozenset({"/work/hello.txt"}),
        ),
        "resumed": ExpectedResult(
            session="18c52824-ec82-431b-ba54-6dff1cd846fd",
            text="Both are there.",
            tokens=(2 * 20, 2 * 4),
            paths=frozenset({"/work/b.txt"}),  # replayed messages are not repeated
        ),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "too-long": ExpectedResult(FailureClass.LIMIT),
        "out-of-tokens": ExpectedResult(FailureClass.LIMIT),
        "outside": ExpectedResult(text="It is not written.", paths=frozenset({"/work/../beside.txt"})),
    }


def _agent_contract(use: str, **options: Any) -> type[AdapterContract]:
    body = {
        "__doc__": f"`use: {use}` with `acp: true`.",
        "__module__": __name__,
        "adapter_type": _TYPES[use],
        "options": {"acp": True, "env": ["MY_KEY"], **options},
        "lines": BRIDGE_LINES,
        "ends": BRIDGE_ENDS,
        "limits": LIMITS,
    }
    return type("TestAgent", (AdapterContract,), body)


TestGeminiAgent = _agent_contract("gemini", model="x", auth="gemini-api-key", args=["--debug"])
TestOpencodeAgent = _agent_contract("opencode", model="anthropic/x")
TestClaudeCodeAgent = _agent_contract("claude-code", model="x", permission_mode="bypassPermissions")
TestCodexAgent = _agent_contract("codex", model="x", provider="local")
TestQwenCodeAgent = _agent_contract("qwen-code", model="x", args=["--debug"])


@pytest.mark.parametrize(
    ("use", "options", "program", "argv"),
    [
        ("gemini", {"model": "m", "args": ["--debug"]}, "gemini", ("gemini", "--acp", "--model", "m", "--debug")),
        ("opencode", {"bin": "/opt/opencode"}, "/opt/opencode", ("/opt/opencode", "acp")),
        ("claude-code", {"model": "m"}, "claude-agent-acp", ("claude-agent-acp",)),
        ("claude-code", {"acp": ["claude-code-acp"]}, "claude-code-acp", ("claude-code-acp",)),
        ("codex", {"model": "m"}, "codex-acp", ("codex-acp",)),
        ("qwen-code", {"model": "m", "bin": "/opt/qwen"}, "/opt/qwen", ("/opt/qwen", "--acp", "--model", "m")),
        ("goose", {}, "goose", ("goose", "acp")),
        ("kilo", {}, "kilo", ("kilo", "acp")),
        ("vibe", {}, "vibe-acp", ("vibe-acp",)),
        ("cline", {"acp": ["cline", "--acp"]}, "cline", ("cline", "--acp")),
    ],
)
def test_cli_runs_as_an_agent(
    use: str, options: dict[str, Any], program: str, argv: tuple[str, ...], tmp_path: Path
) -> None:
    """With one option, in the home and with the variables of its own adapter."""
    own, agent = (
        _TYPES[use](_TYPES[use].Options.model_validate(given))
        for given in ({**options, "acp": False}, {"acp": True, **options})
    )
    assert agent.programs()[-1].name == program
    request = plain_requests(tmp_path)[0]
    command, native = agent.command(request), own.command(request)
    split = command.argv.index("--")
    assert tuple(command.argv[split + 1 :]) == argv
    assert (command.home, command.pass_env) == (native.home, native.pass_env)
    assert native.env.items() <= command.env.items()


def test_mode_decides_what_an_agent_may_do(tmp_path: Path) -> None:
    """That of the CLI's own adapter."""
    request = plain_requests(tmp_path)[0]
    for use, options, restricted in (
        ("gemini", {"approval_mode": "yolo"}, False),
        ("gemini", {}, True),
        ("claude-code", {"permission_mode": "bypassPermissions"}, False),
        ("claude-code", {}, True),
        ("codex", {}, False),
        ("opencode", {}, False),
    ):
        agent = _TYPES[use](_TYPES[use].Options.model_validate({"acp": True, **options}))
        assert ("--permissions" in agent.command(request).argv) == restricted, (use, options)


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("claude-code", {"max_turns": 3}, "`max_turns` has no effect with `acp`"),
        ("codex", {"args": ["-c", "x=1"]}, "`args` has no effect with `acp`"),
        ("opencode", {"agent": "plan"}, "`agent` has no effect with `acp`"),
        ("aider", {}, "aider is not known to run as an agent"),
    ],
)
def test_option_without_effect_is_rejected(use: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _TYPES[use].Options.model_validate({"acp": True, **options})


def test_failure_that_codex_reports_as_its_answer_is_found() -> None:
    """Its agent ends such a turn like any other; an answer about failures is none."""
    agent = _TYPES["codex"](_TYPES["codex"].Options.model_validate({"acp": True}))

    def verdict(text: str) -> Failed | None:
        line = json.dumps({"type": "concluded", "text": text, "failure": None, "reason": ""})
        return agent.verdict(replace(end(line, 0), events=agent.parse(line)))

    failed = verdict("exceeded retry limit, last status: 429 Too Many Requests\n\n")
    assert failed is not None
    assert failed.failure is FailureClass.RATE_LIMITED
    assert verdict("The handler retries on status 429 Too Many Requests.") is None


class TestOllama(AdapterContract):
    """HTTP through a bridge."""

    adapter_type = OllamaAdapter
    options: ClassVar = {"model": "qwen3-coder:30b", "host": "http://[::1]:11434", "context": 65536}
    lines = BRIDGE_LINES
    ends = BRIDGE_ENDS
    limits = LIMITS
    transcripts = TRANSCRIPTS / "ollama"
    recorded: ClassVar = {
        "edit": ExpectedResult(text="It is written.", tokens=(120, 34), paths=frozenset({"hello.txt"})),
        "tool": ExpectedResult(text="Both done.", paths=frozenset({"out/b.txt"})),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED, tokens=(0, 0)),
        "limited-then-well": ExpectedResult(FailureClass.RATE_LIMITED),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "overloaded": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.AUTH),  # a person has to start the server
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT, paths=frozenset()),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "unknown-model": ExpectedResult(FailureClass.INVALID),
        "too-long": ExpectedResult(FailureClass.LIMIT),
        "out-of-tokens": ExpectedResult(FailureClass.LIMIT, tokens=(100, 10), paths=frozenset()),
        "cut-off": ExpectedResult(FailureClass.CRASHED, paths=frozenset()),
        "unfit": ExpectedResult(FailureClass.CRASHED, paths=frozenset()),
        "read-only": ExpectedResult(tokens=(100, 10), paths=frozenset()),
        "outside": ExpectedResult(FailureClass.REFUSED, paths=frozenset()),
        "interrupted": ExpectedResult(),
        "terminated": ExpectedResult(),
    }


class TestAutoClaude(AdapterContract):
    """Two programs through a bridge.

    It was never run: `tests.integration.adapters.test_auto_claude` has a fake of it.
    """

    adapter_type = AutoClaudeAdapter
    options: ClassVar = {"path": "/opt/Auto-Claude", "complexity": "simple", "model": "sonnet", "qa": False}
    lines = BRIDGE_LINES
    ends = BRIDGE_ENDS
    limits = LIMITS


@pytest.mark.parametrize("program", ["acp-claude", "acp-gemini", "acp-opencode", "ollama"])
def test_interrupted_bridge_prints_no_traceback(program: str) -> None:
    """It ends by the signal like any program, after its agent."""
    interrupted = read_recordings(TRANSCRIPTS / program)["interrupted"]
    assert interrupted.signal == signal.SIGINT
    assert not any("Traceback" in line for line in interrupted.stderr)


def test_agent_gets_a_trusted_worktree() -> None:
    """Otherwise Gemini CLI ignores the project's instructions and prints a notice."""
    recordings = read_recordings(TRANSCRIPTS / "acp-gemini").values()
    assert [line for one in recordings for line in one.stderr if "trusted" in line] == []
