"""Names and content of the exported files. Pure.

Names are readable if the id allows it, and unique on any file system.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
from pydantic import ValidationError

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES
from orchestrator.protocols import CommitRecord, Document, DocumentVersion, Event, JsonObject, Key

#: Ids that are used unchanged: valid on case-insensitive file systems, and different from council's own file names.
_PLAIN: Final = re.compile(r"(?!.*\.json$)[a-z0-9][a-z0-9._-]{0,79}")
_ODD: Final = re.compile(r"[^A-Za-z0-9_-]")
_SHOWN: Final = 40  # characters of an encoded name
_DIGITS: Final = 16
#: The maximum depth of folders for an id; the rest is one name, which limits the length of paths.
_DEEPEST: Final = 4


def document_path(key: Key) -> str:
    """Return the file of a document, relative to the folder of the views."""
    match key.kind:
        case "run":
            return f"runs/{_path(key.id)}.json"
        case "task":
            return f"tasks/{_path(key.id)}/state.json"
        case "spec":
            return f"tasks/{_path(key.id)}/spec.json"
        case "checkpoint":
            return f"checkpoints/{_path(key.id)}.json"
        case kind:
            return f"documents/{_name(kind)}/{_path(key.id)}.json"


def version_path(key: Key, version: int) -> str:
    """Return the file of a task's version."""
    return f"tasks/{_path(key.id)}/history/v{version}.json"


def context_path(run: str, task: str) -> str:
    """Return the file of a task's session."""
    return f"context/{_path(f'{run}/{task}')}.json"


def _path(name: str) -> str:
    return "/".join(map(_name, name.split("/", _DEEPEST - 1)))


def _name(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{_ODD.sub('_', text[:_SHOWN])}~{digest[:_DIGITS]}"


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
            "writer": version.writer,
            "events": [_event(one) for one in version.events],
            "deleted": version.value is None and not version.damaged,
            "damaged": version.damaged,
            "value": version.value,
        }
    )


def event_line(record: CommitRecord, event: Event) -> bytes:
    """Return the line of an event in `events.jsonl`."""
    line = {"position": record.position, "time": record.time, "writer": record.writer, **_event(event)}
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers of more than 64 bits
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _event(event: Event) -> JsonObject:
    return {"type": event.type, "data": event.data}


@dataclass(frozen=True, slots=True)
class ActiveTask:
    """A task between its start and its landing."""

    run: str
    task: str
    document: TaskDocument
    hub: Path | None
    """The hub of its run, if known."""
    owns: Sequence[str]
    """The patterns of the paths that it owns; empty: all."""


def active_tasks(documents: Mapping[Key, Document]) -> list[ActiveTask]:
    """Return readable active tasks of unfinished runs, sorted by start."""
    active = []
    for document in documents.values():
        if document.key.kind != "task" or document.damaged:
            continue
        try:
            task = TaskDocument.model_validate_json(document.encoded)
        except ValidationError:
            continue
        name, _, own = document.key.id.partition("/")
        run = documents.get(Key("run", name))
        facts: JsonObject = {} if run is None else run.value
        if task.status in CLAIMED_STATUSES and task.attempts and facts.get("ended") is None:
            spec = documents.get(Key("spec", document.key.id))
            hub, owns = facts.get("hub"), [] if spec is None else spec.value.get("owns", [])
            active.append(ActiveTask(name, own, task, Path(hub) if isinstance(hub, str) else None, owns))
    return sorted(active, key=lambda one: (one.document.attempt.started, one.run, one.task))


def ownership_view(active: Iterable[ActiveTask]) -> bytes:
    """Return `ownership.json`, in which a task without patterns may change any path."""
    owners = [
        {
            "run": one.run,
            "task": one.task,
            "status": one.document.status,
            "attempt": one.document.attempt.number,
            "started": one.document.attempt.started,
            "owns": one.owns,
        }
        for one in active
    ]
    return encode_pretty_json({"owners": owners})
