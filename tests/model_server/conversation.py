"""What a client asks a model and what the model answers, in no API's own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

Json: TypeAlias = dict[str, Any]
DialectName: TypeAlias = Literal["anthropic", "openai-responses", "openai-chat", "gemini", "ollama"]
#: How a tool is called: with a JSON object, with free text, with a JavaScript program that calls functions (Codex' code
#: mode), as the shell built into the Responses API, or as the search for tools there, which brings more of them.
ToolKind: TypeAlias = Literal["function", "freeform", "program", "local-shell", "search"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that a request offers; `parameters` is its JSON schema.

    For a program the properties are the functions that it may call; for the other kinds there are none.
    """

    name: str
    parameters: Json
    kind: ToolKind = "function"
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class ConversationTurn:
    """A text of the user's, or what came of a tool call or of a search for tools (without text: only that it did)."""

    role: Literal["user", "tool", "search"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request to a model: its instructions, what user and tools said in order, and the tools that are offered.

    `stream_usage` is whether a stream is to end with its tokens, where an API leaves that to the client.
    """

    model: str
    stream: bool
    system: str
    turns: tuple[ConversationTurn, ...]
    tools: tuple[Tool, ...] = ()
    stream_usage: bool = False


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens that an answer says it cost."""

    input: int = 100
    output: int = 10

    @property
    def total(self) -> int:
        """Both together."""
        return self.input + self.output


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call; `arguments` is a JSON object for a function, text for the other kinds.

    `number` is unique in its conversation and `key` tells conversations apart; together they make the call's id.
    """

    tool: Tool
    arguments: Json | str
    key: str
    number: int

    def id(self, prefix: str) -> str:
        """Return the same id for the same call of the same conversation."""
        return f"{prefix}{self.key}{self.number:04}"


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What the model says: a text, or with `call` a tool call alone; `is_cut` if it had no tokens left to go on."""

    text: str
    call: ToolCall | None = None
    usage: TokenUsage = field(default_factory=TokenUsage)
    is_cut: bool = False

    def cut(self) -> ModelAnswer:
        """Return the first half of it; a call is none then."""
        return replace(self, text=self.text[: len(self.text) // 2], call=None, is_cut=True)


@dataclass(frozen=True, slots=True)
class ApiFault:
    """An HTTP error in place of an answer; `retry_after` in seconds. `is_too_long` if the prompt is, for the model."""

    status: int
    retry_after: int | None = None
    is_too_long: bool = False


@dataclass(frozen=True, slots=True)
class ApiDialect:
    """An API: how its requests are read, and how answers and errors look.

    `stream` gives the parts of a streamed answer as they are sent, each complete in itself.
    """

    name: DialectName
    read: Callable[[str, Mapping[str, Any]], ModelRequest]
    whole: Callable[[ModelRequest, ModelAnswer], Json]
    stream: Callable[[ModelRequest, ModelAnswer], Iterator[bytes]]
    fault: Callable[[ApiFault], Json]
    stream_type: str = "text/event-stream"


def split_for_stream(text: str) -> list[str]:
    """Return a text in several parts, as a stream brings it; none for an empty one."""
    size = max(1, min(24, (len(text) + 1) // 2))
    return [text[start : start + size] for start in range(0, len(text), size)]
