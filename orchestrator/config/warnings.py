"""What is no mistake in a file, and yet seldom meant. Pure: the few things that are sure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.model import RunConfig


@dataclass(frozen=True, slots=True)
class Surroundings:
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


def find_warnings(config: RunConfig, around: Surroundings) -> list[ConfigWarning]:
    """Return what to tell of a file that is right."""
    found = []
    if config.target == config.base and around.target_checkout is not None:
        what = f"the target {config.target!r} is also the base, and checked out in {around.target_checkout}"
        remedy = "each landing changes the files there, and waits where they have changes; set another `target`"
        found.append(ConfigWarning(what, f"{remedy} unless that is meant"))
    for path in _open_repository(config, around):
        what = f"`writable` lets sessions write {path}, and with it the repository itself"
        found.append(ConfigWarning(what, "name only the folders in it that they need, if any"))
    if config.worktrees.max < config.capacity:
        most = config.worktrees.max
        what = f"`worktrees.max` is {most} and `capacity` {config.capacity}: at most {most} sessions can run at once"
        found.append(ConfigWarning(what, f"set `max: {config.capacity}` under `worktrees:`, or a smaller `capacity`"))
    specs = [*config.tasks, *([] if config.template is None else [config.template])]
    if not any(spec.checks for spec in specs):
        what = "no task has checks: nothing proves the work"
        found.append(ConfigWarning(what, "add the command of your tests as `checks:` under `defaults:`"))
    return found


def _open_repository(config: RunConfig, around: Surroundings) -> list[Path]:
    """Return what is writable of which the repository's checkout or git directory is a part."""
    reaches = [config.fence.reach, *(adapter.reach for adapter in config.adapters.values())]
    inside = [path for path in (around.top, around.git_dir) if path is not None]
    writable = dict.fromkeys(path for reach in reaches for path in reach.writable)
    return [path for path in writable if any(one.is_relative_to(path) for one in inside)]
