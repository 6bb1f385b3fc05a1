"""The adapters of a file: options judged by their types, one for each task, each command tried without effect."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from orchestrator.config.document import UNREADABLE, Node
from orchestrator.config.model import AdapterConfig, Reach
from orchestrator.config.problems import Problems, Vocabulary, shown
from orchestrator.config.references import task_nodes
from orchestrator.config.schema import AdapterEntry
from orchestrator.config.validation import validate
from orchestrator.errors import RefusedError
from orchestrator.protocols import AdapterType, SessionRequest

_NOWHERE: Final = Path("/nowhere")


def read_adapters(
    root: Node, folder: Path, adapter_types: Mapping[str, AdapterType], problems: Problems
) -> dict[str, AdapterConfig]:
    """Return the adapters whose type is known and whose options are right; the others are noted."""
    found: dict[str, AdapterConfig] = {}
    installed = Vocabulary(adapter_types, "the installed ones")
    for name, node in _adapter_nodes(root):
        use = node.get("use")
        if use is None or not isinstance(use.value, str):
            continue
        if use.value not in adapter_types:
            problems.add(use.at, f"there is no adapter type {shown(use.value)}", installed.instead_of(use.value))
            continue
        # A type's own validators are never shown what the file's reader refused.
        unreadable = {key for key in node.value if _holds_unreadable(node.children[key])}
        own = AdapterEntry.model_fields.keys()
        options = validate(adapter_types[use.value].Options, node, problems, without={*own, *unreadable})
        reach = read_reach(node, folder, problems)
        capacity = node.value.get("capacity")
        if options is not None and not unreadable and (capacity is None or isinstance(capacity, int)):
            found[name] = AdapterConfig(name=name, use=use.value, capacity=capacity, reach=reach, options=options)
    return found


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


def _adapter_nodes(root: Node) -> Iterator[tuple[str, Node]]:
    adapters = root.get("adapters")
    for name, node in adapters.children.items() if adapters is not None else ():
        if isinstance(name, str) and isinstance(node.value, dict):
            yield name, node


def _holds_unreadable(node: Node) -> bool:
    return any(part.value is UNREADABLE for part in node.walk())


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
    for choice in (default, *(choice for _, _, choice in chosen)):
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
        name = assigned.get(index)
        if name not in made or index not in prompts:
            continue
        request = SessionRequest(
            run="run",
            task=str(task.value.get("id")),
            attempt=1,
            prompt=prompts[index],
            prompt_file=_NOWHERE / "prompt",
            worktree=_NOWHERE,
        )
        try:
            made[name].command(request)
        except RefusedError as error:
            told = task.get("prompt") or task.get("prompt_file") or task
            problems.add(told.at, error.what, error.remedy)
