"""The supported real CLIs and the setup of their users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

#: The folder of `make test-clis`.
CLIS: Final = Path(__file__).parents[2] / ".clis"
#: Placeholder of the server's URL below.
MODEL: Final = "http://model"


@dataclass(frozen=True, slots=True)
class Program:
    """A user's setup of a CLI: its entry under `adapters`, files at home, variables, and its login.

    A variable that starts with `~/` is a path at home. `needs` are the packages to install. `calls` is the number of
    requests of one session to a model that always answers 429.
    `without_server` is the failure class without a listener; `remedy` is a part of the message without a login, which
    means without `keys` or, if it has none, with one that the server rejects. `has_servers`: supports the Model Context
    Protocol. `tells_tokens`: reports the model's token usage instead of an estimate. `asks_before_edits`: can be
    configured to. `keeps_path`: its shell, if any (`has_shell`), has the PATH of the CLI.
    """

    adapter: Mapping[str, Any]
    needs: str | None
    calls: int
    remedy: str
    keys: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    can_resume: bool = True
    has_servers: bool = True
    without_server: str = "transient"
    tells_tokens: bool = True
    asks_before_edits: bool = False
    keeps_path: bool = True
    has_shell: bool = True

    @property
    def has_stop_hook(self) -> bool:
        """Whether it can run a command when it is about to end."""
        return self.adapter["use"] in {"claude-code", "gemini"}


_GEMINI: Final[Mapping[str, Any]] = {
    "needs": "gemini",
    "keys": {"GEMINI_API_KEY": "a-key-for-nothing"},
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
    "keys": {"ANTHROPIC_API_KEY": "a-key-for-nothing"},
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
        keys={"ANTHROPIC_API_KEY": "a-key-for-nothing"},
        files={".claude/settings.json": {"env": {"ANTHROPIC_BASE_URL": MODEL}}},
        asks_before_edits=True,
    ),
    "codex": Program(
        # Its newer models have a JavaScript tool only; a list of plugins is fetched from GitHub.
        {"use": "codex", "model": "gpt-5.5", "provider": "model", "args": ["--disable", "plugins"]},
        needs="codex",
        calls=2,
        remedy="codex login",
        keys={"OPENAI_API_KEY": "a-key-for-nothing"},
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
        asks_before_edits=True,
        **_GEMINI,
    ),
    "opencode": Program(
        {"use": "opencode", "model": "anthropic/claude-sonnet-4-5"},
        calls=6,
        asks_before_edits=True,
        remedy="opencode auth login",
        **_OPENCODE,
    ),
    "aider": Program(
        {"use": "aider", "model": "openai/gpt-4o", "env": ["LITELLM_LOCAL_MODEL_COST_MAP"]},
        needs="aider",
        calls=27,  # nine retries in more than a minute, with three requests each
        remedy="set its provider's key",
        keys={"OPENAI_API_KEY": "a-key-for-nothing"},
        environ={"OPENAI_API_BASE": f"{MODEL}/v1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        # It downloads model prices unless it has them.
        files={".aider/caches/model_prices_and_context_window.json": {"none": {}}},
        can_resume=False,
        has_servers=False,
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
        can_resume=False,
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
        can_resume=False,
        **_OPENCODE,
        environ={"OPENCODE_CONFIG": "~/.config/opencode/opencode.json"},
    ),
    "ollama": Program(
        {"use": "ollama", "model": "scripted", "host": MODEL},
        needs=None,
        calls=1,
        remedy="log in",
        can_resume=False,
        has_servers=False,
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
