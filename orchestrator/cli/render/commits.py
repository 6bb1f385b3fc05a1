"""Commits of the log as text and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from orchestrator.cli.render.text import printable
from orchestrator.protocols import CommitRecord, Event, JsonObject
from orchestrator.system.instants import format_local_time

#: Documents of a commit that a line names: with its run all of its tasks are recorded.
_MOST_NAMED: Final = 4


class CommitFormatter:
    """Formats commits as lines; columns grow as needed."""

    def __init__(self) -> None:
        self._position, self._by = 6, 0

    def line(self, record: CommitRecord) -> str:
        """Return a commit as printable text."""
        position, by = str(record.position), printable(record.by)
        self._position, self._by = max(self._position, len(position)), max(self._by, len(by))
        events = ", ".join(map(describe_event, record.events))
        parts = [
            position.rjust(self._position),
            format_local_time(record.time),
            by.ljust(self._by),
            *filter(None, [events, ", ".join(_documents(record))]),
        ]
        return printable("  ".join(parts))


def describe_event(event: Event) -> str:
    """Return an event with what it is about, as in `task.landed models`."""
    about = next((event.data[name] for name in ("task", "adapter", "sink", "tracker") if name in event.data), None)
    return printable(event.type if about is None else f"{event.type} {about}")


def _documents(record: CommitRecord) -> list[str]:
    told = [
        f"{key} deleted" if value is None else f"{key} version {version}"
        for key, (version, value) in record.documents.items()
    ]
    told += [f"{key} unreadable" for key in record.unreadable]
    rest = len(told) - _MOST_NAMED
    return told if rest <= 1 else [*told[:_MOST_NAMED], f"and {rest} more"]


def events_json(events: Sequence[Event]) -> list[JsonObject]:
    """Return events as programs get them with what they belong to."""
    return [{"event": one.type, **one.data} for one in events]


def commit_json(record: CommitRecord) -> JsonObject:
    """Return a commit as programs get it, without the values of documents."""
    documents = [
        {"key": str(key), "version": version, "deleted": value is None}
        for key, (version, value) in record.documents.items()
    ]
    return {
        "position": record.position,
        "time": record.time,
        "by": record.by,
        "events": events_json(record.events),
        "documents": documents,
        "unreadable": [str(key) for key in record.unreadable],
    }
