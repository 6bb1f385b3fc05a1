"""What stands in the views' files, decided from records and documents. Pure."""

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

#: Told in `index.json`; what was written in another form is made anew.
_FORMAT: Final = 1
_ABOUT: Final = (
    "Copies for reading, written from the state log and never read back: to change or delete them changes nothing. "
    "`council state views` brings them up to date, with --rebuild it makes them anew."
)
#: The states in which a task's paths are its own: what is built keeps them until it has landed.
_AT_WORK: Final = frozenset({TaskStatus.RUNNING, TaskStatus.QUEUED, TaskStatus.CHECKING, TaskStatus.LANDING})


@dataclass(frozen=True, slots=True)
class ViewPosition:
    """How far views have come: the commit at `position`, and all before it.

    Its time and who made it tell whether a log is the one that they were made from; `events` is how many bytes
    `events.jsonl` had then, `damage` what of the store was known to be damaged, in words.
    """

    position: int = 0
    time: float = 0.0
    by: str = ""
    updated: float = 0.0
    events: int = 0
    damage: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return what stands in `index.json`."""
        return encode_pretty_json({"about": _ABOUT, "format": _FORMAT, **asdict(self)})

    @classmethod
    def decode(cls, data: bytes) -> ViewPosition | None:
        """Return what `index.json` says; None where somebody else wrote it, or a program that made other views."""
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            told = json.loads(data)
            if told["format"] == _FORMAT:
                damage = tuple(str(one) for one in told["damage"])
                found = cls(
                    position=int(told["position"]),
                    time=float(told["time"]),
                    by=str(told["by"]),
                    updated=float(told["updated"]),
                    events=int(told["events"]),
                    damage=damage,
                )
                return found if found.position >= 0 and found.events >= 0 else None
        return None


@dataclass(slots=True)
class ViewChanges:
    """What is to be done: files with their new content (None: removed), and lines for `events.jsonl`."""

    files: dict[str, bytes | None] = field(default_factory=dict)
    events: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ActiveTask:
    """A task that is between its start and its end, with the patterns of the paths that it owns."""

    run: str
    task: str
    status: str
    attempt: Attempt
    owns: Sequence[str]

    @property
    def has_session(self) -> bool:
        """Whether its session is at work."""
        return self.status == TaskStatus.RUNNING and self.attempt.ended is None


def encode_pretty_json(value: Any) -> bytes:
    """Return JSON as a person reads it, with a newline at its end."""
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers of more than 64 bits
        return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def document_view(document: Document) -> bytes:
    """Return what the file of a document says."""
    return encode_pretty_json(document.to_json())


def version_view(key: Key, version: DocumentVersion) -> bytes:
    """Return what the file of one version of a document says."""
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
    """Return the files of documents; None stands for one that is not there any more."""
    files = {document_path(key): None if one is None else document_view(one) for key, one in documents.items()}
    return ViewChanges(files)


def history_changes(key: Key, versions: Iterable[DocumentVersion]) -> ViewChanges:
    """Return the files of versions of a document."""
    return ViewChanges({version_path(key, one.version): version_view(key, one) for one in versions})


def log_changes(records: Sequence[CommitRecord], newest: Mapping[Key, int]) -> ViewChanges:
    """Return what a part of the log means for histories and events.

    `newest` is the newest version of each task as far as it is known: what is too old for it is left out, and removed
    where it was the newest before this part.
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
    """Return what a task is at; None where it is not at work, or that can't be told."""
    if document.damaged:
        return None
    run, _, task = document.key.id.partition("/")
    try:
        read = TaskDocument.model_validate_json(document.encoded)
    except ValidationError:
        return None
    if read.status not in _AT_WORK or not read.attempts:
        return None
    owns = [] if spec is None else spec.value.get("owns", [])
    return ActiveTask(run, task, read.status, read.attempt, owns)


def ownership_view(working: Iterable[ActiveTask]) -> bytes:
    """Return what `ownership.json` says; who names no paths may change any."""
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
    """Return what the file of a session says, as far as it is recorded."""
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
            "words": attempt.words,
            "input_tokens": attempt.input_tokens,
            "output_tokens": attempt.output_tokens,
            "cost": attempt.cost,
        }
    )
