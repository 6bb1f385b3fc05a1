"""Mediated handoffs: transform the result of one phase for the next phase.

The transformation is specified by the phase, or registered for the two kinds; otherwise a default applies.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from orchestrator.domain.documents.json_values import find_json_error, is_empty_value
from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.workflow.violations import Violation
from orchestrator.errors import PluginFailed, plugin_code

#: A synchronous function of a result and its analysis that returns a JSON object.
Transformation = Callable[[dict[str, Any], dict[str, Any]], Any]


class Mediation(StoredDocument):
    """A transformed result."""

    transformation: str | None = None
    """The name of the transformation; None: the default."""
    analysis: dict[str, Any]
    processed: dict[str, Any]
    """The transformed result, which the next phase gets."""
    instructions: str
    """Instructions for the next phase."""


def analyze(data: Mapping[str, Any]) -> dict[str, Any]:
    """Analyze a result: sizes, missing values, risks, opportunities and approach."""
    analysis: dict[str, Any] = {
        "amounts": {key: len(value) for key, value in data.items() if isinstance(value, list | dict) and value},
        "missing": [key for key, value in data.items() if is_empty_value(value)],
        "opportunities": data.get("opportunities") or [],
        "risks": data.get("risks") or [],
        "approach": data.get("approach"),
    }
    findings = data.get("findings")
    if isinstance(findings, list):
        severities = [str(each["severity"]) for each in findings if isinstance(each, dict) and each.get("severity")]
        analysis["severities"] = dict(sorted(Counter(severities).items()))
    return analysis


def scout_to_plan(data: dict[str, Any], analysis: dict[str, Any]) -> dict[str, Any]:
    """Transform a scout result into the input of a planner."""
    return {
        "requirements": data.get("requirements", []),
        "constraints": data.get("constraints", []),
        "scout_findings": data.get("scout_findings", []),
        "opportunities": analysis.get("opportunities", []),
        "risks": analysis.get("risks", []),
        "recommended_approach": analysis.get("approach"),
        "priority_order": data.get("priorities", []),
    }


#: The built-in transformations.
TRANSFORMATIONS: Final[Mapping[str, Transformation]] = {"scout_to_plan": scout_to_plan}


def drop_empty_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without empty values."""
    return {key: value for key, value in data.items() if not is_empty_value(value)}


_INSTRUCTIONS: Final[Mapping[str, str]] = {
    "scout": "Continue from these findings; do not repeat known ones.",
    "plan": "Make a plan that meets the requirements within the constraints, ordered by the priorities.",
    "build": "Implement the plan in the order of the dependencies, and nothing else.",
    "test": "Test the build against the test cases, and report failures.",
    "deploy": "Deploy the named artifacts with the configuration of the environment.",
    "review": "Review the work against the requirements, and give the path and line of each finding.",
}


def get_instructions(to_kind: str | None, processed: Mapping[str, Any]) -> str:
    """Return the instructions for a phase that produces `to_kind`, with input names."""
    instructions = _INSTRUCTIONS.get(to_kind or "", "Continue from the input.")
    return f"{instructions} Input: {', '.join(processed)}." if processed else instructions


def mediate(
    data: Mapping[str, Any],
    from_kind: str,
    to_kind: str | None,
    transformations: Mapping[str, Transformation] = TRANSFORMATIONS,
    named: str | None = None,
) -> Mediation | Violation:
    """Return a result transformed for the next phase, or its violation.

    `named` is the transformation that the phase specifies. Without it, `FROM_to_TO` applies if registered.
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
    location = f"transformation {name!r}"
    if transformation is None:
        return Violation(
            "mediation.unknown", location, "not registered", "install its plugin, or use another transformation"
        )
    try:
        with plugin_code():
            # Copies: a transformation must not change recorded values.
            made = transformation(copy.deepcopy(dict(data)), copy.deepcopy(analysis))
    except PluginFailed as failed:
        return Violation("mediation.failed", location, f"raised {failed}", "fix the plugin that provides it")
    if inspect.iscoroutine(made):
        made.close()
        return Violation(
            "mediation.result", location, "asynchronous functions are not supported", "register a synchronous function"
        )
    if not isinstance(made, dict):
        message = f"expected a JSON object, got {type(made).__name__}"
        return Violation("mediation.result", location, message, "return a dict of plain JSON values")
    flaw = find_json_error(made)
    if flaw is not None:
        return Violation("mediation.result", location, f"its result is not plain JSON: {flaw}", "fix its plugin")
    return made
