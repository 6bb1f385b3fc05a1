"""The permissions that a file needs are derived key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.load import load_value
from orchestrator.config.permissions import list_permission_requests
from orchestrator.plugins import load_plugins

INSTALLED = load_plugins()


def asked(folder: Path, **settings: Any) -> tuple[str, ...]:
    value = {
        "version": 1,
        "adapters": {"a": {"use": "command", "argv": ["sh", "{prompt_file}"]}},
        "tasks": [{"id": "t", "prompt": "x"}],
        **settings,
    }
    config = load_value(value, folder, INSTALLED.adapters, extensions=INSTALLED.extensions())
    return list_permission_requests(config, folder)


def command(**settings: Any) -> dict[str, Any]:
    return {"adapters": {"a": {"use": "command", "argv": ["sh", "{prompt_file}"], **settings}}}


ASKS: dict[str, dict[str, Any]] = {
    "sandbox: off": {"sandbox": "off"},
    "nested_sandboxes: true ": {"nested_sandboxes": True},
    "prompt_file or schema: /": {"tasks": [{"id": "t", "prompt_file": str(Path(__file__))}]},
    "writable: ": {"writable": ["/tmp"]},
    "readable: ": {"readable": ["/tmp"]},
    "adapters.a.writable: ": command(writable=["/tmp"]),
    "adapters.a.argv: /opt/x ": command(argv=["/opt/x", "{prompt_file}"]),
    "adapters.a.argv: ./x ": command(argv=["./x", "{prompt_file}"]),
    "adapters.a.env: MY_KEY ": command(env=["MY_KEY"]),
    "adapters.a.env: PATH=. ": command(env={"PATH": "."}),
    "adapters.a@b.accounts: $KEY (passed from your environment as X": command(accounts={"b": {"X": "$KEY"}}),
    "adapters.a@b.accounts: /usr (set as X": command(accounts={"b": {"X": "/usr"}}),
    "adapters.a.bin: /opt/claude ": {"adapters": {"a": {"use": "claude-code", "bin": "/opt/claude"}}},
    "mcp_servers.m.env: KEY ": {"mcp_servers": {"m": {"command": ["x"], "env": ["KEY"]}}},
    "worktrees.env: KEY ": {"worktrees": {"env": ["KEY"]}},
    "worktrees.copy: .env ": {"worktrees": {"copy": [".env"]}},
    "checks_env: KEY ": {"defaults": {"checks_env": ["KEY"]}},
    "state: file:///x ": {"state": "file:///x"},
    "repo: /": {"repo": "/"},
    "repo: https://localhost/x ": {"repo": "https://localhost/x"},
    "sinks.s: jsonlines ": {"sinks": {"s": {"use": "jsonlines", "file": "out.jsonl"}}},
}


@pytest.mark.parametrize("line", ASKS)
def test_settings_beyond_the_sandbox_need_trust(tmp_path: Path, line: str) -> None:
    """One line each."""
    found = asked(tmp_path, **ASKS[line])
    assert len(found) == 1, found
    assert found[0].startswith(line)


def test_settings_within_the_sandbox_need_no_trust(tmp_path: Path) -> None:
    """Commands of checks and worktrees, limits, branches, and the default network."""
    worktrees = {"setup": ["make"], "before_run": ["make x"], "ports": 2, "keep_ignored": ["node_modules"]}
    defaults = {"checks": ["make test"], "attempts": 5, "priority": 1, "max_file": "1GB"}
    assert asked(tmp_path, worktrees=worktrees, defaults=defaults, capacity=9, network="off", target="main") == ()
    # Sessions can reach these by default too.
    assert asked(tmp_path, network={"allow": ["*.example.com", "localhost:8000", "10.0.0.1"]}) == ()
