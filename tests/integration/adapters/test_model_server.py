"""The scripted model server over real HTTP, parsed as each API's documentation says."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from adapters.bridges.response import EDIT_INSTRUCTIONS, parse_response
from tests.model_server import ModelServer
from tests.waiting import wait_for

Json = dict[str, Any]
SCHEMA = {
    "type": "object",
    "properties": {"file_path": {"type": "string"}, "content": {"type": "string"}},
    "required": ["file_path", "content"],
}
COMMAND = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


@dataclass(frozen=True)
class ParsedAnswer:
    """A client's view of an answer: text, calls by name and arguments, stop reason, and tokens."""

    text: str
    calls: list[tuple[str, Any]]
    ending: str
    usage: tuple[int, int]


@dataclass(frozen=True)
class Api:
    """A client of one API: builds a request with some tool results after the prompt, and parses answers."""

    name: str
    ask: Callable[[str, bool, int, bool], tuple[str, Json]]
    read: Callable[[bytes, bool], ParsedAnswer]
    ended: tuple[str, str, str]
    error: Callable[[Json], str]
    errors: tuple[str, str]


def events(raw: bytes) -> list[tuple[str, str]]:
    """Return names and data of server-sent events, by https:

    html.spec.whatwg.org/multipage/server-sent-events.html.
    """
    found = []
    assert raw.endswith(b"\n\n"), "an event is not terminated"
    for block in raw.decode().strip("\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", "message"), fields["data"]))
    return found


def anthropic_ask(prompt: str, stream: bool, results: int, tools: bool) -> tuple[str, Json]:
    messages: list[Json] = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    for number in range(results):
        use = {"type": "tool_use", "id": f"toolu_{number}", "name": "Write", "input": {}}
        messages.append({"role": "assistant", "content": [use]})
        result = {"type": "tool_result", "tool_use_id": f"toolu_{number}", "content": "write wrong.txt x"}
        messages.append({"role": "user", "content": [result]})
    body: Json = {"model": "m", "max_tokens": 100, "stream": stream, "messages": messages}
    if tools:
        body["tools"] = [
            {"name": "TodoWrite", "input_schema": SCHEMA},
            {"name": "Write", "description": "", "input_schema": SCHEMA},
            {"name": "Bash", "input_schema": COMMAND},
        ]
    return "/v1/messages?beta=true", body


def anthropic_read(raw: bytes, stream: bool) -> ParsedAnswer:
    if not stream:
        message = json.loads(raw)
    else:
        message, partial = {}, ""
        seen = [(name, json.loads(data)) for name, data in events(raw)]
        for name, event in seen:
            assert event["type"] == name
            match event:
                case {"type": "message_start", "message": message}:
                    assert message["content"] == []
                case {"type": "content_block_start", "index": index, "content_block": block}:
                    assert index == len(message["content"])
                    message["content"].append(block)
                    partial = ""
                case {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}}:
                    message["content"][index]["text"] += text
                case {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": text}}:
                    partial += text
                case {"type": "content_block_stop", "index": index} if partial:
                    message["content"][index]["input"] = json.loads(partial)
                case {"type": "message_delta", "delta": delta, "usage": usage}:
                    message |= delta
                    message["usage"] |= usage
        assert seen[-1][1] == {"type": "message_stop"}
    blocks = message["content"]
    return ParsedAnswer(
        "".join(block["text"] for block in blocks if block["type"] == "text"),
        [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"],
        message["stop_reason"],
        (message["usage"]["input_tokens"], message["usage"]["output_tokens"]),
    )


def responses_ask(prompt: str, stream: bool, results: int, tools: bool) -> tuple[str, Json]:
    items: list[Json] = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": prompt}]}]
    for number in range(results):
        common = {"call_id": f"call_{number}"}
        items.append({"type": "function_call", "name": "write_file", "arguments": "{}", **common})
        items.append({"type": "function_call_output", "output": "write wrong.txt x", **common})
    body: Json = {"model": "m", "stream": stream, "input": items, "instructions": "You are an agent."}
    if tools:
        body["tools"] = [
            {"type": "web_search"},
            {"type": "function", "name": "write_stdin", "parameters": {"type": "object", "properties": {}}},
            {"type": "function", "name": "write_file", "parameters": SCHEMA},
            {"type": "function", "name": "shell", "parameters": COMMAND},
        ]
    return "/v1/responses", body


def responses_read(raw: bytes, stream: bool) -> ParsedAnswer:
    if not stream:
        response = json.loads(raw)
    else:
        seen = [(name, json.loads(data)) for name, data in events(raw)]
        assert [event["sequence_number"] for _, event in seen] == list(range(len(seen)))
        assert all(event["type"] == name for name, event in seen)
        deltas: dict[str, str] = {}
        done = {}
        for name, event in seen:
            if name.endswith(".delta"):
                deltas[event["item_id"]] = deltas.get(event["item_id"], "") + event["delta"]
            elif name == "response.output_item.done":
                done[event["item"]["id"]] = event["item"]
        name, last = seen[-1]
        response = last["response"]
        assert (seen[0][0], name) == ("response.created", f"response.{response['status']}")
        assert list(done.values()) == response["output"]
        for key, item in done.items():
            whole = item.get("arguments") or item.get("input") or item["content"][0]["text"]
            assert deltas[key] == whole
    texts, calls = [], []
    for item in response["output"]:
        if item["type"] == "message":
            texts += [part["text"] for part in item["content"] if part["type"] == "output_text"]
        elif item["type"] == "function_call":
            calls.append((item["name"], json.loads(item["arguments"])))
        else:
            calls.append((item["name"], item["input"]))
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    return ParsedAnswer("".join(texts), calls, response["status"], (usage["input_tokens"], usage["output_tokens"]))


def chat_ask(prompt: str, stream: bool, results: int, tools: bool) -> tuple[str, Json]:
    messages: list[Json] = [{"role": "system", "content": "You are an agent."}, {"role": "user", "content": prompt}]
    for number in range(results):
        function = {"name": "write", "arguments": "{}"}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": "write wrong.txt x"})
    body: Json = {"model": "m", "stream": stream, "messages": messages}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if tools:
        functions = [("todowrite", SCHEMA), ("write", SCHEMA), ("bash", COMMAND)]
        body["tools"] = [
            {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in functions
        ]
    return "/v1/chat/completions", body


def chat_read(raw: bytes, stream: bool) -> ParsedAnswer:
    if not stream:
        whole = json.loads(raw)
        message, ending = whole["choices"][0]["message"], whole["choices"][0]["finish_reason"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        text, usage = message["content"] or "", whole["usage"]
    else:
        *chunks, (_, done) = events(raw)
        assert done == "[DONE]"
        text, ending, usage, calls = "", "", None, []
        for _, data in chunks:
            chunk = json.loads(data)
            assert chunk["object"] == "chat.completion.chunk"
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                ending = choice["finish_reason"] or ending
                for part in choice["delta"].get("tool_calls", ()):
                    if part["index"] == len(calls):
                        calls.append(dict(part["function"]))
                    else:
                        calls[part["index"]]["arguments"] += part["function"]["arguments"]
    assert usage is not None
    made = [(call["name"], json.loads(call["arguments"])) for call in calls]
    return ParsedAnswer(text, made, ending, (usage["prompt_tokens"], usage["completion_tokens"]))


def gemini_ask(prompt: str, stream: bool, results: int, tools: bool) -> tuple[str, Json]:
    contents: list[Json] = [{"role": "user", "parts": [{"text": prompt}]}]
    for number in range(results):
        call = {"id": f"c{number}", "name": "write_file", "args": {}}
        contents.append({"role": "model", "parts": [{"functionCall": call}]})
        response = {"id": f"c{number}", "name": "write_file", "response": {"output": "write wrong.txt x"}}
        contents.append({"role": "user", "parts": [{"functionResponse": response}]})
    body: Json = {"contents": contents, "systemInstruction": {"parts": [{"text": "You are an agent."}]}}
    if tools:
        functions = [
            {"name": "write_todos", "parametersJsonSchema": SCHEMA},
            {"name": "write_file", "parametersJsonSchema": SCHEMA},
            {"name": "run_shell_command", "parameters": COMMAND},
        ]
        body["tools"] = [{"functionDeclarations": functions}]
    method = "streamGenerateContent?alt=sse" if stream else "generateContent"
    return f"/v1beta/models/m:{method}", body


def gemini_read(raw: bytes, stream: bool) -> ParsedAnswer:
    chunks = [json.loads(data) for _, data in events(raw)] if stream else [json.loads(raw)]
    parts = [part for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    usage = chunks[-1]["usageMetadata"]
    assert usage["totalTokenCount"] == usage["promptTokenCount"] + usage["candidatesTokenCount"]
    return ParsedAnswer(
        "".join(part.get("text", "") for part in parts),
        [(call["name"], call["args"]) for call in calls],
        chunks[-1]["candidates"][0]["finishReason"],
        (usage["promptTokenCount"], usage["candidatesTokenCount"]),
    )


def ollama_ask(prompt: str, stream: bool, results: int, tools: bool) -> tuple[str, Json]:
    messages: list[Json] = [{"role": "user", "content": prompt}]
    for _ in range(results):
        call = {"function": {"name": "write_file", "arguments": {}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_name": "write_file", "content": "write wrong.txt x"})
    body: Json = {"model": "m", "messages": messages}
    if not stream:  # unlike the others, it streams by default
        body["stream"] = False
    if tools:
        functions = [("write_file", SCHEMA), ("bash", COMMAND)]
        body["tools"] = [
            {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in functions
        ]
    return "/api/chat", body


def ollama_read(raw: bytes, stream: bool) -> ParsedAnswer:
    parts = [json.loads(line) for line in raw.splitlines()]
    assert len(parts) > 1 if stream else len(parts) == 1
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    functions = [call["function"] for part in parts for call in part["message"].get("tool_calls", ())]
    return ParsedAnswer(
        "".join(part["message"]["content"] for part in parts),
        [(function["name"], function["arguments"]) for function in functions],
        parts[-1]["done_reason"],
        (parts[-1]["prompt_eval_count"], parts[-1]["eval_count"]),
    )


APIS = [
    Api(
        "anthropic",
        anthropic_ask,
        anthropic_read,
        ("tool_use", "end_turn", "max_tokens"),
        lambda body: body["error"]["type"],
        ("authentication_error", "rate_limit_error"),
    ),
    Api(
        "openai-responses",
        responses_ask,
        responses_read,
        ("completed", "completed", "incomplete"),
        lambda body: body["error"]["code"],
        ("invalid_api_key", "rate_limit_exceeded"),
    ),
    Api(
        "openai-chat",
        chat_ask,
        chat_read,
        ("tool_calls", "stop", "length"),
        lambda body: body["error"]["code"],
        ("invalid_api_key", "rate_limit_exceeded"),
    ),
    Api(
        "gemini",
        gemini_ask,
        gemini_read,
        ("STOP", "STOP", "MAX_TOKENS"),
        lambda body: body["error"]["status"],
        ("UNAUTHENTICATED", "RESOURCE_EXHAUSTED"),
    ),
    Api(
        "ollama",
        ollama_ask,
        ollama_read,
        ("stop", "stop", "length"),
        lambda body: body["error"],
        ("unauthorized", "too many requests"),
    ),
]


@pytest.fixture
def server() -> Iterator[ModelServer]:
    """Yield a running server."""
    with ModelServer() as server:
        yield server


@pytest.fixture(params=APIS, ids=lambda api: api.name)
def api(request: pytest.FixtureRequest) -> Api:
    """Yield each API in turn."""
    found: Api = request.param
    return found


@pytest.fixture(params=[True, False], ids=["stream", "whole"])
def stream(request: pytest.FixtureRequest) -> bool:
    """Request a stream, and a whole answer."""
    return bool(request.param)


@dataclass(frozen=True)
class Reply:
    """A response; `cut` if the connection ended before the answer did."""

    status: int
    headers: http.client.HTTPMessage
    raw: bytes
    cut: bool


def post(server: ModelServer, path: str, body: Json, headers: dict[str, str] | None = None) -> Reply:
    """Send a request on a new connection."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        try:
            return Reply(response.status, response.headers, response.read(), cut=False)
        except http.client.IncompleteRead as error:
            return Reply(response.status, response.headers, error.partial, cut=True)
    finally:
        connection.close()


def ask_model(
    server: ModelServer, api: Api, prompt: str, stream: bool, results: int = 0, *, tools: bool = True
) -> ParsedAnswer:
    """Return the answer to a prompt after this many tool results."""
    reply = post(server, *api.ask(prompt, stream, results, tools))
    assert (reply.status, reply.cut) == (200, False), reply
    return api.read(reply.raw, stream)


@pytest.mark.extended_variants
def test_text_ends_the_answer(server: ModelServer, api: Api, stream: bool) -> None:
    """The whole text comes at once, with any characters; an empty script gives some text."""
    heard = ask_model(server, api, "You are to\n  say größer 'als' \"x\"\nsay and 🦉 more\nand words", stream)
    assert heard == ParsedAnswer("größer 'als' \"x\"\nand 🦉 more", [], api.ended[1], heard.usage)
    assert ask_model(server, api, "Hello there", stream).text


@pytest.mark.extended_variants
def test_each_turn_is_the_next_tool_call(server: ModelServer, api: Api, stream: bool) -> None:
    """Files and commands go through the client's own tools in order, followed by the text."""
    prompt = "write a/b.txt some  text: \"q\" ä\nrun echo 'x' && true\nwrite c.txt\nsay ready"
    writes, commands = ask_model(server, api, prompt, stream, 0), ask_model(server, api, prompt, stream, 1)
    empty, end = ask_model(server, api, prompt, stream, 2), ask_model(server, api, prompt, stream, 3)
    writer = {"anthropic": "Write", "openai-chat": "write"}.get(api.name, "write_file")
    shell = {"anthropic": "Bash", "openai-responses": "shell", "gemini": "run_shell_command"}.get(api.name, "bash")
    assert writes.calls == [(writer, {"file_path": "a/b.txt", "content": 'some  text: "q" ä\n'})]
    assert commands.calls == [(shell, {"command": "echo 'x' && true"})]
    assert empty.calls == [(writer, {"file_path": "c.txt", "content": "\n"})]
    assert (writes.text, writes.ending, end.ending) == ("", *api.ended[:2])
    assert (end.calls, end.text) == ([], "ready")


@pytest.mark.extended_variants
def test_failure_comes_from_the_api(server: ModelServer, api: Api, stream: bool) -> None:
    """Every request of the conversation gets the status and the error type."""
    path, body = api.ask("fail 401\nwrite a.txt x", stream, 0, True)
    replies = [post(server, path, body) for _ in range(3)]
    assert [reply.status for reply in replies] == [401, 401, 401]
    assert {api.error(json.loads(reply.raw)) for reply in replies} == {api.errors[0]}
    assert "retry-after" not in replies[0].headers


@pytest.mark.extended_variants
def test_failure_ends_after_its_count(server: ModelServer, api: Api, stream: bool) -> None:
    """The error has a retry delay; conversations fail independently."""
    prompt = "fail 429 2 30\nfail 500 1\nsay better"
    replies = [post(server, *api.ask(prompt, stream, 0, True)) for _ in range(3)]
    assert [reply.status for reply in replies] == [429, 429, 500]
    assert [reply.headers["retry-after"] for reply in replies] == ["30", "30", None]
    assert api.error(json.loads(replies[0].raw)) == api.errors[1]
    assert post(server, *api.ask(f"another\n{prompt}", stream, 0, True)).status == 429
    assert ask_model(server, api, prompt, stream).text == "better"


@pytest.mark.extended_variants
def test_drop_interrupts_the_response(server: ModelServer, api: Api, stream: bool) -> None:
    """The connection ends after part of the answer; the retry gets all of it."""
    prompt = "drop 1\nwrite a.txt x"
    reply = post(server, *api.ask(prompt, stream, 0, True))
    assert (reply.status, reply.cut) == (200, True)
    assert reply.raw
    assert len(ask_model(server, api, prompt, stream).calls) == 1


@pytest.mark.extended_variants
def test_response_is_truncated_at_the_limit(server: ModelServer, api: Api, stream: bool) -> None:
    """Half of it comes, no tool is called, the stop reason says why, and the retry gets all of it."""
    prompt = "cut 1\nsay 12345678"
    heard = [ask_model(server, api, prompt, stream) for _ in range(2)]
    assert [(one.text, one.calls, one.ending) for one in heard] == [
        ("1234", [], api.ended[2]),
        ("12345678", [], api.ended[1]),
    ]


@pytest.mark.extended_variants
def test_too_long_prompt_is_rejected(server: ModelServer, api: Api, stream: bool) -> None:
    """It is an invalid request in the API's own words, also when retried."""
    replies = [post(server, *api.ask("overflow\nwrite a.txt x", stream, 0, True)) for _ in range(2)]
    assert [reply.status for reply in replies] == [400, 400]
    plain = post(server, *api.ask("fail 400\nwrite a.txt x", stream, 0, True))
    assert len({replies[0].raw, replies[1].raw, plain.raw}) == 2


@pytest.mark.extended_variants
def test_usage_is_that_of_the_script(server: ModelServer, api: Api, stream: bool) -> None:
    prompt = "usage 1234 56\nrun true"
    assert [ask_model(server, api, prompt, stream, results).usage for results in (0, 1)] == [(1234, 56)] * 2


@pytest.mark.extended_variants
def test_requests_are_recorded_without_credentials(server: ModelServer, api: Api, stream: bool) -> None:
    """The requests in order, with no key in headers or path."""
    path, body = api.ask("say x", stream, 0, True)
    secret = {"Authorization": "Bearer hush", "x-api-key": "hush", "x-goog-api-key": "hush", "X-Seen": "yes"}
    post(server, f"{path}{'&' if '?' in path else '?'}key=hush", body, secret)
    (request,) = server.requests
    assert (request.dialect, request.path, request.model, request.stream) == (api.name, path, "m", stream)
    assert request.body == body
    assert request.headers["x-seen"] == "yes"
    assert "hush" not in str(request)


def test_side_requests_use_no_step_and_no_failure(server: ModelServer) -> None:
    """A request for a title contains the prompt too, but neither fails nor writes."""
    prompt = "fail 500 1\nwrite a.txt x"
    api = APIS[2]
    path, body = api.ask(f"Generate a title for this conversation:\n{prompt}", True, 0, False)
    assert api.read(post(server, path, body).raw, True).calls == []
    assert post(server, *api.ask(prompt, True, 0, True)).status == 500


def test_failures_of_a_prompt_are_counted_across_sessions_of_copilot(server: ModelServer) -> None:
    """Each of its messages begins with the time."""
    statuses = []
    for second in range(2):
        prompt = f"<current_datetime>2026-11-25T23:27:0{second}.372+00:00</current_datetime>\n\nfail 429 1\nsay better"
        statuses.append(post(server, *APIS[2].ask(prompt, True, 0, True)).status)
    assert statuses == [429, 200]


def test_last_prompt_with_a_script_counts(server: ModelServer) -> None:
    """A resumed session starts the new script at its first step; a client's reminders are no scripts."""
    path, body = anthropic_ask("write old.txt x", False, 1, True)
    body["messages"].append({"role": "assistant", "content": "Done."})
    new = [
        {"type": "text", "text": "write new.txt x"},
        {"type": "text", "text": "<system-reminder>\nwrite reminder.txt x\n</system-reminder>"},
    ]
    body["messages"].append({"role": "user", "content": new})
    heard = anthropic_read(post(server, path, body).raw, False)
    assert heard.calls == [("Write", {"file_path": "new.txt", "content": "x\n"})]


@pytest.mark.extended_variants
def test_instructions_choose_the_part_of_the_script(server: ModelServer, api: Api, stream: bool) -> None:
    """The last part whose words occur elsewhere in the prompt; its own line does not count."""
    script = "write a.txt x\nsay all\nonce of apples\nsay apples\nonce of pears\nsay pears"
    assert ask_model(server, api, script, stream, 1).text == "all"
    assert ask_model(server, api, f"This speaks of apples.\n{script}", stream).text == "apples"
    assert ask_model(server, api, f"{script}\nThis speaks of apples, and pears.", stream).text == "apples"
    assert ask_model(server, api, f"{script}\nThis speaks of pears and of apples.", stream).text == "pears"


def test_later_instructions_start_a_part_at_its_first_step(server: ModelServer) -> None:
    script = "write a.txt x\nsay all\nonce of apples\nfail 500 1\nrun true\nsay apples"
    path, body = anthropic_ask(script, False, 1, True)
    assert anthropic_read(post(server, path, body).raw, False).text == "all"
    body["messages"] += [{"role": "assistant", "content": "all"}, {"role": "user", "content": "That speaks of apples."}]
    assert post(server, path, body).status == 500
    heard = anthropic_read(post(server, path, body).raw, False)
    assert heard.calls == [("Bash", {"command": "true"})]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "write wrong.txt x"}
    body["messages"].append({"role": "user", "content": [result]})
    assert anthropic_read(post(server, path, body).raw, False).text == "apples"


def test_tool_of_a_server_is_called_by_its_own_name(server: ModelServer) -> None:
    """Whatever prefix the client adds; arguments that are not a JSON object call nothing."""
    path, body = anthropic_ask('call broken {"a": }\ncall submit_handoff {"data": {"a": [1]}}', False, 0, True)
    body["tools"].append({"name": "mcp__council__submit_handoff", "input_schema": {"type": "object"}})
    heard = anthropic_read(post(server, path, body).raw, False)
    assert heard.calls == [("mcp__council__submit_handoff", {"data": {"a": [1]}})]


def test_codex_is_asked_for_an_unlisted_tool(server: ModelServer) -> None:
    """Codex runs its search. A server may still be starting: the model searches again, but not forever."""
    message = {"type": "message", "role": "user", "content": 'call submit_handoff {"a": 1}'}
    shell = {"type": "function", "name": "exec_command", "parameters": COMMAND}
    body: Json = {"model": "m", "stream": False, "input": [message], "tools": [shell, {"type": "tool_search"}]}
    (search,) = json.loads(post(server, "/v1/responses", body).raw)["output"]
    assert (search["type"], search["execution"]) == ("tool_search_call", "client")
    assert search["arguments"] == {"query": "submit_handoff"}
    found: Json = {"type": "tool_search_output", "call_id": search["call_id"], "tools": []}
    body["input"] += [search, found]
    (again,) = json.loads(post(server, "/v1/responses", body).raw)["output"]
    assert again["type"] == "tool_search_call"
    assert again["call_id"] != search["call_id"]
    body["input"] += [again, found] * 200
    (said,) = json.loads(post(server, "/v1/responses", body).raw)["output"]
    assert said["content"][0]["text"].startswith("None of the tools offered can do submit_handoff")
    tool = {"type": "function", "name": "submit_handoff", "parameters": {"type": "object"}}
    found["tools"].append({"type": "namespace", "name": "mcp__council", "tools": [tool]})
    (call,) = json.loads(post(server, "/v1/responses", body).raw)["output"]
    assert (call["type"], call["namespace"], call["name"]) == ("function_call", "mcp__council", "submit_handoff")
    assert json.loads(call["arguments"]) == {"a": 1}
    assert call["call_id"] != search["call_id"]


def test_call_ids_are_unique_in_a_conversation(server: ModelServer) -> None:
    """Even if a resumed session repeats the same prompt."""
    path, body = anthropic_ask("run true", False, 0, True)
    ids = []
    for _ in range(3):
        message = json.loads(post(server, path, body).raw)
        (use,) = message["content"]
        ids.append(use["id"])
        body["messages"] += [
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": ""}]},
            {"role": "user", "content": "run true"},
        ]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    "reported",
    [
        " - Primary working directory: /x/y z\n",
        "Working directory: /x/y\n",
        "<cwd>/x/y</cwd>",
        "- **Workspace Directories:**\n  - /x/y\n",
    ],
)
def test_paths_are_absolute_if_the_client_names_its_folder(server: ModelServer, reported: str) -> None:
    """Some tools accept no relative paths."""
    path, body = anthropic_ask("write a.txt x", False, 0, True)
    body["system"] = [{"type": "text", "text": f"Words.\n{reported}\nMore."}]
    ((_, arguments),) = anthropic_read(post(server, path, body).raw, False).calls
    assert arguments["file_path"] == f"/x/y{' z' if 'y z' in reported else ''}/a.txt"


def codex_tools(*tools: Json) -> Json:
    """Return a request to the Responses API with these tools."""
    return {"model": "m", "stream": True, "input": "write a/b.txt x y\nrun true", "tools": list(tools)}


def test_codex_gets_a_patch(server: ModelServer) -> None:
    body = codex_tools({"type": "function", "name": "exec_command", "parameters": COMMAND})
    body["tools"].append({"type": "custom", "name": "apply_patch", "description": "", "format": {}})
    patch = "*** Begin Patch\n*** Add File: a/b.txt\n+x y\n*** End Patch\n"
    assert responses_read(post(server, "/v1/responses", body).raw, True).calls == [("apply_patch", patch)]


def test_codex_without_a_patch_tool_gets_a_command(server: ModelServer) -> None:
    """The command creates the file; it is a list of words if the tool expects that."""
    listed = {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}}
    body = codex_tools({"type": "function", "name": "shell", "parameters": listed})
    ((name, arguments),) = responses_read(post(server, "/v1/responses", body).raw, True).calls
    assert name == "shell"
    assert arguments["command"][:2] == ["bash", "-lc"]


def test_writing_command_writes(server: ModelServer, tmp_path: Any) -> None:
    """Including all characters that a shell interprets."""
    body = codex_tools({"type": "function", "name": "exec_command", "parameters": COMMAND})
    body["input"] = "write it's/c.txt x $HOME `id` \\n %s 'q' \"d\""
    ((_, arguments),) = responses_read(post(server, "/v1/responses", body).raw, True).calls
    subprocess.run(["bash", "-c", arguments["command"]], cwd=tmp_path, check=True)
    assert (tmp_path / "it's" / "c.txt").read_text() == "x $HOME `id` \\n %s 'q' \"d\"\n"


def test_codex_in_code_mode_gets_a_program(server: ModelServer) -> None:
    """Its tools are listed in the conversation, and one of them runs programs that call the others."""
    description = "Run JavaScript code to orchestrate/compose tool calls\n\n### `apply_patch`\nEdits.\n"
    program = {"type": "custom", "name": "exec", "description": description}
    namespace = {"type": "namespace", "name": "functions", "tools": [program]}
    items = [{"type": "additional_tools", "role": "developer", "tools": [namespace]}]
    items.append({"type": "message", "role": "user", "content": "write a.txt x"})
    reply = post(server, "/v1/responses", {"model": "m", "stream": False, "input": items})
    (item,) = json.loads(reply.raw)["output"]
    assert (item["type"], item["namespace"], item["name"]) == ("custom_tool_call", "functions", "exec")
    source = item["input"].strip()
    assert source.startswith("text(await tools.apply_patch(")
    patch = json.loads(source.removeprefix("text(await tools.apply_patch(").removesuffix("));"))
    assert patch == "*** Begin Patch\n*** Add File: a.txt\n+x\n*** End Patch\n"


def test_local_shell_gets_words(server: ModelServer) -> None:
    body = codex_tools({"type": "local_shell"}) | {"stream": False, "input": "run echo 'x y'"}
    (item,) = json.loads(post(server, "/v1/responses", body).raw)["output"]
    assert (item["type"], item["action"]["type"]) == ("local_shell_call", "exec")
    assert item["action"]["command"] == ["bash", "-lc", "echo 'x y'"]


def test_required_arguments_of_a_tool_are_added(server: ModelServer) -> None:
    """A description, a choice, a number: a value of the right type."""
    schema = {
        "type": "object",
        "properties": {
            "command": {"type": "string"},
            "description": {"type": "string"},
            "mode": {"enum": ["slow", "fast"]},
            "timeout": {"type": "integer"},
            "unasked": {"type": "string"},
        },
        "required": ["command", "description", "mode", "timeout"],
    }
    path, body = anthropic_ask("run true", False, 0, False)
    body["tools"] = [{"name": "Bash", "input_schema": schema}]
    ((_, arguments),) = anthropic_read(post(server, path, body).raw, False).calls
    assert (arguments["command"], arguments["mode"]) == ("true", "slow")
    assert (type(arguments["description"]), type(arguments["timeout"])) == (str, int)
    assert "unasked" not in arguments


def test_ollama_bridge_parses_the_response(server: ModelServer) -> None:
    """A model without tools returns files in the form that the bridge requests; shown files are no scripts."""
    shown = "```file README.md\nrun make\n  write shown.txt x\n```\n"
    messages = [
        {"role": "system", "content": EDIT_INSTRUCTIONS},
        {"role": "user", "content": f"{shown}\nThe task:\n\nwrite a/b.txt one\nwrite c.txt two\nsay words"},
    ]
    raw = post(server, "/api/chat", {"model": "m", "messages": messages}).raw
    assert parse_response(ollama_read(raw, True).text).files == {"a/b.txt": "one\n", "c.txt": "two\n"}


@pytest.mark.parametrize("stream", [True, False])
def test_ollama_generates(server: ModelServer, stream: bool) -> None:
    """The endpoint without a conversation has its own field for the text."""
    raw = post(server, "/api/generate", {"model": "m", "prompt": "say one two", "stream": stream}).raw
    parts = [json.loads(line) for line in raw.splitlines()]
    assert "".join(part["response"] for part in parts) == "one two"
    assert parts[-1]["done"] is True


@pytest.mark.parametrize(
    ("system", "form"),
    [
        ("Every *SEARCH/REPLACE block* must", "a.txt\n```\n<<<<<<< SEARCH\n=======\nx y\n>>>>>>> REPLACE\n```"),
        ("You MUST use this *file listing* format", "a.txt\n```\nx y\n```"),
    ],
)
def test_aider_gets_its_edit_formats(server: ModelServer, system: str, form: str) -> None:
    """Whole files or diff blocks, as its instructions say."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "write a.txt x y\nsay end"}]
    raw = post(server, "/v1/chat/completions", {"model": "m", "messages": messages}).raw
    assert chat_read(raw, False).text == f"{form}\n\nend"


def test_aider_gets_a_diff_to_the_shown_file(server: ModelServer) -> None:
    """Otherwise it would append to the file."""
    messages = [
        {"role": "system", "content": "Every *SEARCH/REPLACE block* must"},
        {
            "role": "user",
            "content": "I have *added these files to the chat*.\n\na.txt\n```\nold\nlines\n```\n\nb.txt\n```\n```",
        },
        {"role": "assistant", "content": "Ok."},
        {"role": "user", "content": "write a.txt new"},
    ]
    raw = post(server, "/v1/chat/completions", {"model": "m", "messages": messages}).raw
    block = "a.txt\n```\n<<<<<<< SEARCH\nold\nlines\n=======\nnew\n>>>>>>> REPLACE\n```"
    assert chat_read(raw, False).text.startswith(block)


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/messages/count_tokens?beta=true", "input_tokens"), ("/v1beta/models/m:countTokens", "totalTokens")],
)
def test_tokens_are_counted(server: ModelServer, path: str, field: str) -> None:
    """More words are more tokens, without a request to a model."""
    counts = [json.loads(post(server, path, {"messages": "x" * size}).raw)[field] for size in (100, 1000)]
    assert 0 < counts[0] < counts[1]
    assert {request.dialect for request in server.requests} == {None}


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/models", "data"), ("/v1beta/models", "models"), ("/api/tags", "models"), ("/api/version", "version")],
)
def test_lookups_are_answered(server: ModelServer, path: str, field: str) -> None:
    """With content, on a connection that stays open."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("HEAD", "/")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.request("GET", path)
    assert json.loads(connection.getresponse().read())[field]
    connection.close()


def test_unknown_path_and_invalid_body_are_errors(server: ModelServer) -> None:
    assert post(server, "/v1/embeddings", {}).status == 404
    assert post(server, "/v1/messages", {"messages": [3]}).status == 400
    assert ask_model(server, APIS[0], "say still there", True).text == "still there"


def test_delay_delays(server: ModelServer) -> None:
    began = time.monotonic()
    ask_model(server, APIS[0], "delay 0.3\nsay x", True)
    assert time.monotonic() - began >= 0.3


def served() -> list[threading.Thread]:
    """Return the threads of this process that answer requests."""
    return [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]


def test_delay_ends_with_the_client(server: ModelServer) -> None:
    path, body = APIS[0].ask("delay 3600\nsay x", True, 0, True)
    raw = json.dumps(body).encode()
    address = urlsplit(server.url)
    before = set(served())
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
        wait_for(lambda: server.requests)
        assert set(served()) - before
    wait_for(lambda: not set(served()) - before)


def test_delay_ends_with_the_server() -> None:
    """The client sees the connection close, and no thread is left."""
    before = set(served())
    ends: list[BaseException] = []

    def ask(server: ModelServer) -> None:
        try:
            post(server, *APIS[0].ask("delay 3600\nsay x", True, 0, True))
        except (http.client.HTTPException, OSError) as error:
            ends.append(error)

    with ModelServer() as server:
        client = threading.Thread(target=ask, args=(server,))
        client.start()
        wait_for(lambda: server.requests)
    client.join(20)
    assert len(ends) == 1
    wait_for(lambda: not set(served()) - before)


def test_concurrent_conversations_are_separate(server: ModelServer) -> None:
    statuses: dict[int, list[int]] = {}

    def converse(number: int) -> None:
        path, body = APIS[0].ask(f"task {number}\nfail 529 {number % 3}\nsay {number}", True, 0, True)
        statuses[number] = [post(server, path, body).status for _ in range(4)]

    threads = [threading.Thread(target=converse, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == {number: [529] * (number % 3) + [200] * (4 - number % 3) for number in range(24)}


def test_program_serves_until_its_input_ends() -> None:
    """It prints its address, and exits by itself."""
    argv = [sys.executable, "-m", "tests.model_server"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        address = urlsplit(program.stdout.readline().strip())
        assert address.hostname == "127.0.0.1"
        connection = http.client.HTTPConnection(address.netloc, timeout=30)
        connection.request("GET", "/api/version")
        assert connection.getresponse().status == 200
        program.stdin.close()
        assert program.wait(20) == 0
        connection.close()
