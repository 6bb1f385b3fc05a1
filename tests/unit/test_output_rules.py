"""Output rules of the file applied to lines of output."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from adapters.command.adapter import CommandAdapter
from adapters.command.json_paths import values_at
from adapters.command.options import CommandOptions
from adapters.command.output_rules import OutputRule
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import (
    AgentMessage,
    CliWarning,
    ConversationStarted,
    FinalResult,
    SessionEnd,
    SessionEvent,
    ToolCall,
    ToolResult,
    UsageReport,
)

LINE = {
    "type": "result",
    "is_error": False,
    "session_id": "s1",
    "choices": [{"text": "a", "n": 1}, {"text": "b", "n": 2}],
    "usage": {"input": 100, "cache": {"read": 20, "write": 3}, "output": 7, "none": None},
    "models": {"gpt-5.5": {"tokens": 4}, "o9": {"tokens": 5}},
}


def read(line: Any, *rules: dict[str, Any], **options: Any) -> list[SessionEvent]:
    """Return the facts of a line; values other than text are printed as JSON."""
    text = isinstance(line, str)
    options = {"argv": ["x"], "output": "text" if text else "jsonl", "read": [*rules], **options}
    adapter = CommandAdapter(CommandOptions.model_validate(options))
    return list(adapter.parse(line if text else json.dumps(line)))


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("type", ["result"]),
        ("choices.0.text", ["a"]),
        ("choices.1.text", ["b"]),
        ("choices.2.text", []),
        ("choices.-1.text", []),
        ("choices.text", []),
        ("choices.*.text", ["a", "b"]),
        ("models.*.tokens", [4, 5]),
        ("usage.cache.read", [20]),
        ("usage.input + usage.cache.read + usage.cache.write", [100, 20, 3]),
        ("usage.none", []),
        ("usage.input.deeper", []),
        ("is_error", [False]),
        ("nothing", []),
        ("choices.99999999999999999999.text", []),
        ("choices.²", []),
    ],
)
def test_path_finds_its_values(path: str, found: list[Any]) -> None:
    """Names and indexes descend, `*` iterates, `+` adds; missing and null have no value."""
    OutputRule.model_validate({"text": path})
    assert values_at(LINE, path) == found


@pytest.mark.parametrize("path", ["", ".", ".type", "usage.", "a..b", "a b", "a +", "+ a", "a+b", "$.type", "$"])
def test_invalid_path_is_rejected(path: str) -> None:
    """The error has an example of a path, or a hint where to begin."""
    with pytest.raises(ValidationError, match=r"not a path .*usage\.input_tokens|begins with '\$': begin with a key"):
        OutputRule.model_validate({"text": path})


def test_values_of_a_line_are_read() -> None:
    """From all matching rules, and from no others."""
    rules = (
        {"session": "session_id"},
        {"when": {"type": "result"}, "text": "choices.*.text", "model": "type"},
        {"when": {"type": "other"}, "text": "type"},
        {
            "when": {"type": "result", "is_error": False},
            "input_tokens": "usage.input + usage.cache.read + usage.cache.write",
            "output_tokens": "usage.output",
            "cached_tokens": "usage.cache.read",
            "cost": "choices.*.n",
        },
    )
    assert read(LINE, *rules, model="m") == [
        ConversationStarted("s1"),
        AgentMessage("a\nb"),
        UsageReport(model="result"),
        UsageReport(123, 7, 3.0, cached_tokens=20, model="m"),
    ]


@pytest.mark.parametrize(
    ("when", "fits"),
    [
        ({"type": "result"}, True),
        ({"type": "Result"}, False),
        ({"type": "result", "is_error": True}, False),
        ({"is_error": False}, True),
        ({"is_error": 0}, False),
        ({"usage.output": 7}, True),
        ({"usage.output": 7.0}, True),
        ({"usage.output": "7"}, False),
        ({"choices.*.text": "b"}, True),
        ({"nothing": "x"}, False),
    ],
)
def test_rule_applies_to_matching_lines(when: dict[str, Any], fits: bool) -> None:
    """Values must have the same type, and all conditions must match."""
    assert read(LINE, {"when": when, "session": "session_id"}) == ([ConversationStarted("s1")] if fits else [])


@pytest.mark.parametrize(
    ("usage", "spent"),
    [
        ("line", UsageReport(7)),
        ("session", UsageReport(7, is_cumulative=True)),
        ("conversation", UsageReport(7, is_cumulative=True, includes_resumed=True)),
    ],
)
def test_usage_scope_is_applied(usage: str, spent: UsageReport) -> None:
    """Per line, per session so far, or including earlier sessions; a model alone resets nothing."""
    rule = {"input_tokens": "usage.output", "model": "m", "usage": usage}
    assert read({"usage": {"output": 7}}, rule) == [spent]
    assert read({"m": "x"}, rule) == [UsageReport(model="x")]


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (12, 12),
        (12.0, 12),
        (float("inf"), 0),
        (float("nan"), 0),
        ("12", 12),
        ("1,234", 1234),
        ("4.2k", 4200),
        ("2M", 2_000_000),
        (True, 0),
        (-3, 0),
        ("many", 0),
    ],
)
def test_counts_are_parsed(given: Any, tokens: int) -> None:
    """JSON numbers and formatted numbers; other values count as zero."""
    assert read({"n": given}, {"input_tokens": "n"}) == [UsageReport(tokens)]


@pytest.mark.parametrize(
    ("given", "cost"), [(0.5, 0.5), (0, 0.0), ("$1.25", 1.25), ("free", None), (float("nan"), None)]
)
def test_costs_are_parsed(given: Any, cost: float | None) -> None:
    """US dollars with or without the sign; other values are unknown."""
    assert read({"n": given}, {"cost": "n"}) == [UsageReport(cost=cost)]


def test_text_is_read_by_named_groups() -> None:
    """A matching line yields its groups and is not printed; other lines are printed unchanged."""
    rules = (
        {"match": r"^session: (?P<session>\S+)$"},
        {"match": r"tokens: (?P<input_tokens>\S+) sent, (?P<output_tokens>\S+) received", "usage": "session"},
        {"match": r"cost: (?P<cost>\S+)"},
        {"match": r"^agent> (?P<text>.*)"},
        {"match": r"^error: (?P<error>.*)"},
        {"match": r"^all done"},
    )
    rules[-1]["done"] = True  # type: ignore[assignment]
    assert read("Session: s1", *rules) == [ConversationStarted("s1")]
    assert read("Tokens: 4.2k sent, 1,100 received. Cost: $0.07", *rules) == [
        UsageReport(4200, 1100, is_cumulative=True),
        UsageReport(cost=0.07),
    ]
    assert read("agent> Hello.", *rules) == [AgentMessage("Hello.")]
    assert read("Hello.", *rules) == [AgentMessage("Hello.")]
    assert read(" ", *rules) == []
    assert read("All done!", *rules) == [FinalResult()]
    assert read("error: it broke", *rules) == [FinalResult("", Failed(FailureClass.CRASHED, "it broke"))]


def test_text_lines_among_json_are_read() -> None:
    """They are messages unless `match` applies, or messages are read from JSON; broken JSON is dropped."""
    options: dict[str, Any] = {"output": "jsonl"}
    assert read("Welcome!", {"session": "id"}, **options) == [AgentMessage("Welcome!")]
    assert read("Welcome!", {"text": "text"}, **options) == []
    assert read("id s1", {"match": r"^id (?P<session>\S+)"}, **options) == [ConversationStarted("s1")]
    assert read('{"text": "cut o', {"text": "text"}, **options) == []
    assert read('{"id": "s1"}', {"match": '"id": "(?P<session>[^"]+)"'}, **options) == [ConversationStarted("s1")]


@pytest.mark.parametrize(
    ("line", "failure", "reason"),
    [
        ({"error": {"message": "no"}}, "crashed", "no"),
        ({"error": {"message": "no"}, "status": 429}, "rate_limited", "no"),
        ({"error": {"message": "no"}, "status": "503"}, "overloaded", "no"),
        ({"error": {"message": "credit is low"}, "status": 400}, "auth", "credit is low"),
        ({"status": 401}, "auth", "it ended with the status 401"),
        ({"status": 200}, None, ""),
        ({"error": None}, None, ""),
        ({"error": {"message": ""}}, None, ""),
        ({"error": {"message": " \n"}}, None, ""),
    ],
)
def test_errors_are_classified(line: dict[str, Any], failure: str | None, reason: str) -> None:
    """By the patterns of the file, then by status; a line without an error is none."""
    events = read(line, {"error": "error.message", "status": "status"}, failures={"auth": "credit"})
    assert events == ([FinalResult("", Failed(FailureClass(failure), reason))] if failure else [])


def test_structured_error_is_shown_completely() -> None:
    """A path to a structure yields its JSON; several paths yield all of them."""
    assert read({"e": {"code": 7}}, {"error": "e"}) == [FinalResult("", Failed(FailureClass.CRASHED, '{"code": 7}'))]
    several = read(
        {"e": {"name": "Quota", "message": "no"}}, {"error": "e.name + e.message"}, failures={"limit": "^quota"}
    )
    assert several == [FinalResult("", Failed(FailureClass.LIMIT, "Quota: no"))]


def test_error_overrides_done_on_one_line() -> None:
    """For any rule order; the text of the result is kept."""
    rules = ({"when": {"type": "result"}, "text": "text", "done": True}, {"error": "error"})
    for order in (rules, rules[::-1]):
        assert read({"type": "result", "text": "a", "error": "b"}, *order) == [
            FinalResult("a", Failed(FailureClass.CRASHED, "b"))
        ]
        assert read({"type": "result", "text": "a"}, *order) == [FinalResult("a")]


CLAUDE_LIKE: tuple[dict[str, Any], ...] = (
    {
        "when": {"type": "assistant"},
        "tool": "content.*.name",
        "call": "content.*.id",
        "path": "content.*.input.path",
        "detail": "content.*.input.cmd",
        "removed": "content.*.input.old",
        "added": "content.*.input.new",
    },
    {
        "when": {"type": "user"},
        "call": "content.*.id",
        "result": "content.*.output",
        "tool_error": "content.*.is_error",
    },
)


@pytest.mark.parametrize(
    ("type_", "content", "events"),
    [
        (
            "assistant",
            [{"name": "edit", "id": "a", "input": {"path": "a.py", "old": "x\ny", "new": "x\nz"}}],
            [ToolCall("edit", "a.py", ("a.py",), "a", " x\n-y\n+z")],
        ),
        (
            "assistant",
            [{"name": "bash", "id": "b", "input": {"cmd": "make\n test", "path": "x"}}],
            [ToolCall("bash", "make test", ("x",), "b")],
        ),
        # Values that some of several calls have can't be assigned.
        (
            "assistant",
            [{"name": "bash", "id": "b", "input": {"cmd": "make"}}, {"name": "ls", "id": "c"}],
            [ToolCall("bash", "", (), "b"), ToolCall("ls", "", (), "c")],
        ),
        ("user", [{"id": "a", "output": "done", "is_error": False}], [ToolResult("a", output="done")]),
        ("user", [{"id": "a", "output": [{"text": "x"}, {"text": "y"}]}], [ToolResult("a", output="x\ny")]),
        ("user", [{"id": "a", "output": "no\nrule", "is_error": True}], [ToolResult("a", "no rule", "no\nrule")]),
        ("user", [{"id": "a", "is_error": "denied"}], [ToolResult("a", "denied")]),
        ("user", [{"output": "x"}], []),
    ],
)
def test_tool_call_has_changes_and_result(type_: str, content: list[Any], events: list[SessionEvent]) -> None:
    assert read({"type": type_, "content": content}, *CLAUDE_LIKE) == events


def test_result_needs_its_call() -> None:
    with pytest.raises(ValidationError, match="`result` needs the id of the tool call: add `call`"):
        OutputRule.model_validate({"when": {"type": "x"}, "result": "output"})


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("^done", "like `done`"),
        (r"^\s*Cost: \$(?P<cost>[0-9.]+) message$", "like `Cost: $ … message`"),
        (r"Tokens: (?P<input_tokens>[0-9][0-9.,]*k?) sent,(?: .*,)? (?P<output_tokens>\S+) received\.(?: (a|b))?",
         "like `Tokens: … sent, … received.`"),
        (r'^\{"file"', 'like `{"file"`'),
        ("finished|ended", "like `finished`"),
        (r"(?P<text>\d+)", r"that matches `(?P<text>\d+)`"),
    ],
)  # fmt: skip
def test_pattern_is_described_by_its_words(pattern: str, words: str) -> None:
    assert OutputRule(match=pattern, done=True).describe() == f"a line {words}"


def verdict(lines: list[str], code: int | None = 0, **options: Any) -> Failed | None:
    adapter = CommandAdapter(CommandOptions.model_validate({"argv": ["x"], **options}))
    events = [event for line in lines for event in adapter.parse(line)]
    return adapter.verdict(SessionEnd(code, None, 1_000_000.0, "\n".join(lines), "", events))


def test_missing_result_is_a_failure() -> None:
    """A zero exit without it is a failure; with it, or with another failure, that counts."""
    options: dict[str, Any] = {"read": [{"match": "^done", "done": True}], "failures": {"auth": "log in"}}
    missing = Failed(FailureClass.CRASHED, "it ended without a line like `done`", unfinished=True)
    assert verdict([], **options) == missing
    assert verdict(["hello"], **options) == missing
    assert verdict(["please log in"], **options) == Failed(FailureClass.AUTH, "please log in", unfinished=True)
    assert verdict(["hello", "Done.", "bye"], **options) is None
    assert verdict(["hello"], code=1, **options) is None
    by_path: dict[str, Any] = {"output": "jsonl", "read": [{"when": {"type": "end", "ok": True}, "done": True}]}
    assert str(verdict([], **by_path)).count("""a line with type: "end" and ok: true""") == 1


def test_limit_in_an_error_has_reset_time() -> None:
    """Usual words are understood; the limit pattern searches the message even if the status has set the class."""
    options: dict[str, Any] = {"output": "jsonl", "read": [{"error": "message", "status": "status"}]}
    line = json.dumps({"message": "slow down, wait: 90", "status": 429})
    usual = json.dumps({"message": "slow down, again in 90 s", "status": 429})
    assert verdict([usual], 1, **options) == Failed(FailureClass.RATE_LIMITED, "slow down, again in 90 s", 1_000_090.0)
    assert verdict([line], 1, **options) == Failed(FailureClass.RATE_LIMITED, "slow down, wait: 90")
    reported = verdict([line], 1, failures={"rate_limited": r"wait: (?P<seconds>\d+)"}, **options)
    assert reported == Failed(FailureClass.RATE_LIMITED, "slow down, wait: 90", 1_000_090.0)


def test_repeated_request_is_not_a_failure_if_the_end_is_reported() -> None:
    """Messages before a line that marks completion matter only if the program failed."""
    options: dict[str, Any] = {"read": [{"match": "^finished$", "done": True}], "failures": {"rate_limited": "slow"}}
    lines = ["slow down, retrying", "finished"]
    assert verdict(lines, 0, **options) is None
    assert verdict(lines, 1, **options) == Failed(FailureClass.RATE_LIMITED, "slow down, retrying")


def test_tools_and_warnings_are_events() -> None:
    """Each tool has its file, or the first one has all of them."""
    options = CommandOptions.model_validate(
        {
            "argv": ["x"],
            "output": "jsonl",
            "read": [
                {"tool": "tools.*.name", "path": "tools.*.file"},
                {"warning": "warn"},
                {"cost": "cost", "estimate": True},
            ],
        }
    )
    adapter = CommandAdapter(options)
    each = json.dumps({"tools": [{"name": "read", "file": "a"}, {"name": "edit", "file": "b c"}]})
    assert adapter.parse(each) == (ToolCall("read", "a", ("a",)), ToolCall("edit", "b c", ("b c",)))
    some = json.dumps({"tools": [{"name": "run"}, {"name": "edit", "file": "b"}]})
    assert adapter.parse(some) == (ToolCall("run", "b", ("b",)), ToolCall("edit"))
    assert adapter.parse('{"warn": "it is\\nslow"}') == (CliWarning("it is slow"),)
    assert adapter.parse('{"cost": 0.5}') == (UsageReport(cost=0.5, is_estimate=True),)


def test_quoted_error_in_json_is_not_a_failure() -> None:
    """Failure patterns apply to errors and to lines that are not JSON."""
    options: dict[str, Any] = {"output": "jsonl", "read": [{"text": "text"}], "failures": {"auth": "not logged in"}}
    assert verdict(['{"text": "It says: not logged in."}'], 1, **options) is None
    assert verdict(["not logged in"], 1, **options) == Failed(FailureClass.AUTH, "not logged in")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", "4.2k", "-1", "1,0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)
NAMES = st.lists(st.sampled_from(["a", "b", "0", "*"]), min_size=1, max_size=3).map(".".join)


@given(
    st.dictionaries(st.sampled_from("abc"), VALUES),
    st.fixed_dictionaries(
        dict.fromkeys(
            ("text", "session", "input_tokens", "output_tokens", "cached_tokens", "cost", "model", "error", "status"),
            NAMES,
        )
    ),
)
def test_any_output_can_be_read(line: dict[str, Any], rule: dict[str, str]) -> None:
    """For any value the reading is deterministic, with numbers that any store accepts."""
    events = read(line, rule)
    assert events == read(line, rule)
    for event in events:
        if isinstance(event, UsageReport):
            assert min(event.input_tokens, event.output_tokens, event.cached_tokens, event.cost or 0) >= 0
            json.dumps([event.input_tokens, event.cost], allow_nan=False)


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"output": "json"}, "'text' or 'jsonl'"),
        ({"output": "jsonl"}, "add `read` with a rule"),
        ({"read": [{"text": "text"}]}, "write `output: jsonl`"),
        ({"read": [{"match": "x", "session": "id"}]}, "write `output: jsonl`"),
        ({"read": [{"match": "("}]}, "not a regular expression"),
        ({"read": [{"match": "(?P<tokens>x)"}]}, "the group 'tokens' is not a known value: use one of text, "),
        ({"read": [{"match": "x"}]}, "the rule reads nothing: add a value"),
        ({"read": [{"done": True}]}, "add `when` or `match`"),
        ({"read": [{}]}, "the rule reads nothing"),
        ({"read": {"text": "x"}}, "tuple"),
        ({"output": "jsonl", "read": [{"when": {"type": "x"}}]}, "the rule reads nothing"),
        (
            {"output": "jsonl", "read": [{"when": {"type": ["x"]}, "done": True}]},
            "expected a string, number, true or false",
        ),
        ({"output": "jsonl", "read": [{"when": {".type": "x"}, "done": True}]}, "is not a path into a line of JSON"),
        ({"output": "jsonl", "read": [{"text": "t", "usage": "session"}]}, "the rule reads none: add one"),
        (
            {"output": "jsonl", "read": [{"match": "(?P<text>x)", "text": "t"}]},
            "is a path and a group of `match`: keep",
        ),
        ({"output": "jsonl", "read": [{"texts": "t"}]}, "texts"),
    ],
)
def test_mistakes_are_explained(options: dict[str, Any], reported: str) -> None:
    """Each message says what to write."""
    with pytest.raises(ValidationError) as raised:
        CommandOptions.model_validate({"argv": ["x"], **options})
    assert reported in str(raised.value)
