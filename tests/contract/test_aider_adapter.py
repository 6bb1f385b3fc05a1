"""The contract of the profile `aider`, with recorded output."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import ClassVar, Final

from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.plugins import load_plugins
from orchestrator.protocols import AgentMessage, CliWarning, FinalResult, SessionRequest, ToolCall, UsageReport
from orchestrator.testing.adapter_contract import AdapterContract, ExpectedResult
from orchestrator.testing.recordings import read_recordings
from tests.contract.verdicts import TRANSCRIPTS, end

_TYPE: Final = load_plugins({"COUNCIL_PLUGINS": ""}).adapters["aider"]
MODEL: Final = "openai/gpt-5"
OPENAI = "litellm.RateLimitError: RateLimitError: OpenAIException - stub says rate_limit_error"


class TestAider(AdapterContract):
    """Plain text, and an exit code without meaning."""

    adapter_type = _TYPE
    options: ClassVar = {"model": MODEL, "args": ["--map-tokens", "0"], "env": ["MY_KEY", "OPENAI_API_BASE=x"]}
    lines: ClassVar = (
        ("Aider v0.86.1", (AgentMessage("Aider v0.86.1"),)),
        ("", ()),
        (
            "Tokens: 4.2k sent, 1.1k received. Cost: $0.01 message, $0.02 session.",
            (UsageReport(4200, 1100, 0.01, model=MODEL, is_estimate=True), FinalResult()),
        ),
        (
            "Tokens: 12k sent, 10k cache write, 5k cache hit, 300 received.",
            (UsageReport(12_000, 300, model=MODEL, is_estimate=True), FinalResult()),
        ),
        (
            "Cost: $0.00012 message, $1.25 session.",
            (UsageReport(cost=0.00012, model=MODEL, is_estimate=True), FinalResult()),
        ),
        ("Tokens: 1,234 sent, 5 received.", (UsageReport(1234, 5, model=MODEL, is_estimate=True), FinalResult())),
        ("Applied edit to src/a b.py", (ToolCall("edit", "src/a b.py", ("src/a b.py",)),)),
        ("Retrying in 0.2 seconds...", (CliWarning("Retrying in 0.2 seconds..."),)),
        ("Only 3 reflections allowed, stopping.", (CliWarning("Only 3 reflections allowed, stopping."),)),
        ("Only the tests change.", (AgentMessage("Only the tests change."),)),
        (OPENAI, (FinalResult(OPENAI, Failed(FailureClass.RATE_LIMITED, OPENAI)),)),
        (f"half a li{OPENAI}", (FinalResult(f"half a li{OPENAI}", Failed(FailureClass.RATE_LIMITED, OPENAI)),)),
        ("It raises litellm.RateLimitError: then.", (AgentMessage("It raises litellm.RateLimitError: then."),)),
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
        (end("Aider v0.86.1\n", 0), FailureClass("crashed")),
    )
    limits: ClassVar = ((end(f"{OPENAI} Please try again in 20s.", 0), 1_790_000_020.0),)
    transcripts = TRANSCRIPTS / "aider"
    recorded: ClassVar = {
        "edit": ExpectedResult(tokens=(1900, 20), paths=frozenset({"hello.txt"})),
        "tool": ExpectedResult(paths=frozenset({"out/b.txt"})),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED, tokens=(0, 0)),
        "limited-then-well": ExpectedResult(paths=frozenset({"hello.txt"})),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "no-key": ExpectedResult(FailureClass.AUTH),
        "no-model": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "overloaded": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT, paths=frozenset()),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "unknown-model": ExpectedResult(FailureClass.INVALID),
        "no-such-model": ExpectedResult(FailureClass.INVALID),
        "too-long": ExpectedResult(FailureClass.LIMIT),
        "out-of-tokens": ExpectedResult(FailureClass.LIMIT),
        "interrupted": ExpectedResult(FailureClass.CRASHED),
        "terminated": ExpectedResult(),
    }


def test_aider_opens_no_browser(tmp_path: Path) -> None:
    """Aider accepts every offer to open a page, so its browser does nothing; news is disabled."""
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home")
    command = _TYPE(_TYPE.Options()).command(request)
    browser = subprocess.run([command.env["BROWSER"], "http://model"], capture_output=True, check=True)
    assert (browser.stdout, browser.stderr) == (b"", b"")
    recordings = read_recordings(TRANSCRIPTS / "aider").values()
    assert [line for one in recordings for line in one.stdout if "HISTORY" in line] == []
