"""Validate tasks from trackers, and add them to a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.config import adapters, references
from orchestrator.config.model import RunConfig
from orchestrator.config.schema import Task
from orchestrator.config.source.document import Node
from orchestrator.config.source.problems import Position, Problems
from orchestrator.config.source.validation import validate
from orchestrator.config.source.values import read_value
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.protocols import AdapterType, TrackedTask


def add_tracked_tasks(
    config: RunConfig, found: Mapping[str, Sequence[TrackedTask]], adapter_types: Mapping[str, AdapterType]
) -> RunConfig:
    """Return the run with the tasks of its trackers (by tracker) after its own tasks.

    They are equivalent to tasks in the file with the same id, prompt and needs. Raises ConfigError with all errors,
    located by paths such as `trackers.todo[0].prompt`.
    """
    problems = Problems(config.path)
    own, tracked = _nodes(config.tasks, found, problems)
    everything, ours = _as_root([*own, *tracked]), _as_root(tracked)
    references.check_size(everything, problems)
    references.check_ids(everything, problems)
    references.check_needs(everything, problems)
    entries = [validate(Task, node, problems) for node in tracked]
    prompts = references.read_prompts(ours, config.path.parent, problems)
    template = config.template
    if template is not None:
        possible = dict.fromkeys(range(len(tracked)), config.adapters_of(template))
        adapters.try_commands(ours, prompts, possible, config.adapters, adapter_types, problems)
    if problems or template is None:
        raise problems.error()
    trackers = [name for name, tasks in found.items() for _ in tasks]
    specs = [
        template.model_copy(
            update={"id": entry.id, "prompt": prompts[index], "needs": entry.needs, "tracker": trackers[index]}
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
    return {"id": task.id, "prompt": task.prompt, "needs": list(task.needs)}


def _as_root(tasks: Sequence[Node]) -> Node:
    listed = Node(Position(0, 0, "tasks"), [task.value for task in tasks], dict(enumerate(tasks)))
    return Node(listed.at, {"tasks": listed.value}, {"tasks": listed})
