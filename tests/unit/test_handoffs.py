"""Handoffs between phases: records, digests, receipts, and the block at the end of an answer."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from orchestrator.client.strict_json import MAX_DEPTH
from orchestrator.domain.documents.json_values import compute_digest, encode_canonical, find_json_error, parse_object
from orchestrator.domain.workflow.handoffs import (
    MAX_SUMMARY_CHARS,
    Handoff,
    acknowledge,
    find_last_json_block,
    get_payload,
    is_intact,
    make_handoff,
)
from orchestrator.domain.workflow.mediation import Mediation, mediate
from orchestrator.domain.workflow.violations import Violation
from orchestrator.errors import HandoffCorrupted


def second_handoff(data: dict[str, Any] | None = None, **reported: Any) -> Handoff:
    """Return the handoff of the second attempt of a task."""
    facts = {"kind": "plan", "protocol": "direct", "phase": "plan", "time": 5.0, "via": "file", **reported}
    return make_handoff("run", "task", 2, data or {"tasks": [1]}, **facts)


def test_digest_is_that_of_the_canonical_text() -> None:
    """Any implementation with sorted keys and no blanks gets the same digest."""
    text = '{"a":[1,2.5,null],"b":"ä"}'
    assert encode_canonical({"b": "ä", "a": [1, 2.5, None]}) == text.encode()
    assert compute_digest({"b": "ä", "a": [1, 2.5, None]}) == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_handoff_has_its_origin_and_integrity() -> None:
    """Named by its attempt; the digest covers data and mediation; the summary is bounded."""
    handoff = second_handoff(summary="x" * 9999, to="build", tokens=7, cost=0.5)
    assert (handoff.id, handoff.to, handoff.tokens, handoff.cost) == ("run/task/2", "build", 7, 0.5)
    assert len(handoff.summary) == MAX_SUMMARY_CHARS
    assert is_intact(Handoff.model_validate_json(handoff.model_dump_json()))
    assert not is_intact(handoff.model_copy(update={"data": {"tasks": [2]}}))
    assert not is_intact(handoff.model_copy(update={"data": {"tasks": float("nan")}}))


def test_mediated_content_is_passed_on_with_a_digest() -> None:
    """Changing the mediated content breaks the digest too."""
    mediation = mediate({"requirements": ["r"]}, "scout", "plan")
    assert isinstance(mediation, Mediation)
    handoff = second_handoff({"requirements": ["r"]}, mediation=mediation)
    assert get_payload(handoff) == mediation.processed
    assert get_payload(second_handoff({"a": 1})) == {"a": 1}
    assert is_intact(Handoff.model_validate_json(handoff.model_dump_json()))
    forged = mediation.model_copy(update={"instructions": "push to the target"})
    assert not is_intact(handoff.model_copy(update={"mediation": forged}))
    assert not is_intact(handoff.model_copy(update={"mediation": None}))


def test_visit_receives_a_handoff_once() -> None:
    """Repeating a receipt changes nothing; another visit has its own."""
    once = acknowledge(second_handoff(), "build", 3, 6.0)
    assert [(one.phase, one.attempt, one.time, one.digest) for one in once.receipts] == [
        ("build", 3, 6.0, compute_digest({"tasks": [1]}))
    ]
    assert acknowledge(once, "build", 3, 7.0) == once
    assert [one.attempt for one in acknowledge(once, "build", 5, 8.0).receipts] == [3, 5]
    assert is_intact(once)


def test_modified_handoff_is_not_received() -> None:
    """The error names the handoff and the fix."""
    with pytest.raises(HandoffCorrupted, match=r"handoff run/task/2: .*digest.*council retry TASK --from"):
        acknowledge(second_handoff().model_copy(update={"data": {}}), "build", 3, 6.0)


@pytest.mark.parametrize(
    ("value", "flaw"),
    [
        ({"a": [1, "x", None, True, 1.5, {}]}, None),
        ({"a": float("inf")}, "infinite"),
        ({"a": 2**64}, "64 bits"),
        ({"a": -(2**63)}, None),
        ({"a": "\ud800"}, "U+D800"),
        ({"\udfff": 1}, "U+DFFF"),
        ({1: 2}, "a key of type int"),
        ({"a": {1, 2}}, "of type set"),
    ],
)
def test_non_json_value_is_rejected(value: Any, flaw: str | None) -> None:
    found = find_json_error(value)
    assert found is None if flaw is None else flaw in str(found)


def nested(deep: int) -> dict[str, Any]:
    """Return nested objects."""
    value: dict[str, Any] = {}
    for _ in range(deep):
        value = {"a": value}
    return value


def test_deep_nesting_is_reported_at_any_depth() -> None:
    """The limit itself is allowed; ten thousand levels are no internal error."""
    assert find_json_error(nested(MAX_DEPTH - 1)) is None
    assert "deep" in str(find_json_error(nested(MAX_DEPTH)))
    assert "deep" in str(find_json_error(nested(10_000)))
    endless: dict[str, Any] = {}
    endless["a"] = endless
    assert "deep" in str(find_json_error(endless))
    with pytest.raises(ValueError, match="deep"):
        parse_object('{"a":' * (MAX_DEPTH + 1) + "{}" + "}" * (MAX_DEPTH + 1))
    with pytest.raises(ValueError, match="deep"):
        parse_object('{"a":' * 100_000 + "{}" + "}" * 100_000)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1,}', "not valid JSON: .* at line 1"),
        ("[1]", "not an object"),
        ('"x"', "not an object"),
        ("null", "not an object"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        (f'{{"a": {"9" * 30}}}', "64 bits"),
        (f'{{"a": {"9" * 9_000}}}', "digits"),
        ("", "not valid JSON"),
    ],
)
def test_object_is_parsed_strictly(text: str, why: str) -> None:
    """Content that a lenient parser would guess at is reported as a mistake."""
    with pytest.raises(ValueError, match=why):
        parse_object(text)


ANSWERS = {
    "the last one counts": ('```json\n{"a": 1}\n```\ntext\n```json\n{"a": 2}\n```\n', {"a": 2}, 0),
    "without a word behind the fence": ('```\n{"a": 1}\n```', {"a": 1}, 0),
    "tildes, and more of them": ('~~~~~ JSON \n{"a":\n1}\n~~~~~', {"a": 1}, 0),
    "a fence in a longer fence is text": ('````json\n{"a": "\\n```\\n"}\n````', {"a": "\n```\n"}, 0),
    "an indented block of a list": ('1. so:\n   ```json\n   {"a": 1}\n   ```\n', {"a": 1}, 0),
    "lines that end as on Windows": ('```json\r\n{"a": 1}\r\n```\r\n', {"a": 1}, 0),
    "not closed": ('```json\n{"a": 1}', {"a": 1}, 0),
    "code is passed over": ('```json\n{"a": 1}\n```\n```python\nx = {}\n```', {"a": 1}, 0),
    "what is no object is passed over": ('```json\n{"a": 1}\n```\n```json\n[1]\n```', {"a": 1}, 1),
    "what says nothing may be no JSON": ('```json\n{"a": 1}\n```\n```\nmake test\n```', {"a": 1}, 1),
    "what says json and is none ends the search": ('```json\n{"a": 1}\n```\n```json\n{"a": 2,}\n```', None, 1),
    "no block": ('{"a": 1}', None, 0),
    "nothing": ("", None, 0),
    "a code span is no fence": ('```{"a": 1}``` and\n```json\n{"a": 2}\n```', {"a": 2}, 0),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_last_block_of_a_message_is_used(name: str) -> None:
    """The last object in a fence counts; a rejected one is reported with its line."""
    text, data, skipped = ANSWERS[name]
    found = find_last_json_block(text)
    assert found.data == data
    assert len(found.skipped) == skipped
    assert all(" line " in one for one in found.skipped)


SCOUTED = {"requirements": ["r"], "constraints": [], "scout_findings": ["f"], "priorities": ["p"], "risks": ["x"]}


def test_scout_is_mediated_to_a_planner() -> None:
    """The bundled transformation accepts both kinds and names the inputs of a planner."""
    done = mediate({**SCOUTED, "approach": "slowly", "opportunities": ["o"]}, "scout", "plan")
    assert isinstance(done, Mediation)
    assert done.transformation == "scout_to_plan"
    assert done.processed == {
        "requirements": ["r"],
        "constraints": [],
        "scout_findings": ["f"],
        "opportunities": ["o"],
        "risks": ["x"],
        "recommended_approach": "slowly",
        "priority_order": ["p"],
    }
    assert "requirements" in done.instructions


def test_default_mediation_is_used_without_a_transformation() -> None:
    """Empty fields are omitted, items are counted, and instructions are added."""
    data = {"findings": [{"severity": "major"}, {"severity": "info"}, {"severity": "major"}], "summary": "", "line": 0}
    done = mediate(data, "review", "build")
    assert isinstance(done, Mediation)
    assert done.transformation is None
    assert done.processed == {"findings": data["findings"], "line": 0}
    assert done.analysis["severities"] == {"info": 1, "major": 2}
    assert done.analysis["amounts"] == {"findings": 3}
    assert done.analysis["missing"] == ["summary"]
    assert done == mediate(data, "review", "build")
    other = mediate(data, "review", None)
    assert isinstance(other, Mediation)
    assert other.instructions != done.instructions


async def _late(_data: dict[str, Any], _analysis: dict[str, Any]) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (None, "mediation.unknown"),
        (lambda _data, _analysis: 1 / 0, "mediation.failed"),
        (lambda data: data, "mediation.failed"),
        (lambda _data, _analysis: ["a"], "mediation.result"),
        (lambda _data, _analysis: {"a": {1}}, "mediation.result"),
        (_late, "mediation.result"),
    ],
)
def test_failing_transformation_is_a_violation(function: Any, rule: str) -> None:
    """It is reported by its name and raises nothing."""
    done = mediate(SCOUTED, "scout", "plan", {} if function is None else {"odd": function}, "odd")
    assert isinstance(done, Violation)
    assert done.rule == rule
    assert "'odd'" in str(done)


def test_transformation_can_not_change_the_record() -> None:
    """It gets a copy."""

    def meddle(data: dict[str, Any], analysis: dict[str, Any]) -> dict[str, Any]:
        data["requirements"].append("more")
        analysis.clear()
        return data

    data = {"requirements": ["r"]}
    done = mediate(data, "a", "b", {"a_to_b": meddle})
    assert isinstance(done, Mediation)
    assert (data, done.processed) == ({"requirements": ["r"]}, {"requirements": ["r", "more"]})
    assert done.analysis["amounts"] == {"requirements": 1}
