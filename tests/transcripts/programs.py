"""Which real programs are recorded, and what each is put through."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from adapters.claude_code import ClaudeCodeAdapter
from adapters.codex import CodexAdapter
from adapters.gemini import GeminiAdapter
from adapters.opencode import OpencodeAdapter
from orchestrator.protocols import AdapterType

#: Stands for the server's URL.
MODEL: Final = "http://model"


@dataclass(frozen=True, slots=True)
class Case:
    """One run: the script in the prompt, options and variables beside the program's own, and a signal for its process
    group once the model has been asked, or once it has `said` something or `made` a file. `is_dead`: nothing listens
    where the model should be.
    """

    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    signal: signal.Signals | None = None
    said: str | None = None
    made: str | None = None
    is_dead: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """How a program is run: its adapter, the options of all cases, in which `http://model` stands for the server's URL,
    and its variables, given that URL and its own home.
    """

    adapter: AdapterType
    options: Mapping[str, Any]
    environ: Callable[[str, Path], Mapping[str, str]]
    cases: Mapping[str, Case]


def _codex_environ(_url: str, home: Path) -> Mapping[str, str]:
    """Its home may not be where temporary files are."""
    (home.parent / "tmp").mkdir()
    return {"OPENAI_API_KEY": "no-key", "TMPDIR": str(home.parent / "tmp")}


#: What every program is put through; each adds and replaces what is its own.
CASES: Final[Mapping[str, Case]] = {
    "edit": Case("write hello.txt hi\nsay It is written.\nusage 120 34"),
    "tool": Case("run echo from-the-shell\nwrite out/b.txt two\nsay Both done."),
    "limited": Case("fail 429\nwrite hello.txt hi"),
    "limited-then-well": Case("fail 429 1 1\nwrite hello.txt hi"),
    "no-login": Case("fail 401\nwrite hello.txt hi"),
    "server-error": Case("fail 500\nwrite hello.txt hi"),
    "dead-server": Case("write hello.txt hi", is_dead=True),
    "broken-stream": Case("drop\nwrite hello.txt hi"),
    "interrupted": Case("delay 60\nwrite hello.txt hi", signal=signal.SIGINT),
    "terminated": Case("delay 60\nwrite hello.txt hi", signal=signal.SIGTERM),
}


def _gemini(url: str, home: Path) -> Mapping[str, str]:
    """Settings take variables. Of its ten attempts, which take minutes, two are left; its reports stay at home."""
    settings = {
        "security": {"auth": {"selectedType": "${AUTH_TYPE}"}},
        "privacy": {"usageStatisticsEnabled": False},
        "general": {"maxAttempts": 2},
        "model": {"maxSessionTurns": "${MAX_TURNS}"},
    }
    (home / ".gemini").mkdir(exist_ok=True)
    (home / ".gemini/settings.json").write_text(json.dumps(settings))
    own = {"AUTH_TYPE": "gemini-api-key", "MAX_TURNS": "-1", "TMPDIR": str(home)}
    return {"GOOGLE_GEMINI_BASE_URL": url, "GEMINI_API_KEY": "a-key-for-nothing", **own}


def _opencode_environ(url: str, home: Path) -> Mapping[str, str]:
    """Its own configuration file says where the model is."""
    file = home / "opencode.json"
    file.write_text(json.dumps({"provider": {"anthropic": {"options": {"baseURL": f"{url}/v1"}}}}))
    return {"OPENCODE_CONFIG": str(file), "ANTHROPIC_API_KEY": "no-key"}


def _claude_environ(url: str, _home: Path) -> Mapping[str, str]:
    return {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "no-key"}


_DENIED: Final = {"permission": {"edit": {"*": "allow", "hello.txt": "deny"}, "bash": "deny"}}
#: By a folder of it no one can make another.
_UNWRITABLE: Final = {"XDG_DATA_HOME": f"{os.devnull}/data"}


PROGRAMS: Final[Mapping[str, Program]] = {
    "gemini": Program(
        GeminiAdapter,
        {"model": "gemini-2.5-pro", "approval_mode": "yolo"},
        _gemini,
        {
            **CASES,
            "refused": Case("write ../beside.txt hi"),
            "no-shell": Case("write hello.txt hi\nrun echo from-the-shell", {"approval_mode": "auto_edit"}),
            "limited-for-long": Case("fail 429 9 4000\nwrite hello.txt hi"),
            "overloaded": Case("fail 503\nwrite hello.txt hi"),
            "wrong-request": Case("fail 400\nwrite hello.txt hi"),
            "no-such-model": Case("fail 404\nwrite hello.txt hi"),
            "turns": Case("write a.txt a\nwrite b.txt b", environ={"MAX_TURNS": "1"}),
            "no-key": Case("write hello.txt hi", environ={"GEMINI_API_KEY": ""}),
            "gateway": Case("write hello.txt hi", environ={"AUTH_TYPE": ""}),
            "untrusted": Case("write hello.txt hi", environ={"GEMINI_CLI_TRUST_WORKSPACE": "false"}),
        },
    ),
    "codex": Program(
        adapter=CodexAdapter,
        options={
            "model": "gpt-5.5",  # its newer ones have no tools but a program of JavaScript
            "provider": "model",
            "args": [
                *("--disable", "plugins"),  # a list of them is fetched from GitHub
                *("-c", 'model_providers.model.name="model"'),
                *("-c", 'model_providers.model.base_url="http://model/v1"'),
                *("-c", 'model_providers.model.env_key="OPENAI_API_KEY"'),
            ],
        },
        environ=_codex_environ,
        cases={
            **CASES,
            "dead-server": Case("write hello.txt hi", signal=signal.SIGTERM, said="waiting for network", is_dead=True),
            "refused": Case("write hello.txt hi\nrun echo hi > hello.txt", options={"sandbox": "read-only"}),
            "invalid": Case("fail 400\nwrite hello.txt hi"),
            "overloaded": Case("fail 503\nwrite hello.txt hi"),
            "no-key": Case("write hello.txt hi", environ={"OPENAI_API_KEY": ""}),
            "unwritable": Case("write hello.txt hi", environ={"CODEX_HOME": "/sys"}),
        },
    ),
    "claude-code": Program(
        adapter=ClaudeCodeAdapter,
        options={"model": "opus", "permission_mode": "bypassPermissions"},
        environ=_claude_environ,
        cases={
            **CASES,
            "limited-until": Case("fail 429 99 1\nwrite hello.txt hi"),
            "interrupted-tool": Case("run touch began; sleep 60\nusage 120 34", signal=signal.SIGINT, made="began"),
            "refused": Case(
                "write .git/hooks/x hi\nsay It is not written.", options={"permission_mode": "acceptEdits"}
            ),
            "turns": Case("write a.txt a\nwrite b.txt b", options={"args": ["--max-turns", "1"]}),
            "invalid": Case("fail 400\nwrite hello.txt hi"),
            "overloaded": Case("fail 529\nwrite hello.txt hi"),
        },
    ),
    "opencode": Program(
        adapter=OpencodeAdapter,
        options={"model": "anthropic/claude-sonnet-4-5"},
        environ=_opencode_environ,
        cases={
            **CASES,
            "limited-until": Case("fail 429 99 1\nwrite hello.txt hi"),
            "refused": Case("write hello.txt hi\nsay It is not written.", options={"config": _DENIED}),
            "invalid": Case("fail 400\nwrite hello.txt hi"),
            "overloaded": Case("fail 529\nwrite hello.txt hi"),
            "unknown-model": Case("write hello.txt hi", options={"model": "anthropic/no-such-model"}),
            "unwritable": Case("write hello.txt hi", environ=_UNWRITABLE),
        },
    ),
}
