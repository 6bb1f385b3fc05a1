"""The names of the views' files: readable if the id allows it, and unique on any file system."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from orchestrator.protocols import Key

INDEX: Final = "index.json"
EVENTS: Final = "events.jsonl"
OWNERSHIP: Final = "ownership.json"
CONTEXT: Final = "context"

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


def context_path(key: Key) -> str:
    """Return the file of a task's session."""
    return f"{CONTEXT}/{_path(key.id)}.json"


def _path(name: str) -> str:
    return "/".join(map(_name, name.split("/", _DEEPEST - 1)))


def _name(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{_ODD.sub('_', text[:_SHOWN])}~{digest[:_DIGITS]}"
