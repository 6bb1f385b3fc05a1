"""What is no mistake in a file, and yet seldom meant. Pure: the few things that are sure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator.config.model import RunConfig
from orchestrator.config.source.problems import join_names
from orchestrator.protocols import Adapter, Capability

#: What package managers and compilers keep downloads and results in.
_CACHES: Final = frozenset(
    {
        *(".cache", ".npm", ".yarn", ".pnpm-store", ".bun", ".cargo", ".rustup", ".m2", ".gradle", ".ivy2"),
        *(".bundle", ".gem", ".nuget", ".composer", ".pub-cache", ".ccache"),
    }
)


@dataclass(frozen=True, slots=True)
class RepositoryPaths:
    """What is known of the repository on this machine; None where there is none."""

    top: Path | None = None
    """The top of its checkout."""
    git_dir: Path | None = None
    target_checkout: Path | None = None
    """The folder in which the target is checked out."""


@dataclass(frozen=True, slots=True)
class ConfigWarning:
    """What will happen, and what to do unless it is meant."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def find_warnings(config: RunConfig, around: RepositoryPaths, adapters: Mapping[str, Adapter]) -> list[ConfigWarning]:
    """Return what to tell of a file that is right; `adapters` are all of its own, by name."""
    found = []
    specs = [*config.tasks, *([] if config.template is None else [config.template])]
    is_checked = any(spec.checks for spec in specs)
    if config.target == config.base and around.target_checkout is not None:
        what = f"the target {config.target!r} is also the base, and checked out in {around.target_checkout}"
        remedy = "each landing changes the files there, and waits where they have changes; set another `target`"
        found.append(ConfigWarning(what, f"{remedy} unless that is meant"))
    for path in _open_repository(config, around):
        what = f"`writable` lets sessions write {path}, and with it the repository itself"
        found.append(ConfigWarning(what, "name only the folders in it that they need, if any"))
    for path in _package_caches(config) if is_checked else ():
        what = f"`writable` lets sessions write {path}, from which setup and checks may take programs"
        found.append(ConfigWarning(what, "name it under `writable` of the adapters whose sessions need it"))
    if config.worktrees.max < config.capacity:
        most = config.worktrees.max
        what = f"`worktrees.max` is {most} and `capacity` {config.capacity}: at most {most} sessions can run at once"
        found.append(ConfigWarning(what, f"set `max: {config.capacity}` under `worktrees:`, or a smaller `capacity`"))
    most = config.coordination.max_retries + 1
    if above := [spec for spec in specs if spec.attempts > most and "attempts" in spec.model_fields_set]:
        name, attempts = above[0].id, above[0].attempts
        what = f"task {name!r} has {attempts} `attempts`, `coordination.max_retries` ends it after {most}"
        found.append(ConfigWarning(what, f"set `max_retries: {attempts - 1}` under `coordination:`"))
    if not is_checked:
        what = "no task has checks: nothing proves the work"
        found.append(ConfigWarning(what, "add the command of your tests as `checks:` under `defaults:`"))
    found += _repeated_fallbacks(config)
    used = dict.fromkeys(name for spec in specs for name in config.adapters_of(spec))
    unable = [repr(name) for name in used if Capability.MCP not in adapters[name].capabilities()]
    if config.mcp_servers and unable:
        what = f"sessions of {join_names(unable)} are not told of `mcp_servers`: {join_names([*map(repr, config.mcp_servers)])}"
        found.append(ConfigWarning(what, "give tasks that need them an adapter that can use them"))
    return found


def _repeated_fallbacks(config: RunConfig) -> Iterator[ConfigWarning]:
    """Yield a warning for each list of adapters that names one again, which never stands in."""
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
        again = dict.fromkeys(repr(name) for place, name in enumerate(rest) if name in {first, *rest[:place]})
        what = f"`fallback` of {join_names(whose)} names {join_names([*again])} again: an adapter can't stand in for itself"
        yield ConfigWarning(what, f"name others than `adapter: {first}` there, each once")


def _package_caches(config: RunConfig) -> list[Path]:
    """Return the folders of package managers that sessions of all adapters may write, and so setup and checks."""
    return [path for path in config.fence.reach.writable if path.name in _CACHES or path.parent.name == ".cache"]


def _open_repository(config: RunConfig, around: RepositoryPaths) -> list[Path]:
    """Return what is writable of which the repository's checkout or git directory is a part."""
    reaches = [config.fence.reach, *(adapter.reach for adapter in config.adapters.values())]
    inside = [path for path in (around.top, around.git_dir) if path is not None]
    writable = dict.fromkeys(path for reach in reaches for path in reach.writable)
    return [path for path in writable if any(one.is_relative_to(path) for one in inside)]
