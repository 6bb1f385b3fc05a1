"""Rules for a program's standard output, for lines of text and lines of JSON.

read:
  - when: {type: thread.started}
    session: thread_id
  - when: {type: turn.completed}
    input_tokens: usage.input_tokens
    done: true
  - match: 'Tokens: (?P<input_tokens>\\S+) sent, (?P<output_tokens>\\S+) received'
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, model_validator

from adapters.bridges.tool_text import edit_diff
from adapters.command.json_paths import JsonPath, values_at
from adapters.failures import failure_class_for_status, one_line
from adapters.json_output import as_cost, as_count, as_text, output_text, parse_object, parse_plain_line
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import (
    AgentMessage,
    CliWarning,
    ConversationStarted,
    FinalResult,
    SessionEvent,
    ToolCall,
    ToolResult,
    UsageReport,
)

#: Maximum characters of a line to search, because patterns are the user's and lines the agent's.
MAX_LINE_CHARS: Final = 4096

_SPENT: Final = ("input_tokens", "output_tokens", "cached_tokens", "cost")
_TOOL: Final = ("tool", "path", "detail", "removed", "added", "call", "result", "tool_error")
_FIELDS: Final = ("text", "session", *_SPENT, "model", *_TOOL, "warning", "error", "status")
_AMOUNT: Final = re.compile(r"\$?([0-9][0-9,]{0,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})([kKmM]?)")
#: Parts of a regular expression that match several texts, and escaped characters. A gap replaces the former.
_GAP: Final = "\0"
_GROUP: Final = re.compile(r"(?<!\\)\((?:\\.|\[(?:\\.|[^\]\\])*\]|[^()\[\\])*\)[*+?]*(?:\{[^}]*\})?")
_VARIABLE: Final = re.compile(
    r"(?:\\[A-Za-z0-9]|\[(?:\\.|[^\]\\])*\]|(?<!\\)\.)(?:[*+?]+|\{[^}]*\})?|[^\\](?:[*?]|\{[0-9,]+\})"
)
_LITERAL: Final = re.compile(r"\\(.)")
_TIMES: Final = {"": 1, "k": 1_000, "m": 1_000_000}


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern[:60]!r} is not a regular expression ({error}): correct it") from None
    return pattern


def _check_groups(pattern: str) -> str:
    for name in re.compile(pattern).groupindex:
        if name not in _FIELDS:
            raise ValueError(f"the group {name!r} is not a known value: use one of {', '.join(_FIELDS)}")
    return pattern


def _check_wanted(value: Any) -> Any:
    if not isinstance(value, str | int | float):
        raise ValueError("expected a string, number, true or false: write one, or a longer path")  # noqa: TRY004  pydantic
    return value


#: A validated regular expression.
RegexPattern = Annotated[str, AfterValidator(_check_pattern)]
_Wanted = Annotated[
    Any,
    AfterValidator(_check_wanted),
    WithJsonSchema({"anyOf": [{"type": kind} for kind in ("string", "number", "boolean")]}),
]


class OutputRule(BaseModel):
    """An entry of `read`, for one kind of line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    match: Annotated[RegexPattern, AfterValidator(_check_groups)] | None = None
    """A regular expression that the line matches; its named groups are values (`(?P<session>\\S+)`)."""
    when: dict[JsonPath, _Wanted] = Field(default_factory=dict)
    """Values that the JSON line must have, keyed by path."""
    text: JsonPath | None = None
    """The path to the agent's message."""
    session: JsonPath | None = None
    """The path to the program's conversation id."""
    input_tokens: JsonPath | None = None
    """The path to the number of input tokens, including cached ones."""
    output_tokens: JsonPath | None = None
    """The path to the number of output tokens."""
    cached_tokens: JsonPath | None = None
    """The path to the number of input tokens read from a cache."""
    cost: JsonPath | None = None
    """The path to the cost in US dollars."""
    usage: Literal["line", "session", "conversation"] = "line"
    """The scope of tokens and cost: this line, the session so far, or the conversation including earlier sessions."""
    estimate: bool = False
    """Whether tokens and cost are the program's own estimate instead of the numbers of the model's provider."""
    model: JsonPath | None = None
    """The path to the model's name."""
    tool: JsonPath | None = None
    """The path to the name of a tool that the agent uses."""
    path: JsonPath | None = None
    """The path to the file that the tool uses."""
    detail: JsonPath | None = None
    """The path to the tool's main argument, such as a command, which is shown instead of the file."""
    removed: JsonPath | None = None
    """The path to the text that an edit replaces."""
    added: JsonPath | None = None
    """The path to the text that an edit adds."""
    call: JsonPath | None = None
    """The path to the id of a tool call, which connects the call and its result."""
    result: JsonPath | None = None
    """The path to what a tool returned: text, or a list of objects with `text`."""
    tool_error: JsonPath | None = None
    """The path to the reason why a tool failed, or to `true`."""
    warning: JsonPath | None = None
    """The path to a message that matters but is not a failure."""
    error: JsonPath | None = None
    """The path to an error message."""
    status: JsonPath | None = None
    """The path to an error's HTTP status, which determines the failure class."""
    done: bool = False
    """Whether the line means success. If a rule sets this, a session without such a line has failed."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_empty(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject empty keys in a file; stored rules contain nulls."""
        is_from_file = bool(info.context and info.context.get("from_file"))
        empty = (
            [key for key, entry in value.items() if entry is None] if is_from_file and isinstance(value, dict) else []
        )
        if empty:
            raise ValueError(f"{empty[0]} is empty: give it a value or leave it out")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        groups = () if self.match is None else re.compile(self.match).groupindex
        paths = [name for name in _FIELDS if getattr(self, name) is not None]
        if not (self.fields_read or self.done):
            raise ValueError("the rule reads nothing: add a value such as `text` or `input_tokens`, or `done: true`")
        if twice := [name for name in paths if name in groups]:
            raise ValueError(f"`{twice[0]}` is a path and a group of `match`: keep one of them")
        if self.done and self.match is None and not self.when:
            raise ValueError("every line would mean success: add `when` or `match` to this rule")
        if (results := self.fields_read & {"result", "tool_error"}) and "call" not in self.fields_read:
            raise ValueError(f"`{min(results)}` needs the id of the tool call: add `call`")
        if self.usage != "line" and not self.fields_read.intersection(_SPENT):
            raise ValueError("`usage` needs tokens or a cost, and the rule reads none: add one, such as `cost`")
        return self

    @property
    def fields_read(self) -> frozenset[str]:
        """The values that the rule reads."""
        groups = () if self.match is None else re.compile(self.match).groupindex
        return frozenset(name for name in _FIELDS if name in groups or getattr(self, name) is not None)

    @property
    def needs_json(self) -> bool:
        """Whether the rule applies only to lines of JSON."""
        return bool(self.match is None or self.when or any(getattr(self, name) is not None for name in _FIELDS))

    def describe(self) -> str:
        """Return a description of the rule's lines."""
        wanted = [f"{path}: {json.dumps(value, ensure_ascii=False)}" for path, value in self.when.items()]
        like = "" if self.match is None else describe_pattern(self.match)
        return f"a line {' '.join(filter(None, (like, 'with' if wanted else '', ' and '.join(wanted))))}"


def describe_pattern(pattern: str) -> str:
    """Return a regular expression for users, by the literal text of its first alternative."""
    # Groups inside of groups first, so that none is left.
    before, text = "", pattern
    while text != before:
        before, text = text, _GROUP.sub(_GAP, text)
    text = _VARIABLE.sub(_GAP, text.partition("|")[0])
    words = _LITERAL.sub(r"\1", text.strip("^$ "))
    words = re.sub(rf"\s*(?:{_GAP}\s*)+", " … ", words).strip(" …")
    return f"like `{words}`" if any(map(str.isalnum, words)) else f"that matches `{pattern}`"


_Values = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class OutputReader:
    """Reads lines by rules. All rules that match a line apply.

    `model` is the model's name if no line contains it; `class_in` returns the failure class of a text.
    """

    rules: Sequence[OutputRule]
    is_json: bool
    model: str | None
    class_in: Callable[[str], FailureClass | None]

    def read(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line; unmatched lines that are not JSON are messages."""
        value = parse_object(line) if self.is_json else None
        found = [(rule, values) for rule in self.rules if (values := _values(rule, line, value)) is not None]
        if value is None and not any(rule.match is not None for rule, _ in found):
            if self.is_json:
                # Such a line is no message of a program whose messages are read from JSON: a banner, or a log.
                return () if any("text" in rule.fields_read for rule in self.rules) else parse_plain_line(line)
            return (AgentMessage(line),) if line.strip() else ()
        return tuple(self._events(found))

    @property
    def awaited(self) -> str | None:
        """A description of the lines that a session must print to succeed, or None."""
        return " or ".join(rule.describe() for rule in self.rules if rule.done) or None

    def _events(self, found: Sequence[tuple[OutputRule, _Values]]) -> Iterator[SessionEvent]:
        texts = [text for _, values in found for text in _texts(values, "text")]
        failed = self._failure([values for _, values in found])
        is_finished = failed is not None or any(rule.done for rule, _ in found)
        for _, values in found:
            yield from (ConversationStarted(session) for session in _texts(values, "session")[:1])
        if texts and not is_finished:
            yield AgentMessage("\n".join(texts))
        for rule, values in found:
            yield from _tools(values)
            yield from _results(values)
            yield from map(CliWarning, map(one_line, _texts(values, "warning")))
            yield from self._spent(rule, values)
        if is_finished:
            yield FinalResult("\n".join(texts), failed)

    def _spent(self, rule: OutputRule, values: _Values) -> Iterator[UsageReport]:
        model = next(iter(_texts(values, "model")), None)
        if any(values[name] for name in _SPENT):
            sent, received, cached = (as_count(sum(map(_count, values[name]))) for name in _SPENT[:3])
            costs = [cost for cost in map(_cost, values["cost"]) if cost is not None]
            yield UsageReport(
                input_tokens=sent,
                output_tokens=received,
                cost=as_cost(sum(costs)) if costs else None,
                is_cumulative=rule.usage != "line",
                cached_tokens=cached,
                model=model or self.model,
                includes_resumed=rule.usage == "conversation",
                is_estimate=rule.estimate,
            )
        elif model is not None:
            yield UsageReport(model=model)

    def _failure(self, found: Sequence[_Values]) -> Failed | None:
        errors = [error for values in found for error in values["error"]]
        # Show all parts of a structured error.
        words = [json.dumps(error) if error and isinstance(error, dict) else as_text(error).strip() for error in errors]
        message = ": ".join(filter(None, words))
        status = next((number for values in found for number in map(_count, values["status"]) if number), 0)
        by_status = failure_class_for_status(status)
        if not message and by_status is None:
            return None
        # The file's patterns take precedence over a status, which is often that of any invalid request.
        failure = self.class_in(message) or by_status or FailureClass.CRASHED
        return Failed(failure, one_line(message) or f"it ended with the status {status}")


def _values(rule: OutputRule, line: str, value: Any) -> _Values | None:
    """Return the values that a rule reads from a line, or None if it does not apply."""
    match = None if rule.match is None else re.search(rule.match, line[:MAX_LINE_CHARS], re.IGNORECASE)
    if rule.match is not None and match is None:
        return None
    if not all(any(_is(found, wanted) for found in values_at(value, path)) for path, wanted in rule.when.items()):
        return None
    groups = {} if match is None else match.groupdict()
    paths = {name: getattr(rule, name) for name in _FIELDS}
    return {
        name: [groups[name]] if groups.get(name) else [] if path is None else values_at(value, path)
        for name, path in paths.items()
    }


def _tools(values: _Values) -> Iterator[ToolCall]:
    """Yield the calls in a line, each with its values, or the first one with all files."""
    names, paths = _texts(values, "tool"), _texts(values, "path")
    details, removed, added, calls = (
        _per_call(values[key], len(names)) for key in ("detail", "removed", "added", "call")
    )
    for number, name in enumerate(names):
        own = paths[number : number + 1] if len(paths) == len(names) else () if number else paths
        diff = edit_diff(as_text(removed[number]), as_text(added[number]))
        detail = one_line(as_text(details[number]) or (own[0] if own else ""))
        yield ToolCall(name, detail, tuple(own), as_text(calls[number]) or None, diff)


def _results(values: _Values) -> Iterator[ToolResult]:
    """Yield the results of tools in a line."""
    if not (values["result"] or values["tool_error"]):
        return
    calls = _texts(values, "call")
    for call, result, error in zip(
        calls, *(_per_call(values[key], len(calls)) for key in ("result", "tool_error")), strict=True
    ):
        output = output_text(result)
        failed = one_line(as_text(error) or output) if error else None
        yield ToolResult(call, failed, output)


def _per_call(found: Sequence[Any], count: int) -> Sequence[Any]:
    """Return a value for each call in a line; None if they can't be assigned."""
    return found if len(found) == count else found[:1] if count == 1 and found else [None] * count


def _is(value: Any, wanted: Any) -> bool:
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def _texts(values: _Values, name: str) -> list[str]:
    return [text for text in map(as_text, values[name]) if text.strip()]


def _count(value: Any) -> int:
    """Return a number of tokens; 0 if the value is not a number."""
    amount = _amount(value) if isinstance(value, str) else value
    return as_count(round(as_cost(amount) or 0) if isinstance(amount, float) else amount)


def _cost(value: Any) -> float | None:
    return as_cost(_amount(value) if isinstance(value, str) else value)


def _amount(text: str) -> float | None:
    """Parse a number such as `1,234`, `4.2k` or `$0.07`; return None if invalid."""
    found = _AMOUNT.fullmatch(text.strip())
    return None if found is None else float(found[1].replace(",", "")) * _TIMES[found[2].lower()]
