"""Compare a run's file with its record, and apply the changes to tasks. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from orchestrator.config.model import RunConfig
from orchestrator.domain.events.runs import FIXED_KEYS
from orchestrator.domain.events.tasks import TaskReloaded
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.settings.run_settings import SandboxSettings, TaskSpec
from orchestrator.engine.state.records import run_key, spec_key
from orchestrator.errors import RefusedError, raise_combined_refusal
from orchestrator.protocols import Document, Event, Write

#: Keys that an active process has read at its start.
_READ_AT_START: Final = frozenset({"adapter", "fallback", "priority"})
#: Fields of the run document that come from the file.
_RUN_FIELDS: Final = (
    "base",
    "target",
    "capacity",
    "session_memory",
    "sandbox",
    "worktrees",
    "mcp_servers",
    "budget",
    "prices",
    "workflows",
)
#: The key of tasks from the command line instead of the file.
TASKS_KEY: Final = "tasks"
_ADAPTERS_PREFIX: Final = "adapters."


@dataclass(frozen=True, slots=True)
class FileChanges:
    """Differences between the file of a run and its record, by key."""

    file: str
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The keys that differ, by task; `adapters.NAME` for the definition of an adapter that it uses."""
    keys: Sequence[str] = ()
    """The keys that differ for the whole run."""
    has_tasks: bool = True
    """Whether the tasks of the run come from the file."""
    unreadable: str | None = None
    """The reason that the file can't be compared, if any."""
    config: RunConfig | None = None
    """The configuration in the file."""

    def __bool__(self) -> bool:
        """Return True if anything differs."""
        return bool(self.tasks or self.keys)


def compare_with_file(run: RunDocument, specs: Mapping[str, TaskSpec], config: RunConfig) -> FileChanges:
    """Return the differences between a file and the record of its run.

    `specs` are the tasks to compare.
    """
    file_tasks = {task.id: task for task in config.tasks}
    changed_adapters = {
        name
        for name, stored in run.adapters.items()
        if name in config.adapters and stored != config.adapters[name].to_stored()
    }
    tasks = {
        name: keys
        for name, spec in specs.items()
        if name in file_tasks and (keys := _changed(spec, file_tasks[name], changed_adapters))
    }
    now = config if config.target is not None else config.model_copy(update={"target": run.target})
    keys = [
        key
        for name in _RUN_FIELDS
        if name not in run.overrides
        for key in _changed_file_keys(name, getattr(run, name), getattr(now, name))
    ]
    if TASKS_KEY in run.overrides:  # the file has only the defaults of such tasks
        changed = dict.fromkeys(key for each in tasks.values() for key in each)
        keys += [key if key.startswith(_ADAPTERS_PREFIX) else f"defaults.{key}" for key in changed]
        return FileChanges(str(config.path), {}, keys, has_tasks=False, config=config)
    return FileChanges(str(config.path), tasks, keys, config=config)


def _changed_file_keys(name: str, then: Any, now: Any) -> Sequence[str]:
    """Return the changed configuration keys of one field of the run document."""
    if isinstance(then, SandboxSettings):
        return [key for key, value in then if getattr(now, key) != value]
    return [] if then == now else [name]


def _changed(then: TaskSpec, now: TaskSpec, adapters: Collection[str]) -> Sequence[str]:
    """Return the keys in which two specifications differ.

    The changed adapters of the newer one are included.
    """
    keys = []
    if then != now:
        old, new = then.model_dump(mode="json"), now.model_dump(mode="json")
        names = ("needs" if key == "built_needs" else key for key in old if old[key] != new[key])
        keys = list(dict.fromkeys(names))
    return [*keys, *(f"{_ADAPTERS_PREFIX}{name}" for name in now.adapters if name in adapters)]


def build_reload(
    run: Document, specs: Mapping[str, tuple[int, TaskSpec]], changes: FileChanges, *, is_live: bool
) -> tuple[list[Write], list[Event]]:
    """Return the writes and events that apply a file to tasks.

    `specs` include their versions. Raises RefusedError with a reason for each impossible change.
    """
    document, config = RunDocument.model_validate(run.value), changes.config
    if TASKS_KEY in document.overrides:
        raise RefusedError(f"the tasks of run {document.id} are not from a file", "start a new run to change them")
    if config is None:
        raise RefusedError(f"can't reload the file: {changes.unreadable}", "fix the file, or omit --reload")
    file_tasks = {task.id: task for task in config.tasks}
    problems = list(_find_problems(document, specs, changes, config, is_live=is_live))
    raise_combined_refusal(problems, "revert these in the file, or omit --reload")
    writes, events = [], []
    adapters = dict(document.adapters)
    for name, (version, _) in specs.items():
        keys = changes.tasks.get(name, ())
        if not keys:
            continue
        adapters |= {adapter: config.adapters[adapter].to_stored() for adapter in file_tasks[name].adapters}
        writes.append(Write(spec_key(document.id, name), version, file_tasks[name].model_dump(mode="json")))
        events.append(Event.of(TaskReloaded(run=document.id, task=name, keys=keys)))
    if writes:
        updated = document.model_copy(update={"adapters": adapters, "config_digest": None})
        writes.append(Write(run_key(document.id), run.version, updated.model_dump(mode="json")))
    return writes, events


def is_adoptable_while_active(keys: Sequence[str]) -> bool:
    """Return True if no active process has read any of the changed keys at its start."""
    return not any(key in _READ_AT_START or key.startswith(_ADAPTERS_PREFIX) for key in keys)


def can_reload(run: RunDocument, spec: TaskSpec | DispatchEntry) -> bool:
    """Return True if a task of a run comes from its file."""
    return TASKS_KEY not in run.overrides and _source(spec) is None


def _source(spec: TaskSpec | DispatchEntry) -> str | None:
    """Return the source of a task that does not come from the file."""
    if spec.plan is not None:
        return "a plan"
    return None if spec.tracker is None else f"the tracker {spec.tracker!r}"


def _find_problems(
    run: RunDocument,
    specs: Mapping[str, tuple[int, TaskSpec]],
    changes: FileChanges,
    config: RunConfig,
    *,
    is_live: bool,
) -> Iterator[tuple[str, str]]:
    file_tasks = {task.id: task for task in config.tasks}
    for name, (_, spec) in specs.items():
        if (source := _source(spec)) is not None:
            yield f"task {name!r} comes from {source}, not from the file", "omit --reload for it"
        elif name not in file_tasks:
            yield f"{changes.file} no longer has a task {name!r}", "add it again, or omit --reload for it"
        keys = changes.tasks.get(name, ())
        for key in keys:
            if key in FIXED_KEYS:
                yield f"`{key}` of task {name!r} can't change: {FIXED_KEYS[key]}", "start a new run"
            elif is_live and not is_adoptable_while_active([key]):
                message = f"`{key}` of task {name!r} can't change while the run is active"
                yield message, "wait for it to end, or stop it with SIGINT, then retry"
            elif key.startswith(_ADAPTERS_PREFIX) and (
                problem := _other_type(run, config, key.removeprefix(_ADAPTERS_PREFIX))
            ):
                yield problem, "use another name"


def _other_type(run: RunDocument, config: RunConfig, adapter: str) -> str | None:
    then, now = run.adapters[adapter].use, config.adapters[adapter].use
    return (
        None
        if then == now
        else f"adapter {adapter!r} changed from {then!r} to {now!r}: adapters can't share conversations"
    )
