"""Documents, their differences and their versions, as text and as JSON. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from orchestrator.cli.render.text import align_columns, printable
from orchestrator.domain.documents.delta import compute_delta, delta_to_json, format_delta
from orchestrator.domain.events.state import StateRepaired
from orchestrator.domain.settings.quantities import format_size_short
from orchestrator.protocols import (
    CommitRecord,
    Document,
    DocumentVersion,
    Event,
    JsonObject,
    Key,
    StateSnapshot,
    VerificationReport,
)
from orchestrator.system.clock import format_local_time


def state_json(found: StateSnapshot) -> JsonObject:
    """Return the documents of a snapshot as JSON."""
    return {**_position_json(found), "documents": [one.to_json() for one in _sorted(found)]}


def _position_json(found: StateSnapshot) -> JsonObject:
    return {"position": found.position, "time": found.time if found.position else None}


def _sorted(found: StateSnapshot) -> list[Document]:
    return [found.documents[key] for key in sorted(found.documents)]


def _describe_position(found: StateSnapshot) -> str:
    return (
        f"position {found.position}, {format_local_time(found.time)}"
        if found.position
        else "position 0, before the first commit"
    )


def state_lines(found: StateSnapshot, *, with_values: bool) -> Iterator[str]:
    """Yield a line for each document of a snapshot, and its value if requested."""
    documents = _sorted(found)
    yield f"{_describe_position(found)}: {len(documents)} {'document' if len(documents) == 1 else 'documents'}"
    rows = align_columns([_row(one) for one in documents], "  ")
    for one, row in zip(documents, rows, strict=True):
        yield row
        if with_values:
            text = json.dumps(one.value, indent=2, ensure_ascii=False)
            yield from (f"    {printable(line)}" for line in text.split("\n"))


def _row(one: Document) -> list[str]:
    damaged = ["damaged: shows an older value"] if one.damaged else []
    return [
        str(one.key),
        f"version {one.version}",
        f"position {one.position}",
        format_local_time(one.time),
        one.writer,
        *damaged,
    ]


class DocumentDifference(NamedTuple):
    """A document at two points in time; None if it did not exist."""

    key: Key
    old: Document | None
    new: Document | None

    @property
    def kind(self) -> str:
        """`added`, `removed` or `changed`."""
        if self.old is None:
            return "added"
        return "removed" if self.new is None else "changed"


def document_differences(old: StateSnapshot, new: StateSnapshot) -> list[DocumentDifference]:
    """Return the documents whose versions differ between two snapshots, sorted by key."""
    keys = sorted({*old.documents, *new.documents})
    found = [DocumentDifference(key, old.documents.get(key), new.documents.get(key)) for key in keys]
    return [one for one in found if one.old is None or one.new is None or one.old.version != one.new.version]


def differences_json(old: StateSnapshot, new: StateSnapshot) -> JsonObject:
    """Return the differences between two snapshots as JSON."""
    documents = [_difference_json(one) for one in document_differences(old, new)]
    return {"from": _position_json(old), "to": _position_json(new), "documents": documents}


def _difference_json(one: DocumentDifference) -> JsonObject:
    return {
        "key": str(one.key),
        "kind": one.kind,
        "old_version": None if one.old is None else one.old.version,
        "new_version": None if one.new is None else one.new.version,
        "fields": field_changes(one.old.value if one.old else None, one.new.value if one.new else None),
    }


def difference_lines(old: StateSnapshot, new: StateSnapshot) -> Iterator[str]:
    """Yield the differences between two snapshots, by document and field."""
    yield f"from {_describe_position(old)}"
    yield f"to   {_describe_position(new)}"
    found = document_differences(old, new)
    rows = [
        [one.kind, str(one.key), f"version {' → '.join(str(side.version) for side in (one.old, one.new) if side)}"]
        for one in found
    ]
    for one, row in zip(found, align_columns(rows), strict=True):
        yield row
        if one.old is not None and one.new is not None:
            yield from (f"    {line}" for line in field_lines(one.old.value, one.new.value))
    if not found:
        yield "no differences"


#: A version and the previous one; None if there is no previous version or it was pruned.
VersionPair = tuple[DocumentVersion, DocumentVersion | None]


def history_json(key: Key, steps: Sequence[VersionPair]) -> JsonObject:
    """Return the versions of a document as JSON."""
    return {"key": str(key), "versions": [_version_json(*step) for step in steps]}


def _version_json(one: DocumentVersion, before: DocumentVersion | None) -> JsonObject:
    return {
        "version": one.version,
        "position": one.position,
        "time": one.time,
        "writer": one.writer,
        "events": events_json(one.events),
        "deleted": one.value is None and not one.damaged,
        "damaged": one.damaged,
        "old_version": None if before is None or before.damaged else before.version,
        "old": None if before is None else before.value,
        "new": one.value,
    }


def history_lines(key: Key, steps: Sequence[VersionPair]) -> Iterator[str]:
    """Yield the versions of a document, each followed by its changed fields."""
    yield printable(str(key))
    rows = [
        [
            f"version {one.version}",
            f"position {one.position}",
            format_local_time(one.time),
            one.writer,
            ", ".join(map(describe_event, one.events)),
        ]
        for one, _ in steps
    ]
    for (one, before), row in zip(steps, align_columns(rows, "  "), strict=True):
        yield row
        yield from (f"      {line}" for line in _version_changes(one, before))


def _version_changes(one: DocumentVersion, before: DocumentVersion | None) -> Sequence[str]:
    if one.damaged:
        return ["damaged: its value can't be read"]
    if one.value is None:
        return ["deleted"]
    if before is None and one.version > 1:
        return ["the previous version is pruned"]
    if before is not None and before.damaged:
        return ["the previous version is unreadable"]
    return field_lines(before.value if before else None, one.value) or ["no changes"]


def field_changes(old: JsonObject | None, new: JsonObject | None) -> JsonObject:
    """Return the fields that were `added`, `modified` and `removed`.

    None means that the document does not exist.
    """
    return delta_to_json(compute_delta(old or {}, new or {}))


def field_lines(old: JsonObject | None, new: JsonObject | None) -> list[str]:
    """Return a printable line for each field that differs: `path: old → new`."""
    return [printable(line) for line in format_delta(compute_delta(old or {}, new or {}))]


#: The maximum number of documents named in the line of a commit: the first commit of a run has all of its tasks.
_MOST_NAMED: Final = 4


class CommitFormatter:
    """A formatter of commits as lines; columns grow as needed."""

    def __init__(self) -> None:
        self._position, self._writer = 6, 0

    def line(self, record: CommitRecord) -> str:
        """Return a commit as printable text."""
        position, writer = str(record.position), printable(record.writer)
        self._position, self._writer = max(self._position, len(position)), max(self._writer, len(writer))
        events = ", ".join(map(describe_event, record.events))
        parts = [
            position.rjust(self._position),
            format_local_time(record.time),
            writer.ljust(self._writer),
            *filter(None, [events, ", ".join(_documents(record))]),
        ]
        return printable("  ".join(parts))


def describe_event(event: Event) -> str:
    """Return the type of an event and its subject, for example `task.landed models`."""
    about = next((event.data[name] for name in ("task", "adapter", "sink", "tracker") if name in event.data), None)
    return printable(event.type if about is None else f"{event.type} {about}")


def _documents(record: CommitRecord) -> list[str]:
    parts = [
        f"{key} deleted" if value is None else f"{key} version {version}"
        for key, (version, value) in record.documents.items()
    ]
    parts += [f"{key} unreadable" for key in record.unreadable]
    rest = len(parts) - _MOST_NAMED
    return parts if rest <= 1 else [*parts[:_MOST_NAMED], f"and {rest} more"]


def events_json(events: Sequence[Event]) -> list[JsonObject]:
    """Return events as JSON, for the JSON of a commit or a version."""
    return [{"event": one.type, **one.data} for one in events]


def commit_json(record: CommitRecord) -> JsonObject:
    """Return a commit as JSON, without the values of documents."""
    documents = [
        {"key": str(key), "version": version, "deleted": value is None}
        for key, (version, value) in record.documents.items()
    ]
    return {
        "position": record.position,
        "time": record.time,
        "writer": record.writer,
        "events": events_json(record.events),
        "documents": documents,
        "unreadable": [str(key) for key in record.unreadable],
    }


@dataclass(frozen=True, slots=True)
class RepairedDocument:
    """A repaired document and its new version.

    The version is None if no value was readable and the document was deleted.
    """

    key: str
    version: int | None


def repaired_documents(records: Iterable[CommitRecord]) -> list[RepairedDocument]:
    """Return the documents that these commits repaired."""
    found = []
    for record in records:
        versions = {str(key): version for key, (version, _) in record.documents.items()}
        repaired = [event.data for event in record.events if event.type == StateRepaired.type]
        found += [RepairedDocument(one["key"], versions[one["key"]] if one["is_known"] else None) for one in repaired]
    return found


def verification_json(found: VerificationReport, repaired: Sequence[RepairedDocument]) -> JsonObject:
    """Return a verification report and the repaired documents as one JSON object."""
    return {
        "is_valid": found.is_valid,
        "position": found.position,
        "bytes": found.bytes,
        "damage": [one.describe() for one in found.damage],
        "damaged": [str(key) for key in found.damaged],
        "differs": [str(key) for key in found.mismatched],
        "unreadable": {str(key): flaw for key, flaw in found.unreadable.items()},
        "repaired": [{"key": one.key, "version": one.version} for one in repaired],
    }


def verification_lines(found: VerificationReport, repaired: Sequence[RepairedDocument]) -> Iterator[str]:
    """Yield the repaired documents and a verification report as lines."""
    for document in repaired:
        version = document.version
        outcome = (
            "deleted, because no value is known"
            if version is None
            else f"restored to its last known value, now version {version}"
        )
        yield printable(f"repaired: {document.key}: {outcome}")
    verdict = "intact" if found.is_valid else "damaged"
    yield f"{found.position:,} commits, {format_size_short(found.bytes)}: {verdict}"
    for one in found.damage:
        yield printable(f"  {one.describe()}")
    for key in found.damaged:
        yield printable(f"  {key}: the newest version is unreadable")
    for key, flaw in found.unreadable.items():
        yield printable(f"  {key}: can't be read: {flaw}")
    for key in found.mismatched:
        yield printable(f"  {key}: differs from the log: restart the processes that have this state open")
    if not found.is_valid:
        yield "`council state verify --repair` restores the readable state"
