"""What differs between two versions of a document, field by field."""

from __future__ import annotations

from orchestrator.cli.render.output import printable
from orchestrator.domain.documents.delta import compute_delta, delta_to_json, format_delta
from orchestrator.protocols import JsonObject


def field_changes(old: JsonObject | None, new: JsonObject | None) -> JsonObject:
    """Return lists of what was `added`, `modified` and `removed`, each with its path; None stands for no document."""
    return delta_to_json(compute_delta(old or {}, new or {}))


def field_lines(old: JsonObject | None, new: JsonObject | None) -> list[str]:
    """Return a line for each field that differs, `path: old → new`, as text that a terminal only shows."""
    return [printable(line) for line in format_delta(compute_delta(old or {}, new or {}))]
