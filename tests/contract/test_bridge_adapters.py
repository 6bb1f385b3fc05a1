"""The contract on the adapters that talk through a bridge of ours, with what it printed beside real agents."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest

from adapters.acp import AcpAdapter
from adapters.ollama import OllamaAdapter
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.outcome import Failed
from orchestrator.protocols import (
    Concluded,
    Denied,
    Identified,
    Said,
    SessionEnd,
    SessionEvent,
    Spent,
    ToolEnded,
    UsedTool,
    Warned,
)
from orchestrator.testing.adapter_contract import AdapterContract, Recorded
from orchestrator.testing.recordings import read_recordings
from tests.contract.judging import TRANSCRIPTS, end

BRIDGE_LINES: Sequence[tuple[str, Sequence[SessionEvent]]] = (
    ('{"type": "said", "text": "Hi."}', (Said("Hi."),)),
    ('{"type": "tool", "name": "edit", "detail": "x", "paths": ["a", 1]}', (UsedTool("edit", "x", ("a",)),)),
    ('{"type": "tool", "name": "x", "detail": "", "paths": [], "call": "c"}', (UsedTool("x", call="c"),)),
    ('{"type": "tool_ended", "call": "c", "failed": null}', (ToolEnded("c"),)),
    ('{"type": "tool_ended", "call": "c", "failed": "no"}', (ToolEnded("c", "no"),)),
    ('{"type": "spent", "input_tokens": 1, "output_tokens": 2, "cost": null}', (Spent(1, 2, None, in_all=True),)),
    ('{"type": "spent", "input_tokens": 1, "output_tokens": 2, "cost": NaN}', (Spent(1, 2, None, in_all=True),)),
    ('{"type": "session", "id": "s"}', (Identified("s"),)),
    ('{"type": "warned", "text": "x"}', (Warned("x"),)),
    ('{"type": "denied", "tool": "x", "detail": "y", "call": ""}', (Denied("x", "y"),)),
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


def limited(reason: str) -> SessionEnd:
    return end(json.dumps({"type": "concluded", "text": reason, "failure": "rate_limited", "reason": reason}))


LIMITS: Sequence[tuple[SessionEnd, float]] = (
    (limited("Resource has been exhausted (e.g. check quota). Suggested retry after 4000s."), 1_790_004_000.0),
    (limited("Claude AI usage limit reached|1790003600"), 1_790_003_600.0),
    (limited("You've hit your limit: resets 5pm (UTC)"), 1_790_010_000.0),
    (limited("usage limit reached, resets at 2026-09-21T17:00:00Z"), 1_790_010_000.0),
)
BRIDGE_ENDS: Sequence[tuple[SessionEnd, FailureClass | None]] = (
    (end('{"type": "concluded", "text": "x", "failure": "overloaded", "reason": "y"}'), FailureClass.OVERLOADED),
    (end('{"type": "concluded", "text": "", "failure": null, "reason": ""}', 0), None),
    (end('{"type": "said", "text": "x"}', None, "Traceback"), None),
)


#: What all agents make of what all programs are put through.
_AGENTS: Mapping[str, Recorded] = {
    "tool": Recorded(text="Both done."),
    "limited": Recorded(FailureClass.RATE_LIMITED),
    "limited-then-well": Recorded(text="Done.", paths=frozenset({"/work/hello.txt"})),
    "no-login": Recorded(FailureClass.AUTH),
    "server-error": Recorded(FailureClass.OVERLOADED),
    "overloaded": Recorded(FailureClass.OVERLOADED),
    "dead-server": Recorded(FailureClass.TRANSIENT),
    "broken-stream": Recorded(FailureClass.TRANSIENT),
    "unknown-model": Recorded(FailureClass.INVALID),
    "out-of-tokens": Recorded(tokens=(100, 10)),  # they say that their turn is over, and nothing else
    "interrupted": Recorded(),
    "terminated": Recorded(),
    "read-only": Recorded(text="It is looked at."),
}


class TestAcp(AdapterContract):
    """A conversation, through a bridge, with Gemini CLI, which asks leave for everything."""

    adapter_type = AcpAdapter
    options: ClassVar = {"argv": ["gemini", "--acp"], "model": "x", "env": ["GEMINI_API_KEY"]}
    lines = BRIDGE_LINES
    ends = BRIDGE_ENDS
    limits = LIMITS
    transcripts = TRANSCRIPTS / "acp-gemini"
    recorded: ClassVar = {
        **_AGENTS,
        "edit": Recorded(
            session="5957b2fb-b08e-4bcf-b6d1-3062d25e682e",
            text="It is written.",
            tokens=(2 * 120, 2 * 34),
            paths=frozenset({"/work/hello.txt"}),
        ),
        "resumed": Recorded(
            session="b0b76deb-32df-4659-b447-42897f325ffa",
            text="Both are there.",
            tokens=(2 * 20, 2 * 4),
            paths=frozenset({"/work/b.txt"}),  # what was done before is not told again
        ),
        "invalid": Recorded(FailureClass.INVALID),
        "no-key": Recorded(FailureClass.AUTH),
        "not-installed": Recorded(FailureClass.INVALID),
        "limited-for-long": Recorded(FailureClass.RATE_LIMITED),
        "too-long": Recorded(FailureClass.LIMIT),
        "outside": Recorded(text="It is not written.", paths=frozenset()),  # it refuses that by itself
    }


class TestAcpOpencode(AdapterContract):
    """The same with opencode, which asks leave for what its configuration says, and tells no status."""

    adapter_type = AcpAdapter
    options: ClassVar = {"argv": ["opencode", "acp"], "env": ["ANTHROPIC_API_KEY"]}
    transcripts = TRANSCRIPTS / "acp-opencode"
    limits: ClassVar = (
        (end("", None, 'opencode\n{"type":"council.limited","message":"No.","until":1790003600000}'), 1_790_003_600.0),
    )
    recorded: ClassVar = {
        "limited-for-long": Recorded(FailureClass.RATE_LIMITED),
        **_AGENTS,
        "edit": Recorded(
            session="ses_df60b8be3ffelymAhaWpKaVZd7",
            text="It is written.",
            tokens=(120, 34),  # of its last answer
            paths=frozenset({"/work/hello.txt"}),
        ),
        "resumed": Recorded(
            session="ses_df60a4719ffeonBmdhPR9d3Aob",
            text="Both are there.",
            tokens=(20, 4),
            paths=frozenset({"/work/b.txt"}),  # what was done before is not told again
        ),
        "asking": Recorded(text="Done.", paths=frozenset({"/work", "/work/hello.txt"})),
        "outside": Recorded(FailureClass.REFUSED),
        "invalid": Recorded(FailureClass.CRASHED),
        "too-long": Recorded(text="Done.Done."),  # it sums up and goes on
    }


class TestAcpClaude(AdapterContract):
    """The same with Claude Code, which asks leave for everything."""

    adapter_type = AcpAdapter
    options: ClassVar = {"argv": ["claude-agent-acp"], "env": ["ANTHROPIC_API_KEY"], "home": "own", "resumes": True}
    transcripts = TRANSCRIPTS / "acp-claude"
    recorded: ClassVar = {
        **_AGENTS,
        "edit": Recorded(
            session="2cde79db-c2f8-4569-93b8-5c3634bf1923",
            text="It is written.",
            tokens=(2 * 120, 2 * 34),
            paths=frozenset({"/work/hello.txt"}),
        ),
        "resumed": Recorded(
            session="18c52824-ec82-431b-ba54-6dff1cd846fd",
            text="Both are there.",
            tokens=(2 * 20, 2 * 4),
            paths=frozenset({"/work/b.txt"}),  # what was done before is not told again
        ),
        "invalid": Recorded(FailureClass.INVALID),
        "too-long": Recorded(FailureClass.LIMIT),
        "out-of-tokens": Recorded(FailureClass.LIMIT),
        "outside": Recorded(text="It is not written.", paths=frozenset({"/work/../beside.txt"})),
    }


class TestOllama(AdapterContract):
    """HTTP, through a bridge."""

    adapter_type = OllamaAdapter
    options: ClassVar = {"model": "qwen3-coder:30b", "host": "http://[::1]:11434", "context": 65536}
    lines = BRIDGE_LINES
    ends = BRIDGE_ENDS
    limits = LIMITS
    transcripts = TRANSCRIPTS / "ollama"
    recorded: ClassVar = {
        "edit": Recorded(text="It is written.", tokens=(120, 34), paths=frozenset({"hello.txt"})),
        "tool": Recorded(text="Both done.", paths=frozenset({"out/b.txt"})),
        "limited": Recorded(FailureClass.RATE_LIMITED, tokens=(0, 0)),
        "limited-then-well": Recorded(FailureClass.RATE_LIMITED),
        "no-login": Recorded(FailureClass.AUTH),
        "server-error": Recorded(FailureClass.OVERLOADED),
        "overloaded": Recorded(FailureClass.OVERLOADED),
        "dead-server": Recorded(FailureClass.AUTH),  # somebody has to start it
        "broken-stream": Recorded(FailureClass.TRANSIENT, paths=frozenset()),
        "invalid": Recorded(FailureClass.INVALID),
        "unknown-model": Recorded(FailureClass.INVALID),
        "too-long": Recorded(FailureClass.LIMIT),
        "out-of-tokens": Recorded(FailureClass.LIMIT, tokens=(100, 10), paths=frozenset()),
        "cut-off": Recorded(FailureClass.CRASHED, paths=frozenset()),
        "unfit": Recorded(FailureClass.CRASHED, paths=frozenset()),
        "read-only": Recorded(tokens=(100, 10), paths=frozenset()),
        "outside": Recorded(FailureClass.REFUSED, paths=frozenset()),
        "interrupted": Recorded(),
        "terminated": Recorded(),
    }


@pytest.mark.parametrize("program", ["acp-claude", "acp-gemini", "acp-opencode", "ollama"])
def test_a_bridge_that_is_interrupted_says_nothing_of_its_code(program: str) -> None:
    """It ends by the signal, as any program does, once its agent is gone."""
    interrupted = read_recordings(TRANSCRIPTS / program)["interrupted"]
    assert interrupted.signal == signal.SIGINT
    assert not any("Traceback" in line for line in interrupted.stderr)


def test_an_agent_trusts_the_worktree() -> None:
    """Gemini CLI would leave out what the project tells it, and says so."""
    recordings = read_recordings(TRANSCRIPTS / "acp-gemini").values()
    assert [line for one in recordings for line in one.stderr if "trusted" in line] == []
