"""What is on record of a run: the keys of its documents, how they begin, and how they are read."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from orchestrator.domain.runs.model import AdapterDocument, RunDocument, RunRequest, TaskDocument
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.workflow.handoffs import Handoff
from orchestrator.engine.state.merge_run import MERGE_TASK
from orchestrator.errors import RefusedError, UnreadableDocument, describe_validation_error
from orchestrator.protocols import Commit, Document, Event, JsonObject, Key, Store, Write
from orchestrator.system.failpoints import failpoint

if TYPE_CHECKING:
    from orchestrator.config.model import TaskSpec

_NO_DOCUMENTS: Mapping[str, TaskDocument] = {}

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

_ENTRY = cache(lambda: TypeAdapter(DispatchEntry))


def new_run_id(now: float) -> str:
    """Return a run id that sorts by time: date, time (UTC) and a few random characters."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_key(run: str) -> Key:
    """Return the key of a run's document."""
    return Key("run", run)


def task_key(run: str, task: str) -> Key:
    """Return the key of a task's state."""
    return Key("task", f"{run}/{task}")


def spec_key(run: str, task: str) -> Key:
    """Return the key of what a task was asked to do; written once."""
    return Key("spec", f"{run}/{task}")


def request_key(run: str, request: str) -> Key:
    """Return the key of what was asked of a run's owner; deleted when it is done."""
    return Key("request", f"{run}/{request}")


def cursor_key(run: str, kind: str, name: str) -> Key:
    """Return the key of how far a run's events have been delivered, to a `sink` or a `tracker`."""
    return Key("cursor", f"{run}/{kind}/{name}")


def adapter_key(run: str, adapter: str) -> Key:
    """Return the key of what a run has learned about an adapter."""
    return Key("adapter", f"{run}/{adapter}")


def handoff_key(handoff: str) -> Key:
    """Return the key of what a phase handed over, by its id."""
    return Key("handoff", handoff)


async def read_handoffs(store: Store, run: str, task: str) -> dict[str, tuple[int, Handoff]]:
    """Return what the phases of a task have handed over, by id, with the versions of the documents."""
    found = {}
    for item in await store.list("handoff", f"{run}/{task}/"):
        handoff = _parsed(Handoff, _require_undamaged(store, item))
        found[handoff.id] = (item.version, handoff)
    return found


async def record_new_run(
    store: Store, run: RunDocument, specs: Mapping[str, TaskSpec], begun: Mapping[str, TaskDocument] = _NO_DOCUMENTS
) -> None:
    """Record a new run with all of its tasks, at once; `begun` has those that do not begin from nothing."""
    writes = [Write(run_key(run.id), 0, run.model_dump(mode="json")), *new_task_writes(run, specs, begun)]
    begin = {"position": await store.position()}
    for kind, names in (("sink", run.sinks), ("tracker", run.trackers)):
        writes += [Write(cursor_key(run.id, kind, name), 0, begin) for name in names]
    created = Event("run.created", {"run": run.id, "tasks": len(specs), "target": run.target})
    await store.commit(Commit(writes, [created]))
    failpoint("run.seeded")


async def read_run(store: Store, run: str) -> RunDocument:
    """Return a run's document; RefusedError if there is none, it is damaged, or of a version that says other things."""
    found = await store.get(run_key(run))
    if found is None:
        raise RefusedError(f"there is no run {run!r}", "`council runs` lists them")
    document = _parsed(RunDocument, _require_undamaged(store, found))
    if document.inconsistency is not None:
        raise UnreadableDocument(str(found.key), document.inconsistency)
    if document.workflows:  # all else that it is made of only matters to who works in it: `read_runnable`
        _check(found)
    return document


async def read_runnable(store: Store, run: str) -> RunDocument:
    """Return a run's document as `read_run` does; UnreadableDocument, too, where nobody could work in it."""
    document = await read_run(store, run)
    found = await store.get(run_key(run))
    if found is not None:
        _check(found)
    return document


def _check(found: Document) -> None:
    # Late: most of what only shows a run needs none of the shapes.
    from orchestrator.state.documents.validation import find_document_error

    if (flaw := find_document_error(found)) is not None:
        raise UnreadableDocument(str(found.key), flaw)


async def check_task(store: Store, run: RunDocument, task: str) -> None:
    """Refuse the name of a task that a run does not have; that of a merge is led to the newest run of a merge."""
    if task == MERGE_TASK and task not in run.tasks:
        merges = [one for one in await store.list("run") if not one.damaged and one.value.get("merges") is not None]
        if merges:
            newest = max(merges, key=lambda one: (one.value["started"], one.key.id)).key.id
            remedy = f"`council merge` makes a run of its own: add --run {newest}"
            raise RefusedError(f"run {run.id} has no task {task!r}", remedy)
    run.check_task(task)


async def read_task(store: Store, run: str, task: str) -> TaskDocument:
    """Return where one task is."""
    found = await store.get(task_key(run, task))
    if found is None:
        raise RefusedError(f"run {run} has no task {task!r}", "`council status` names them")
    return _parsed(TaskDocument, found)


async def read_spec(store: Store, run: str, task: str) -> TaskSpec:
    """Return what a task was asked to do; RefusedError if that is missing or damaged."""
    # Late: its models take as long to make as all of what shows a run takes to read.
    from orchestrator.config.model import TaskSpec

    found = await store.get(spec_key(run, task))
    return _parsed(TaskSpec, _require_undamaged(store, _there({} if found is None else {task: found}, task)))


async def read_specs(store: Store, run: str, tasks: Iterable[str]) -> dict[str, TaskSpec]:
    """Return what tasks were asked to do, as `read_spec`, with one look at the store."""
    from orchestrator.config.model import TaskSpec

    found = await _list_by_name(store, "spec", run)
    return {task: _parsed(TaskSpec, _require_undamaged(store, _there(found, task))) for task in tasks}


async def read_tasks(store: Store, run: str) -> dict[str, Document]:
    """Return the state documents of a run's tasks by task id."""
    return await _list_by_name(store, "task", run)


def task_documents(found: Mapping[str, Document], tasks: Sequence[str]) -> dict[str, TaskDocument]:
    """Return the state of each of the tasks from their documents, in the order of `tasks`."""
    for task in tasks:
        if task not in found:
            what = f"nothing is recorded any more of how task {task} stands"
            raise RefusedError(what, "go back to a checkpoint (`council checkpoint list`), or start a new run")
    encoded = [found[task].encoded for task in tasks]
    # Those that have not begun are all the same, and none can be changed.
    distinct = {one: found[task] for one, task in zip(encoded, tasks, strict=True)}
    read = {one: _parsed(TaskDocument, document) for one, document in distinct.items()}
    for one, task_document in read.items():
        if task_document.inconsistency is not None:
            raise UnreadableDocument(str(distinct[one].key), task_document.inconsistency)
    return {task: read[one] for task, one in zip(tasks, encoded, strict=True)}


async def read_entries(store: Store, run: RunDocument, blank: Collection[str] = ()) -> dict[str, DispatchEntry]:
    """Return what decisions need of each task, in the order of the file; of those that are `blank`, nothing.

    What their plans became is told by the tasks' documents, see `dispatch.with_subtasks`.
    """
    found = await _list_by_name(store, "spec", run.id)
    for item in found.values():
        if item.damaged:
            raise _damaged_error(store, item)
    parse, nothing = _ENTRY().validate_json, DispatchEntry()
    return {task: nothing if task in blank else _valid(parse, _there(found, task)) for task in run.tasks}


def parse_entry(spec: JsonObject) -> DispatchEntry:
    """Return what decisions need of a task by what it was asked to do."""
    return _ENTRY().validate_python(spec)


def new_task_writes(
    run: RunDocument, specs: Mapping[str, TaskSpec], begun: Mapping[str, TaskDocument] = _NO_DOCUMENTS
) -> list[Write]:
    """Return the writes that record tasks of a run beside its own document."""
    writes = []
    for task, spec in specs.items():
        writes.append(Write(spec_key(run.id, task), 0, spec.model_dump(mode="json")))
        writes.append(Write(task_key(run.id, task), 0, begun.get(task, TaskDocument()).model_dump(mode="json")))
    return writes


async def read_adapters(store: Store, run: RunDocument) -> dict[str, AdapterDocument]:
    """Return what a run has learned about its adapters, by name."""
    found = await _list_by_name(store, "adapter", run.id)
    return {name: _parsed(AdapterDocument, item) for name, item in found.items()}


async def read_requests(store: Store, run: str) -> list[RunRequest]:
    """Return what was asked of a run's owner and is not done yet, the oldest first."""
    found = sorted(await store.list("request", f"{run}/"), key=lambda one: one.position)
    return [_parsed(RunRequest, one) for one in found]


def _parsed(model: type[Model], found: Document) -> Model:
    return _valid(model.model_validate_json, found)


def _valid(parse: Callable[[bytes], T], found: Document) -> T:
    try:
        return parse(found.encoded)
    except ValidationError as error:
        raise UnreadableDocument(str(found.key), describe_validation_error(error)) from None


def _there(found: Mapping[str, Document], task: str) -> Document:
    if task not in found:
        raise RefusedError(f"the record of task {task!r} is missing", "start a new run")
    return found[task]


def _require_undamaged(store: Store, found: Document) -> Document:
    if found.damaged:
        raise _damaged_error(store, found)
    return found


def _damaged_error(store: Store, found: Document) -> RefusedError:
    places = ", ".join(dict.fromkeys(f"{one.path} at byte {one.offset}" for one in store.damage))
    return RefusedError(
        f"the record of {found.key} is damaged in the state log ({places})",
        "`council state verify --repair` restores the readable state, then `council resume` continues from it; or "
        "start a new run: what has landed stays landed, and the branches of this run are kept",
    )


async def _list_by_name(store: Store, kind: str, run: str) -> dict[str, Document]:
    """Return the documents of a kind that a run has, each by the rest of its id."""
    prefix = f"{run}/"
    return {found.key.id[len(prefix) :]: found for found in await store.list(kind, prefix)}
