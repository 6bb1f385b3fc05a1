"""Server-sent events."""

from __future__ import annotations

import json

from tests.model_server.conversation import Json


def encode_event(data: Json, name: str | None = None) -> bytes:
    """Return an event with JSON data, including the terminating blank line."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
