"""The supported real CLIs and the setup of their users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from orchestrator.plugins import load_plugins
from orchestrator.protocols import Adapter, AdapterType, Capability
from tests.transcripts.programs.case import MODEL
from tests.transcripts.programs.profiles import CONTINUE_CONFIG

#: The folder of `make test-clis`.
CLIS: Final = Path(__file__).parents[2] / ".clis"
_KEY: Final = "a-key-for-nothing"


@cache
def _types() -> Mapping[str, AdapterType]:
    return load_plugins({"COUNCIL_PLUGINS": ""}).adapters


@dataclass(frozen=True, slots=True)
class Program:
    """A user's setup of a CLI: its entry under `adapters`, files at home, variables, and its login.

    A variable that starts with `~/` is a path at home. `needs` is the program to install. `calls` is the number of
    requests of one session to a model that always answers 429. `remedy` is a part of the message without a login, which
    means without `keys` or, if it has none, with one that the server rejects. `renews` are files that it writes again.
    `without_server` and `broken_stream` are the failure classes without a listener, and of streams that break.
    `tells_tokens`: reports the tokens of the model, False: an estimate, None: nothing. `keeps_path`: its shell, if any
    (`has_shell`), has the PATH of the CLI. `edits`: changes files.
    """

    adapter: Mapping[str, Any]
    needs: str | None
    calls: int
    remedy: str
    keys: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    renews: Sequence[str] = ()
    without_server: str = "transient"
    broken_stream: str = "transient"
    tells_tokens: bool | None = True
    keeps_path: bool = True
    has_shell: bool = True
    edits: bool = True

    def can(self, capability: Capability) -> bool:
        """Return whether its adapter has a capability."""
        return capability in self._adapter().capabilities()

    def _adapter(self) -> Adapter:
        options = {name: value for name, value in self.adapter.items() if name != "use"}
        adapter_type = _types()[self.adapter["use"]]
        return adapter_type(adapter_type.Options.model_validate(options))


_GEMINI: Final[Mapping[str, Any]] = {
    "needs": "gemini",
    "keys": {"GEMINI_API_KEY": _KEY},
    "environ": {"GOOGLE_GEMINI_BASE_URL": MODEL},
    "files": {
        ".gemini/settings.json": {
            "security": {"auth": {"selectedType": "gemini-api-key"}},
            "general": {"maxAttempts": 2},
            "privacy": {"usageStatisticsEnabled": False},
        }
    },
}
_OPENCODE: Final[Mapping[str, Any]] = {
    "needs": "opencode",
    "keys": {"ANTHROPIC_API_KEY": _KEY},
    "files": {
        ".config/opencode/opencode.json": {"provider": {"anthropic": {"options": {"baseURL": f"{MODEL}/v1"}}}},
    },
}

PROGRAMS: Final[Mapping[str, Program]] = {
    "claude-code": Program(
        {"use": "claude-code", "model": "sonnet", "permission_mode": "bypassPermissions"},
        needs="claude",
        calls=4,
        remedy="claude auth login",
        keys={"ANTHROPIC_API_KEY": _KEY},
        files={".claude/settings.json": {"env": {"ANTHROPIC_BASE_URL": MODEL}}},
    ),
    "codex": Program(
        # Its newer models have a JavaScript tool only; a list of plugins is fetched from GitHub.
        {"use": "codex", "model": "gpt-5.5", "provider": "model", "args": ["--disable", "plugins"]},
        needs="codex",
        calls=2,
        remedy="codex login",
        keys={"OPENAI_API_KEY": _KEY},
        files={
            ".codex/config.toml": (
                "[model_providers.model]\n"
                f'name = "model"\nbase_url = "{MODEL}/v1"\nenv_key = "OPENAI_API_KEY"\nwire_api = "responses"\n'
            )
        },
        without_server="timeout",  # it waits for the network forever
        keeps_path=False,  # a login shell, whose profile sets another
    ),
    "gemini": Program(
        {"use": "gemini", "model": "gemini-2.5-pro", "approval_mode": "yolo"},
        calls=3,
        remedy="GEMINI_API_KEY",
        **_GEMINI,
    ),
    "opencode": Program(
        {"use": "opencode", "model": "anthropic/claude-sonnet-4-5", "env": ["npm_config_registry"]},
        environ={"npm_config_registry": MODEL},  # where `Stage.assert_clean` finds downloads of packages
        calls=6,
        remedy="opencode auth login",
        **_OPENCODE,
    ),
    "aider": Program(
        {"use": "aider", "model": "openai/gpt-4o", "env": ["LITELLM_LOCAL_MODEL_COST_MAP"]},
        needs="aider",
        calls=27,  # nine retries in more than a minute, with three requests each
        remedy="set its provider's key",
        keys={"OPENAI_API_KEY": _KEY},
        environ={"OPENAI_API_BASE": f"{MODEL}/v1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        # It downloads model prices unless it has them.
        files={".aider/caches/model_prices_and_context_window.json": {"none": {}}},
        has_shell=False,
        tells_tokens=False,
    ),
    "acp-gemini": Program(
        {
            "use": "acp",
            "argv": ["gemini", "--acp", "-m", "gemini-2.5-pro"],
            "env": ["GEMINI_API_KEY", "GEMINI_CLI_SYSTEM_SETTINGS_PATH", "GOOGLE_GEMINI_BASE_URL"],
            "home": "own",
        },
        calls=2,
        remedy="log in",
        **{**_GEMINI, "environ": {**_GEMINI["environ"], "GEMINI_CLI_SYSTEM_SETTINGS_PATH": "~/.gemini/settings.json"}},
    ),
    "acp-opencode": Program(
        {
            "use": "acp",
            "argv": ["opencode", "acp"],
            "model": "anthropic/claude-sonnet-4-5",
            "env": ["ANTHROPIC_API_KEY", "OPENCODE_CONFIG"],
            "home": "own",
        },
        calls=6,
        remedy="log in",
        **_OPENCODE,
        environ={"OPENCODE_CONFIG": "~/.config/opencode/opencode.json"},
    ),
    "qwen-code": Program(
        {"use": "qwen-code", "model": "qwen3-coder-plus", "args": ["--auth-type", "openai"]},
        needs="qwen",
        calls=7,
        remedy="OPENAI_API_KEY",
        keys={"OPENAI_API_KEY": _KEY},
        environ={"OPENAI_BASE_URL": f"{MODEL}/v1"},
    ),
    "copilot": Program(
        {"use": "copilot", "model": "gpt-4o", "env": ["COPILOT_OFFLINE=true"]},
        needs="copilot",
        calls=6,
        remedy="copilot login",
        environ={"COPILOT_PROVIDER_BASE_URL": f"{MODEL}/v1", "COPILOT_PROVIDER_API_KEY": _KEY},
    ),
    "continue": Program(
        {"use": "continue"},
        needs="cn",
        calls=33,  # ten retries, with three requests each
        remedy="cn login",
        files={".continue/config.yaml": CONTINUE_CONFIG},
        tells_tokens=None,
    ),
    "kilo": Program(
        {"use": "kilo", "model": "anthropic/claude-sonnet-4-5"},
        needs="kilo",
        calls=3,
        remedy="kilo auth login",
        keys={"ANTHROPIC_API_KEY": _KEY},
        files={".config/kilo/kilo.json": {"provider": {"anthropic": {"options": {"baseURL": f"{MODEL}/v1"}}}}},
    ),
    "cline": Program(
        {"use": "cline"},
        needs="cline",
        calls=6,
        remedy="cline auth",
        renews=(".cline/data/settings/providers.json",),
        files={
            ".cline/data/settings/providers.json": {
                "version": 1,
                "lastUsedProvider": "openai-compatible",
                "modes": {},
                "providers": {
                    "openai-compatible": {
                        "settings": {
                            "provider": "openai-compatible",
                            "apiKey": "no-key",
                            "model": "gpt-4o",
                            "baseUrl": f"{MODEL}/v1",
                        },
                        "updatedAt": "2026-11-25T03:11:10.389Z",
                        "tokenSource": "manual",
                    }
                },
            }
        },
    ),
    "vibe": Program(
        {"use": "vibe"},
        needs="vibe",
        calls=1,
        remedy="vibe --setup",
        keys={"MISTRAL_API_KEY": _KEY},
        files={
            ".vibe/config.toml": (
                'active_model = "scripted"\nenable_telemetry = false\nenable_update_checks = false\n'
                f'[[providers]]\nname = "local"\napi_base = "{MODEL}/v1"\napi_key_env_var = "MISTRAL_API_KEY"\n'
                '[[models]]\nname = "gpt-4o"\nprovider = "local"\nalias = "scripted"\n'
            )
        },
    ),
    "kimi": Program(
        {"use": "kimi"},
        needs="kimi",
        calls=9,
        remedy="kimi login",
        keys={"KIMI_API_KEY": _KEY},
        environ={"KIMI_BASE_URL": f"{MODEL}/v1", "KIMI_MODEL_NAME": "kimi-k2"},
        tells_tokens=None,
    ),
    "llm": Program(
        {"use": "llm", "model": "gpt-4o-mini"},
        needs="llm",
        calls=3,
        remedy="llm keys set",
        keys={"OPENAI_API_KEY": _KEY},
        environ={"OPENAI_BASE_URL": f"{MODEL}/v1"},
        tells_tokens=False,
        has_shell=False,
        edits=False,
    ),
    "mini-swe-agent": Program(
        {"use": "mini-swe-agent", "model": "openai/gpt-4o"},
        needs="mini",
        calls=9,
        remedy="key of the model",
        keys={"OPENAI_API_KEY": _KEY},
        environ={"OPENAI_API_BASE": f"{MODEL}/v1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ),
    "ollama": Program(
        {"use": "ollama", "model": "scripted", "host": MODEL},
        needs=None,
        calls=1,
        remedy="log in",
        has_shell=False,
        without_server="auth",
    ),
}


def selected(names: str) -> Mapping[str, Program]:
    """Return the CLIs with these names, by default all. Raises SystemExit for an unknown name."""
    chosen = names.split() or list(PROGRAMS)
    unknown = [name for name in chosen if name not in PROGRAMS]
    if unknown:
        raise SystemExit(f"CLIS: there is no {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    return {name: PROGRAMS[name] for name in chosen}
