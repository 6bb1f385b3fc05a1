"""Programs that are run by their profiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from orchestrator.plugins import load_plugins
from tests.transcripts.programs.case import ASKED, CASES, MODEL, Case, Program

_TYPES: Final = load_plugins({"COUNCIL_PLUGINS": ""}).adapters


def _openai(url: str, _home: Path) -> Mapping[str, str]:
    bases = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
    return {"OPENAI_API_KEY": "no-key", **dict.fromkeys(bases, f"{url}/v1"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def _program(name: str, options: Mapping[str, Any], environ: Any = _openai, **cases: Case) -> Program:
    usual = {one: CASES[one] for one in ("edit", "tool", "no-login", "server-error", "dead-server", "broken-stream")}
    return Program(adapter=_TYPES[name], options=options, environ=environ, cases={**usual, **cases})


# It has a shell only, ends with a command, and begins its first line with words of its own.
_END: Final = "run echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"

MINI_SWE_AGENT: Final = Program(
    adapter=_TYPES["mini-swe-agent"],
    options={"model": "openai/gpt-4o"},
    environ=_openai,
    cases={
        "edit": Case(f"\nrun echo hi > hello.txt\n{_END}\nusage 120 34"),
        "no-login": Case(f"\nfail 401\n{_END}"),
        "invalid": Case(f"\nfail 400\n{_END}"),
        "limited-then-well": Case(f"\nfail 429 1 1\n{_END}"),
    },
)
# It has no tools, without which the server would ignore a script that needs one.
LLM: Final = _program(
    "llm",
    {"model": "gpt-4o-mini"},
    **{
        "edit": Case("say It is written.\nusage 120 34"),
        "tool": Case("say No tool is needed.", asked={"read_only": True}),
        "no-login": Case("fail 401\nsay x"),
        "server-error": Case("fail 500\nsay x"),
        "dead-server": Case("say x", is_dead=True),
        "broken-stream": Case("drop\nsay x"),
        "limited": Case("fail 429\nsay x"),
    },
)
#: Its model is set only in a file of configuration.
CONTINUE_CONFIG: Final = {
    "name": "test",
    "version": "1.0.0",
    "schema": "v1",
    "models": [
        {
            "name": "scripted",
            "provider": "openai",
            "model": "gpt-4o",
            "apiKey": "no-key",
            "apiBase": f"{MODEL}/v1",
            "roles": ["chat"],
            "capabilities": ["tool_use"],
        }
    ],
}
CONTINUE: Final = _program(
    "continue", {"files": {"config.yaml": CONTINUE_CONFIG}, "args": ["--config", "{home}/config.yaml"]}, lambda *_: {}
)
COPILOT: Final = _program(
    "copilot",
    {"model": "gpt-4o", "env": ["COPILOT_OFFLINE=true"]},
    lambda url, _: {"COPILOT_PROVIDER_BASE_URL": f"{url}/v1", "COPILOT_PROVIDER_API_KEY": "no-key"},
    resumed=ASKED["resumed"],
)
KILO: Final = _program(
    "kilo",
    {
        "model": "anthropic/claude-sonnet-4-5",
        "files": {".config/kilo/kilo.json": {"provider": {"anthropic": {"options": {"baseURL": f"{MODEL}/v1"}}}}},
        "settings": {},
    },
    lambda *_: {"ANTHROPIC_API_KEY": "no-key"},
    resumed=ASKED["resumed"],
    limited=CASES["limited"],
)
_CLINE: Final = {
    "provider": "openai-compatible",
    "apiKey": "no-key",
    "model": "gpt-4o",
    "baseUrl": f"{MODEL}/v1",
}
CLINE: Final = _program(
    "cline",
    {
        "files": {
            ".cline/data/settings/providers.json": {
                "version": 1,
                "lastUsedProvider": "openai-compatible",
                "modes": {},
                "providers": {"openai-compatible": {"settings": _CLINE, "updatedAt": "2026-11-25T03:11:10.389Z"}},
            }
        },
        "logins": [],
    },
    lambda *_: {},
    limited=CASES["limited"],
)
_VIBE: Final = f"""
active_model = "scripted"
enable_telemetry = false
enable_update_checks = false
[[providers]]
name = "local"
api_base = "{MODEL}/v1"
api_key_env_var = "MISTRAL_API_KEY"
[[models]]
name = "gpt-4o"
provider = "local"
alias = "scripted"
"""
VIBE: Final = _program(
    "vibe",
    {"files": {".vibe/config.toml": _VIBE}, "links": []},
    lambda *_: {"MISTRAL_API_KEY": "no-key"},
    resumed=ASKED["resumed"],
    limited=CASES["limited"],
)
