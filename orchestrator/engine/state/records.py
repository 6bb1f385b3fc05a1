"""Keys of a run's documents, their initial contents, and their readers."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from orchestrator.domain.events.runs import RunCreated
from orchestrator.domain.runs.check_results import CheckRecord
from orchestrator.domain.runs.model import AdapterDocument, Attachment, RunDocument, RunRequest, TaskDocument
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.scheduling.landing_order import QueueWindow
from orchestrator.domain.sessions.messages import UserMessage
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.handoffs import Handoff
from orchestrator.engine.state.merge_run import MERGE_TASK
from orchestrator.errors import RefusedError, UnreadableDocument, describe_validation_error
from orchestrator.protocols import Commit, Document, Event, JsonObject, Key, Store, Write
from orchestrator.state.documents.validation import find_document_error
from orchestrator.system.failpoints import failpoint

_NO_DOCUMENTS: Mapping[str, TaskDocument] = {}

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

_ENTRY = cache(lambda: TypeAdapter(DispatchEntry))


def new_run_id(now: float) -> str:
    """Return a run id that sorts by time: date and time (UTC), and a random suffix."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_key(run: str) -> Key:
    """Return the key of a run document."""
    return Key("run", run)


def task_key(run: str, task: str) -> Key:
    """Return the key of a task document."""
    return Key("task", f"{run}/{task}")


def spec_key(run: str, task: str) -> Key:
    """Return the key of a task's specification."""
    return Key("spec", f"{run}/{task}")


def request_key(run: str, request: str) -> Key:
    """Return the key of a request to a run; the document is deleted once handled."""
    return Key("request", f"{run}/{request}")


def cursor_key(run: str, kind: str, name: str) -> Key:
    """Return the key of the delivery cursor of a `sink` or a `tracker`."""
    return Key("cursor", f"{run}/{kind}/{name}")


def adapter_key(run: str, adapter: str) -> Key:
    """Return the key of an adapter's state in a run."""
    return Key("adapter", f"{run}/{adapter}")


def cooldown_key(adapter: str, definition: str) -> Key:
    """Return the key of the cooldown that runs share for an adapter, given a digest of its definition."""
    return Key("cooldown", f"{adapter}/{definition}")


def handoff_key(handoff: str) -> Key:
    """Return the key of a handoff."""
    return Key("handoff", handoff)


def message_key(run: str, task: str, message: str) -> Key:
    """Return the key of a user's message to a task."""
    return Key("message", f"{run}/{task}/{message}")


def queue_key(run: str, orchestrator: str) -> Key:
    """Return the key of the merges that a process checks for the merge queue of a run."""
    return Key("queue", f"{run}/{orchestrator}")


async def read_queue_windows(store: Store, run: str) -> dict[str, QueueWindow]:
    """Return the merges that processes check, or checked last, by the name of the process."""
    documents = await _list_by_name(store, "queue", run)
    return {name: _parsed(QueueWindow, document) for name, document in documents.items()}


def check_key(digest: str) -> Key:
    """Return the key of the recorded result of a check."""
    return Key("check", digest)


async def read_check(store: Store, digest: str) -> tuple[int, CheckRecord | None]:
    """Return the recorded result of a check with its version; None if there is none, or an unreadable one."""
    document = await store.get(check_key(digest))
    if document is None:
        return 0, None
    if document.damaged or find_document_error(document) is not None:
        return document.version, None
    return document.version, CheckRecord.model_validate_json(document.encoded)


async def list_checks(store: Store) -> dict[str, tuple[int, CheckRecord]]:
    """Return the readable recorded results of checks by digest, each with the version of its document."""
    return {
        document.key.id: (document.version, CheckRecord.model_validate_json(document.encoded))
        for document in await store.list("check")
        if not document.damaged and find_document_error(document) is None
    }


def attachment_key(run: str, task: str) -> Key:
    """Return the key of the record that a user is attached to a task."""
    return Key("attachment", f"{run}/{task}")


async def read_attachment(store: Store, run: str, task: str) -> tuple[int, Attachment | None]:
    """Return the attachment to a task and the version of its document; 0 and None if there is none."""
    document = await store.get(attachment_key(run, task))
    return (0, None) if document is None else (document.version, _parsed(Attachment, document))


async def read_messages(store: Store, run: str, task: str) -> list[UserMessage]:
    """Return the messages to a task, oldest first."""
    documents = await store.list("message", f"{run}/{task}/")
    messages = [
        _parsed(UserMessage, document).model_copy(update={"version": document.version}) for document in documents
    ]
    return sorted(messages, key=lambda message: (message.time, message.id))


def message_write(run: str, task: str, message: UserMessage) -> Write:
    """Return the write that records a new message, or a change of it; a concurrent withdrawal excludes it."""
    return Write(message_key(run, task, message.id), message.version, message.model_dump(mode="json"))


async def read_handoffs(store: Store, run: str, task: str) -> dict[str, tuple[int, Handoff]]:
    """Return the handoffs of a task by id, each with the version of its document."""
    handoffs = {}
    for document in await store.list("handoff", f"{run}/{task}/"):
        handoff = _parsed(Handoff, _require_undamaged(store, document))
        handoffs[handoff.id] = (document.version, handoff)
    return handoffs


async def record_new_run(
    store: Store, run: RunDocument, specs: Mapping[str, TaskSpec], begun: Mapping[str, TaskDocument] = _NO_DOCUMENTS
) -> None:
    """Record a new run with all tasks in one commit.

    `begun` has the documents of tasks that start with existing work.
    """
    writes = [Write(run_key(run.id), 0, run.model_dump(mode="json")), *new_task_writes(run, specs, begun)]
    begin = {"position": await store.position()}
    for kind, names in (("sink", run.sinks), ("tracker", run.trackers)):
        writes += [Write(cursor_key(run.id, kind, name), 0, begin) for name in names]
    created = Event.of(RunCreated(run=run.id, tasks=len(specs), target=run.target))
    await store.commit(Commit(writes, [created]))
    failpoint("run.seeded")


async def read_run(store: Store, run: str) -> RunDocument:
    """Return a run document.

    Raises RefusedError if it is missing, damaged or of an incompatible version.
    """
    stored = await store.get(run_key(run))
    if stored is None:
        raise RefusedError(f"there is no run {run!r}", "`council runs` lists all runs")
    return _parsed(RunDocument, _require_undamaged(store, stored))


async def read_whole(store: Store, run: str, read: Callable[[], Awaitable[T]]) -> T:
    """Return the result of `read`, whose queries all see the same tasks of a run.

    Plans add tasks and restores remove them, in one commit with the run document. So if that document changes in the
    meantime, `read` is repeated, even after an error.
    """
    while True:
        before = await store.get(run_key(run))
        try:
            result = await read()
        except RefusedError:
            if await store.get(run_key(run)) == before:
                raise
            continue
        if await store.get(run_key(run)) == before:
            return result


async def read_run_with_tasks(store: Store, run: str) -> tuple[RunDocument, dict[str, Document]]:
    """Return a run and its stored tasks by id, as of one commit."""

    async def read() -> tuple[RunDocument, dict[str, Document]]:
        return await read_run(store, run), await read_tasks(store, run)

    return await read_whole(store, run, read)


async def check_task(store: Store, run: RunDocument, task: str) -> None:
    """Raise RefusedError if a run has no such task.

    For `merge`, suggest the newest merge run.
    """
    if task == MERGE_TASK and task not in run.tasks:
        merges = [
            document
            for document in await store.list("run")
            if not document.damaged and document.value.get("merges") is not None
        ]
        if merges:
            newest = max(merges, key=lambda document: (document.value["started"], document.key.id)).key.id
            remedy = f"it belongs to a separate run of `council merge`: add --run {newest}"
            raise RefusedError(f"run {run.id} has no task {task!r}", remedy)
    run.check_task(task)


async def read_task(store: Store, run: str, task: str) -> TaskDocument:
    """Return the document of a task."""
    stored = await store.get(task_key(run, task))
    if stored is None:
        raise RefusedError(f"run {run} has no task {task!r}", f"`council status --run {run}` lists the tasks")
    return _parsed(TaskDocument, stored)


async def read_spec(store: Store, run: str, task: str) -> TaskSpec:
    """Return a task's specification; raise RefusedError if it is missing or damaged."""
    stored = await store.get(spec_key(run, task))
    return _parse_spec(store, {} if stored is None else {task: stored}, task)


async def read_specs(store: Store, run: str, tasks: Iterable[str]) -> dict[str, TaskSpec]:
    """Return the specifications of tasks as `read_spec` does, with one store query."""
    documents = await _list_by_name(store, "spec", run)
    return {task: _parse_spec(store, documents, task) for task in tasks}


def _parse_spec(store: Store, documents: Mapping[str, Document], task: str) -> TaskSpec:
    return _parsed(TaskSpec, _require_undamaged(store, _require_present(documents, task)))


async def read_tasks(store: Store, run: str) -> dict[str, Document]:
    """Return the stored documents of a run's tasks by task id."""
    return await _list_by_name(store, "task", run)


def task_documents(stored: Mapping[str, Document], tasks: Sequence[str]) -> dict[str, TaskDocument]:
    """Parse the documents of tasks, in the order of `tasks`."""
    for task in tasks:
        if task not in stored:
            message = f"the state of task {task} is missing"
            raise RefusedError(message, "restore a checkpoint (`council checkpoint list`), or start a new run")
    encoded = [stored[task].encoded for task in tasks]
    # Unstarted tasks share one immutable document.
    distinct = {content: stored[task] for content, task in zip(encoded, tasks, strict=True)}
    parsed = {content: _parsed(TaskDocument, document) for content, document in distinct.items()}
    for content, task_document in parsed.items():
        if task_document.inconsistency is not None:
            raise UnreadableDocument(str(distinct[content].key), task_document.inconsistency)
    return {task: parsed[content] for task, content in zip(tasks, encoded, strict=True)}


async def read_entries(store: Store, run: RunDocument, blank: Collection[str] = ()) -> dict[str, DispatchEntry]:
    """Return the dispatch entries of tasks in file order.

    Tasks in `blank` have empty entries. Subtasks of plans are in the task documents, see `dispatch.with_subtasks`.
    """
    specs = await _list_by_name(store, "spec", run.id)
    for document in specs.values():
        if document.damaged:
            raise _damaged_error(store, document)
    parse, nothing = _ENTRY().validate_json, DispatchEntry()
    return {task: nothing if task in blank else _parse(parse, _require_present(specs, task)) for task in run.tasks}


def parse_entry(spec: JsonObject) -> DispatchEntry:
    """Return the dispatch entry of a specification."""
    return _ENTRY().validate_python(spec)


def new_task_writes(
    run: RunDocument, specs: Mapping[str, TaskSpec], begun: Mapping[str, TaskDocument] = _NO_DOCUMENTS
) -> list[Write]:
    """Return the writes that record new tasks, without the run document."""
    writes = []
    for task, spec in specs.items():
        writes.append(Write(spec_key(run.id, task), 0, spec.model_dump(mode="json")))
        writes.append(Write(task_key(run.id, task), 0, begun.get(task, TaskDocument()).model_dump(mode="json")))
    return writes


async def read_adapters(store: Store, run: RunDocument) -> dict[str, AdapterDocument]:
    """Return the states of a run's adapters, by name."""
    documents = await _list_by_name(store, "adapter", run.id)
    return {name: _parsed(AdapterDocument, document) for name, document in documents.items()}


async def read_requests(store: Store, run: str) -> list[RunRequest]:
    """Return the pending requests of a run, oldest first."""
    documents = sorted(await store.list("request", f"{run}/"), key=lambda document: document.position)
    return [_parsed(RunRequest, document) for document in documents]


def _parsed(model: type[Model], document: Document) -> Model:
    return _parse(model.model_validate_json, document)


def _parse(parse: Callable[[bytes], T], document: Document) -> T:
    try:
        return parse(document.encoded)
    except ValidationError as error:
        raise UnreadableDocument(str(document.key), describe_validation_error(error)) from None


def _require_present(documents: Mapping[str, Document], task: str) -> Document:
    if task not in documents:
        raise RefusedError(f"the record of task {task!r} is missing", "start a new run")
    return documents[task]


def _require_undamaged(store: Store, document: Document) -> Document:
    if document.damaged:
        raise _damaged_error(store, document)
    return document


def _damaged_error(store: Store, document: Document) -> RefusedError:
    locations = ", ".join(dict.fromkeys(damage.location for damage in store.damage))
    return RefusedError(
        f"the record of {document.key} is damaged in the state log ({locations})",
        "recover the readable part with `council state verify --repair`, then `council resume`; or start a new run: "
        "landed work stays landed, and the branches of this run are preserved",
    )


async def _list_by_name(store: Store, kind: str, run: str) -> dict[str, Document]:
    """Return the documents of a kind in a run, keyed by the rest of their ids."""
    prefix = f"{run}/"
    return {document.key.id[len(prefix) :]: document for document in await store.list(kind, prefix)}
