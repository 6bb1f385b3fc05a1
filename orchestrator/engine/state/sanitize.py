"""Remove secrets and invalid JSON values before documents are recorded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from orchestrator.protocols import JsonObject

if TYPE_CHECKING:
    from orchestrator.domain.security.secrets import Redactor

#: Fields of documents and events with foreign text.
_FOREIGN_TEXT_FIELDS = frozenset(
    {"reason", "feedback", "paths", "discarded", "closed", "changes", "worktree", "words", "note"}
)


def sanitize(value: JsonObject, redactor: Redactor) -> JsonObject:
    """Remove secrets from program output.

    Names and ids of our own stay, whatever they look like.
    """
    return {key: _item(key, item, redactor) for key, item in value.items()}


def _item(key: str, item: Any, redactor: Redactor) -> Any:
    if isinstance(item, str):  # truncated program output may end in half a surrogate pair, which no store accepts
        item = item.encode(errors="replace").decode()
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if key in _FOREIGN_TEXT_FIELDS:
        return redactor.json(item)
    if isinstance(item, list):
        return [sanitize(one, redactor) if isinstance(one, dict) else one for one in item]
    return item
