"""Turn the tasks of trackers into tasks of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import anyio

from orchestrator.config import adapters, references
from orchestrator.config.load import resolve_needs
from orchestrator.config.model import RunConfig, restore_adapters
from orchestrator.config.schema import Task
from orchestrator.config.source.document import Node
from orchestrator.config.source.problems import Position, Problems
from orchestrator.config.source.validation import validate
from orchestrator.config.source.values import read_value
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.settings.fields import NO_WORKFLOW
from orchestrator.domain.settings.names import entry_of_adapter
from orchestrator.domain.settings.run_settings import ResolvedSettings, TaskSpec
from orchestrator.domain.wording import suggest
from orchestrator.engine.run_context import NewTasks
from orchestrator.engine.state.records import read_specs
from orchestrator.errors import ConfigError, PluginFailed, RefusedError, plugin_code
from orchestrator.plugins import Plugins
from orchestrator.protocols import AdapterType, Store, TrackedTask, Tracker

#: The timeout of a tracker, in seconds.
FETCH_TIMEOUT = 60.0


async def add_open_tracked_tasks(config: RunConfig, plugins: Plugins, *, may_be_none: bool = False) -> RunConfig:
    """Return the config with the open tasks of its trackers in addition to its own.

    Raises ConfigError if tracked tasks are invalid, RefusedError if a tracker does not answer or there is no task at
    all, unless `may_be_none`.
    """
    if not config.trackers:
        return config
    stored = {name: tracker.to_stored() for name, tracker in config.trackers.items()}
    tracked = {
        name: await _fetch_tracked_tasks(name, partial(plugins.open, "tracker", name, tracker))
        for name, tracker in stored.items()
    }
    config = add_tracked_tasks(config, tracked, plugins.adapters)
    if not config.tasks and not may_be_none:
        names = ", ".join(map(repr, tracked))
        remedy = "add a task, or try again later: those of an active run are not free (`council runs` lists runs)"
        raise RefusedError(f"nothing to do: no open task in {names}", remedy)
    return config


async def _fetch_tracked_tasks(
    name: str, open_tracker: Callable[[], AbstractAsyncContextManager[Tracker]]
) -> Sequence[TrackedTask]:
    """Return the open tasks of a tracker; raise RefusedError if it can't list them."""
    remedy = "fix the tracker, or remove it from the file"
    try:
        with plugin_code(RefusedError, TimeoutError), anyio.fail_after(FETCH_TIMEOUT):
            async with open_tracker() as tracker:
                return [_checked(task) for task in await tracker.tasks()]
    except RefusedError as error:
        raise RefusedError(f"tracker {name!r}: {error.message}", error.remedy) from error
    except TimeoutError as error:
        raise RefusedError(f"tracker {name!r} did not list its tasks within {FETCH_TIMEOUT:g} s", remedy) from error
    except PluginFailed as failed:
        raise RefusedError(f"tracker {name!r} can't list its tasks: {failed}", remedy) from failed


def _checked(task: TrackedTask) -> TrackedTask:
    """Return a task of a tracker with tuples; raise AttributeError or TypeError if it is none."""
    return TrackedTask(
        task.id, task.prompt, tuple(task.needs), task.priority, tuple(task.owns), task.adapter, task.workflow,
        tuple(task.past_requests),
    )  # fmt: skip


async def find_new_tasks(store: Store, plugins: Plugins, run: RunDocument) -> NewTasks:
    """Return the tasks of a run's trackers that are not tasks of the run yet.

    Raises RefusedError if a tracker does not answer.
    """
    assert run.follow is not None, "the run takes new tasks"  # noqa: S101  the caller has checked it
    found = {
        name: [task for task in await _fetch_tracked_tasks(name, partial(plugins.open, "tracker", name, tracker))
               if task.id not in run.tasks]
        for name, tracker in run.trackers.items()
    }  # fmt: skip
    if not any(found.values()):
        return NewTasks({}, {})
    specs, context = await read_specs(store, run.id, run.tasks), run.follow.context
    kept = {name: getattr(run, name) for name in ResolvedSettings.model_fields}
    config = RunConfig.model_construct(
        **kept | {"adapters": restore_adapters(run.adapters, plugins.adapters, plugins.explain)},
        path=Path(run.config),
        tasks=tuple(specs.values()),
        context=context,
        template=run.follow.model_copy(update={"context": context if run.follow.workflow is not None else {}}),
    )
    return _add_valid(config, found, plugins.adapters)


def _add_valid(
    config: RunConfig, found: Mapping[str, Sequence[TrackedTask]], adapter_types: Mapping[str, AdapterType]
) -> NewTasks:
    """Return the valid tasks: all together, or else those that are valid by themselves."""
    known = len(config.tasks)
    try:
        return NewTasks({task.id: task for task in add_tracked_tasks(config, found, adapter_types).tasks[known:]}, {})
    except ConfigError:
        refused: dict[tuple[str, str], str] = {}
    for name, tasks in found.items():
        for task in tasks:
            try:
                config = add_tracked_tasks(config, {name: [task]}, adapter_types)
            except ConfigError as error:
                refused[name, task.id] = "; ".join(one.message for one in error.problems)
    return NewTasks({task.id: task for task in config.tasks[known:]}, refused)


def add_tracked_tasks(
    config: RunConfig, found: Mapping[str, Sequence[TrackedTask]], adapter_types: Mapping[str, AdapterType]
) -> RunConfig:
    """Return the run with the tasks of its trackers (by tracker) after its own tasks.

    They are equivalent to tasks in the file with the same fields. Raises ConfigError with all errors, located by paths
    such as `trackers.todo[0].prompt`.
    """
    problems = Problems(config.path)
    own, tracked = _nodes(config.tasks, found, problems)
    everything, ours = _as_root([*own, *tracked]), _as_root(tracked)
    references.check_size(everything, problems)
    references.check_ids(everything, problems)
    references.check_needs(everything, problems)
    _check_names(tracked, config, problems)
    entries = [validate(Task, node, problems) for node in tracked]
    prompts = references.read_prompts(ours, config.path.parent, problems)
    template = config.template
    if template is not None:
        possible = dict.fromkeys(range(len(tracked)), config.adapters_of(template))
        adapters.try_commands(ours, prompts, possible, config.adapters, adapter_types, problems)
    if problems or template is None:
        raise problems.error()
    origins = [(name, task.past_requests) for name, tasks in found.items() for task in tasks]
    specs = [
        template.model_copy(
            update={
                **_settings(entry, config),
                "id": entry.id,
                "prompt": prompts[index],
                **resolve_needs(entry),
                "tracker": origins[index][0],
                "past_requests": tuple(origins[index][1]),
            }
        )
        for index, entry in enumerate(entries)
        if entry is not None
    ]
    return config.model_copy(update={"tasks": (*config.tasks, *specs)})


def _nodes(
    own: Sequence[TaskSpec], found: Mapping[str, Sequence[TrackedTask]], problems: Problems
) -> tuple[list[Node], list[Node]]:
    trackers = {name: [_facts(task) for task in tasks] for name, tasks in found.items()}
    root = read_value({"tasks": [_facts(task) for task in own], "trackers": trackers}, problems)
    if root is None:
        raise problems.error()
    tracked = root.children["trackers"].children.values()
    return list(root.children["tasks"].children.values()), [
        node for tasks in tracked for node in tasks.children.values()
    ]


def _facts(task: TaskSpec | TrackedTask) -> dict[str, object]:
    facts: dict[str, object] = {"id": task.id, "prompt": task.prompt, "needs": list(task.needs)}
    if isinstance(task, TaskSpec):
        return facts
    settings = {"priority": task.priority, "owns": list(task.owns), "adapter": task.adapter, "workflow": task.workflow}
    return facts | {key: value for key, value in settings.items() if value not in (None, [])}


def _check_names(tracked: Sequence[Node], config: RunConfig, problems: Problems) -> None:
    """Report adapters and workflows of tracked tasks that the file does not have."""
    adapter_names = dict.fromkeys([*map(entry_of_adapter, config.adapters), *config.adapters])
    known = {"adapter": adapter_names.keys(), "workflow": config.workflows.keys()}
    for task in tracked:
        for key, names in known.items():
            node = task.get(key)
            if node is not None and node.value not in names and (key, node.value) != ("workflow", NO_WORKFLOW):
                remedy = suggest(str(node.value), names, f"the {key}s of the file") if names else f"it has no {key}s"
                problems.add(node.at, f"there is no {key} {node.value!r} in the file", remedy)


def _settings(entry: Task, config: RunConfig) -> dict[str, object]:
    """Return the settings of a tracked task that replace the defaults of the file."""
    update: dict[str, object] = {name: getattr(entry, name) for name in entry.model_fields_set & {"priority", "owns"}}
    if entry.adapter is not None:
        accounts = [one for one in config.adapters if entry.adapter in (one, entry_of_adapter(one))]
        update |= {"adapter": accounts[0], "fallback": tuple(accounts[1:])}
    if entry.workflow is not None:
        is_none = entry.workflow == NO_WORKFLOW
        update |= {"workflow": None if is_none else entry.workflow, "context": {} if is_none else config.context}
    return update


def _as_root(tasks: Sequence[Node]) -> Node:
    listed = Node(Position(0, 0, "tasks"), [task.value for task in tasks], dict(enumerate(tasks)))
    return Node(listed.at, {"tasks": listed.value}, {"tasks": listed})
