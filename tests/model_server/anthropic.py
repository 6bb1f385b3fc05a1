"""The Anthropic Messages API: https://docs.anthropic.com/en/api/messages-streaming."""

from __future__ import annotations

import hashlib
import json
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

_FAULTS: Final = {
    400: ("invalid_request_error", "The request is invalid."),
    401: ("authentication_error", "invalid x-api-key"),
    402: ("billing_error", "There is an issue with your billing."),
    403: ("permission_error", "Your API key does not have permission to use the specified resource."),
    404: ("not_found_error", "The requested resource was not found."),
    413: ("request_too_large", "Request exceeds the maximum allowed number of bytes."),
    429: ("rate_limit_error", "This request would exceed your account's rate limit. Please try again later."),
    500: ("api_error", "Internal server error"),
    504: ("timeout_error", "The request timed out."),
    529: ("overloaded_error", "Overloaded"),
}
_TOO_LONG: Final = ("invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text", "") for block in content or () if block.get("type") == "text")


def _turns(message: Json) -> Iterator[ConversationTurn]:
    content = message.get("content")
    if message.get("role") == "user" and isinstance(content, str):
        yield ConversationTurn("user", content)
    elif message.get("role") == "user":
        for block in content or ():
            if block.get("type") == "tool_result":
                yield ConversationTurn("tool")
            elif block.get("type") == "text":
                yield ConversationTurn("user", block["text"])


def _read(_path: str, body: Mapping[str, Any]) -> ModelRequest:
    return ModelRequest(
        str(body.get("model", "")),
        bool(body.get("stream")),
        _text(body.get("system")),
        tuple(turn for message in body.get("messages", ()) for turn in _turns(message)),
        tuple(Tool(tool["name"], tool["input_schema"]) for tool in body.get("tools") or () if "input_schema" in tool),
    )


def _block(answer: ModelAnswer) -> Json:
    if answer.call is None:
        return {"type": "text", "text": answer.text}
    call = answer.call
    return {"type": "tool_use", "id": call.id("toolu_"), "name": call.tool.name, "input": call.arguments}


def _usage(answer: ModelAnswer) -> Json:
    return {
        "input_tokens": answer.usage.input,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": answer.usage.output,
    }


def _whole(asked: ModelRequest, answer: ModelAnswer) -> Json:
    said = json.dumps([asked.model, _block(answer), len(asked.turns)]).encode()
    return {
        "id": f"msg_{hashlib.sha256(said).hexdigest()[:24]}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": [_block(answer)],
        "stop_reason": "max_tokens" if answer.is_cut else "end_turn" if answer.call is None else "tool_use",
        "stop_sequence": None,
        "usage": _usage(answer),
    }


def _deltas(answer: ModelAnswer) -> Iterator[Json]:
    if answer.call is None:
        for piece in split_for_stream(answer.text):
            yield {"type": "text_delta", "text": piece}
    else:
        for piece in ("", *split_for_stream(json.dumps(answer.call.arguments, ensure_ascii=False))):
            yield {"type": "input_json_delta", "partial_json": piece}


def _events(asked: ModelRequest, answer: ModelAnswer) -> Iterator[Json]:
    whole = _whole(asked, answer)
    empty: Json = {"text": ""} if answer.call is None else {"input": {}}
    opening = _block(answer) | empty
    begun = whole | {"content": [], "stop_reason": None, "usage": _usage(answer) | {"output_tokens": 1}}
    yield {"type": "message_start", "message": begun}
    yield {"type": "content_block_start", "index": 0, "content_block": opening}
    yield {"type": "ping"}
    for delta in _deltas(answer):
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    ending = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": ending, "usage": _usage(answer)}
    yield {"type": "message_stop"}


def _stream(asked: ModelRequest, answer: ModelAnswer) -> Iterator[bytes]:
    return (encode_event(data, data["type"]) for data in _events(asked, answer))


def _fault(fault: ApiFault) -> Json:
    reported = _FAULTS.get(fault.status, _FAULTS[400 if fault.status < 500 else 500])
    kind, message = _TOO_LONG if fault.is_too_long else reported
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_scripted"}


DIALECT: Final = ApiDialect("anthropic", _read, _whole, _stream, _fault)
