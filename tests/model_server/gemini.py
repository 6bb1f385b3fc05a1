"""The Gemini API: https://ai.google.dev/api/generate-content."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tests.model_server.conversation import (
    ApiDialect,
    ApiFault,
    ConversationTurn,
    Json,
    ModelAnswer,
    ModelRequest,
    Tool,
    split_for_stream,
)
from tests.model_server.sse import encode_event

#: The path of a request: model and method.
PATH: Final = re.compile(r".*/models/(?P<model>[^/:]+):(?P<method>\w+)")

_FAULTS: Final = {
    400: ("INVALID_ARGUMENT", "Request contains an invalid argument."),
    401: ("UNAUTHENTICATED", "Request had invalid authentication credentials."),
    403: ("PERMISSION_DENIED", "The caller does not have permission."),
    404: ("NOT_FOUND", "The model is not found."),
    429: ("RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota)."),
    500: ("INTERNAL", "An internal error has occurred. Please retry."),
    503: ("UNAVAILABLE", "The model is overloaded. Please try again later."),
    504: ("DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
}
_TOO_LONG: Final = (
    "INVALID_ARGUMENT",
    "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
)


def _either(mapping: Mapping[str, Any], camel: str) -> Any:
    """Return a field by either of its spellings; the API accepts both."""
    return mapping.get(camel, mapping.get(re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", camel)))


def _parts(content: Any) -> list[Json]:
    return [{"text": content}] if isinstance(content, str) else (content or {}).get("parts") or []


def _turns(content: Json) -> Iterator[ConversationTurn]:
    if content.get("role") == "model":
        return
    for part in _parts(content):
        if _either(part, "functionResponse") is not None:
            yield ConversationTurn("tool")
        elif "text" in part:
            yield ConversationTurn("user", part["text"])


def _tools(tools: Any) -> Iterator[Tool]:
    for tool in tools or ():
        for function in _either(tool, "functionDeclarations") or ():
            yield Tool(function["name"], _either(function, "parametersJsonSchema") or function.get("parameters") or {})


def _read(path: str, body: Mapping[str, Any]) -> ModelRequest:
    found = PATH.fullmatch(path)
    return ModelRequest(
        found["model"] if found else "",
        bool(found and found["method"].startswith("stream")),
        "\n".join(part.get("text", "") for part in _parts(_either(body, "systemInstruction"))),
        tuple(turn for content in body.get("contents") or () for turn in _turns(content)),
        tuple(_tools(body.get("tools"))),
    )


def _chunk(asked: ModelRequest, part: Json) -> Json:
    candidate: Json = {"content": {"parts": [part], "role": "model"}, "index": 0}
    return {"candidates": [candidate], "modelVersion": asked.model, "responseId": f"scripted-{len(asked.turns)}"}


def _ended(chunk: Json, answer: ModelAnswer) -> Json:
    chunk["candidates"][0]["finishReason"] = "MAX_TOKENS" if answer.is_cut else "STOP"
    usage = answer.usage
    counts = {
        "promptTokenCount": usage.input,
        "candidatesTokenCount": usage.output,
        "totalTokenCount": usage.total,
    }
    return chunk | {"usageMetadata": counts}


def _part(answer: ModelAnswer) -> Json:
    if (call := answer.call) is None:
        return {"text": answer.text}
    return {"functionCall": {"id": call.id("call_"), "name": call.tool.name, "args": call.arguments}}


def _whole(asked: ModelRequest, answer: ModelAnswer) -> Json:
    return _ended(_chunk(asked, _part(answer)), answer)


def _stream(asked: ModelRequest, answer: ModelAnswer) -> Iterator[bytes]:
    parts = [_part(answer)] if answer.call else [{"text": piece} for piece in split_for_stream(answer.text)]
    for part in parts:
        yield encode_event(_chunk(asked, part))
    yield encode_event(_ended(_chunk(asked, {"text": ""}), answer))


def _fault(fault: ApiFault) -> Json:
    reported = _FAULTS.get(fault.status, _FAULTS[400 if fault.status < 500 else 500])
    status, message = _TOO_LONG if fault.is_too_long else reported
    error: Json = {"code": fault.status, "message": message, "status": status}
    if fault.retry_after is not None:
        kind = "type.googleapis.com/google.rpc.RetryInfo"
        error["details"] = [{"@type": kind, "retryDelay": f"{fault.retry_after}s"}]
    return {"error": error}


DIALECT: Final = ApiDialect("gemini", _read, _whole, _stream, _fault)
