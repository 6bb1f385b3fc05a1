"""The contract of the opencode adapter, with recorded output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from pydantic import ValidationError

from adapters.acp import AgentChoice
from adapters.opencode import OpencodeAdapter, OpencodeOptions
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import (
    AgentMessage,
    ConversationStarted,
    FinalResult,
    SessionRequest,
    ToolCall,
    ToolDenied,
    ToolResult,
    UsageReport,
)
from orchestrator.testing.adapter_contract import AdapterContract, ExpectedResult
from orchestrator.testing.recordings import read_recordings
from tests.contract.verdicts import TRANSCRIPTS, end, get_verdict

#: The variable with a configuration.
VARIABLE: Final = "OPENCODE_CONFIG_CONTENT"


def opencode(type_: str, part: dict[str, Any] | None = None, **fields: Any) -> str:
    more = {} if part is None else {"part": {"id": "prt_1", "sessionID": "ses_1", **part}}
    return json.dumps({"type": type_, "timestamp": 1_790_000_000_500, "sessionID": "ses_1", **more, **fields})


def opencode_tool(name: str, status: str = "completed", **state: Any) -> str:
    return opencode("tool_use", {"type": "tool", "tool": name, "state": {"status": status, **state}})


def opencode_step(reason: str, **tokens: int) -> str:
    counts = {"input": 1, "output": 4, "reasoning": 50, "cache": {"write": 20, "read": 300}, **tokens}
    return opencode("step_finish", {"type": "step-finish", "reason": reason, "tokens": counts, "cost": 0.25})


def opencode_error(name: str, message: str, **data: Any) -> str:
    return opencode("error", error={"name": name, "data": {"message": message, **data}})


def opencode_api_error(status: int, message: str = "No.", **data: Any) -> str:
    return opencode_error("APIError", message, statusCode=status, isRetryable=False, **data)


BEGUN = opencode("step_start", {"type": "step-start"})
HIDDEN = opencode_error("UnknownError", "Unexpected server error. Check server logs for details.", ref="err_1")
NO_MODEL = 'timestamp=x level=ERROR run=1 message="failed" error="ProviderModelNotFoundError: Model not found: a/b."'
WAITS = 'timestamp=x level=ERROR message="stream error" agent=build error.error="AI_APICallError: Rate limit reached"'

MODEL = "openrouter/qwen/qwen3-coder"
STEP = UsageReport(321, 54, 0.25, cached_tokens=300, model=MODEL)

PATCH = """\
*** Begin Patch
*** Update File: a.py
*** Move to: b.py
@@
-x
+y
*** Add File: c d.py
+z
*** End Patch"""


class TestOpencode(AdapterContract):
    """JSON lines without a result, and a log with details."""

    adapter_type = OpencodeAdapter
    options: ClassVar = {
        "model": MODEL,
        "agent": "build",
        "config": {"permission": {"webfetch": "deny"}, "provider": {"x": {"options": {"apiKey": "{env:MY_KEY}"}}}},
        "args": ["--variant", "high"],
        "env": ["MY_KEY"],
    }
    lines: ClassVar = (
        (opencode("step_start", {"type": "step-start"}), (ConversationStarted("ses_1"),)),
        (opencode("text", {"type": "text", "text": "Hi."}), (AgentMessage("Hi."),)),
        (opencode("text", {"type": "text", "text": " "}), ()),
        (opencode("reasoning", {"type": "reasoning", "text": "Hm."}), ()),
        (opencode_tool("edit", input={"filePath": "/w/a.py"}), (ToolCall("edit", "/w/a.py", ("/w/a.py",)),)),
        (opencode_tool("bash", input={"command": "make\n test"}), (ToolCall("bash", "make test"),)),
        (
            opencode("tool_use", {"tool": "bash", "callID": "c", "state": {"input": {}, "metadata": {"exit": 1}}}),
            (ToolCall("bash", call="c"), ToolResult("c", "exit code 1")),
        ),
        (opencode_tool("bash", "error", input={"command": "x"}, error="Timeout"), (ToolCall("bash", "x"),)),
        (
            opencode_tool("apply_patch", input={"patchText": PATCH}),
            (ToolCall("apply_patch", "a.py b.py c d.py", ("a.py", "b.py", "c d.py"), diff=PATCH),),
        ),
        (
            opencode_tool("write", "error", input={"filePath": "a"}, error="The user has specified a rule which"
                          " prevents you from using this specific tool call. Here are some of the relevant rules []"),
            (
                ToolCall("write", "a", ("a",)),
                ToolDenied("write", "a", "allow it with `permission` in the adapter's `config`"),
            ),
        ),
        (opencode_step("tool-calls"), (STEP,)),
        (opencode_step("stop"), (STEP, FinalResult())),
        ('{"type":"step_finish","part":{"reason":"stop","tokens":{"cache":1,"output":true},"cost":0}}',
         (UsageReport(model=MODEL), FinalResult())),
        (
            opencode_api_error(429, responseHeaders={"retry-after": "60"}),
            (ConversationStarted("ses_1"), FinalResult("", Failed(FailureClass.RATE_LIMITED, "No.", 1_790_000_060.5))),
        ),
        (
            opencode_api_error(429, responseHeaders={"retry-after": "Mon, 21 Sep 2026 14:13:20 GMT"}),
            (ConversationStarted("ses_1"), FinalResult("", Failed(FailureClass.RATE_LIMITED, "No.", 1_790_000_000.0))),
        ),
        (
            opencode_api_error(429, responseHeaders={"retry-after": "soon"}),
            (ConversationStarted("ses_1"), FinalResult("", Failed(FailureClass.RATE_LIMITED, "No."))),
        ),
        ('{"type":"error"}', (FinalResult("", Failed(FailureClass.CRASHED, "it ended with an error: unnamed")),)),
        ("plain words", (AgentMessage("plain words"),)),
    )  # fmt: skip
    ends: ClassVar = (
        (end(opencode_api_error(403)), FailureClass("auth")),
        (end(opencode_api_error(400, "Your credit balance is too low to access it.")), FailureClass("auth")),
        (end(opencode_api_error(429, responseBody='{"error":{"code":"insufficient_quota"}}')), FailureClass("auth")),
        (end(opencode_api_error(404)), FailureClass("invalid")),
        (end(opencode_error("ProviderAuthError", "x", providerID="openai")), FailureClass("auth")),
        (end(opencode_error("ContextOverflowError", "prompt is too long")), FailureClass("limit")),
        (end(f"{opencode_error('ContextOverflowError', 'x')}\n{opencode_step('stop')}"), None),
        (end(opencode_error("MessageOutputLengthError", "")), FailureClass("limit")),
        (end(opencode_error("ContentFilterError", "x")), FailureClass("refused")),
        (end(opencode_step("length"), 0), FailureClass("limit")),
        (end(opencode_error("APIError", "x", isRetryable=True)), FailureClass("transient")),
        (end(opencode_error("APIError", "x", isRetryable=False)), FailureClass("crashed")),
        (end(HIDDEN), FailureClass("crashed")),
        (end(HIDDEN, stderr=NO_MODEL), FailureClass("invalid")),
        (end(opencode_step("tool-calls"), None, WAITS), FailureClass("rate_limited")),
        (end(opencode_step("stop"), 0, WAITS), None),
        (
            end(
                "",
                stderr="\x1b[91m\x1b[1mError: \x1b[0mUnexpected error\n\n"
                "Unknown: FileSystem.open (/home/me/.local/share/opencode/log/opencode.log)",
            ),
            FailureClass("invalid"),
        ),
        (end(f"{BEGUN}\n{opencode_step('tool-calls')}", 0), FailureClass("crashed")),
        (end(f"{BEGUN}\n{opencode_step('tool-calls')}", None), None),
        (end("", 0), None),
    )
    limits: ClassVar = (
        (end("", None, '{"type":"council.limited","message":"No.","until":1790003600000}'), 1_790_003_600.0),
        (end(opencode_api_error(429, "Usage limit reached, resets in 2 hours 5 minutes.")), 1_790_007_500.0),
        (end(opencode_api_error(429, responseHeaders={"retry-after": "60"})), 1_790_000_060.5),
    )
    transcripts = TRANSCRIPTS / "opencode"
    recorded: ClassVar = {
        "resumed": ExpectedResult(
            session="ses_dfc3ada87ffe7Zbxaq2o2A54xT",
            text="Both are there.",
            tokens=(2 * 20, 2 * 4),
            paths=frozenset({"/work/b.txt"}),
        ),
        "read-only": ExpectedResult(text="It is looked at.", paths=frozenset({"/work/hello.txt"})),
        "edit": ExpectedResult(
            session="ses_dfc986321ffeZTBadsNvnjbr3u",
            text="It is written.",
            tokens=(2 * 120, 2 * 34),
            paths=frozenset({"/work/hello.txt"}),
        ),
        "tool": ExpectedResult(text="Both done.", paths=frozenset({"/work/out/b.txt"})),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED, tokens=(0, 0)),
        "limited-for-long": ExpectedResult(FailureClass.RATE_LIMITED),
        "limited-until": ExpectedResult(FailureClass.RATE_LIMITED),
        "limited-then-well": ExpectedResult(text="Done.", paths=frozenset({"/work/hello.txt"})),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "overloaded": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "unknown-model": ExpectedResult(FailureClass.INVALID),
        "unwritable": ExpectedResult(FailureClass.INVALID),
        "refused": ExpectedResult(text="It is not written.", paths=frozenset({"/work/hello.txt"})),
        "interrupted": ExpectedResult(),
        "terminated": ExpectedResult(),
    }


def test_opencode_usage_limit_has_reset_time() -> None:
    """From the header of its last response: one second later."""
    recording = read_recordings(TRANSCRIPTS / "opencode")["limited-until"]
    failed = get_verdict(OpencodeAdapter, {}, "\n".join(recording.stdout))
    assert failed is not None
    assert failed.until == json.loads(recording.stdout[-1])["timestamp"] / 1000 + 1


@pytest.mark.parametrize("acp", [False, True])
def test_opencode_configuration_of_the_environment_is_merged_with_ours(acp: bool, tmp_path: Path) -> None:
    """Otherwise it would remove the plugins that enforce ownership and limits."""
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home", pre_edit=("hook",))
    given = {"plugin": ["theirs"], "permission": {"bash": "deny"}, "model": "a/b"}
    make = AgentChoice(OpencodeAdapter, OpencodeOptions)

    def made(env: object) -> Any:
        options = {"config": {"permission": {"edit": "ask"}}, "acp": acp, "env": env}
        return make(OpencodeOptions.model_validate(options))

    config = json.loads(made({VARIABLE: json.dumps(given)}).command(request).env[VARIABLE])
    assert config["model"] == "a/b"
    assert config["permission"]["bash"] == "deny"
    own = [(tmp_path / "home" / name).as_uri() for name in ("council-limit.js", "council-hook.js")]
    assert config["plugin"][0] == "theirs"
    assert config["plugin"][1:] == own
    with pytest.raises(ValidationError, match="is not a JSON object"):
        made([f"{VARIABLE}=[]"])
    with pytest.raises(ValidationError, match="set its content in `env`"):
        made([VARIABLE])


def test_opencode_configuration_overrides_ours(tmp_path: Any) -> None:
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home")
    options = {"config": {"share": "manual", "permission": {"bash": "deny"}}}
    command = OpencodeAdapter(OpencodeAdapter.Options.model_validate(options)).command(request)  # type: ignore[arg-type]
    assert json.loads(command.env[VARIABLE]) == {
        "autoupdate": False,
        "share": "manual",
        "permission": {"bash": "deny"},
        "plugin": [(tmp_path / "home/council-limit.js").as_uri()],
    }
