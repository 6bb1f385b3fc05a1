"""The contract of every profile in the package, with recordings of those that were run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from orchestrator.config.profiles import ProfileAdapterType
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.plugins import load_plugins
from orchestrator.protocols import SessionEnd
from orchestrator.testing.adapter_contract import AdapterContract, ExpectedResult, plain_requests
from tests.contract.verdicts import TRANSCRIPTS, get_verdict

_TYPES: Final = load_plugins({"COUNCIL_PLUGINS": ""}).adapters

#: The expected results of recordings, by profile.
RECORDED: Final[Mapping[str, Mapping[str, ExpectedResult]]] = {
    "cline": {
        "edit": ExpectedResult(text="It is written.", tokens=(2 * 120, 2 * 34)),
        "tool": ExpectedResult(text="Both done.", tokens=(3 * 100, 3 * 10)),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
    },
    "continue": {
        "edit": ExpectedResult(text="It is written."),
        "tool": ExpectedResult(text="Both done."),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
    },
    "copilot": {
        "edit": ExpectedResult(text="It is written.", tokens=(2 * 120, 2 * 34), paths=frozenset({"hello.txt"})),
        "tool": ExpectedResult(text="Both done.", tokens=(3 * 100, 3 * 10)),
        "resumed": ExpectedResult(
            session="3aaf2d74-990f-4a81-8b41-b2b28d6c6899",
            text="Both are there.",
            tokens=(2 * 120 + 2 * 20, 2 * 34 + 2 * 4),
        ),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
    },
    "llm": {
        "edit": ExpectedResult(text="It is written."),
        "tool": ExpectedResult(text="No tool is needed."),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
    },
    "mini-swe-agent": {
        "edit": ExpectedResult(tokens=(2 * 120, 2 * 34)),
        "limited-then-well": ExpectedResult(),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "invalid": ExpectedResult(FailureClass.INVALID),
    },
    "vibe": {
        "resumed": ExpectedResult(
            session="052d055d-de2d-df4a-34f3-3b708768d0d4", text="Both are there.", tokens=(2 * 20, 2 * 4)
        ),
        "edit": ExpectedResult(text="It is written.", tokens=(2 * 120, 2 * 34), paths=frozenset({"hello.txt"})),
        "tool": ExpectedResult(text="Both done.", tokens=(3 * 100, 3 * 10)),
        "limited": ExpectedResult(FailureClass.RATE_LIMITED),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
    },
    "qwen-code": {
        "edit": ExpectedResult(text="It is written.", tokens=(2 * 120, 2 * 34), paths=frozenset({"/work/hello.txt"})),
        "resumed": ExpectedResult(
            session="390590a8-34e3-4e9f-8e6b-c8cf364f2416",
            text="Both are there.",
            tokens=(2 * 120 + 2 * 20, 2 * 34 + 2 * 4),
        ),
        "tool": ExpectedResult(text="Both done."),
        "limited-then-well": ExpectedResult(text="Done."),
        "no-login": ExpectedResult(FailureClass.AUTH),
        "no-key": ExpectedResult(FailureClass.AUTH),
        "server-error": ExpectedResult(FailureClass.OVERLOADED),
        "dead-server": ExpectedResult(FailureClass.TRANSIENT),
        "broken-stream": ExpectedResult(FailureClass.TRANSIENT),
        "invalid": ExpectedResult(FailureClass.INVALID),
        "interrupted": ExpectedResult(),
        "terminated": ExpectedResult(),
        "0.15-edit": ExpectedResult(text="It is written.", tokens=(2 * 120, 2 * 34)),
        "0.15-no-login": ExpectedResult(FailureClass.AUTH),
        "0.15-server-error": ExpectedResult(FailureClass.OVERLOADED),
        "0.15-invalid": ExpectedResult(FailureClass.INVALID),
    },
}


def _contract(name: str) -> type[AdapterContract]:
    recorded = RECORDED.get(name, {})
    body = {
        "__doc__": f"The profile {name}.",
        "__module__": __name__,
        "adapter_type": _TYPES[name],
        "options": {"model": "large", "args": ["--verbose"], "env": ["MY_KEY"]},
        "transcripts": TRANSCRIPTS / name if recorded else None,
        "recorded": recorded,
    }
    return type("TestProfile", (AdapterContract,), body)


# `aider` has more recordings, and a module of its own.
_PROFILES: Final = [
    name for name, made in sorted(_TYPES.items()) if isinstance(made, ProfileAdapterType) and name != "aider"
]
globals().update({f"Test_{name.replace('-', '_')}": _contract(name) for name in _PROFILES})


def test_arguments_of_a_profile_are_in_order(tmp_path: Path) -> None:
    """Those of the session, the model, and the user's own; the program can be another one."""
    contract = _contract("qwen-code")()
    adapter_type = contract.adapter_type
    adapter = adapter_type(adapter_type.Options.model_validate({"bin": "/opt/qwen", **contract.options}))
    request = replace(plain_requests(tmp_path)[0], resume="0c5b2f3e-1d")
    common = ("/opt/qwen", "--output-format", "stream-json", "--approval-mode", "yolo")
    own = ("--model", "large", "--verbose")
    assert adapter.command(request).argv == (*common, "--resume", "0c5b2f3e-1d", *own)


@pytest.mark.parametrize(
    ("use", "text"), [("gemini", "critical error ./"), ("crush", "invalid."), ("vibe", "missing.")]
)
def test_long_line_is_searched_quickly(use: str, text: str) -> None:
    """In milliseconds, even if it repeats the beginning of a pattern."""
    adapter = _TYPES[use](_TYPES[use].Options.model_validate({}))
    line = text * (65_536 // len(text))
    began = time.process_time()
    adapter.verdict(SessionEnd(1, None, 1_000_000.0, line, line))
    assert time.process_time() - began < 0.5


def mini_error(text: str) -> str:
    info = {"exit_status": "InternalServerError", "submission": ""}
    return json.dumps({"file": {"info": info, "messages": [{}, {"extra": {"exception_str": text}}]}})


@pytest.mark.parametrize(
    ("use", "line", "failure"),
    [
        ("copilot", "GitHub Copilot native binary at /opt/copilot was terminated by signal SIGKILL.", None),
        ("copilot", "TypeError: terminated", FailureClass.TRANSIENT),
        ("mini-swe-agent", mini_error("OpenAIException - Connection error."), FailureClass.TRANSIENT),
        ("mini-swe-agent", mini_error("OpenAIException - Missing credentials. Pass an `api_key`"), FailureClass.AUTH),
        ("mini-swe-agent", mini_error("OpenAIException - The server had an error"), FailureClass.OVERLOADED),
    ],
)
def test_last_line_is_classified(use: str, line: str, failure: FailureClass | None) -> None:
    """None: by the exit code, as a crash."""
    found = get_verdict(_TYPES[use], {}, line)
    assert (found and found.failure) == failure
