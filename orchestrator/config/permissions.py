"""List the permissions that a config requests, for confirmation by a user."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from orchestrator.config.accounts import VARIABLE_MARK
from orchestrator.config.model import RunConfig
from orchestrator.domain.settings.run_settings import (
    AdapterConfig,
    PathAccess,
    PullRequestConfig,
    SandboxSettings,
    SinkConfig,
    TrackerConfig,
    WorktreeSettings,
)


def list_permission_requests(config: RunConfig, inside: Path) -> tuple[str, ...]:
    """Return the requested permissions, one line each, in the order of the keys.

    `inside` is the root of the checkout with the config file. Tasks, inline prompts, commands of checks and worktrees,
    limits, branches and programs without a path need no permission, because they are limited by the sandbox.
    """
    return tuple(dict.fromkeys(_requests(config, inside)))


def _requests(config: RunConfig, inside: Path) -> Iterator[str]:
    if config.is_url:
        yield f"repo: {config.repo} (fetch and push with your credentials)"
    elif not Path(config.repo).is_relative_to(inside.resolve()):
        yield f"repo: {config.repo} (outside {inside})"
    for path in config.texts:
        if not path.is_relative_to(inside.resolve()):
            yield f"prompt_file or schema: {path} (its content is passed to sessions)"
    yield from _sandbox(config.sandbox)
    for name, adapter in config.adapters.items():
        yield from _adapter(f"adapters.{name}.", adapter)
    for name, server in config.mcp_servers.items():
        yield from _variables(f"mcp_servers.{name}.env", server.env)
    yield from _worktrees(config.worktrees)
    if config.state.url is not None:
        yield f"state: {config.state.url} (where runs are recorded)"
    for task in (*config.tasks, *([config.template] if config.template is not None else [])):
        yield from _variables("checks_env", task.checks_env)
    yield from _sinks_and_trackers("sinks", config.sinks)
    yield from _sinks_and_trackers("trackers", config.trackers)
    if config.pull_requests is not None:
        yield _plugin("pull_requests", config.pull_requests)


def _sandbox(sandbox: SandboxSettings) -> Iterator[str]:
    if sandbox.sandbox == "off":
        yield "sandbox: off (sessions and checks run without a sandbox)"
    if sandbox.nested_sandboxes:
        yield "nested_sandboxes: true (sessions and checks can make user namespaces)"
    yield from _access("", sandbox.access)


def _worktrees(worktrees: WorktreeSettings) -> Iterator[str]:
    yield from _variables("worktrees.env", worktrees.env)
    for key, paths in (("copy", worktrees.copied), ("link", worktrees.linked)):
        for path in paths:
            yield f"worktrees.{key}: {path} (sessions can read this untracked file of your checkout)"


def _sinks_and_trackers(kind: str, entries: Mapping[str, SinkConfig] | Mapping[str, TrackerConfig]) -> Iterator[str]:
    for name, entry in entries.items():
        yield _plugin(f"{kind}.{name}", entry)


def _plugin(at: str, entry: SinkConfig | TrackerConfig | PullRequestConfig) -> str:
    options = entry.options.model_dump(mode="json", exclude_unset=True)
    written = json.dumps(options, ensure_ascii=False, sort_keys=True)
    return f"{at}: {entry.use} {written} (runs without a sandbox)"


def _adapter(at: str, adapter: AdapterConfig) -> Iterator[str]:
    yield from _access(at, adapter.access)
    for variables in adapter.accounts.values():
        for name, value in variables.items():
            passed = f"passed from your environment as {name}" if value.startswith(VARIABLE_MARK) else f"set as {name}"
            yield f"{at}accounts: {value} ({passed}: sessions use the account there)"
    options = adapter.options.model_dump(mode="json", exclude_unset=True)
    for key in ("bin", "argv", "command"):
        written = options.get(key)
        program = written[0] if isinstance(written, list) and written else written
        if isinstance(program, str) and "/" in program:
            yield f"{at}{key}: {program} (run without a sandbox, to get its version)"
    match options.get("env"):
        case list(names):
            # A program needs its home to find its settings; the sandbox limits which files there are readable.
            yield from _variables(f"{at}env", [str(name) for name in names if name != "HOME"])
        case dict(values):
            for name, value in values.items():
                yield f"{at}env: {name}={value} (set for its program, even without a sandbox)"


def _access(at: str, access: PathAccess) -> Iterator[str]:
    yield from (f"{at}writable: {path} (sessions can change it)" for path in access.writable)
    yield from (f"{at}readable: {path} (sessions can read it)" for path in access.readable)


def _variables(at: str, names: Iterable[str]) -> Iterator[str]:
    yield from (f"{at}: {name} (passed from your environment)" for name in names)
