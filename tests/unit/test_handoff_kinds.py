"""Handoff kinds: accepted content, violations, and derived values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from orchestrator.domain.workflow import handoff_models
from orchestrator.domain.workflow.handoff_kinds import (
    HANDOFF_KINDS,
    PHASE_NEEDS,
    HandoffValidator,
    kind_from_model,
    kind_from_schema,
    with_validators,
)
from orchestrator.domain.workflow.violations import MAX_VIOLATIONS, HandoffContext, Violation
from orchestrator.errors import RefusedError

SUM = "0123456789abcdef" * 4
PLAN = {"tasks": [{"id": "a", "prompt": "do it"}], "dependencies": [], "timeline": [], "resources": []}


def parsed(kind: str, data: dict[str, Any], facts: HandoffContext | None = None) -> dict[str, Any]:
    """Return the parsed content of a handoff."""
    checked = HANDOFF_KINDS[kind].check(data, facts or HandoffContext())
    assert checked.data is not None, [str(one) for one in checked.violations]
    return checked.data


def violations_of(kind: str, data: Any, facts: HandoffContext | None = None) -> list[tuple[str, str]]:
    """Return the rules and positions of the violations of a handoff."""
    checked = HANDOFF_KINDS[kind].check(data, facts or HandoffContext())
    assert checked.data is None
    assert all(one.message and one.remedy for one in checked.violations)
    return [(one.rule, one.location) for one in checked.violations]


#: By kind: input, and the expected subset of the parsed content.
LIBERAL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("scout", {"findings": "one file"}, {"scout_findings": ["one file"], "requirements": [], "approach": ""}),
    ("scout", {"observations": [{"file": "a.py"}, 3, None]}, {"scout_findings": [{"file": "a.py"}, "3"]}),
    (
        "scout",
        {"scout_findings": [], "priority_order": ["p"], "recommended_approach": ["one", "two"]},
        {"priorities": ["p"], "approach": "one\ntwo", "scout_findings": []},
    ),
    ("plan", {**PLAN, "timeline": None, "resources": "pip"}, {"timeline": [], "resources": ["pip"]}),
    ("plan", {**PLAN, "schedule": {"day 1": "a"}} | {"timeline": {"x": 1}}, {"timeline": {"x": 1}}),
    (
        "plan",
        {**PLAN, "tasks": ["first", "second"]},
        {
            "tasks": [
                {"id": "t1", "prompt": "first", "dependencies": [], "owns": []},
                {"id": "t2", "prompt": "second", "dependencies": [], "owns": []},
            ]
        },
    ),
    (
        "plan",
        {**PLAN, "tasks": {"a": "first", "b": {"description": "second", "depends_on": "a", "files": "x.py, y.py"}}},
        {
            "tasks": [
                {"id": "a", "prompt": "first", "dependencies": [], "owns": []},
                {"id": "b", "prompt": "second", "dependencies": ["a"], "owns": ["x.py", "y.py"]},
            ]
        },
    ),
    (
        "plan",
        {
            **PLAN,
            "tasks": [{"id": 1, "title": "x"}, {"id": 2, "task": "y", "needs": [{"id": 1}], "depends_on": "none"}],
        },
        {
            "tasks": [
                {"id": "1", "prompt": "x", "dependencies": [], "owns": []},
                {"id": "2", "prompt": "y", "dependencies": [], "owns": []},
            ]
        },
    ),
    ("build", {"artifacts": {"./a/b": f"SHA256:{SUM.upper()}"}}, {"artifacts": [{"path": "a/b", "checksum": SUM}]}),
    ("build", {"artifacts": {"path": "a", "sha256": SUM}}, {"artifacts": [{"path": "a", "checksum": SUM}]}),
    (
        "build",
        {"files": None, "changes": "x", "tests": ["t"]},
        {"artifacts": [], "implementation": ["x"], "test_cases": ["t"]},
    ),
    ("test", {"status": "Passed", "coverage": 91.5}, {"passed": True, "coverage": "91.5"}),
    ("test", {"success": False, "errors": "boom"}, {"passed": False, "failures": ["boom"]}),
    ("deploy", {"status": "rolled_back", "env": "staging"}, {"deployed": False, "environment": "staging"}),
    ("review", {"decision": "LGTM"}, {"verdict": "approve", "findings": []}),
    ("review", {"approved": True}, {"verdict": "approve"}),
    (
        "review",
        {
            "verdict": "Request changes",
            "issues": ["bad", {"file": "a", "line": "L12-15", "severity": "High", "comment": "c"}],
        },
        {
            "verdict": "reject",
            "findings": [
                {"path": None, "line": None, "severity": "major", "message": "bad"},
                {"path": "a", "line": 12, "severity": "major", "message": "c"},
            ],
        },
    ),
    (
        "review",
        {"verdict": "reject", "findings": {"message": "m", "line": 0, "severity": "P1"}},
        {"findings": [{"path": None, "line": None, "severity": "major", "message": "m"}]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data", "expected"), LIBERAL)
def test_valid_content_is_accepted(kind: str, data: dict[str, Any], expected: dict[str, Any]) -> None:
    """Alternative spellings, single values for lists, mappings for lists; parsed content parses to itself."""
    made = parsed(kind, data)
    assert {key: made[key] for key in expected} == expected
    assert parsed(kind, made) == made
    Draft202012Validator(HANDOFF_KINDS[kind].schema).validate(
        {key: one for key, one in made.items() if key != "findings"}
    )


WRONG: list[tuple[str, Any, list[tuple[str, str]]]] = [
    ("scout", {}, [("scout.required", "scout_findings")]),
    ("plan", {"tasks": []}, [
        ("plan.empty", "tasks"), ("plan.required", "dependencies"), ("plan.required", "timeline"),
        ("plan.required", "resources"),
    ]),
    ("plan", {**PLAN, "tasks": [{"prompt": "x"}, {"id": "b"}, 3]}, [
        ("plan.required", "tasks[0].id"), ("plan.required", "tasks[1].prompt"), ("plan.form", "tasks[2]"),
    ]),
    ("plan", {**PLAN, "tasks": [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}]}, [
        ("plan.ids", "tasks[1].id"),
    ]),
    ("plan", {**PLAN, "tasks": [{"id": "a", "prompt": "x", "needs": ["b"]}]}, [
        ("plan.dependencies", "tasks[0].dependencies[0]"),
    ]),
    ("plan", {**PLAN, "dependencies": {"a": ["requests"]}}, [("plan.dependencies", "dependencies.a")]),
    ("plan", {**PLAN, "tasks": [{"id": "a", "prompt": "x", "needs": "a"}]}, [("plan.circle", "tasks")]),
    ("plan", {**PLAN, "tasks": ["x", "y"], "dependencies": {"t1": "t2", "t2": ["t1"]}}, [("plan.circle", "tasks")]),
    ("plan", {**PLAN, "resources": ["x"] * 501}, [("plan.form", "resources")]),
    ("plan", {**PLAN, "tasks": ["x"] * 201}, [("plan.size", "tasks")]),
    ("build", {}, [("build.required", "artifacts")]),
    ("build", {"artifacts": ["a.py"]}, [("build.form", "artifacts[0]")]),
    ("build", {"artifacts": [{"path": "a"}]}, [("build.required", "artifacts[0].checksum")]),
    ("build", {"artifacts": {"a": "abc"}}, [("build.form", "artifacts[0].checksum")]),
    ("build", {"artifacts": {"../a": SUM, "/b": SUM, "c//d": SUM}}, [
        ("build.path", f"artifacts[{place}].path") for place in range(3)
    ]),
    ("review", {"verdict": "perhaps"}, [("review.choice", "verdict")]),
    ("review", {"verdict": "reject"}, [("review.findings", "findings")]),
    ("review", {"verdict": "reject", "findings": [{"path": "a", "message": ""}]}, [
        ("review.empty", "findings[0].message"),
    ]),
    ("test", {"passed": "maybe"}, [("test.form", "passed")]),
    ("scout", ["x"], [("scout.object", "the handoff")]),
    ("scout", {"findings": float("nan")}, [("scout.json", "the handoff")]),
    ("scout", {"findings": "x" * 1_100_000}, [("scout.json", "the handoff")]),
    ("scout", {"findings": "x" * 20_001}, [("scout.form", "findings")]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data", "expected"), WRONG)
def test_invalid_content_has_its_position(kind: str, data: Any, expected: list[tuple[str, str]]) -> None:
    """Each violation has a rule, a position and a remedy; all are reported at once."""
    assert violations_of(kind, data) == expected


def test_reported_mistakes_are_limited() -> None:
    """A repair prompt must not be longer than the work."""
    found = violations_of("build", {"artifacts": [{"path": "a"}] * 100})
    assert len(found) == MAX_VIOLATIONS + 1
    assert found[-1] == ("build.more", "the handoff")


@pytest.mark.parametrize(
    ("checksums", "expected"),
    [
        ({"a": SUM}, []),
        ({"a": f"sha256:{SUM}"}, []),
        ({}, []),
        ({"a": None}, [("build.artifacts", "artifacts[0].path")]),
        ({"a": "f" * 64}, [("build.checksum", "artifacts[0].checksum")]),
    ],
)
def test_artifacts_match_the_tree(checksums: dict[str, str | None], expected: list[tuple[str, str]]) -> None:
    """Missing and wrong artifacts are named; unchecked ones pass."""
    data, facts = {"artifacts": {"a": SUM}}, HandoffContext(checksums)
    assert (
        violations_of("build", data, facts) if expected else [] if parsed("build", data, facts) else None
    ) == expected
    assert HANDOFF_KINDS["build"].paths({"artifacts": {"./a": SUM, "../b": SUM}}) == ("a",)
    assert (
        HANDOFF_KINDS["build"].paths({"artifacts": 3}) == HANDOFF_KINDS["scout"].paths({"artifacts": {"a": SUM}}) == ()
    )


def test_unknown_fields_are_dropped_and_reported() -> None:
    checked = HANDOFF_KINDS["scout"].check({"findings": [], "mood": "good"}, HandoffContext())
    assert checked.ignored == ("mood",)
    assert checked.data is not None
    assert "mood" not in checked.data


def test_needs_of_a_planned_task_are_read() -> None:
    """From the task and from the plan, without duplicates; invalid tasks are ignored."""
    data = {
        **PLAN,
        "tasks": [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y", "needs": "a"}, {"id": "c", "prompt": "z"}],
    }
    plan = handoff_models.Plan.model_validate({**data, "dependencies": {"b": ["a"], "c": "a, b"}})
    assert handoff_models.collect_needs(plan) == {"a": (), "b": ("a",), "c": ("a", "b")}


EXPORTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scout": (
        {"findings": ["f"], "constraints": ["c"], "summary": "s"},
        {
            **{key: [] for key in ("requirements", "priorities", "risks", "opportunities")},
            "scout_findings": ["f"],
            "constraints": ["c"],
            "approach": "",
        },
    ),
    "plan": (
        {**PLAN, "specs": ["s"], "dependencies": {"x": "y"}, "summary": "so"},
        {
            "plan": {
                "tasks": [{"id": "a", "prompt": "do it", "dependencies": [], "owns": []}],
                "timeline": [],
                "resources": [],
                "summary": "so",
            },
            "specifications": ["s"],
            "dependencies": {"x": "y"},
        },
    ),
    "build": (
        {"artifacts": {"a": SUM}, "config": ["k"]},
        {
            **{key: [] for key in ("implementation", "test_cases", "coverage_requirements", "environment")},
            "artifacts": [{"path": "a", "checksum": SUM}],
            "configuration": ["k"],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPORTED)
def test_later_phases_inherit_values(kind: str) -> None:
    """By the names that phases need, empty values included, since conditions use them."""
    data, expected = EXPORTED[kind]
    assert HANDOFF_KINDS[kind].exports(parsed(kind, data)) == expected


def test_exports_are_unique_and_requirements_met() -> None:
    """Each input of a phase is exported by exactly one kind."""
    text = ["x"]
    full: dict[str, dict[str, Any]] = {
        "scout": dict.fromkeys(handoff_models.Scout.model_fields, text),
        "plan": {**PLAN, "specifications": text, "dependencies": text},
        "build": {**dict.fromkeys(handoff_models.Build.model_fields, text), "artifacts": {"a": SUM}},
        "test": {"passed": True},
        "deploy": {"deployed": True},
        "review": {"verdict": "approve"},
    }
    exported = {name: set(HANDOFF_KINDS[name].exports(parsed(name, data))) for name, data in full.items()}
    assert exported.keys() == HANDOFF_KINDS.keys()
    assert all(not one & other for one, other in itertools.combinations(exported.values(), 2))
    assert {need for needs in PHASE_NEEDS.values() for need in needs} <= set().union(*exported.values())
    assert {name: kind.required for name, kind in HANDOFF_KINDS.items()} == {
        "scout": ("scout_findings",),
        "plan": ("tasks", "dependencies", "timeline", "resources"),
        "build": ("artifacts",),
        "test": ("passed",),
        "deploy": ("deployed",),
        "review": ("verdict",),
    }


@pytest.mark.parametrize("kind", HANDOFF_KINDS.values(), ids=HANDOFF_KINDS)
def test_each_schema_is_valid(kind: Any) -> None:
    Draft202012Validator.check_schema(kind.schema)
    assert not Draft202012Validator(kind.schema).is_valid({})
    assert len(str(kind.schema)) < 2500


RISK = {
    "type": "object",
    "required": ["risks"],
    "properties": {"risks": {"type": "array", "items": {"$ref": "#/$defs/risk"}}},
    "$defs": {"risk": {"type": "object", "required": ["name"], "properties": {"level": {"enum": [1, 2, 3]}}}},
}


def test_kind_of_the_user_is_accepted() -> None:
    """Its schema validates the content, which becomes one value with the name of the kind."""
    kind = kind_from_schema("risk", RISK)
    good = kind.check({"risks": [{"name": "x", "level": 2}], "more": 1}, HandoffContext())
    assert good.data == {"risks": [{"name": "x", "level": 2}], "more": 1}
    assert kind.exports(good.data) == {"risk": good.data}
    assert kind.required == ("risks",)
    bad = kind.check({"risks": [{"level": 9}]}, HandoffContext())
    assert [(one.rule, one.location) for one in bad.violations] == [
        ("risk.schema", "risks[0]"),
        ("risk.schema", "risks[0].level"),
    ]
    assert kind.check({}, HandoffContext()).violations[0].location == "the handoff"


@pytest.mark.parametrize(
    ("schema", "fragment"),
    [
        ({"type": "objekt"}, "type"),
        ({"properties": {"a": {"minimum": "3"}}}, "properties.a.minimum"),
        ({"properties": {"a": {"$ref": "https://example.org/schema.json"}}}, "is not fetched"),
        ({"items": [{"$dynamicRef": "other.json#x"}], "$defs": {}}, "items"),
    ],
)
def test_unsupported_schema_is_rejected(schema: dict[str, Any], fragment: str) -> None:
    """Nothing is fetched; a mistake in a schema is a config mistake."""
    with pytest.raises(RefusedError, match=fragment):
        kind_from_schema("risk", schema)


@pytest.mark.parametrize("schema", [{"$ref": "#/$defs/gone"}, {"allOf": [{"$ref": "#"}]}])
def test_unresolvable_schema_is_a_violation(schema: dict[str, Any]) -> None:
    """A missing or endless reference fails the phase, not the run."""
    checked = kind_from_schema("odd", schema).check({"a": 1}, HandoffContext())
    assert [one.rule for one in checked.violations] == ["odd.check"]


class Estimate(BaseModel):
    """A plugin's handoff model."""

    days: int


def test_kind_of_a_plugin_is_accepted() -> None:
    """A pydantic model is a kind; an error in its own code is a violation."""

    def too_long(estimate: Estimate, _context: HandoffContext) -> list[Violation]:
        return [Violation("estimate.long", "days", "too long", "shorten it")] if 10 // estimate.days < 1 else []

    kind = kind_from_model("estimate", Estimate, rule=too_long, needs=("plan",))
    assert kind.check({"days": "3"}, HandoffContext()).data == {"days": 3}
    assert [one.rule for one in kind.check({"days": 11}, HandoffContext()).violations] == ["estimate.long"]
    assert [one.rule for one in kind.check({"days": "x"}, HandoffContext()).violations] == ["estimate.form"]
    fault = kind.check({"days": 0}, HandoffContext()).violations
    assert "ZeroDivisionError" in str(fault[0])


def test_validators_of_plugins_run() -> None:
    """They see valid content and cannot change it; a failing one is named and hides no other."""

    def meddling(data: dict[str, Any], _context: HandoffContext) -> list[Violation]:
        data.clear()
        return []

    def never(_data: dict[str, Any], _context: HandoffContext) -> list[Violation]:
        raise AssertionError("it is for another kind")

    found = Violation("mine", "tasks", "no estimate", "add one")
    good = with_validators(
        HANDOFF_KINDS["plan"], {"m": HandoffValidator("plan", meddling), "n": HandoffValidator("build", never)}
    )
    assert good.check(PLAN, HandoffContext()).data == parsed("plan", PLAN)
    bad = with_validators(
        HANDOFF_KINDS["plan"],
        {
            "broken": HandoffValidator("plan", lambda data, _facts: data["gone"]),
            "strange": HandoffValidator("plan", lambda _data, _facts: ["x"]),  # type: ignore[list-item]
            "right": HandoffValidator("plan", lambda _data, _facts: [found]),
        },
    )
    checked = bad.check(PLAN, HandoffContext())
    assert checked.data is None
    assert [one.rule for one in checked.violations] == ["plan.broken", "plan.strange", "mine"]
    assert [one.rule for one in bad.check({}, HandoffContext()).violations].count("plan.required") == 4
    assert with_validators(HANDOFF_KINDS["plan"], {}) is HANDOFF_KINDS["plan"]
