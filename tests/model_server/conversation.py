"""Requests and answers of models, independent of an API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

Json: TypeAlias = dict[str, Any]
DialectName: TypeAlias = Literal["anthropic", "openai-responses", "openai-chat", "gemini", "ollama"]
#: Kinds of tool calls: with a JSON object, with free text, with a JavaScript program that calls functions (Codex'
#: code mode), the shell built into the Responses API, or the tool search there, which loads more tools.
ToolKind: TypeAlias = Literal["function", "freeform", "program", "local-shell", "search"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool of a request; `parameters` is its JSON schema.

    For a program its properties are the callable functions; the other kinds have none.
    """

    name: str
    parameters: Json
    kind: ToolKind = "function"
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class ConversationTurn:
    """A text of the user, or the result of a tool call or tool search (possibly without text)."""

    role: Literal["user", "tool", "search"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A model request: instructions, the messages of user and tools in order, and the offered tools.

    `stream_usage` is whether a stream ends with its token usage, where an API lets the client choose.
    """

    model: str
    stream: bool
    system: str
    turns: tuple[ConversationTurn, ...]
    tools: tuple[Tool, ...] = ()
    stream_usage: bool = False


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """The token usage reported by an answer."""

    input: int = 100
    output: int = 10

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.input + self.output


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call; `arguments` is a JSON object for a function, text for the other kinds.

    `number` is unique in its conversation and `key` identifies the conversation; together they make the call's id.
    """

    tool: Tool
    arguments: Json | str
    key: str
    number: int

    def id(self, prefix: str) -> str:
        """Return a deterministic id of the call."""
        return f"{prefix}{self.key}{self.number:04}"


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """A model answer: a text, or with `call` only a tool call; `is_cut` if it was truncated at the token limit."""

    text: str
    call: ToolCall | None = None
    usage: TokenUsage = field(default_factory=TokenUsage)
    is_cut: bool = False

    def cut(self) -> ModelAnswer:
        """Return the first half; a call is dropped."""
        return replace(self, text=self.text[: len(self.text) // 2], call=None, is_cut=True)


@dataclass(frozen=True, slots=True)
class ApiFault:
    """An HTTP error as the answer; `retry_after` in seconds.

    `is_too_long` if the prompt exceeds the model's context.
    """

    status: int
    retry_after: int | None = None
    is_too_long: bool = False


@dataclass(frozen=True, slots=True)
class ApiDialect:
    """An API: the parsing of its requests, and the format of answers and errors.

    `stream` yields the chunks of a streamed answer, each complete in itself.
    """

    name: DialectName
    read: Callable[[str, Mapping[str, Any]], ModelRequest]
    whole: Callable[[ModelRequest, ModelAnswer], Json]
    stream: Callable[[ModelRequest, ModelAnswer], Iterator[bytes]]
    fault: Callable[[ApiFault], Json]
    stream_type: str = "text/event-stream"


def split_for_stream(text: str) -> list[str]:
    """Split a text into the chunks of a stream; none for an empty text."""
    size = max(1, min(24, (len(text) + 1) // 2))
    return [text[start : start + size] for start in range(0, len(text), size)]
