"""What differs between two versions of a document, field by field."""

from __future__ import annotations

from orchestrator.cli.render.output import plain
from orchestrator.domain.documents.delta import compare, lines, to_json
from orchestrator.protocols import JsonObject


def field_changes(old: JsonObject | None, new: JsonObject | None) -> JsonObject:
    """Return lists of what was `added`, `modified` and `removed`, each with its path; None stands for no document."""
    return to_json(compare(old or {}, new or {}))


def field_lines(old: JsonObject | None, new: JsonObject | None) -> list[str]:
    """Return a line for each field that differs, `path: old → new`, as text that a terminal only shows."""
    return [plain(line) for line in lines(compare(old or {}, new or {}))]
