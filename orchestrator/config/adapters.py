"""The adapters of a file: options judged by their types, one for each task, each command tried without effect."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.config.document import Node
from orchestrator.config.entries import Explain, read_entries
from orchestrator.config.model import AdapterConfig, Reach
from orchestrator.config.names import check_kept
from orchestrator.config.problems import Problems, Vocabulary, shown
from orchestrator.config.references import task_nodes
from orchestrator.config.schema import AdapterSettings
from orchestrator.errors import RefusedError
from orchestrator.protocols import Adapter, AdapterType, SessionRequest

_NOWHERE: Final = Path("/nowhere")


def read_adapters(
    root: Node, folder: Path, adapter_types: Mapping[str, AdapterType], explain: Explain, problems: Problems
) -> dict[str, AdapterConfig]:
    """Return the adapters whose type is known and whose options are right; the others are noted."""
    found: dict[str, AdapterConfig] = {}
    own = AdapterSettings.model_fields.keys()
    for name, node, use, options in read_entries(root, "adapter", adapter_types, own, folder, explain, problems):
        reach = read_reach(node, folder, problems)
        capacity = node.value.get("capacity")
        if capacity is None or isinstance(capacity, int):
            found[name] = AdapterConfig(
                name=name, use=use, capacity=capacity, reach=reach, keep_ignored=_kept(node), options=options
            )
    return found


def _kept(node: Node) -> tuple[str, ...]:
    """Return what is right under `keep_ignored`; the rest is told of with the file's shape."""
    found = []
    listed = node.value.get("keep_ignored")
    for item in listed if isinstance(listed, list) else ():
        with suppress(ValueError):
            found += [check_kept(item)] if isinstance(item, str) else []
    return tuple(found)


def read_reach(node: Node, folder: Path, problems: Problems) -> Reach:
    """Return the absolute paths under `writable` and `readable` of a mapping; those that don't exist are noted."""
    found: dict[str, list[Path]] = {"writable": [], "readable": []}
    for key, paths in found.items():
        listed = node.get(key)
        for item in listed.children.values() if listed is not None and isinstance(listed.value, list) else ():
            if not isinstance(item.value, str) or not item.value or "\0" in item.value:
                continue
            path = Path(os.path.realpath(folder / Path(item.value).expanduser()))
            if not path.exists():
                problems.add(item.at, f"{shown(item.value)} does not exist", "make it first, or remove it from here")
            paths.append(path)
    return Reach(writable=tuple(found["writable"]), readable=tuple(found["readable"]))


def assign_adapters(root: Node, problems: Problems) -> dict[int, str]:
    """Return the name of each task's adapter by the task's index, for those that have one: its own, else the default
    one, else the only one."""
    adapters = root.get("adapters")
    if adapters is None or not isinstance(adapters.value, dict) or not adapters.value:
        return {}
    names = adapters.value.keys()
    vocabulary = Vocabulary(names, "the adapters")
    default = root.get("defaults", "adapter")
    chosen = [(index, task, task.get("adapter")) for index, task in task_nodes(root)]
    for choice in (default, *(choice for _, _, choice in chosen), *_fallbacks(root)):
        if choice is not None and isinstance(choice.value, str) and choice.value not in names:
            problems.add(choice.at, f"there is no adapter {shown(choice.value)}", vocabulary.instead_of(choice.value))
    only = next(iter(names)) if len(names) == 1 else None
    assigned: dict[int, str] = {}
    for index, task, own in chosen:
        choice = own or default
        name = only if choice is None else choice.value
        if isinstance(name, str):
            assigned[index] = name
        elif choice is None:
            remedy = "add `adapter:` here or under `defaults:`"
            problems.add(task.at, "the task names no adapter, and there are several", remedy)
    return assigned


def _fallbacks(root: Node) -> Iterator[Node]:
    """Yield each name of an adapter that is to stand in for another."""
    entries = (root.get("defaults"), *(task for _, task in task_nodes(root)))
    for told in (None if entry is None else entry.get("fallback") for entry in entries):
        if told is not None and isinstance(told.value, list):
            yield from told.children.values()


def trial_request(task: str, prompt: str, home: Path = _NOWHERE / "home") -> SessionRequest:
    """Return what an adapter is asked to see what it would run; its paths don't exist, but for the home perhaps."""
    return SessionRequest(
        run="run",
        task=task,
        attempt=1,
        prompt=prompt,
        prompt_file=_NOWHERE / "prompt",
        worktree=_NOWHERE,
        home=home,
    )


def default_adapter(root: Node, problems: Problems) -> str | None:
    """Return the adapter of tasks that trackers give; noted where there is none."""
    default, adapters, trackers = root.get("defaults", "adapter"), root.get("adapters"), root.get("trackers")
    names = list(adapters.value) if adapters is not None and isinstance(adapters.value, dict) else []
    if default is not None:
        return default.value if default.value in names else None
    if len(names) > 1 and trackers is not None:
        remedy = "add `adapter:` under `defaults:`"
        problems.add(trackers.at, "the tasks of trackers have no adapter, and there are several", remedy)
    return names[0] if len(names) == 1 else None


def try_commands(
    root: Node,
    prompts: Mapping[int, str],
    assigned: Mapping[int, str],
    adapters: Mapping[str, AdapterConfig],
    adapter_types: Mapping[str, AdapterType],
    problems: Problems,
) -> None:
    """Ask each task's adapter for its command, which starts nothing, and note what it refuses."""
    made = {name: adapter_types[adapter.use](adapter.options) for name, adapter in adapters.items()}
    for index, task in task_nodes(root):
        if index not in prompts:
            continue
        request = trial_request(str(task.value.get("id")), prompts[index])
        told = task.get("fallback") or root.get("defaults", "fallback")
        fallback = [one.value for one in told.children.values()] if told else []
        for name in dict.fromkeys((assigned.get(index), *fallback)):
            if not isinstance(name, str) or name not in made:
                continue
            try:
                _try_command(name, made[name], request)
            except RefusedError as error:
                prompt = task.get("prompt") or task.get("prompt_file") or task
                problems.add(prompt.at, error.what, error.remedy)


def _try_command(name: str, adapter: Adapter, request: SessionRequest) -> None:
    """Raise RefusedError where there is no command that could be run."""
    try:
        argv = adapter.command(request).argv
    except RefusedError:
        raise
    except Exception as error:
        what = f"the adapter {shown(name)} can't make its command, {type(error).__name__}: {error}"
        raise RefusedError(" ".join(what.split()), "update its plugin, or use another adapter") from error
    if not argv or not all(isinstance(part, str) for part in argv):
        what = f"the adapter {shown(name)} makes a command that is not of text: {argv!r}"
        raise RefusedError(what, "update its plugin, or use another adapter")
