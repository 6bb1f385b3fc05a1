"""The API of Ollama: https://github.com/ollama/ollama/blob/main/docs/api.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from tests.model_server.conversation import (
    ApiDialect,
    ApiFault,
    ConversationTurn,
    Json,
    ModelAnswer,
    ModelRequest,
    split_for_stream,
)
from tests.model_server.openai_chat import read_messages, read_tools

_FAULTS: Final = {
    400: "invalid request",
    401: "unauthorized",
    404: "model not found",
    429: "too many requests",
    500: "internal server error",
    503: "server busy, please try again. maximum pending requests exceeded",
}
_TOO_LONG: Final = "the input length exceeds the context length"
_MILLISECOND: Final = 1_000_000


def _read_chat(_path: str, body: Mapping[str, Any]) -> ModelRequest:
    system, turns = read_messages(body.get("messages"))
    return ModelRequest(
        str(body.get("model", "")), body.get("stream") is not False, system, turns, read_tools(body.get("tools"))
    )


def _read_generate(_path: str, body: Mapping[str, Any]) -> ModelRequest:
    turns = (ConversationTurn("user", str(body.get("prompt", ""))),)
    return ModelRequest(
        str(body.get("model", "")), body.get("stream") is not False, str(body.get("system") or ""), turns
    )


def _frame(asked: ModelRequest) -> Json:
    return {"model": asked.model, "created_at": datetime.now(UTC).isoformat()}


def _ending(answer: ModelAnswer) -> Json:
    return {
        "done": True,
        "done_reason": "length" if answer.is_cut else "stop",
        "total_duration": 3 * _MILLISECOND,
        "load_duration": _MILLISECOND,
        "prompt_eval_count": answer.usage.input,
        "prompt_eval_duration": _MILLISECOND,
        "eval_count": answer.usage.output,
        "eval_duration": _MILLISECOND,
    }


def _message(answer: ModelAnswer) -> Json:
    message: Json = {"role": "assistant", "content": answer.text}
    if (call := answer.call) is not None:
        message["tool_calls"] = [{"function": {"name": call.tool.name, "arguments": call.arguments}}]
    return {"message": message}


def _response(answer: ModelAnswer) -> Json:
    return {"response": answer.text}


def _line(data: Json) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode() + b"\n"


def _fault(fault: ApiFault) -> Json:
    if fault.is_too_long:
        return {"error": _TOO_LONG}
    return {"error": _FAULTS.get(fault.status, _FAULTS[400 if fault.status < 500 else 500])}


def _dialect(read: Callable[[str, Mapping[str, Any]], ModelRequest], said: Callable[[ModelAnswer], Json]) -> ApiDialect:
    def whole(asked: ModelRequest, answer: ModelAnswer) -> Json:
        return _frame(asked) | said(answer) | _ending(answer)

    def stream(asked: ModelRequest, answer: ModelAnswer) -> Iterator[bytes]:
        parts = [answer] if answer.call else [ModelAnswer(piece) for piece in split_for_stream(answer.text)]
        for part in parts:
            yield _line(_frame(asked) | said(part) | {"done": False})
        yield _line(_frame(asked) | said(ModelAnswer("")) | _ending(answer))

    return ApiDialect("ollama", read, whole, stream, _fault, "application/x-ndjson")


CHAT: Final = _dialect(_read_chat, _message)
GENERATE: Final = _dialect(_read_generate, _response)
