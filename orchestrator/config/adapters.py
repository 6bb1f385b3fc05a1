"""Read adapters, assign them to tasks, and check their commands (not executed)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from orchestrator.config.entries import ExplainMissing, read_entries
from orchestrator.config.references import iter_items, iter_task_nodes
from orchestrator.config.source.document import Node
from orchestrator.config.source.problems import Position, Problems
from orchestrator.config.source.validation import validate
from orchestrator.config.workflows.load import iter_phase_nodes, workflow_of
from orchestrator.domain.settings.names import account_adapter_name, entry_of_adapter
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.settings.run_settings import AdapterConfig, AdapterSettings
from orchestrator.domain.wording import quote_text, suggest, suggest_similar
from orchestrator.errors import PluginFailed, RefusedError, plugin_code
from orchestrator.protocols import Adapter, AdapterType, SessionRequest

_NOWHERE: Final = Path("/nowhere")


def read_adapters(
    root: Node, folder: Path, adapter_types: Mapping[str, AdapterType], explain: ExplainMissing, problems: Problems
) -> dict[str, AdapterConfig]:
    """Return the valid adapters, and report errors in the others."""
    read = read_entries(root, "adapter", adapter_types, AdapterSettings, folder, explain, problems)
    return {
        name: AdapterConfig(
            **dict(settings) | read_path_access(node, folder, problems) | _read_accounts(node, problems),
            options=options,
        )
        for name, node, settings, options in read
    }


def _read_accounts(node: Node, problems: Problems) -> dict[str, dict[str, dict[str, str]]]:
    """Return the accounts of an adapter with absolute folders; report missing ones."""
    accounts: dict[str, dict[str, str]] = {}
    section = node.get("accounts")
    for name, account in section.children.items() if section is not None else ():
        variables = accounts[str(name)] = {}
        for variable, item in account.children.items():
            if isinstance(item.value, str) and item.value.startswith(("~/", "/")):
                variables[str(variable)] = os.path.realpath(Path(item.value).expanduser())
                if not Path(variables[str(variable)]).is_dir():
                    remedy = f"create it, and log in there with {variable} set to it"
                    problems.add(item.at, f"there is no folder {quote_text(item.value)}", remedy)
            else:
                variables[str(variable)] = item.value
    return {"accounts": accounts}


def read_path_access(node: Node, folder: Path, problems: Problems) -> dict[str, tuple[str, ...]]:
    """Return absolute paths from `writable` and `readable`; report missing ones."""
    access: dict[str, tuple[str, ...]] = {"writable": (), "readable": ()}
    for key in access:
        for item in iter_items(node.get(key)):
            if not isinstance(item.value, str) or not item.value or "\0" in item.value:
                continue
            path = os.path.realpath(folder / Path(item.value).expanduser())
            if not Path(path).exists():
                message = f"{quote_text(item.value)} does not exist"
                problems.add(item.at, message, "create it first, or remove it here")
            access[key] += (path,)
    return access


def add_named_types(root: Node, folder: Path, adapter_types: Mapping[str, AdapterType]) -> Node:
    """Add `use` to entries that are named after their type, and an entry for each used adapter without one.

    The latter needs a type without required options.
    """
    section = root.get("adapters")
    if section is not None and not isinstance(section.value, dict):  # reported by schema validation
        return root
    entries: dict[str | int, Node] = (
        {} if section is None else {name: _with_use(name, one, adapter_types) for name, one in section.children.items()}
    )
    named = {one.value: one for one in _named(root) if isinstance(one.value, str)}
    added: dict[str | int, Node] = {
        name: Node(one.at, {"use": name}, {"use": Node(one.at, name)}, {"use": one.at})
        for name, one in named.items()
        if name not in entries and name in adapter_types and has_only_optional_options(adapter_types[name], folder)
    }
    if not added and (section is None or entries == section.children):
        return root
    entries |= added
    value = {str(name): one.value for name, one in entries.items()}
    keys = {} if section is None else section.keys
    made = Node(
        root.at if section is None else section.at,
        value,
        entries,
        {**keys, **{str(name): one.at for name, one in added.items()}},
    )
    return root._replace(value={**root.value, "adapters": value}, children={**root.children, "adapters": made})


def _with_use(name: str | int, entry: Node, adapter_types: Mapping[str, AdapterType]) -> Node:
    """Return an entry with its name as its type if it has none and there is such a type."""
    if not isinstance(entry.value, dict) or "use" in entry.value or name not in adapter_types:
        return entry
    use = Node(entry.at, name)
    return Node(entry.at, {**entry.value, "use": name}, {**entry.children, "use": use}, {**entry.keys, "use": entry.at})


def has_only_optional_options(adapter_type: AdapterType, folder: Path) -> bool:
    """Return whether an adapter type can be used without options."""
    nothing = Node(Position(1, 1), {})
    return validate(adapter_type.Options, nothing, Problems(""), folder=folder) is not None


def list_adapter_names(section: Node) -> list[str]:
    """Return the names of the adapters in `adapters:`, followed by those of their accounts."""
    accounts = ((name, node.get("accounts")) for name, node in section.children.items())
    each = (
        account_adapter_name(str(name), str(account))
        for name, found in accounts
        if found is not None
        for account in found.children
    )
    return [*map(str, section.value), *each]


def find_only_adapter(written: Node, root: Node) -> str | None:
    """Return the only adapter in a file, by entries or else uses; None if several.

    `root` is the file `written` plus the entries from `add_named_types`.
    """
    for file in (written, root):
        section = file.get("adapters")
        if section is not None and isinstance(section.value, dict) and section.value:
            return str(next(iter(section.value))) if len(section.value) == 1 else None
    return None


def assign_adapters(
    root: Node,
    only: str | None,
    workflows: Mapping[str, Sequence[Phase]],
    adapter_types: Mapping[str, AdapterType],
    folder: Path,
    problems: Problems,
) -> dict[int, str]:
    """Return the adapter of each task by index, and report unknown adapters.

    It is the task's own adapter, else the default, else the only one, else the adapter of the phase that writes, if all
    phases of the workflow specify an adapter.
    """
    adapters = root.get("adapters")
    if adapters is None or not isinstance(adapters.value, dict) or not adapters.value:
        return {}
    names = list_adapter_names(adapters)
    for named in _named(root):
        if isinstance(named.value, str) and named.value not in names:
            usable = [name for name, one in adapter_types.items() if has_only_optional_options(one, folder)]
            remedy = suggest_similar(named.value, [*names, *usable]) or suggest(named.value, names, "the adapters")
            problems.add(named.at, f"there is no adapter {quote_text(named.value)}", remedy)
    default = root.get("defaults", "adapter")
    assigned: dict[int, str] = {}
    for index, task in iter_task_nodes(root):
        choice = task.get("adapter") or default
        name: Any = (only or _of_phases(task, root, workflows)) if choice is None else choice.value
        if isinstance(name, str):
            assigned[index] = name
        elif choice is None:
            remedy = "add `adapter:` here or under `defaults:`"
            problems.add(task.at, "the task has no adapter, and there are several", remedy)
    return assigned


def _of_phases(task: Node, root: Node, workflows: Mapping[str, Sequence[Phase]]) -> str | None:
    """Return the adapter of the phase that writes, if all phases name their adapter."""
    phases = workflows.get(workflow_of(task, root) or "", ())
    if not phases or any(phase.adapter is None for phase in phases):
        return None
    return next((phase for phase in reversed(phases) if phase.writes), phases[-1]).adapter


def _named(root: Node) -> Iterator[Node]:
    """Yield each adapter name in the file, including fallbacks."""
    section = root.get("workflows")
    workflows = section.children.values() if section is not None and isinstance(section.value, dict) else ()
    phases = (phase.node for workflow in workflows for phase in iter_phase_nodes(workflow))
    for entry in (root.get("defaults"), *(task for _, task in iter_task_nodes(root)), *phases):
        if entry is not None and (choice := entry.get("adapter")) is not None:
            yield choice
        yield from iter_items(None if entry is None else entry.get("fallback"))


def make_trial_request(task: str, prompt: str, home: Path = _NOWHERE / "home") -> SessionRequest:
    """Return a request for checking a command; except for `home`, no path exists."""
    return SessionRequest(
        run="run",
        task=task,
        attempt=1,
        prompt=prompt,
        prompt_file=_NOWHERE / "prompt",
        worktree=_NOWHERE,
        home=home,
    )


def default_adapter(
    root: Node, only: str | None, workflows: Mapping[str, Sequence[Phase]], problems: Problems
) -> str | None:
    """Return the adapter of tasks from trackers, and report if there is none."""
    default, adapters, trackers = root.get("defaults", "adapter"), root.get("adapters"), root.get("trackers")
    names = list(adapters.value) if adapters is not None and isinstance(adapters.value, dict) else []
    if default is not None:
        return default.value if adapters is not None and default.value in list_adapter_names(adapters) else None
    found = only or _of_phases(root, root, workflows)
    if found is None and len(names) > 1 and trackers is not None:
        remedy = "add `adapter:` under `defaults:`"
        problems.add(trackers.at, "the tasks of trackers have no adapter, and there are several", remedy)
    return found


def possible_adapters(
    root: Node, assigned: Mapping[int, str], workflows: Mapping[str, Sequence[Phase]]
) -> dict[int, list[str]]:
    """Return all adapters that may run a task or its phases, by task index."""
    found: dict[int, list[str]] = {}
    for index, task in iter_task_nodes(root):
        fallback = task.get("fallback") or root.get("defaults", "fallback")
        phases = workflows.get(workflow_of(task, root) or "", ())
        names = [assigned.get(index), *(one.value for one in iter_items(fallback))]
        names += [name for phase in phases for name in (phase.adapter, *phase.fallback)]
        found[index] = [name for name in dict.fromkeys(names) if isinstance(name, str)]
    return found


def try_commands(
    root: Node,
    prompts: Mapping[int, str],
    possible: Mapping[int, Sequence[str]],
    adapters: Mapping[str, AdapterConfig],
    adapter_types: Mapping[str, AdapterType],
    problems: Problems,
) -> None:
    """Build the command of each task's adapters without starting it; report errors."""
    made = {name: adapter_types[adapter.use](adapter.options) for name, adapter in adapters.items()}
    for index, task in iter_task_nodes(root):
        if index not in prompts:
            continue
        request = make_trial_request(str(task.value.get("id")), prompts[index])
        for name in map(entry_of_adapter, possible.get(index, ())):
            if name not in made:
                continue
            try:
                _try_command(name, made[name], request)
            except RefusedError as error:
                prompt = task.get("prompt") or task.get("prompt_file") or task
                problems.add(prompt.at, error.message, error.remedy)


def _try_command(name: str, adapter: Adapter, request: SessionRequest) -> None:
    """Raise RefusedError if the adapter has no valid command."""
    try:
        with plugin_code(RefusedError):
            argv = adapter.command(request).argv
    except PluginFailed as failed:
        message = f"the adapter {quote_text(name)} failed to build its command: {failed}"
        raise RefusedError(message, "update its plugin, or use another adapter") from failed
    if not argv or not all(isinstance(part, str) for part in argv):
        message = f"the adapter {quote_text(name)} built a command with values other than strings: {argv!r}"
        raise RefusedError(message, "update its plugin, or use another adapter")
