"""Lookups of clients besides model answers: model lists, versions, token counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from tests.model_server.conversation import Json

_MODEL: Final = "scripted"
_THEN: Final = "2025-01-01T00:00:00Z"
_DETAILS: Final = {
    "parent_model": "",
    "format": "gguf",
    "family": "scripted",
    "families": ["scripted"],
    "parameter_size": "1B",
    "quantization_level": "Q4_0",
}


def answer_lookup(path: str, body: Mapping[str, Any], *, anthropic: bool) -> Json | None:
    """Return the response for a path, with model lists in the client's format; None for an unknown path."""
    tokens = len(json.dumps(body)) // 4
    match path.rsplit("/", 1)[-1]:
        case "" | "api":
            return {}
        case "count_tokens" | "input_tokens":
            return {"input_tokens": tokens}
        case "tags":
            model = {"name": _MODEL, "model": _MODEL, "modified_at": _THEN, "size": 1, "digest": "0" * 64}
            return {"models": [model | {"details": _DETAILS}]}
        case "show":
            return {
                "modelfile": "",
                "parameters": "",
                "template": "{{ .Prompt }}",
                "details": _DETAILS,
                "model_info": {"general.architecture": "scripted", "scripted.context_length": 131072},
                "capabilities": ["completion", "tools"],
            }
        case "version":
            return {"version": "0.9.0"}
        case "models":
            return _models(path, anthropic=anthropic)
        case name if name.endswith(":countTokens"):
            return {"totalTokens": tokens}
    return None


def _models(path: str, *, anthropic: bool) -> Json:
    if "v1beta" in path:
        return {"models": [{"name": f"models/{_MODEL}", "supportedGenerationMethods": ["generateContent"]}]}
    if anthropic:
        model = {"type": "model", "id": _MODEL, "display_name": _MODEL, "created_at": _THEN}
        return {"data": [model], "has_more": False, "first_id": _MODEL, "last_id": _MODEL}
    return {"object": "list", "data": [{"id": _MODEL, "object": "model", "created": 0, "owned_by": "scripted"}]}
