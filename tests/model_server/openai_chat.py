"""The OpenAI Chat Completions API: https://platform.openai.com/docs/api-reference/chat-streaming."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tests.model_server.conversation import (
    ApiDialect,
    ConversationTurn,
    Json,
    ModelAnswer,
    ModelRequest,
    Tool,
    split_for_stream,
)
from tests.model_server.openai_faults import openai_error
from tests.model_server.sse import encode_event

_ID: Final = "chatcmpl-scripted"


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or () if part.get("type") == "text")


def read_messages(messages: Any) -> tuple[str, tuple[ConversationTurn, ...]]:
    """Return the instructions and turns of a message list; shared with Ollama."""
    system, turns = [], []
    for message in messages or ():
        text = _text(message.get("content"))
        match message.get("role"):
            case "system" | "developer":
                system.append(text)
            case "user":
                turns.append(ConversationTurn("user", text))
            case "tool" | "function":
                turns.append(ConversationTurn("tool"))
    return "\n".join(system), tuple(turns)


def read_tools(tools: Any) -> tuple[Tool, ...]:
    """Return the functions of a tool list; shared with Ollama."""
    functions = [tool["function"] for tool in tools or () if tool.get("type") == "function"]
    return tuple(Tool(function["name"], function.get("parameters") or {}) for function in functions)


def _read(_path: str, body: Mapping[str, Any]) -> ModelRequest:
    system, turns = read_messages(body.get("messages"))
    return ModelRequest(
        str(body.get("model", "")),
        bool(body.get("stream")),
        system,
        turns,
        read_tools(body.get("tools")),
        stream_usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


def _usage(answer: ModelAnswer) -> Json:
    usage = answer.usage
    return {"prompt_tokens": usage.input, "completion_tokens": usage.output, "total_tokens": usage.total}


def _finish(answer: ModelAnswer) -> str:
    if answer.is_cut:
        return "length"
    return "stop" if answer.call is None else "tool_calls"


def _whole(asked: ModelRequest, answer: ModelAnswer) -> Json:
    message: Json = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if (call := answer.call) is not None:
        function = {"name": call.tool.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        message["tool_calls"] = [{"id": call.id("call_"), "type": "function", "function": function}]
    return {
        "id": _ID,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}],
        "usage": _usage(answer),
    }


def _deltas(answer: ModelAnswer) -> Iterator[Json]:
    if (call := answer.call) is None:
        yield {"role": "assistant", "content": ""}
        for piece in split_for_stream(answer.text):
            yield {"content": piece}
        return
    opening = {
        "index": 0,
        "id": call.id("call_"),
        "type": "function",
        "function": {"name": call.tool.name, "arguments": ""},
    }
    yield {"role": "assistant", "content": None, "tool_calls": [opening]}
    for piece in split_for_stream(json.dumps(call.arguments, ensure_ascii=False)):
        yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}


def _stream(asked: ModelRequest, answer: ModelAnswer) -> Iterator[bytes]:
    chunk: Json = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": asked.model,
    }
    for delta in _deltas(answer):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        yield encode_event(chunk | {"choices": [choice]})
    choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": _finish(answer)}
    yield encode_event(chunk | {"choices": [choice]})
    if asked.stream_usage:
        yield encode_event(chunk | {"choices": [], "usage": _usage(answer)})
    yield b"data: [DONE]\n\n"


DIALECT: Final = ApiDialect("openai-chat", _read, _whole, _stream, openai_error)
