"""What the file of a run says now that the record of the run does not, and how tasks take it over. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from orchestrator.config.model import RunConfig, TaskSpec
from orchestrator.domain.runs.model import RunDocument
from orchestrator.engine.state.records import run_key, spec_key
from orchestrator.errors import RefusedError, raise_combined_refusal
from orchestrator.protocols import Document, Event, JsonObject, Write

#: Keys of a task that a run can't take from its file any more, and why.
FIXED_KEYS: Final[Mapping[str, str]] = {
    "needs": "the order of a run's tasks is set when it starts",
    "owns": "the paths that a run's tasks own are set when it starts",
    "workflow": "the phases of a run's tasks are set when it starts",
}
#: Keys that a process that is running read when it started.
_READ_AT_START: Final = frozenset({"adapter", "fallback", "priority"})
#: Fields of a run's document that its file says.
_RUN_FIELDS: Final = (
    "base",
    "target",
    "capacity",
    "session_memory",
    "fence",
    "worktrees",
    "mcp_servers",
    "budget",
    "prices",
    "workflows",
)
#: The keys of a file behind the parts of the field `fence`.
_SANDBOX_KEYS: Final[Mapping[str, str]] = {
    "sandbox": "sandbox",
    "network": "network",
    "hosts": "network",
    "nesting": "nested_sandboxes",
    "limits": "limits",
    "reach": "writable",
}
#: The key of what the command line gave instead of the file: its tasks.
TASKS_KEY: Final = "tasks"
_ADAPTERS_PREFIX: Final = "adapters."


@dataclass(frozen=True, slots=True)
class FileChanges:
    """What differs between the file of a run and its record, by key."""

    file: str
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The keys that differ, by task; `adapters.NAME` for the definition of an adapter that it uses."""
    keys: Sequence[str] = ()
    """The keys that differ and hold for the whole run."""
    has_tasks: bool = True
    """Whether the tasks of the run are from the file."""
    unreadable: str | None = None
    """Why the file can't be compared; None: it can."""
    config: RunConfig | None = None
    """What the file says."""

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.tasks or self.keys)

    def to_json(self) -> JsonObject:
        """Return it for programs."""
        return {"file": self.file, "tasks": {name: [*keys] for name, keys in self.tasks.items()}, "keys": [*self.keys]}


def compare_with_file(run: RunDocument, specs: Mapping[str, TaskSpec], config: RunConfig) -> FileChanges:
    """Return what a file says otherwise than the record of its run; `specs` are the tasks that it matters for."""
    said = {task.id: task for task in config.tasks}
    others = {
        name
        for name, one in run.adapters.items()
        if name in config.adapters and one != config.adapters[name].to_stored()
    }
    tasks = {
        name: keys for name, spec in specs.items() if name in said and (keys := _changed(spec, said[name], others))
    }
    now = _run_values(config)
    then = run.model_dump(mode="json", include=set(_RUN_FIELDS))
    now["target"] = then["target"] if config.target is None else config.target
    keys = [
        key for name in _RUN_FIELDS if name not in run.given for key in _changed_file_keys(name, then[name], now[name])
    ]
    if TASKS_KEY in run.given:  # of such tasks the file has the defaults alone
        changed = dict.fromkeys(key for each in tasks.values() for key in each)
        keys += [key if key.startswith(_ADAPTERS_PREFIX) else f"defaults.{key}" for key in changed]
        return FileChanges(str(config.path), {}, keys, has_tasks=False, config=config)
    return FileChanges(str(config.path), tasks, keys, config=config)


def _changed_file_keys(name: str, then: Any, now: Any) -> Sequence[str]:
    """Return the keys of a file that a field of the run's document differs by."""
    if name != "fence":
        return [] if then == now else [name]
    return list(dict.fromkeys(_SANDBOX_KEYS[part] for part in now if then.get(part) != now[part]))


def _run_values(config: RunConfig) -> dict[str, Any]:
    workflows = {
        name: [phase.model_dump(mode="json", by_alias=True) for phase in phases]
        for name, phases in config.workflows.items()
    }
    return {**config.model_dump(mode="json", include=set(_RUN_FIELDS) - {"workflows"}), "workflows": workflows}


def _changed(then: TaskSpec, now: TaskSpec, adapters: Collection[str]) -> Sequence[str]:
    """Return the keys by which two specifications differ, and those of the adapters of the newer one that differ."""
    keys = []
    if then != now:
        old, new = then.model_dump(mode="json"), now.model_dump(mode="json")
        keys = [key for key in old if old[key] != new[key]]
    return [*keys, *(f"{_ADAPTERS_PREFIX}{name}" for name in now.adapters if name in adapters)]


def build_reload(
    run: Document, specs: Mapping[str, tuple[int, TaskSpec]], changes: FileChanges, *, is_live: bool
) -> tuple[list[Write], list[Event]]:
    """Return the writes and events by which tasks take over what the file says of them; `specs` have their versions.

    RefusedError with the reason for each thing that can't be changed.
    """
    document, config = RunDocument.model_validate(run.value), changes.config
    if TASKS_KEY in document.given:
        raise RefusedError(f"the tasks of run {document.id} are not from a file", "start a new run to change them")
    if config is None:
        raise RefusedError(f"{changes.file} can't be read: {changes.unreadable}", "repair it, or leave --reload out")
    said = {task.id: task for task in config.tasks}
    refused = list(_find_problems(document, specs, changes, config, is_live=is_live))
    raise_combined_refusal(refused, "undo these in the file, or leave --reload out")
    writes, events = [], []
    adapters = dict(document.adapters)
    for name, (version, _) in specs.items():
        keys = changes.tasks.get(name, ())
        if not keys:
            continue
        adapters |= {one: config.adapters[one].to_stored() for one in said[name].adapters}
        writes.append(Write(spec_key(document.id, name), version, said[name].model_dump(mode="json")))
        events.append(Event("task.reloaded", {"run": document.id, "task": name, "keys": list(keys)}))
    if adapters != document.adapters:
        amended = document.model_copy(update={"adapters": adapters})
        writes.append(Write(run_key(document.id), run.version, amended.model_dump(mode="json")))
    return writes, events


def can_reload(run: RunDocument, spec: TaskSpec) -> bool:
    """Return whether a task of a run is from its file."""
    return TASKS_KEY not in run.given and _source(spec) is None


def _source(spec: TaskSpec) -> str | None:
    """Return what a task that is not from the file comes from."""
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
    said = {task.id: task for task in config.tasks}
    for name, (_, spec) in specs.items():
        if (source := _source(spec)) is not None:
            yield f"task {name!r} comes from {source}, not from the file", "leave --reload out for it"
        elif name not in said:
            yield f"{changes.file} has no task {name!r} any more", "add it again, or leave --reload out for it"
        keys = changes.tasks.get(name, ())
        for key in keys:
            if key in FIXED_KEYS:
                yield f"`{key}` of task {name!r} can't change: {FIXED_KEYS[key]}", "start a new run for that"
            elif is_live and (key in _READ_AT_START or key.startswith(_ADAPTERS_PREFIX)):
                what = f"`{key}` of task {name!r} can't change while the run is running"
                yield what, "wait for its end, or stop it with SIGINT, and repeat this"
            elif key.startswith(_ADAPTERS_PREFIX) and (
                why := _other_type(run, config, key.removeprefix(_ADAPTERS_PREFIX))
            ):
                yield why, "give it another name"


def _other_type(run: RunDocument, config: RunConfig, adapter: str) -> str | None:
    then, now = run.adapters[adapter]["use"], config.adapters[adapter].use
    return None if then == now else f"adapter {adapter!r} was {then!r} and is {now!r}: conversations do not move"
