"""Recorded events as sentences."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from orchestrator.cli.render.text import one_line, printable
from orchestrator.domain.events import EVENT_TYPES, Shown, TypedEvent
from orchestrator.domain.events.base import template_names
from orchestrator.protocols import Event
from orchestrator.system.clock import format_local_time


def is_shown(event: Event, *, above_table: bool = False) -> bool:
    """Return True if an event of an active run is printed.

    `above_table` selects the events that are printed above a live table.
    """
    kind = EVENT_TYPES.get(event.type)
    return kind is not None and kind.shown in ({Shown.ALWAYS} if above_table else {Shown.ALWAYS, Shown.LINES})


def event_line(time: float, event: Event) -> str:
    """Return an event as a line with its local time."""
    return f"{datetime.fromtimestamp(time, UTC).astimezone():%H:%M:%S} {event_text(event)}"


def event_text(event: Event) -> str:
    """Return an event as a sentence; its type if it is unknown or lacks a field."""
    kind = EVENT_TYPES.get(event.type)
    known = None if kind is None else kind.from_data(event.data)
    task = f"{event.data['task']}: " if event.data.get("task") else ""
    return printable(f"{task}{event.type if known is None else _sentence(known)}")


def _sentence(event: TypedEvent) -> str:
    template = event.choose_sentence()
    return template.format(**{name: _present(event, name) for name in template_names(template)})


def _present(event: TypedEvent, name: str) -> Any:
    """Return a field as text: local time, comma-separated list, or one line."""
    value = getattr(event, name)
    if event.field_types.get(name, "").startswith("Instant"):
        return format_local_time(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return one_line(value) if isinstance(value, str) else value
