"""Warnings about valid but probably unintended settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator.config.model import RunConfig
from orchestrator.domain.wording import join_names
from orchestrator.protocols import Adapter, Capability

#: The cache folders of package managers and compilers.
_CACHES: Final = frozenset(
    {
        *(".cache", ".npm", ".yarn", ".pnpm-store", ".bun", ".cargo", ".rustup", ".m2", ".gradle", ".ivy2"),
        *(".bundle", ".gem", ".nuget", ".composer", ".pub-cache", ".ccache"),
    }
)


@dataclass(frozen=True, slots=True)
class RepositoryPaths:
    """The paths of the repository on this machine; None if not present."""

    top: Path | None = None
    """The root of its checkout."""
    git_dir: Path | None = None
    target_checkout: Path | None = None
    """The folder where the target is checked out."""


@dataclass(frozen=True, slots=True)
class ConfigWarning:
    """A warning, and its remedy."""

    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}"


def find_warnings(config: RunConfig, around: RepositoryPaths, adapters: Mapping[str, Adapter]) -> list[ConfigWarning]:
    """Return warnings about a valid config; `adapters` has its adapters by name."""
    warnings = []
    specs = [*config.tasks, *([] if config.template is None else [config.template])]
    is_checked = any(spec.checks for spec in specs)
    if config.target == config.base and around.target_checkout is not None:
        message = f"the target {config.target!r} is the base, and is checked out in {around.target_checkout}"
        remedy = "each landing updates the files there, and is deferred if they are changed; set another `target`"
        warnings.append(ConfigWarning(message, f"{remedy} unless this is intended"))
    for path in _open_repository(config, around):
        message = f"`writable` lets sessions write to {path}, which contains the repository itself"
        warnings.append(ConfigWarning(message, "list only the folders in it that sessions need, if any"))
    for path in _package_caches(config) if is_checked else ():
        message = f"`writable` lets sessions write to {path}, from which setup and checks may run programs"
        warnings.append(ConfigWarning(message, "list it under `writable` of the adapters whose sessions need it"))
    if config.worktrees.max < config.capacity:
        limit = config.worktrees.max
        message = (
            f"`worktrees.max` is {limit} and `capacity` {config.capacity}: at most {limit} sessions can run at once"
        )
        warnings.append(
            ConfigWarning(message, f"set `max: {config.capacity}` under `worktrees:`, or a smaller `capacity`")
        )
    limit = config.coordination.max_retries + 1
    if above := [spec for spec in specs if spec.attempts > limit and "attempts" in spec.model_fields_set]:
        name, attempts = above[0].id, above[0].attempts
        message = f"task {name!r} has {attempts} `attempts`, but `coordination.max_retries` limits them to {limit}"
        warnings.append(ConfigWarning(message, f"set `max_retries: {attempts - 1}` under `coordination:`"))
    if not is_checked:
        message = "no task has checks: work lands unverified"
        warnings.append(ConfigWarning(message, "add your test command as `checks:` under `defaults:`"))
    if ungated := [spec.id for spec in specs if spec.stop_gate and not spec.checks]:
        message = f"task {ungated[0]!r} has a `stop_gate` without checks, which has no effect"
        warnings.append(ConfigWarning(message, "add `checks`, or remove `stop_gate`"))
    gated = {name for spec in specs if spec.stop_gate and spec.checks for name in config.adapters_of(spec)}
    if unable := sorted(repr(name) for name in gated if Capability.STOP_GATE not in adapters[name].capabilities()):
        message = f"adapters {join_names(unable)} do not support `stop_gate`: their sessions end without it"
        warnings.append(ConfigWarning(message, "use another adapter, or rely on `checks`, which run before landing"))
    warnings += _repeated_fallbacks(config)
    used = dict.fromkeys(name for spec in specs for name in config.adapters_of(spec))
    unable = [repr(name) for name in used if Capability.MCP not in adapters[name].capabilities()]
    if config.mcp_servers and unable:
        servers = join_names([*map(repr, config.mcp_servers)])
        message = f"adapters {join_names(unable)} do not support `mcp_servers`: {servers}"
        warnings.append(ConfigWarning(message, "use another adapter for tasks that need them"))
    return warnings


def _repeated_fallbacks(config: RunConfig) -> Iterator[ConfigWarning]:
    """Yield a warning for each list of adapters with a duplicate."""
    specs = [(repr(spec.id), spec.adapters) for spec in config.tasks]
    specs += [] if config.template is None else [("tasks of trackers", config.template.adapters)]
    specs += [
        (f"phase {phase.name!r}", (phase.adapter, *phase.fallback))
        for phases in config.workflows.values()
        for phase in phases
        if phase.adapter is not None
    ]
    tasks: dict[tuple[str, ...], list[str]] = {}
    for task, adapters in specs:
        if len(set(adapters)) < len(adapters):
            tasks.setdefault(adapters, []).append(task)
    for (first, *rest), whose in tasks.items():
        again = dict.fromkeys(repr(name) for index, name in enumerate(rest) if name in {first, *rest[:index]})
        message = f"`fallback` of {join_names(whose)} repeats {join_names([*again])}, which has no effect"
        yield ConfigWarning(message, f"list adapters other than `adapter: {first}`, each once")


def _package_caches(config: RunConfig) -> list[Path]:
    """Return package caches that all sessions, setup commands and checks may write."""
    return [path for path in config.sandbox.access.writable if path.name in _CACHES or path.parent.name == ".cache"]


def _open_repository(config: RunConfig, around: RepositoryPaths) -> list[Path]:
    """Return writable paths that contain the repository's checkout or git directory."""
    reaches = [config.sandbox.access, *(adapter.access for adapter in config.adapters.values())]
    inside = [path for path in (around.top, around.git_dir) if path is not None]
    writable = dict.fromkeys(path for reach in reaches for path in reach.writable)
    return [path for path in writable if any(folder.is_relative_to(path) for folder in inside)]
