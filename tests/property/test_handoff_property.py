"""For any values: phase inputs, inheritance, digests, and the end of an answer."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.documents.json_values import (
    compute_digest,
    encode_canonical,
    find_json_error,
    is_empty_value,
    parse_object,
)
from orchestrator.domain.runs.phases import PHASE_TRANSITIONS, PhaseRecord, PhaseStatus, PhaseTrigger, advance_phase
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS, CheckResult, HandoffKind
from orchestrator.domain.workflow.handoffs import Handoff, acknowledge, find_last_json_block, is_intact, make_handoff
from orchestrator.domain.workflow.phase_context import get_phase_needs, select_values
from orchestrator.domain.workflow.routing import Workflow
from orchestrator.domain.workflow.violations import HandoffContext
from orchestrator.engine.phases.values import collect_phase_values
from orchestrator.engine.session_api.shared_values import SharedValues
from orchestrator.errors import InvalidTransition
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.testing.clock import ManualClock

#: Characters of one to four bytes, and those special to JSON or fences.
TEXT = st.text(st.sampled_from('aB1é€😀 \n\t`~"\\{}[]:,'), max_size=12)
NAMES = st.sampled_from(["plan", "build", "requirements", "constraints", "scout_findings", "specifications", "x", "y"])
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | FLOATS | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
CONTEXTS = st.dictionaries(NAMES, VALUES, max_size=6)


@given(CONTEXTS, st.none() | st.lists(NAMES, max_size=6))
def test_filter_returns_what_is_needed_and_reports_the_rest(values: dict[str, Any], needs: list[str] | None) -> None:
    """Inputs and omitted values are a partition of all values; sizes are reported."""
    chosen, reported = select_values(values, needs)
    assert chosen == {key: values[key] for key in chosen}
    assert set(chosen) == (set(values) if needs is None else set(values) & set(needs))
    assert reported.keys == tuple(chosen)
    assert sorted((*reported.keys, *reported.omitted)) == sorted(values)
    assert (reported.size, reported.total_size) == (len(encode_canonical(chosen)), len(encode_canonical(values)))
    assert reported.size <= reported.total_size
    assert select_values(chosen, needs)[0] == chosen


@st.composite
def workflows(draw: st.DrawFn) -> list[Phase]:
    """Draw phases with values of their own."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
    return [Phase(name=name, context=draw(CONTEXTS)) for name in names]


@given(workflows(), CONTEXTS, st.data())
def test_phase_gets_the_newest_value_of_each_name(
    phases: list[Phase], inherited: dict[str, Any], data: st.DataObject
) -> None:
    """Its own values come first, then those of later phases; an empty value replaces none."""
    done, handoffs, known = dict[str, PhaseRecord](), dict[str, tuple[int, Handoff]](), dict(inherited)
    for number, phase in enumerate(phases[:-1], 1):
        produced = data.draw(CONTEXTS)
        fields: dict[str, Any] = {
            "kind": phase.name,
            "protocol": "direct",
            "phase": phase.name,
            "time": 0.0,
            "via": "file",
        }
        handoff = make_handoff("run", "task", number, produced, **fields)
        handoffs[handoff.id] = (1, handoff)
        done[phase.name] = PhaseRecord(phase=phase.name, status=PhaseStatus.COMPLETED, handoff=handoff.id)
        known |= {key: value for key, value in produced.items() if key not in known or not is_empty_value(value)}
    clock = ManualClock()
    shared = SharedValues(MemoryStore(clock), clock, Redactor(()), "run")
    workflow = Workflow(phases)
    found = anyio.run(collect_phase_values, workflow, phases[-1], inherited, done, handoffs, plain_kind, shared)
    assert found.known == {**known, **phases[-1].context}


def plain_kind(phase: Phase) -> HandoffKind:
    """Return a kind that exports all values of a handoff."""
    return HandoffKind(phase.name, dict, lambda data, _: CheckResult(data), dict)


@given(NAMES, st.none() | st.sampled_from(sorted(HANDOFF_KINDS)), st.none() | st.lists(NAMES).map(tuple))
def test_declared_values_of_a_phase_come_first(name: str, kind: str | None, needs: tuple[str, ...] | None) -> None:
    """Then the inputs of its kind, then those of its name; otherwise everything."""
    found = get_phase_needs(Phase(name=name, needs=needs), None if kind is None else HANDOFF_KINDS[kind])
    by_name = {
        "plan": ("requirements", "constraints", "scout_findings"),
        "build": ("plan", "specifications", "dependencies"),
        "test": ("implementation", "test_cases", "coverage_requirements"),
        "deploy": ("artifacts", "configuration", "environment"),
    }
    assert found == (needs if needs is not None else by_name.get(str(kind), by_name.get(name)))


@given(st.dictionaries(TEXT, VALUES, max_size=5), st.data())
def test_digest_is_equal_for_equal_values_only(value: dict[str, Any], data: st.DataObject) -> None:
    """Key order and a round trip through the store do not matter."""
    keys = data.draw(st.permutations(list(value)))
    assert (
        compute_digest({key: value[key] for key in keys})
        == compute_digest(value)
        == compute_digest(json.loads(json.dumps(value)))
    )
    assert find_json_error(value) is None
    other = data.draw(st.dictionaries(TEXT, VALUES, max_size=5))
    assert (compute_digest(other) == compute_digest(value)) == (encode_canonical(other) == encode_canonical(value))
    handoff = make_handoff("r", "t", 1, value, kind="x", protocol="direct", phase="p", time=0.0, via="tool")
    assert is_intact(handoff)
    assert is_intact(handoff.model_copy(update={"data": other})) == (encode_canonical(other) == encode_canonical(value))


@given(st.lists(st.tuples(st.sampled_from(["build", "review"]), st.integers(1, 4)), max_size=8))
def test_each_visit_has_one_receipt(visits: list[tuple[str, int]]) -> None:
    """For any number of acknowledgements."""
    handoff = make_handoff("r", "t", 1, {}, kind="x", protocol="direct", phase="p", time=0.0, via="tool")
    for now, (phase, attempt) in enumerate(visits):
        handoff = acknowledge(handoff, phase, attempt, float(now))
    assert [(one.phase, one.attempt) for one in handoff.receipts] == list(dict.fromkeys(visits))


OBJECTS = st.dictionaries(TEXT, VALUES, max_size=4)
PROSE = st.text(st.sampled_from('aé😀 \n\t\r{}"#-'), max_size=40)


@given(OBJECTS, st.lists(st.tuples(PROSE, OBJECTS), max_size=3), PROSE, st.sampled_from(["```", "`````", "~~~"]))
def test_last_block_is_found_in_any_message(
    last: dict[str, Any], earlier: list[tuple[str, dict[str, Any]]], tail: str, fence: str
) -> None:
    """With any text before, between and after blocks."""
    blocks = [f"{text}\n```json\n{json.dumps(one)}\n```\n" for text, one in earlier]
    answer = "".join(blocks) + f"{fence}json\n{json.dumps(last, indent=1, ensure_ascii=False)}\n{fence}\n{tail}"
    assert find_last_json_block(answer).data == last


@given(st.text(st.sampled_from('`~{}[]":,a1 \n\\')))
def test_any_message_is_parsed_without_an_error(answer: str) -> None:
    """The last block, if any, is plain JSON."""
    found = find_last_json_block(answer)
    assert found.data is None or find_json_error(found.data) is None


@given(st.text(st.sampled_from('{}[]":,a1eE+-.\\ud8 ')))
def test_parsed_value_equals_the_json(text: str) -> None:
    """The strict parser accepts a subset of a lenient one, with equal results."""
    try:
        value = parse_object(text)
    except ValueError:
        return
    assert find_json_error(value) is None
    assert value == json.loads(encode_canonical(value))


@given(st.sampled_from(sorted(HANDOFF_KINDS)), st.dictionaries(st.sampled_from(
    ["tasks", "dependencies", "timeline", "resources", "findings", "verdict", "artifacts", "passed", "summary", "id",
     "scout_findings", "message", "path", "line", "checksum", "deployed", "approach", "specs"]), VALUES))  # fmt: skip
def test_any_object_is_accepted_or_named_as_invalid(name: str, data: dict[str, Any]) -> None:
    """A kind never raises; accepted content parses to itself, and exports are plain JSON."""
    kind = HANDOFF_KINDS[name]
    checked = kind.check(data, HandoffContext())
    assert (checked.data is None) == bool(checked.violations)
    assert "check" not in {one.rule.partition(".")[2] for one in checked.violations}
    if checked.data is not None:
        assert kind.check(checked.data, HandoffContext()).data == checked.data
        assert find_json_error(kind.exports(checked.data)) is None


@given(st.lists(st.sampled_from(PhaseTrigger), max_size=8))
def test_visits_follow_the_transition_table(triggers: list[PhaseTrigger]) -> None:
    """For any triggers; a missing row raises and changes nothing."""
    record: PhaseRecord | None = None
    for trigger in triggers:
        status = None if record is None else record.status
        changes = {"phase": "p"} if record is None else {}
        if (status, trigger) in PHASE_TRANSITIONS:
            record = advance_phase("p", record, trigger, **changes)
            assert record.status is PHASE_TRANSITIONS[status, trigger]
        else:
            with pytest.raises(InvalidTransition):
                advance_phase("p", record, trigger, **changes)
