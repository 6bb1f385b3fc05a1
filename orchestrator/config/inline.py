"""Configure a run from the command line: by prompts, or by changes to a config."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.adapters import has_only_optional_options, list_adapter_names
from orchestrator.config.entries import ExplainMissing, Extensions
from orchestrator.config.load import NO_EXTENSIONS, build_run_config, default_slot_count, read_file
from orchestrator.config.model import RunConfig
from orchestrator.config.source.document import Node
from orchestrator.config.source.problems import INLINE_NAME, Problems
from orchestrator.config.source.values import read_value
from orchestrator.domain.wording import join_names, suggest, suggest_similar
from orchestrator.errors import PluginFailed, RefusedError, plugin_code
from orchestrator.protocols import AdapterType, JsonObject

#: The maximum number of task names in a remedy.
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class InlineTasks:
    """Prompts and options of inline tasks.

    None: use the value of the file, or the default.
    """

    prompts: Sequence[str]
    adapter: str | None = None
    base: str | None = None
    target: str | None = None
    checks: Sequence[str] = ()


def load_inline(
    tasks: InlineTasks,
    file: Path | None,
    folder: Path,
    adapter_types: Mapping[str, AdapterType],
    extensions: Extensions = NO_EXTENSIONS,
) -> RunConfig:
    """Return a run of these tasks, named task-1 and so on.

    The settings are those of `file`, or defaults in the repository `folder`. Raises ConfigError as `load_config` and
    `load_value` do, and RefusedError if the adapter is ambiguous.
    """
    path = folder.absolute() / INLINE_NAME if file is None else file.absolute()
    problems = Problems(INLINE_NAME if file is None else file)

    def read() -> Node | None:
        below = read_value({"version": 1}, problems) if file is None else read_file(file, problems)
        if below is None:
            return None
        check_adapter_choice(tasks.adapter, below, folder, adapter_types, extensions.explain)
        above = read_value(_settings(tasks), problems)
        return None if above is None else _overlay(_without(below, "trackers"), above)

    return build_run_config(read, path, adapter_types, extensions, problems).model_copy(
        update={"overrides": _overrides(tasks)}
    )


def _overrides(tasks: InlineTasks) -> tuple[str, ...]:
    chosen = {"base": tasks.base, "target": tasks.target, "adapter": tasks.adapter, "checks": tasks.checks or None}
    return ("tasks", *(key for key, value in chosen.items() if value is not None))


def _settings(tasks: InlineTasks) -> JsonObject:
    own: JsonObject = {} if tasks.adapter is None else {"adapter": tasks.adapter}
    own |= {"checks": tasks.checks} if tasks.checks else {}
    entries = [{"id": f"task-{number}", "prompt": prompt, **own} for number, prompt in enumerate(tasks.prompts, 1)]
    branches = {"base": tasks.base, "target": tasks.target}
    return {"tasks": entries, **{key: branch for key, branch in branches.items() if branch is not None}}


def check_adapter_choice(
    wanted: str | None,
    file: Node,
    folder: Path,
    adapter_types: Mapping[str, AdapterType],
    explain: ExplainMissing,
) -> None:
    """Raise RefusedError if the adapter is unknown or the choice is ambiguous.

    Valid adapters are those in the file, and installed types without required options.
    """
    named = file.value.get("adapters", {})
    if not isinstance(named, dict):  # reported as an error in the file
        return
    ready = [use for use, kind in sorted(adapter_types.items()) if has_only_optional_options(kind, folder)]
    section = file.get("adapters")
    listed = [] if section is None else list_adapter_names(section)
    possible = [*listed, *(use for use in ready if use not in named)]
    if wanted is None:
        default = file.get("defaults", "adapter")
        if default is None and not named and possible and not any(_is_installed(adapter_types[one]) for one in ready):
            raise no_program_error(possible)
        if default is None and len(named) != 1:
            message = "the file has several adapters and no default" if named else "no file specifies an adapter"
            raise RefusedError(message, _choices(possible))
        return
    if wanted in possible:
        return
    message = f"there is no adapter {wanted!r}"
    if wanted in adapter_types:
        message = f"{wanted!r} needs options, which only a file can provide"
    remedy = suggest(wanted, possible, "possible ones") if possible else _choices([])
    raise RefusedError(message, "; ".join(filter(None, (explain(wanted), remedy))))


def no_program_error(adapters: Iterable[str]) -> RefusedError:
    """Return the error that no adapter's program is on PATH and no file exists."""
    own = "create a council.yaml with an adapter of `use: command`, which runs any program"
    remedy = f"install one (`council adapters` shows how), or {own}"
    return RefusedError(f"no supported CLI is on PATH (adapters: {', '.join(adapters)})", remedy)


def _is_installed(adapter_type: AdapterType) -> bool:
    """Return whether all programs of an adapter without options are on PATH. Blocks."""
    try:
        with plugin_code():
            programs = adapter_type(adapter_type.Options.model_validate({})).programs()
            return all(shutil.which(one.name) is not None for one in programs)
    except PluginFailed:
        return True  # its errors are reported where it is used


def _choices(possible: Sequence[str]) -> str:
    if not possible:
        return (
            "create a council.yaml with `adapters:` (`council init`), because no installed type works without options"
        )
    return f"choose one with --adapter: {', '.join(possible)}"


def _without(node: Node, key: str) -> Node:
    children = {name: child for name, child in node.children.items() if name != key}
    return node._replace(value={name: value for name, value in node.value.items() if name != key}, children=children)


def _overlay(below: Node, above: Node) -> Node:
    """Return the merged mapping; `above` overrides `below`."""
    children = {**below.children, **above.children}
    value = {key: child.value for key, child in children.items()}
    return Node(below.at, value, children, {**below.keys, **above.keys})


def select_tasks(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Return a run of these tasks with their direct and indirect needs, in file order.

    The run has no trackers. Raises RefusedError for an unknown task.
    """
    tasks = {task.id: task for task in config.tasks}
    for name in names:
        if name not in tasks:
            remedy = suggest_similar(name, tasks) or f"use one of: {join_names(tasks, _MOST_NAMED)}"
            raise RefusedError(f"the file has no task {name!r}", remedy)
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        wanted += [need for need in tasks[name].needs if need not in wanted]
    selected = tuple(task for task in config.tasks if task.id in wanted)
    return config.model_copy(update={"tasks": selected, "trackers": {}, "template": None})


def with_capacity(config: RunConfig, capacity: int) -> RunConfig:
    """Return a run with another capacity and its default number of worktree slots."""
    worktrees = config.worktrees
    if worktrees.max == default_slot_count(config.capacity):
        worktrees = worktrees.model_copy(update={"max": default_slot_count(capacity)})
    overrides = (*config.overrides, "capacity", *(["worktrees"] if worktrees != config.worktrees else []))
    return config.model_copy(update={"capacity": capacity, "worktrees": worktrees, "overrides": overrides})


def with_failing_base(config: RunConfig) -> RunConfig:
    """Return a run whose sessions start even if checks fail on the base."""
    tasks = tuple(task.model_copy(update={"allow_failing_base": True}) for task in config.tasks)
    return config.model_copy(update={"tasks": tasks})
