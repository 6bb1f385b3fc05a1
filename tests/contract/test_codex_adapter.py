"""The contract of the Codex adapter, with recorded output."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adapters.codex import CodexAdapter, CodexOptions
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import (
    AgentMessage,
    CliWarning,
    ConversationStarted,
    FinalResult,
    SessionRequest,
    ToolCall,
    ToolResult,
    UsageReport,
)
from orchestrator.testing.adapter_contract import AdapterContract, ExpectedResult
from orchestrator.testing.recordings import read_recordings
from tests.contract.verdicts import SESSION, TRANSCRIPTS, end, get_verdict


def codex_item(when: str, type_: str, **fields: Any) -> str:
    return json.dumps({"type": f"item.{when}", "item": {"id": "item_0", "type": type_, **fields}})


def codex_failure(message: str) -> str:
    error = {"type": "error", "message": message}
    return "\n".join(map(json.dumps, (error, {"type": "turn.failed", "error": {"message": message}})))


HIT = "You\u2019ve hit your usage limit. To get more access now, send a request to your admin"


class TestCodex(AdapterContract):
    """JSON lines with failures in words."""

    adapter_type = CodexAdapter
    options: ClassVar = {
        "model": "gpt-5.5",
        "provider": "azure",
        "sandbox": "workspace-write",
        "args": ["-c", "model_reasoning_effort=high"],
        "env": ["MY_KEY"],
    }
    lines: ClassVar = (
        (json.dumps({"type": "thread.started", "thread_id": SESSION}), (ConversationStarted(SESSION),)),
        ('{"type":"turn.started"}', ()),
        (codex_item("completed", "agent_message", text="Hi."), (AgentMessage("Hi."),)),
        (codex_item("completed", "agent_message", text=" "), ()),
        (codex_item("completed", "reasoning", text="Hm."), ()),
        (
            codex_item("completed", "error", message="Model metadata for `x` not found."),
            (CliWarning("Model metadata for `x` not found."),),
        ),
        (
            codex_item("started", "command_execution", command="/bin/bash -lc 'make\n test'", exit_code=None),
            (ToolCall("shell", "/bin/bash -lc 'make test'", call="item_0"),),
        ),
        (
            codex_item("completed", "command_execution", command="/bin/bash -lc true", exit_code=0),
            (ToolResult("item_0"),),
        ),
        (
            codex_item("completed", "command_execution", exit_code=2, aggregated_output="one\ntwo\n", status="failed"),
            (ToolResult("item_0", "exit code 2: two", "one\ntwo"),),
        ),
        (
            codex_item("completed", "mcp_tool_call", status="failed", error={"message": "no such tool"}),
            (ToolResult("item_0", "no such tool"),),
        ),
        (codex_item("started", "file_change", changes=[{"path": "/w/a.py", "kind": "add"}]), ()),
        (
            codex_item("completed", "file_change", changes=[{"path": "/w/a.py", "kind": "add"}, {"path": "/w/b.py"}]),
            (ToolCall("edit", "/w/a.py /w/b.py", ("/w/a.py", "/w/b.py"), "item_0"), ToolResult("item_0")),
        ),
        (
            codex_item("completed", "file_change", changes=[1, {"path": 2}]),
            (ToolCall("edit", call="item_0"), ToolResult("item_0")),
        ),
        (
            codex_item("started", "mcp_tool_call", server="docs", tool="find", arguments={}),
            (ToolCall("docs.find", call="item_0"),),
        ),
        (codex_item("completed", "web_search", query="pep 440"), (ToolCall("web_search", "pep 440"),)),
        (
            '{"type":"turn.completed","usage":{"input_tokens":120,"cached_input_tokens":100,"output_tokens":34}}',
            (
                UsageReport(120, 34, is_cumulative=True, cached_tokens=100, model="gpt-5.5", includes_resumed=True),
                FinalResult(),
            ),
        ),
        ('{"type":"turn.completed","usage":null}', (FinalResult(),)),
        (
            '{"type":"error","message":"Reconnecting... 1/5 (unexpected status 401 Unauthorized: no)"}',
            (CliWarning("Reconnecting... 1/5 (unexpected status 401 Unauthorized: no)"),),
        ),
        (
            '{"type":"turn.failed","error":{"message":"Selected model is at capacity."}}',
            (FinalResult("", Failed(FailureClass.OVERLOADED, "Selected model is at capacity.")),),
        ),
        ('{"type":"turn.failed"}', (FinalResult("", Failed(FailureClass.CRASHED, "it ended with an error")),)),
        ("plain words", (AgentMessage("plain words"),)),
    )
    ends: ClassVar = (
        (end(codex_failure("unexpected status 403 Forbidden: Country not supported")), FailureClass("auth")),
        (end(codex_failure("Quota exceeded. Check your plan and billing details.")), FailureClass("auth")),
        (end(codex_failure("To use Codex with your ChatGPT plan, upgrade to Plus: x")), FailureClass("auth")),
        (end(codex_failure(f"{HIT} or try again later.")), FailureClass("rate_limited")),
        (end(codex_failure("exceeded retry limit, last status: 502 Bad Gateway")), FailureClass("overloaded")),
        (
            end(codex_failure("Selected model is at capacity. Please try a different model.")),
            FailureClass("overloaded"),
        ),
        (
            end(codex_failure("Codex ran out of room in the model's context window. Start a new thread or clear …")),
            FailureClass("limit"),
        ),
        (end(codex_failure("This request has been flagged for possible cybersecurity risk.")), FailureClass("refused")),
        (
            end(codex_failure("Invalid prompt: we've limited access to this content for safety reasons.")),
            FailureClass("refused"),
        ),
        (
            end(codex_failure("The model `x` does not exist or you do not have access to it.")),
            FailureClass("invalid"),
        ),
        (end(codex_failure("Something new.")), FailureClass("crashed")),
        (
            end("", stderr="Error loading config.toml: model_providers contains reserved built-in provider IDs"),
            FailureClass("invalid"),
        ),
        (end("", 2, "error: unexpected argument '--x' found\n\nUsage: codex exec [OPTIONS]"), FailureClass("invalid")),
        (end("", stderr='Error finding codex home: CODEX_HOME points to "/x", but that'), FailureClass("invalid")),
        (end(f'{codex_failure("x")}\n{{"type":"turn.completed","usage":{{}}}}', 0), None),
        (end("", 1, "Error: something else"), None),
    )
    limits: ClassVar = ((end(codex_failure(f"{HIT} or try again in 3600s.")), 1_790_003_600.0),)
    transcripts = TRANSCRIPTS / "codex"
    recorded: ClassVar = {
        "resumed": ExpectedResult(
            session="01a203c4-e80d-7503-b13e-fcc6f0fb2765",
            text="Both are there.",
            tokens=(2 * 120 + 2 * 20, 2 * 34 + 2 * 4),
            paths=frozenset({"/work/b.txt"}),
        ),
        "denied": ExpectedResult(text="Tried."),
        "read-only": ExpectedResult(FailureClass.REFUSED, text="It is looked at.", paths=frozenset()),
        "edit": ExpectedResult(
            session="01a20367-e977-74a0-a6b2-e9a9a51bad2e",
            text="It is written.",
            tokens=(2 * 120, 2 * 34),
            paths=frozenset({"/work/hello.txt"}),
        ),
        "tool": ExpectedResult(text="Both done.", paths=frozenset({"/work/out/b.txt"})),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED),
        "limited-then-well": ExpectedResult(text="Done.", paths=frozenset({"/work/hello.txt"})),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "no-key": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "overloaded": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "unwritable": ExpectedResult(FailureClass.INVALID),
        "refused": ExpectedResult(FailureClass.REFUSED),
        "interrupted": ExpectedResult(),
        "terminated": ExpectedResult(),
    }


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the local time zone to UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize(
    ("reported", "until"),
    [
        ("or try again at 2:09 PM.", datetime(2026, 9, 21, 14, 10, tzinfo=UTC)),
        ("or try again at 12:30 AM.", datetime(2026, 9, 22, 0, 31, tzinfo=UTC)),
        ("or try again at Sep 23rd, 2026 12:09 PM.", datetime(2026, 9, 23, 12, 10, tzinfo=UTC)),
        ("or try again at Foo 23rd, 2026 12:09 PM.", None),
        ("or try again later.", None),
    ],
)
def test_codex_usage_limit_has_reset_time(reported: str, until: datetime | None) -> None:
    """In words, in local time, with a date unless today; the session ended on 2026-09-21, 14:13 UTC."""
    failed = get_verdict(CodexAdapter, {}, codex_failure(f"{HIT} {reported}"))
    assert failed is not None
    assert (failed.failure, failed.until) == (FailureClass.RATE_LIMITED, until.timestamp() if until else None)


def test_codex_rate_limit_has_duration() -> None:
    """In seconds."""
    failed = get_verdict(
        CodexAdapter, {}, codex_failure("rate limit exceeded: Rate limit reached. Please try again in 1.5s.")
    )
    assert failed is not None
    assert failed.until == 1_790_000_001.5


@pytest.mark.parametrize(
    ("recording", "remedy"),
    [("no-login", "codex login"), ("no-key", "env_key"), ("unwritable", "writable"), ("refused", "`sandbox: none`")],
)
def test_codex_failure_has_a_remedy(recording: str, remedy: str) -> None:
    """It follows the program's message."""
    adapter = CodexAdapter(CodexAdapter.Options.model_validate({}))  # type: ignore[arg-type]
    reported = read_recordings(TRANSCRIPTS / "codex")[recording].end()
    events = [event for line in reported.stdout.splitlines() for event in adapter.parse(line)]
    failed = adapter.verdict(replace(reported, events=events))
    assert failed is not None
    assert remedy in failed.reason


@pytest.mark.parametrize(
    ("provider", "is_requested", "is_set"),
    [(None, True, False), ("openai", True, False), ("ollama", False, False), ("azure", False, True)],
)
def test_codex_provider_changes_its_settings(
    tmp_path: Path, provider: str | None, is_requested: bool, is_set: bool
) -> None:
    """The login applies to its own provider only, and only a provider named by the file can be configured."""
    adapter = CodexAdapter(CodexAdapter.Options.model_validate({"provider": provider}))  # type: ignore[arg-type]
    assert [bool(program.ready) for program in adapter.programs()] == [is_requested]
    argv = adapter.command(SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home")).argv
    assert (f"model_provider={provider}" in argv) is (provider is not None)
    assert "features.shell_snapshot=false" in argv  # otherwise its keys are in a file
    assert (f"model_providers.{provider}.stream_max_retries=1" in argv) is is_set


def test_attached_codex_has_an_answer_whether_to_trust_the_worktree(tmp_path: Path) -> None:
    """It could not save that of the user, and would ask again."""
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home", "s", interactive=True)
    argv = CodexAdapter(CodexOptions()).command(request).argv
    (setting,) = [tomllib.loads(one) for one in argv if one.startswith("projects=")]
    assert setting == {"projects": {str(tmp_path): {"trust_level": "untrusted"}}}
