"""Compute the content of the views' files from records and documents. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import orjson
from pydantic import ValidationError

from orchestrator.domain.runs.model import Attempt, TaskDocument, TaskStatus
from orchestrator.protocols import VERSIONS_KEPT, CommitRecord, Document, DocumentVersion, Event, JsonObject, Key
from orchestrator.repo.worktrees.hub import work_branch_name
from orchestrator.views.names import document_path, version_path

#: The format version in `index.json`; views of other versions are rebuilt.
_FORMAT: Final = 1
_ABOUT: Final = (
    "Readable copies of the state log, which are never read back: changing or deleting them has no effect. "
    "`council state views` updates them, and rebuilds them with --rebuild."
)
#: The statuses in which a task owns its paths: a built task keeps them until it has landed.
_OWNING_STATUSES: Final = frozenset({TaskStatus.RUNNING, TaskStatus.QUEUED, TaskStatus.CHECKING, TaskStatus.LANDING})


@dataclass(frozen=True, slots=True)
class ViewPosition:
    """The position of the views: they include the commit at `position`, and all before it.

    Its time and writer identify the log that they were made from. `events` is the size of `events.jsonl` in bytes at
    that position; `damage` describes the known damage of the store.
    """

    position: int = 0
    time: float = 0.0
    by: str = ""
    updated: float = 0.0
    events: int = 0
    damage: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return the content of `index.json`."""
        return encode_pretty_json({"about": _ABOUT, "format": _FORMAT, **asdict(self)})

    @classmethod
    def decode(cls, data: bytes) -> ViewPosition | None:
        """Parse `index.json`; return None if it is invalid or has another format version."""
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            value = json.loads(data)
            if value["format"] == _FORMAT:
                damage = tuple(str(one) for one in value["damage"])
                position = cls(
                    position=int(value["position"]),
                    time=float(value["time"]),
                    by=str(value["by"]),
                    updated=float(value["updated"]),
                    events=int(value["events"]),
                    damage=damage,
                )
                return position if position.position >= 0 and position.events >= 0 else None
        return None


@dataclass(slots=True)
class ViewChanges:
    """Pending changes: files with their new content (None: remove), and lines for `events.jsonl`."""

    files: dict[str, bytes | None] = field(default_factory=dict)
    events: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ActiveTask:
    """A task between its start and its landing, with the patterns of the paths that it owns."""

    run: str
    task: str
    status: str
    attempt: Attempt
    owns: Sequence[str]

    @property
    def has_session(self) -> bool:
        """Whether its session is running."""
        return self.status == TaskStatus.RUNNING and self.attempt.ended is None


def encode_pretty_json(value: Any) -> bytes:
    """Return indented JSON with a newline at its end."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers of more than 64 bits
        return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def document_view(document: Document) -> bytes:
    """Return the content of a document's file."""
    return encode_pretty_json(document.to_json())


def version_view(key: Key, version: DocumentVersion) -> bytes:
    """Return the content of the file of a document's version."""
    return encode_pretty_json(
        {
            "key": str(key),
            "version": version.version,
            "position": version.position,
            "time": version.time,
            "by": version.by,
            "events": [_event(one) for one in version.events],
            "deleted": version.value is None and not version.damaged,
            "damaged": version.damaged,
            "value": version.value,
        }
    )


def document_changes(documents: Mapping[Key, Document | None]) -> ViewChanges:
    """Return the files of documents; None is a deleted one."""
    files = {document_path(key): None if one is None else document_view(one) for key, one in documents.items()}
    return ViewChanges(files)


def history_changes(key: Key, versions: Iterable[DocumentVersion]) -> ViewChanges:
    """Return the files of a document's versions."""
    return ViewChanges({version_path(key, one.version): version_view(key, one) for one in versions})


def log_changes(records: Sequence[CommitRecord], newest: Mapping[Key, int]) -> ViewChanges:
    """Return the changes of histories and events for a part of the log.

    `newest` is the newest known version of each task: versions that are too old are skipped, and removed if an earlier
    part wrote them.
    """
    changes = ViewChanges()
    oldest: dict[Key, int] = {}
    last: dict[Key, int] = {}
    for record in records:
        changes.events += [_event_line(record, event) for event in record.events]
        for key, (version, value) in record.documents.items():
            if key.kind == "task":
                oldest.setdefault(key, version)
                last[key] = max(version, newest.get(key, 0))
                if version > last[key] - VERSIONS_KEPT:
                    found = DocumentVersion(version, record.position, record.time, record.by, value, record.events)
                    changes.files[version_path(key, version)] = version_view(key, found)
    for key, version in last.items():
        for gone in range(max(1, oldest[key] - VERSIONS_KEPT), version - VERSIONS_KEPT + 1):
            changes.files[version_path(key, gone)] = None
    return changes


def _event(event: Event) -> JsonObject:
    return {"type": event.type, "data": event.data}


def _event_line(record: CommitRecord, event: Event) -> bytes:
    line = {"position": record.position, "time": record.time, "by": record.by, **_event(event)}
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers of more than 64 bits
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def active_task(document: Document, spec: Document | None) -> ActiveTask | None:
    """Return the active task of a document; None if it is not active or unreadable."""
    if document.damaged:
        return None
    run, _, task = document.key.id.partition("/")
    try:
        read = TaskDocument.model_validate_json(document.encoded)
    except ValidationError:
        return None
    if read.status not in _OWNING_STATUSES or not read.attempts:
        return None
    owns = [] if spec is None else spec.value.get("owns", [])
    return ActiveTask(run, task, read.status, read.attempt, owns)


def ownership_view(working: Iterable[ActiveTask]) -> bytes:
    """Return the content of `ownership.json`; a task without patterns may change any path."""
    ordered = sorted(working, key=lambda one: (one.attempt.started, one.run, one.task))
    owners = [
        {
            "run": one.run,
            "task": one.task,
            "status": one.status,
            "attempt": one.attempt.number,
            "since": one.attempt.started,
            "owns": one.owns,
        }
        for one in ordered
    ]
    return encode_pretty_json({"owners": owners})


def context_view(one: ActiveTask, worktree: str | None) -> bytes:
    """Return the content of a session's file."""
    attempt = one.attempt
    return encode_pretty_json(
        {
            "run": one.run,
            "task": one.task,
            "attempt": attempt.number,
            "adapter": attempt.adapter,
            "since": attempt.started,
            "branch": work_branch_name(one.run, one.task, str(attempt.number)),
            "worktree": worktree,
            "last_message": attempt.last_message,
            "input_tokens": attempt.input_tokens,
            "output_tokens": attempt.output_tokens,
            "cost": attempt.cost,
        }
    )
