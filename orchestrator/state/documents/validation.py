"""Validate council's documents by kind, and check manual changes.

Documents of other kinds belong to other programs and may have any shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ValidationError

from orchestrator.domain.documents.stored import (
    CheckpointRecord,
    ConflictRecord,
    Cursor,
    NamedLock,
    PortsRecord,
    RunLease,
    SharedValue,
)
from orchestrator.domain.events.state import StateRepaired
from orchestrator.domain.runs.check_results import CheckRecord
from orchestrator.domain.runs.model import (
    AdapterDocument,
    Attachment,
    RunDocument,
    RunRequest,
    SharedCooldown,
    TaskDocument,
)
from orchestrator.domain.runs.statuses import UNSUCCESSFUL_STATUSES, TaskStatus
from orchestrator.domain.scheduling.claims import Claim, LeaseParticipant, MergeLease, OrchestratorLease
from orchestrator.domain.scheduling.landing_order import QueueWindow
from orchestrator.domain.scheduling.path_ownership import PathOwnership
from orchestrator.domain.sessions.contexts import SessionContext
from orchestrator.domain.sessions.messages import UserMessage
from orchestrator.domain.sessions.notes import Note
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.handoffs import Handoff
from orchestrator.errors import RefusedError, UnreadableDocument, VersionConflict, describe_validation_error
from orchestrator.protocols import Commit, Document, Event, JsonObject, Key, Store, VerificationReport, Write
from orchestrator.state.log.codec import encode_object

#: The kind of the documents of named locks.
LOCK_KIND: Final = "named_lock"

#: The fields of a run that users may change; the others are fixed at creation.
EDITABLE_RUN_FIELDS: Final = frozenset({"capacity", "ended", "halted", "annotations"})
#: The fields of a task that users may change; the others are written only by the run.
EDITABLE_TASK_FIELDS: Final = frozenset(
    {"status", "reason", "feedback", "ignored_reason", "pull_request", "annotations"}
)
#: The statuses that users may set; the others need work that only a run can record.
MANUAL_STATUSES: Final = tuple(one for one in TaskStatus if one is TaskStatus.PENDING or one in UNSUCCESSFUL_STATUSES)
#: How many versions of a document to search for a readable one.
_DEEP: Final = 1000

_NOT_EDITABLE: Final = "use the command or function that writes it; for your own documents use another kind"


def _task(encoded: bytes) -> TaskDocument:
    task = TaskDocument.model_validate_json(encoded)
    if task.inconsistency is not None:
        raise ValueError(task.inconsistency)
    return task


def _lease(key: Key, encoded: bytes) -> object:
    if key.id.startswith("merge/"):
        return MergeLease.model_validate_json(encoded)
    return RunLease.model_validate_json(encoded) if key.id.startswith("run/") else None


def _ownership(key: Key, encoded: bytes) -> object:
    # An id without `/` is the version guard of a scope.
    return PathOwnership.model_validate_json(encoded) if "/" in key.id else None


def checkpoint_number(key: Key) -> int | None:
    """Return the number at the end of a checkpoint's name, or None."""
    owner, _, number = key.id.rpartition("/")
    return int(number) if owner and re.fullmatch(r"[1-9][0-9]{0,14}", number) else None


def _checkpoint(key: Key, encoded: bytes) -> object:
    if checkpoint_number(key) is None:
        raise ValueError("its name does not end with a number")
    return CheckpointRecord.model_validate_json(encoded)


def _any(_key: Key, _encoded: bytes) -> None:
    """Accept any object: the originals of imported documents may have any fields."""


def _model(model: type[BaseModel]) -> Callable[[Key, bytes], object]:
    return lambda _, encoded: model.model_validate_json(encoded)


#: The validator of each of council's kinds.
_KINDS: Final[Mapping[str, Callable[[Key, bytes], object]]] = {
    "run": _model(RunDocument),
    "spec": _model(TaskSpec),
    "task": lambda _, encoded: _task(encoded),
    "lease": _lease,
    "orchestrator": _model(OrchestratorLease),
    "claim": _model(Claim),
    "adapter": _model(AdapterDocument),
    "cooldown": _model(SharedCooldown),
    "cursor": _model(Cursor),
    "request": _model(RunRequest),
    "conflict": _model(ConflictRecord),
    "checkpoint": _checkpoint,
    "import": _any,
    "imported": _any,
    "ownership": _ownership,
    "context": _model(SessionContext),
    "handoff": _model(Handoff),
    "shared": _model(SharedValue),
    LOCK_KIND: _model(NamedLock),
    "note": _model(Note),
    "message": _model(UserMessage),
    "queue": _model(QueueWindow),
    "check": _model(CheckRecord),
    "checking": _model(LeaseParticipant),
    "attachment": _model(Attachment),
    "ports": _model(PortsRecord),
}
DOCUMENT_KINDS: Final = frozenset(_KINDS)


class DocumentError(NamedTuple):
    """An unreadable document of council, and the reason."""

    key: Key
    reason: str


def find_document_error(found: Document) -> str | None:
    """Return why a council document is invalid; None if it is valid.

    None also for documents of other kinds and for those damaged in the log.
    """
    return None if found.damaged else _flaw(found.key, found.encoded)


def _flaw(key: Key, encoded: bytes) -> str | None:
    read = _KINDS.get(key.kind)
    if read is None:
        return None
    try:
        read(key, encoded)
    except ValidationError as error:
        return describe_validation_error(error)
    except ValueError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_readable(found: Document) -> bool:
    """Return True if a document's newest value is readable and valid."""
    return not found.damaged and find_document_error(found) is None


def filter_readable(found: Sequence[Document]) -> Iterator[Document]:
    """Yield only the readable documents."""
    return filter(is_readable, found)


async def find_unreadable(store: Store) -> list[DocumentError]:
    """Return council's unreadable documents, sorted by key."""
    listed = [one for kind in sorted(DOCUMENT_KINDS) for one in await store.list(kind)]
    return [DocumentError(one.key, flaw) for one in listed if (flaw := find_document_error(one)) is not None]


async def verify_store(store: Store) -> VerificationReport:
    """Verify a store's log and the shape of all council documents."""
    report = await store.verify()
    unreadable = {one.key: one.reason for one in await find_unreadable(store)}
    return replace(report, unreadable=unreadable)


async def repair_documents(store: Store, keys: Sequence[Key]) -> None:
    """Restore documents to their newest readable value; delete those without one.

    Unreadable values remain in the history (`council state history`). Each repair is recorded as an event
    `state.repaired`.
    """
    for key in keys:
        found = await store.get(key)
        if found is None or find_document_error(found) is None:
            continue
        known = (one.value for one in await store.history(key, _DEEP) if not one.damaged)
        value = next((one for one in known if one is not None and _flaw(key, encode_object(key, one)) is None), None)
        if value is not None and key.kind in {"lease", "claim", "orchestrator"}:
            value = {**value, "epoch": found.version + 1}  # higher than all earlier epochs, so no process has it
        event = Event.of(StateRepaired(key=str(key), lost_version=found.version, is_known=value is not None))
        ttl = None if found.expires is None else max(found.expires - found.time, 1.0)
        try:
            await store.commit(Commit([Write(key, found.version, value, ttl)], [event]))
        except VersionConflict:  # another process has just written it
            continue


def check_manual_change(key: Key, found: Document | None, value: JsonObject | None) -> None:
    """Raise RefusedError if a manual change to a council document is not allowed.

    The value None means deletion. Raises InvalidDocument for a value that no store accepts. Documents of other kinds
    may have any value. Of council's documents, only runs and tasks can be changed, and only in their editable fields;
    all others are written only by commands and functions.
    """
    if key.kind not in DOCUMENT_KINDS:
        return
    before = None if found is None else found.value
    encoded = None if value is None else encode_object(key, value)
    if before == value:
        return
    fields = {"run": EDITABLE_RUN_FIELDS, "task": EDITABLE_TASK_FIELDS}.get(key.kind)
    if fields is None:
        raise RefusedError(f"{key} is written only by council", _NOT_EDITABLE)
    if value is None or encoded is None:
        raise RefusedError(
            f"{key} is part of run {key.id.partition('/')[0]}", "`council clean --runs` removes whole runs"
        )
    if found is None or found.damaged:
        remedy = "`council run` creates runs and their tasks; use another kind for your own documents"
        what = "is damaged in the log" if found else "does not exist"
        raise RefusedError(f"{key} {what}", "`council state verify --repair` first" if found else remedy)
    if (flaw := find_document_error(found)) is not None:  # the changed fields are unknown
        raise UnreadableDocument(str(key), flaw)
    _check_known(key, value)
    if (flaw := _flaw(key, encoded)) is not None:
        begin = f"edit the output of `council state at now {key}`"
        raise RefusedError(f"{key} can't have this value: {flaw}", begin)
    _check_fields(key, found.value, value, fields)


def _check_known(key: Key, value: JsonObject) -> None:
    """Raise RefusedError for fields that a document of this kind does not have."""
    known = (RunDocument if key.kind == "run" else TaskDocument).model_fields
    unknown = sorted(value.keys() - known.keys())
    if unknown:
        what = f"{key} has no field {', '.join(map(repr, unknown[:3]))}"
        raise RefusedError(what, "put your own fields under `annotations`")


def _check_fields(key: Key, before: JsonObject, value: JsonObject, fields: frozenset[str]) -> None:
    changed = [name for name in {**before, **value} if before.get(name, _defaults(key)[name]) != value.get(
        name, _defaults(key)[name])]  # fmt: skip
    fixed = sorted(set(changed) - fields)
    if fixed:
        what = f"{fixed[0]!r} of {key} is written only by the run"
        raise RefusedError(
            what, f"{', '.join(sorted(fields))} can be changed manually, and `annotations` takes any value"
        )
    if key.kind == "task" and "status" in changed and value["status"] not in MANUAL_STATUSES:
        what = f"{key} can't be set to {value['status']} manually: only the run records that together with the work"
        raise RefusedError(what, f"set one of {', '.join(MANUAL_STATUSES)}; or add a note under `annotations`")


def _defaults(key: Key) -> Mapping[str, Any]:
    return _defaults_of("run" if key.kind == "run" else "task")


@cache
def _defaults_of(kind: str) -> Mapping[str, Any]:
    if kind == "task":
        return TaskDocument().model_dump(mode="json")
    fields = RunDocument.model_fields
    return {name: None if field.is_required() else field.get_default() for name, field in fields.items()}
