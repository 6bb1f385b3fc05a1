"""The OpenAI Responses API: https://platform.openai.com/docs/api-reference/responses-streaming."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tests.model_server.conversation import (
    ApiDialect,
    ConversationTurn,
    Json,
    ModelAnswer,
    ModelRequest,
    Tool,
    ToolCall,
    split_for_stream,
)
from tests.model_server.openai_faults import openai_error
from tests.model_server.sse import encode_event

# Attempts of a tool search: the tool may be that of a server that is still starting.
_SEARCHES: Final = 200
# The list of callable functions in the description of Codex' code mode.
_NESTED: Final = re.compile(r"^### `(\w+)`$", re.MULTILINE)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or () if part.get("type") in ("input_text", "text"))


def _turns(items: Any) -> Iterator[tuple[str, ConversationTurn]]:
    """Yield each item's role with its turn."""
    if isinstance(items, str):
        yield "user", ConversationTurn("user", items)
        return
    for item in items or ():
        if str(item.get("type", "")).endswith("_call_output"):
            yield "tool", ConversationTurn("tool")
        elif item.get("type") == "tool_search_output":
            yield "search", ConversationTurn("search")
        elif item.get("type", "message") == "message" and item.get("role") != "assistant":
            yield item["role"], ConversationTurn("user", _text(item.get("content")))


def _tools(tools: Any, namespace: str | None = None) -> Iterator[Tool]:
    for tool in tools or ():
        match tool.get("type"):
            case "function":
                yield Tool(tool["name"], tool.get("parameters") or {}, namespace=namespace)
            case "custom" if tool.get("description", "").startswith("Run JavaScript"):
                functions: Json = {name: {} for name in _NESTED.findall(tool["description"])}
                yield Tool(tool["name"], {"properties": functions}, "program", namespace)
            case "custom":
                yield Tool(tool["name"], {}, "freeform", namespace)
            case "local_shell":
                yield Tool("local_shell", {}, "local-shell")
            case "tool_search":
                yield Tool("tool_search", {}, "search")
            case "namespace":
                yield from _tools(tool.get("tools"), tool["name"])


def _offered(body: Mapping[str, Any]) -> Iterator[Tool]:
    items = body.get("input")
    items = items if isinstance(items, list) else []
    # Codex sends some models their tools in the conversation, and all models the tools found by a search.
    for item in items:
        if item.get("type") in ("additional_tools", "tool_search_output"):
            yield from _tools(item.get("tools"))
    searches = sum(item.get("type") == "tool_search_output" for item in items[_last_told(items) :])
    offered = _tools(body.get("tools"))
    yield from (tool for tool in offered if tool.kind != "search" or searches < _SEARCHES)


def _last_told(items: Sequence[Json]) -> int:
    """Return the index of the last user message, 0 without one."""
    return max((number for number, item in enumerate(items) if item.get("role") == "user"), default=0)


def _read(_path: str, body: Mapping[str, Any]) -> ModelRequest:
    turns = list(_turns(body.get("input")))
    system = [turn.text for role, turn in turns if role in ("system", "developer")]
    return ModelRequest(
        str(body.get("model", "")),
        bool(body.get("stream")),
        "\n".join([str(body.get("instructions") or ""), *system]).strip(),
        tuple(turn for role, turn in turns if role in ("user", "tool", "search")),
        tuple(_offered(body)),
    )


def _call_item(call: ToolCall) -> Json:
    common = {"call_id": call.id("call_"), "status": "completed"}
    name = {"name": call.tool.name} | ({"namespace": call.tool.namespace} if call.tool.namespace else {})
    match call.tool.kind:
        case "freeform" | "program":
            return {"type": "custom_tool_call", "id": call.id("ctc_"), **common, **name, "input": call.arguments}
        case "local-shell":
            action = {"type": "exec", "env": {}, "command": ["bash", "-lc", call.arguments]}
            return {"type": "local_shell_call", "id": call.id("lsh_"), **common, "action": action}
        case "search":
            search = {"type": "tool_search_call", "id": call.id("tsc_"), "execution": "client"}
            return {**search, **common, "arguments": call.arguments}
        case "function":
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            return {"type": "function_call", "id": call.id("fc_"), **common, **name, "arguments": arguments}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(asked: ModelRequest, answer: ModelAnswer) -> Json:
    if answer.call is not None:
        return _call_item(answer.call)
    message = {"type": "message", "id": f"msg_{len(asked.turns):024}", "status": "completed", "role": "assistant"}
    return message | {"content": [_part(answer.text)]}


def _whole(asked: ModelRequest, answer: ModelAnswer) -> Json:
    return {
        "id": f"resp_{len(asked.turns):024}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if answer.is_cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if answer.is_cut else None,
        "instructions": None,
        "max_output_tokens": None,
        "model": asked.model,
        "output": [_item(asked, answer)],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": answer.usage.input,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer.usage.output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.usage.total,
        },
        "user": None,
        "metadata": {},
    }


def _text_events(item: Json, text: str) -> Iterator[Json]:
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    opened = item | {"status": "in_progress", "content": []}
    yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
    yield {"type": "response.content_part.added", **place, "part": _part("")}
    for piece in split_for_stream(text):
        yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": _part(text)}


def _call_events(item: Json) -> Iterator[Json]:
    field, name = {
        "function_call": ("arguments", "function_call_arguments"),
        "custom_tool_call": ("input", "custom_tool_call_input"),
    }.get(item["type"], (None, ""))
    opened = item | {"status": "in_progress"} | ({field: ""} if field else {})
    yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
    if field:
        place = {"item_id": item["id"], "output_index": 0}
        for piece in split_for_stream(item[field]):
            yield {"type": f"response.{name}.delta", **place, "delta": piece}
        yield {"type": f"response.{name}.done", **place, field: item[field]}


def _events(asked: ModelRequest, answer: ModelAnswer) -> Iterator[Json]:
    whole = _whole(asked, answer)
    item = whole["output"][0]
    begun = whole | {"status": "in_progress", "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    yield from _text_events(item, answer.text) if answer.call is None else _call_events(item)
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": f"response.{whole['status']}", "response": whole}


def _stream(asked: ModelRequest, answer: ModelAnswer) -> Iterator[bytes]:
    for number, data in enumerate(_events(asked, answer)):
        yield encode_event(data | {"sequence_number": number}, data["type"])


DIALECT: Final = ApiDialect("openai-responses", _read, _whole, _stream, openai_error)
