"""What stands between two phases of a mediated handoff: one's result, made ready for the other. Pure.

A transformation that is named, or registered for the two kinds, makes it ready; without one a default does, which
needs nothing but the result.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from orchestrator.domain.documents.json_values import find_json_error, is_empty_value
from orchestrator.domain.workflow.violations import Violation, describe_exception

#: What a transformation is: a function of a result and its analysis that returns a JSON object, at once.
Transformation = Callable[[dict[str, Any], dict[str, Any]], Any]


class Mediation(BaseModel):
    """What became of a result on its way."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    transformation: str | None = None
    """The name of the transformation; None: the default."""
    analysis: dict[str, Any]
    processed: dict[str, Any]
    """What the next phase is given in place of the result."""
    instructions: str
    """What it is told to do with that."""


def analyze(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what can be said of a result by its form: how much of what, and what it says about how to go on."""
    analysis: dict[str, Any] = {
        "amounts": {key: len(value) for key, value in data.items() if isinstance(value, list | dict) and value},
        "missing": [key for key, value in data.items() if is_empty_value(value)],
        "opportunities": data.get("opportunities") or [],
        "risks": data.get("risks") or [],
        "approach": data.get("approach"),
    }
    findings = data.get("findings")
    if isinstance(findings, list):
        severities = [str(one["severity"]) for one in findings if isinstance(one, dict) and one.get("severity")]
        analysis["severities"] = dict(sorted(Counter(severities).items()))
    return analysis


def scout_to_plan(data: dict[str, Any], analysis: dict[str, Any]) -> dict[str, Any]:
    """Return what was found as a planner wants it."""
    return {
        "requirements": data.get("requirements", []),
        "constraints": data.get("constraints", []),
        "scout_findings": data.get("scout_findings", []),
        "opportunities": analysis.get("opportunities", []),
        "risks": analysis.get("risks", []),
        "recommended_approach": analysis.get("approach"),
        "priority_order": data.get("priorities", []),
    }


#: What is there without a plugin.
TRANSFORMATIONS: Final[Mapping[str, Transformation]] = {"scout_to_plan": scout_to_plan}


def drop_empty_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without what says nothing."""
    return {key: value for key, value in data.items() if not is_empty_value(value)}


_INSTRUCTIONS: Final[Mapping[str, str]] = {
    "scout": "Look further from here; what is known need not be found again.",
    "plan": "Make a plan that meets the requirements within the constraints, in the order of the priorities.",
    "build": "Do what is planned, in the order of the dependencies, and nothing beside it.",
    "test": "Test what was built against the test cases, and say what does not hold.",
    "deploy": "Deploy the artifacts that are named, as the configuration of the environment says.",
    "review": "Judge what was done against what was asked for, and name each finding with its place.",
}


def get_instructions(to_kind: str | None, processed: Mapping[str, Any]) -> str:
    """Return what a phase of a kind is told to do with what it is given."""
    told = _INSTRUCTIONS.get(to_kind or "", "Go on from what is given.")
    return f"{told} Given: {', '.join(processed)}." if processed else told


def mediate(
    data: Mapping[str, Any],
    from_kind: str,
    to_kind: str | None,
    transformations: Mapping[str, Transformation] = TRANSFORMATIONS,
    named: str | None = None,
) -> Mediation | Violation:
    """Return a result made ready for the next phase, or why its transformation can't do that.

    `named` is the transformation that the phase names; else that of the name `FROM_to_TO`, if there is one, is taken.
    """
    analysis = analyze(data)
    name = named or (f"{from_kind}_to_{to_kind}" if f"{from_kind}_to_{to_kind}" in transformations else None)
    if name is None:
        processed = drop_empty_values(data)
    else:
        made = _transform(name, transformations.get(name), data, analysis)
        if isinstance(made, Violation):
            return made
        processed = made
    instructions = get_instructions(to_kind, processed)
    return Mediation(transformation=name, analysis=analysis, processed=processed, instructions=instructions)


def _transform(
    name: str, transformation: Transformation | None, data: Mapping[str, Any], analysis: dict[str, Any]
) -> dict[str, Any] | Violation:
    place = f"transformation {name!r}"
    if transformation is None:
        return Violation("mediation.unknown", place, "nothing registers it", "install its plugin, or name another")
    try:
        # What it does with its arguments must not change what is on record.
        made = transformation(copy.deepcopy(dict(data)), copy.deepcopy(analysis))
    except Exception as error:
        return Violation(
            "mediation.failed", place, f"it raised {describe_exception(error)}", "mend the plugin that brings it"
        )
    if inspect.iscoroutine(made):
        made.close()
        return Violation("mediation.result", place, "it is asynchronous", "register a plain function")
    if not isinstance(made, dict):
        what = f"it returned {type(made).__name__}, no JSON object"
        return Violation("mediation.result", place, what, "let it return a dict of plain JSON values")
    flaw = find_json_error(made)
    if flaw is not None:
        return Violation("mediation.result", place, f"what it returned is no plain JSON: {flaw}", "mend its plugin")
    return made
