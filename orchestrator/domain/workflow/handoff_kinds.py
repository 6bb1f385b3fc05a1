"""What a phase can hand over: kinds, each with a schema, what it is checked for, and the values that come of it. Pure.

What those hold that come with it is said in `handoff_models`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, Final

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from orchestrator.client.commands import MAX_HANDOFF_BYTES
from orchestrator.domain.documents.json_values import encode_canonical, find_json_error
from orchestrator.domain.workflow.violations import (
    MAX_VIOLATIONS,
    HandoffFacts,
    Violation,
    describe_exception,
    run_check,
)
from orchestrator.errors import RefusedError


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was handed over as its kind has it, or what is wrong with it."""

    data: dict[str, Any] | None
    """None if anything is wrong."""
    violations: Sequence[Violation] = ()
    ignored: Sequence[str] = ()
    """The keys that its kind does not know."""


Check = Callable[[dict[str, Any], HandoffFacts], CheckResult]
Exports = Callable[[Mapping[str, Any]], dict[str, Any]]
Paths = Callable[[Mapping[str, Any]], tuple[str, ...]]
Needs = tuple[str, ...] | None


def _no_paths(_data: Mapping[str, Any]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class HandoffKind:
    """A kind of handoff. Made by `kind_from_model` or `kind_from_schema`."""

    name: str
    make_schema: Callable[[], dict[str, Any]]
    check: Check
    """Judges what was handed over; never raises."""
    exports: Exports
    """Returns the values that later phases inherit, from data that passed."""
    needs: Needs = None
    """The values that a phase of this kind is given where it declares nothing; None: all."""
    paths: Paths = _no_paths
    """Returns the paths whose checksums its check wants in `HandoffFacts`."""

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema (Draft 2020-12) of it."""
        return self.make_schema()

    @property
    def required(self) -> tuple[str, ...]:
        """The keys that must be there."""
        required = self.schema.get("required")
        return tuple(map(str, required)) if isinstance(required, list) else ()


@dataclass(frozen=True, slots=True)
class HandoffValidator:
    """What a plugin checks beside a kind's own check."""

    kind: str
    check: Callable[[dict[str, Any], HandoffFacts], Iterable[Violation]]
    """Yields what is wrong with data that passed the kind's own check."""


Rule = Callable[[Any, HandoffFacts], Iterable[Violation]]


def _no_rule(_model: Any, _facts: HandoffFacts) -> Iterable[Violation]:
    return ()


def kind_from_model(
    name: str,
    model: type[BaseModel],
    *,
    rule: Rule = _no_rule,
    exports: Exports | None = None,
    needs: Needs = None,
    paths: Paths = _no_paths,
) -> HandoffKind:
    """Return the kind of what a pydantic model takes; `rule` says what else is wrong with an instance of it.

    Without `exports` it is one value of the kind's name.
    """
    return _make_kind(name, lambda: (model, rule), exports or _export_whole(name), needs, paths)


def _make_kind(
    name: str, load: Callable[[], tuple[type[BaseModel], Rule]], exports: Exports, needs: Needs, paths: Paths
) -> HandoffKind:
    def check(data: dict[str, Any], facts: HandoffFacts) -> CheckResult:
        return _guarded(name, data, lambda plain: _check_model(name, *load(), plain, facts))

    def schema() -> dict[str, Any]:
        return load()[0].model_json_schema(schema_generator=_Lean)

    return HandoffKind(name, cache(schema), check, exports, needs, paths)


class _Lean(GenerateJsonSchema):
    # Titles say in prompts what the names of the fields say already.
    def field_title_should_be_set(self, _schema: Any) -> bool:
        return False


def kind_from_schema(name: str, schema: Mapping[str, Any]) -> HandoffKind:
    """Return the kind of what a JSON Schema (Draft 2020-12) allows; RefusedError if it is no such schema.

    Nothing is fetched: it can refer to nothing but itself.
    """
    return _schema_kind(name, encode_canonical(dict(schema)))


@lru_cache(maxsize=64)
def _schema_kind(name: str, encoded: bytes) -> HandoffKind:
    fixed: dict[str, Any] = json.loads(encoded)
    check_schema(fixed)

    def check(data: dict[str, Any], _facts: HandoffFacts) -> CheckResult:
        return _guarded(name, data, lambda plain: _check_schema_data(name, fixed, plain))

    return HandoffKind(name, lambda: fixed, check, _export_whole(name))


def with_validators(kind: HandoffKind, validators: Mapping[str, HandoffValidator]) -> HandoffKind:
    """Return a kind that those of the validators (by name) check, too, that are made for it."""
    mine = {name: one.check for name, one in validators.items() if one.kind == kind.name}
    if not mine:
        return kind

    def check(data: dict[str, Any], facts: HandoffFacts) -> CheckResult:
        checked = kind.check(data, facts)
        if checked.data is None:
            return checked
        found = list[Violation]()
        for name, one in mine.items():
            # A check must not change what it judges.
            call = partial(one, copy.deepcopy(checked.data), facts)
            found += run_check(f"{kind.name}.{name}", f"validator {name!r}", call)
        return CheckResult(None, _bounded(kind.name, found)) if found else checked

    return replace(kind, check=check)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse what is no JSON Schema (Draft 2020-12), or refers to what lies elsewhere."""
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = _place(error.absolute_path) or "the schema"
        remedy = "see https://json-schema.org/draft/2020-12 for what can be said"
        raise RefusedError(f"{place} is wrong: {error.message[:300]}", remedy) from None
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise RefusedError(f"it refers to {reference[:200]!r}, and nothing is fetched", "put it under `$defs`")


def _references(schema: Any) -> Iterable[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for one in schema:
            yield from _references(one)


def _export_whole(name: str) -> Exports:
    return lambda data: {name: dict(data)}


def _guarded(kind: str, data: Any, check: Callable[[dict[str, Any]], CheckResult]) -> CheckResult:
    """Check what is a plain JSON object within the size limit; a fault of the check itself is a violation."""
    if not isinstance(data, dict):
        what = f"it is {type(data).__name__}, no JSON object"
        return CheckResult(None, (Violation(f"{kind}.object", "the handoff", what, "hand over a JSON object"),))
    flaw = find_json_error(data)
    if flaw is None and len(encode_canonical(data)) > MAX_HANDOFF_BYTES:
        flaw = f"it is larger than {MAX_HANDOFF_BYTES} bytes"
    if flaw is not None:
        return CheckResult(
            None, (Violation(f"{kind}.json", "the handoff", flaw, "hand over a small, plain JSON object"),)
        )
    try:
        return check(data)
    except Exception as error:
        fault = describe_exception(error)
        remedy = "mend the plugin or the schema that defines this kind"
        return CheckResult(None, (Violation(f"{kind}.check", f"kind {kind!r}", f"its check failed: {fault}", remedy),))


def _check_model(
    name: str, model: type[BaseModel], rule: Rule, data: dict[str, Any], facts: HandoffFacts
) -> CheckResult:
    try:
        made = model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=False)
        return CheckResult(None, _bounded(name, [_violation(name, one) for one in details if _is_own(one, details)]))
    found = list(rule(made, facts))
    if found:
        return CheckResult(None, _bounded(name, found))
    known = _known_keys(model)
    return CheckResult(made.model_dump(mode="json"), (), tuple(key for key in data if key not in known))


def _is_own(error: ErrorDetails, errors: Sequence[ErrorDetails]) -> bool:
    """Whether it is not only that a list is too short when what is wrong in it does not count."""
    place = error["loc"]
    return error["type"] != "too_short" or not any(
        one["loc"][: len(place)] == place and len(one["loc"]) > len(place) for one in errors
    )


def _known_keys(model: type[BaseModel]) -> frozenset[str]:
    known: set[str] = set()
    for name, one in model.model_fields.items():
        known.add(name)
        alias = one.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        known.update(choice for choice in choices if isinstance(choice, str))
    return frozenset(known)


def _violation(kind: str, error: ErrorDetails) -> Violation:
    place = _place(error["loc"]) or "the handoff"
    limits = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return Violation(f"{kind}.required", place, "it is missing", "add it as the schema says")
        case "too_long" | "string_too_long":
            most = limits.get("max_length")
            return Violation(f"{kind}.size", place, f"it is longer than {most}", f"keep it to {most} at most")
        case "too_short" | "string_too_short":
            return Violation(f"{kind}.empty", place, "it is empty", "say something")
        case "literal_error":
            expected = str(limits.get("expected"))
            return Violation(f"{kind}.choice", place, "it is none of what is possible", f"write {expected}")
        case _:
            what = error["msg"].removeprefix("Value error, ")[:300]
            return Violation(f"{kind}.form", place, what, "write it as the schema says")


def _bounded(kind: str, found: Sequence[Violation]) -> Sequence[Violation]:
    left = len(found) - MAX_VIOLATIONS
    if left <= 0:
        return tuple(found)
    more = Violation(f"{kind}.more", "the handoff", f"{left} more mistakes are not told", "mend these first")
    return (*found[:MAX_VIOLATIONS], more)


def _check_schema_data(name: str, schema: dict[str, Any], data: dict[str, Any]) -> CheckResult:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    # An empty registry: what a schema refers to is in it, or nowhere.
    validator = Draft202012Validator(schema, registry=Registry())
    remedy = "write it as the schema says"
    found = [
        Violation(f"{name}.schema", _place(error.absolute_path) or "the handoff", error.message[:300], remedy)
        for error, _ in zip(validator.iter_errors(data), range(MAX_VIOLATIONS), strict=False)
    ]
    return CheckResult(None, sorted(found, key=lambda one: one.place)) if found else CheckResult(data)


def _place(path: Iterable[Any]) -> str:
    place = ""
    for part in path:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    return place


def _export_keys(*keys: str) -> Exports:
    """Export these keys; those that say nothing, too, since conditions ask for them."""
    return lambda data: {key: data[key] for key in keys if key in data}


def _plan_exports(data: Mapping[str, Any]) -> dict[str, Any]:
    plan = {key: data[key] for key in ("tasks", "timeline", "resources", "summary") if key in data}
    return {"plan": plan, **_export_keys("specifications", "dependencies")(data)}


#: What phases of a name need where nothing else is said.
PHASE_NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "plan": ("requirements", "constraints", "scout_findings"),
    "build": ("plan", "specifications", "dependencies"),
    "test": ("implementation", "test_cases", "coverage_requirements"),
    "deploy": ("artifacts", "configuration", "environment"),
}

_SCOUTED: Final = (
    "scout_findings", "requirements", "constraints", "priorities", "risks", "opportunities", "approach",
)  # fmt: skip
_BUILT: Final = (
    "artifacts", "implementation", "test_cases", "coverage_requirements", "configuration", "environment",
)  # fmt: skip


def _builtin_kind(name: str, exports: Exports) -> HandoffKind:
    """Return a kind whose model is loaded when it is used: most programs use none."""

    def load() -> tuple[type[BaseModel], Rule]:
        from orchestrator.domain.workflow import handoff_models as models

        rules: Mapping[str, Rule] = {
            "plan": models.check_plan,
            "build": models.check_build,
            "review": models.check_review,
        }
        return getattr(models, name.capitalize()), rules.get(name, _no_rule)

    def paths(data: Mapping[str, Any]) -> tuple[str, ...]:
        from orchestrator.domain.workflow.handoff_models import find_artifact_paths

        return find_artifact_paths(data)

    return _make_kind(name, load, exports, PHASE_NEEDS.get(name), paths if name == "build" else _no_paths)


#: What is there without a plugin. No two export a value of the same name.
HANDOFF_KINDS: Final[Mapping[str, HandoffKind]] = {
    name: _builtin_kind(name, exports)
    for name, exports in (
        ("scout", _export_keys(*_SCOUTED)),
        ("plan", _plan_exports),
        ("build", _export_keys(*_BUILT)),
        ("test", _export_whole("test_results")),
        ("deploy", _export_whole("deployment")),
        ("review", _export_whole("review")),
    )
}
