"""What a program's standard output means, by rules of the file: for lines of text, and for those that hold JSON.

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

from adapters.failures import failure_class_for_status, one_line
from adapters.json_output import as_cost, as_count, as_text, parse_object, parse_plain_line
from adapters.json_paths import JsonPath, values_at
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.outcome import Failed
from orchestrator.protocols import AgentMessage, ConversationStarted, FinalResult, SessionEvent, UsageReport

#: Characters of a line that patterns are looked for in: they are a user's, lines an agent's.
MAX_LINE_CHARS: Final = 4096

_SPENT: Final = ("input_tokens", "output_tokens", "cached_tokens", "cost")
_FACTS: Final = ("text", "session", *_SPENT, "model", "error", "status")
_AMOUNT: Final = re.compile(r"\$?([0-9][0-9,]{0,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})([kKmM]?)")
_TIMES: Final = {"": 1, "k": 1_000, "m": 1_000_000}


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern[:60]!r} is no regular expression, {error}: correct it") from None
    return pattern


def _check_groups(pattern: str) -> str:
    for name in re.compile(pattern).groupindex:
        if name not in _FACTS:
            raise ValueError(f"the group {name!r} is no fact that is read: name it one of {', '.join(_FACTS)}")
    return pattern


def _check_wanted(value: Any) -> Any:
    if not isinstance(value, str | int | float):
        raise ValueError("only a text, a number, true or false can be waited for: write one, or a path further in")  # noqa: TRY004  told by pydantic
    return value


#: A regular expression, checked.
RegexPattern = Annotated[str, AfterValidator(_check_pattern)]
_Wanted = Annotated[
    Any,
    AfterValidator(_check_wanted),
    WithJsonSchema({"anyOf": [{"type": one} for one in ("string", "number", "boolean")]}),
]


class OutputRule(BaseModel):
    """What stands under `read` for one kind of line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    match: Annotated[RegexPattern, AfterValidator(_check_groups)] | None = None
    """A regular expression that such a line has; its named groups are what is read (`(?P<session>\\S+)`)."""
    when: dict[JsonPath, _Wanted] = Field(default_factory=dict)
    """What such a line of JSON has, by paths: each is equal to the value here."""
    text: JsonPath | None = None
    """Where the agent's words are."""
    session: JsonPath | None = None
    """Where the program's own id of the conversation is."""
    input_tokens: JsonPath | None = None
    """Where the number of tokens is that went in, those from a cache among them."""
    output_tokens: JsonPath | None = None
    """Where the number of tokens is that came out."""
    cached_tokens: JsonPath | None = None
    """Where the number of tokens is that were read from a cache."""
    cost: JsonPath | None = None
    """Where the cost is, in US dollars."""
    usage: Literal["line", "session", "conversation"] = "line"
    """What tokens and cost are of: this line alone, all since the program started, or with earlier sessions of the
    conversation.
    """
    model: JsonPath | None = None
    """Where the name of the model is."""
    error: JsonPath | None = None
    """Where the message of an error is."""
    status: JsonPath | None = None
    """Where the HTTP status of an error is, which says what kind of failure it is."""
    done: bool = False
    """Whether such a line says that all is done: if any rule does, a session without such a line has failed."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_empty(cls, value: Any, info: ValidationInfo) -> Any:
        """What is stored has nothing where the file says nothing."""
        is_from_file = bool(info.context and info.context.get("from_file"))
        empty = [key for key, one in value.items() if one is None] if is_from_file and isinstance(value, dict) else []
        if empty:
            raise ValueError(f"{empty[0]} is empty: give it a value or leave it out")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        groups = () if self.match is None else re.compile(self.match).groupindex
        paths = [name for name in _FACTS if getattr(self, name) is not None]
        if not (self.facts_read or self.done):
            raise ValueError("the rule reads nothing: add a fact such as `text` or `input_tokens`, or `done: true`")
        if twice := [name for name in paths if name in groups]:
            raise ValueError(f"`{twice[0]}` is a path and a group of `match`: keep one of them")
        if self.done and self.match is None and not self.when:
            raise ValueError("each line would say that all is done: add `when` or `match` to this rule")
        if self.usage != "line" and not self.facts_read.intersection(_SPENT):
            raise ValueError("`usage` is of tokens or a cost, and the rule reads none: add `input_tokens` or the like")
        return self

    @property
    def facts_read(self) -> frozenset[str]:
        """The facts that it reads."""
        groups = () if self.match is None else re.compile(self.match).groupindex
        return frozenset(name for name in _FACTS if name in groups or getattr(self, name) is not None)

    @property
    def needs_json(self) -> bool:
        """Whether it means anything only for lines of JSON."""
        return bool(self.match is None or self.when or any(getattr(self, name) is not None for name in _FACTS))

    def describe(self) -> str:
        """Return in words which lines it is for."""
        wanted = [f"{path}: {json.dumps(value, ensure_ascii=False)}" for path, value in self.when.items()]
        return f"a line with {' and '.join([*([self.match] if self.match else []), *wanted])}"


_Facts = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class OutputReader:
    """Read lines by rules; all rules that match a line apply.

    `model` is the name of the model if no line has it; `match_failure_class` returns the failure class of a text.
    """

    rules: Sequence[OutputRule]
    is_json: bool
    model: str | None
    class_in: Callable[[str], FailureClass | None]

    def read(self, line: str) -> Sequence[SessionEvent]:
        """Return what a line means; one that no rule is for is said as it stands, unless it is JSON."""
        value = parse_object(line) if self.is_json else None
        found = [(rule, facts) for rule in self.rules if (facts := _facts(rule, line, value)) is not None]
        if value is None and not any(rule.match is not None for rule, _ in found):
            return parse_plain_line(line) if self.is_json else (AgentMessage(line),) if line.strip() else ()
        return tuple(self._events(found))

    @property
    def awaited(self) -> str | None:
        """What a session has to print to have ended well, in words; None: nothing."""
        return " or ".join(rule.describe() for rule in self.rules if rule.done) or None

    def _events(self, found: Sequence[tuple[OutputRule, _Facts]]) -> Iterator[SessionEvent]:
        texts = [text for _, facts in found for text in _texts(facts, "text")]
        failed = self._failure([facts for _, facts in found])
        is_over = failed is not None or any(rule.done for rule, _ in found)
        for _, facts in found:
            yield from (ConversationStarted(session) for session in _texts(facts, "session")[:1])
        if texts and not is_over:
            yield AgentMessage("\n".join(texts))
        for rule, facts in found:
            yield from self._spent(rule, facts)
        if is_over:
            yield FinalResult("\n".join(texts), failed)

    def _spent(self, rule: OutputRule, facts: _Facts) -> Iterator[UsageReport]:
        model = next(iter(_texts(facts, "model")), None)
        if any(facts[name] for name in _SPENT):
            sent, received, cached = (as_count(sum(map(_count, facts[name]))) for name in _SPENT[:3])
            costs = [cost for cost in map(_cost, facts["cost"]) if cost is not None]
            yield UsageReport(
                input_tokens=sent,
                output_tokens=received,
                cost=as_cost(sum(costs)) if costs else None,
                is_cumulative=rule.usage != "line",
                cached_tokens=cached,
                model=model or self.model,
                includes_resumed=rule.usage == "conversation",
            )
        elif model is not None:
            yield UsageReport(model=model)

    def _failure(self, found: Sequence[_Facts]) -> Failed | None:
        told = [one for facts in found for one in facts["error"]]
        # Of an error that has parts all are told.
        words = [json.dumps(one) if one and isinstance(one, dict) else as_text(one).strip() for one in told]
        message = ": ".join(filter(None, words))
        status = next((number for facts in found for number in map(_count, facts["status"]) if number), 0)
        by_status = failure_class_for_status(status)
        if not message and by_status is None:
            return None
        # What the file says of words goes before a status, which is often that of any wrong request.
        failure = self.class_in(message) or by_status or FailureClass.CRASHED
        return Failed(failure, one_line(message) or f"it ended with the status {status}")


def _facts(rule: OutputRule, line: str, value: Any) -> _Facts | None:
    """Return what a rule reads from a line; None if it is not for it."""
    match = None if rule.match is None else re.search(rule.match, line[:MAX_LINE_CHARS], re.IGNORECASE)
    if rule.match is not None and match is None:
        return None
    if not all(any(_is(one, wanted) for one in values_at(value, path)) for path, wanted in rule.when.items()):
        return None
    groups = {} if match is None else match.groupdict()
    paths = {name: getattr(rule, name) for name in _FACTS}
    return {
        name: [groups[name]] if groups.get(name) else [] if path is None else values_at(value, path)
        for name, path in paths.items()
    }


def _is(value: Any, wanted: Any) -> bool:
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def _texts(facts: _Facts, name: str) -> list[str]:
    return [text for text in map(as_text, facts[name]) if text.strip()]


def _count(value: Any) -> int:
    """Return a number of tokens; 0 if it is none."""
    amount = _amount(value) if isinstance(value, str) else value
    return as_count(round(as_cost(amount) or 0) if isinstance(amount, float) else amount)


def _cost(value: Any) -> float | None:
    return as_cost(_amount(value) if isinstance(value, str) else value)


def _amount(text: str) -> float | None:
    """Return a number as programs print it for people: `1,234`, `4.2k`, `$0.07`; None if it is none."""
    found = _AMOUNT.fullmatch(text.strip())
    return None if found is None else float(found[1].replace(",", "")) * _TIMES[found[2].lower()]
