"""What may go on record: no secret in what programs say, and nothing that is no JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from orchestrator.protocols import JsonObject

if TYPE_CHECKING:
    from orchestrator.domain.security.secrets import Redactor

#: The fields of documents and events whose text is not our own.
_FOREIGN_TEXT_FIELDS = frozenset(
    {"reason", "feedback", "paths", "discarded", "disabled_reason", "changes", "worktree", "words", "note"}
)


def sanitize(value: JsonObject, redactor: Redactor) -> JsonObject:
    """Take secrets out of what comes from programs; names and ids of our own stay, whatever they look like."""
    return {key: _item(key, item, redactor) for key, item in value.items()}


def _item(key: str, item: Any, redactor: Redactor) -> Any:
    if isinstance(item, str):  # programs that cut text in two leave half a surrogate pair, which no store takes
        item = item.encode(errors="replace").decode()
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if key in _FOREIGN_TEXT_FIELDS:
        return redactor.json(item)
    if isinstance(item, list):
        return [sanitize(one, redactor) if isinstance(one, dict) else one for one in item]
    return item
