"""Kinds of handoffs, each with a schema, a check, and exported values.

`handoff_models` has the models of the built-in kinds.
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

from orchestrator import lazy
from orchestrator.client.commands import MAX_HANDOFF_BYTES
from orchestrator.domain.documents.json_values import encode_canonical, find_json_error
from orchestrator.domain.workflow.violations import (
    MAX_VIOLATIONS,
    HandoffContext,
    Violation,
    run_check,
)
from orchestrator.errors import PluginFailed, RefusedError, plugin_code


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A handoff normalized by its kind, or its violations."""

    data: dict[str, Any] | None
    """None if there are violations."""
    violations: Sequence[Violation] = ()
    ignored: Sequence[str] = ()
    """Keys that the kind does not define."""


Check = Callable[[dict[str, Any], HandoffContext], CheckResult]
Exports = Callable[[Mapping[str, Any]], dict[str, Any]]
Paths = Callable[[Mapping[str, Any]], tuple[str, ...]]
Needs = tuple[str, ...] | None


def _no_paths(_data: Mapping[str, Any]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class HandoffKind:
    """A kind of handoff. Created by `kind_from_model` or `kind_from_schema`."""

    name: str
    make_schema: Callable[[], dict[str, Any]]
    check: Check
    """Checks a handoff; never raises."""
    exports: Exports
    """Returns the values that later phases inherit, from checked data."""
    needs: Needs = None
    """The default values for a phase of this kind; None: all."""
    paths: Paths = _no_paths
    """Returns the paths whose checksums the check needs in `HandoffContext`."""

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema (draft 2020-12) of this kind."""
        return self.make_schema()

    @property
    def required(self) -> tuple[str, ...]:
        """The required keys."""
        required = self.schema.get("required")
        return tuple(map(str, required)) if isinstance(required, list) else ()


@dataclass(frozen=True, slots=True)
class HandoffValidator:
    """An additional check of a kind, from a plugin."""

    kind: str
    check: Callable[[dict[str, Any], HandoffContext], Iterable[Violation]]
    """Yields violations of data that passed the check of the kind."""


Rule = Callable[[Any, HandoffContext], Iterable[Violation]]


def _no_rule(_model: Any, _context: HandoffContext) -> Iterable[Violation]:
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
    """Return a pydantic model's kind; `rule` yields additional violations.

    Without `exports`, it exports one value under the name of the kind.
    """
    return _make_kind(name, lambda: (model, rule), exports or _export_whole(name), needs, paths)


def _make_kind(
    name: str, load: Callable[[], tuple[type[BaseModel], Rule]], exports: Exports, needs: Needs, paths: Paths
) -> HandoffKind:
    def check(data: dict[str, Any], context: HandoffContext) -> CheckResult:
        return _check_safely(name, data, lambda plain: _check_model(name, *load(), plain, context))

    def schema() -> dict[str, Any]:
        return load()[0].model_json_schema(schema_generator=_UntitledSchema)

    return HandoffKind(name, cache(schema), check, exports, needs, paths)


class _UntitledSchema(GenerateJsonSchema):
    # Titles would repeat the field names in prompts.
    def field_title_should_be_set(self, _schema: Any) -> bool:
        return False


def kind_from_schema(name: str, schema: Mapping[str, Any]) -> HandoffKind:
    """Return a kind from a JSON Schema (draft 2020-12); raise RefusedError if invalid.

    The schema may refer only to itself: nothing is fetched.
    """
    return _schema_kind(name, encode_canonical(dict(schema)))


@lru_cache(maxsize=64)
def _schema_kind(name: str, encoded: bytes) -> HandoffKind:
    fixed: dict[str, Any] = json.loads(encoded)
    check_schema(fixed)

    def check(data: dict[str, Any], _context: HandoffContext) -> CheckResult:
        return _check_safely(name, data, lambda plain: _check_schema_data(name, fixed, plain))

    return HandoffKind(name, lambda: fixed, check, _export_whole(name))


def with_validators(kind: HandoffKind, validators: Mapping[str, HandoffValidator]) -> HandoffKind:
    """Return a kind with the additional checks of `validators`, by name."""
    checks = {name: validator.check for name, validator in validators.items() if validator.kind == kind.name}
    if not checks:
        return kind

    def check(data: dict[str, Any], context: HandoffContext) -> CheckResult:
        checked = kind.check(data, context)
        if checked.data is None:
            return checked
        violations = list[Violation]()
        for name, validate in checks.items():
            # A copy: a check must not change the data.
            call = partial(validate, copy.deepcopy(checked.data), context)
            violations += run_check(f"{kind.name}.{name}", f"validator {name!r}", call)
        return CheckResult(None, _limit(kind.name, violations)) if violations else checked

    return replace(kind, check=check)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise RefusedError for an invalid JSON Schema, or one with external references."""
    try:
        lazy.jsonschema.Draft202012Validator.check_schema(schema)
    except lazy.jsonschema.SchemaError as error:
        location = _place(error.absolute_path) or "the schema"
        remedy = "see https://json-schema.org/draft/2020-12"
        raise RefusedError(f"{location} is invalid: {error.message[:300]}", remedy) from None
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise RefusedError(f"external reference {reference[:200]!r} is not fetched", "copy its schema to `$defs`")


def _references(schema: Any) -> Iterable[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)


def _export_whole(name: str) -> Exports:
    return lambda data: {name: dict(data)}


def _check_safely(kind: str, data: Any, check: Callable[[dict[str, Any]], CheckResult]) -> CheckResult:
    """Check a plain JSON object within the size limit; a crash is a violation."""
    if not isinstance(data, dict):
        message = f"expected a JSON object, got {type(data).__name__}"
        return CheckResult(None, (Violation(f"{kind}.object", "the handoff", message, "submit a JSON object"),))
    flaw = find_json_error(data)
    if flaw is None and len(encode_canonical(data)) > MAX_HANDOFF_BYTES:
        flaw = f"larger than {MAX_HANDOFF_BYTES} bytes"
    if flaw is not None:
        return CheckResult(
            None, (Violation(f"{kind}.json", "the handoff", flaw, "submit a smaller, plain JSON object"),)
        )
    try:
        with plugin_code():
            return check(data)
    except PluginFailed as failed:
        remedy = "fix the plugin or the schema that defines this kind"
        return CheckResult(None, (Violation(f"{kind}.check", f"kind {kind!r}", f"its check failed: {failed}", remedy),))


def _check_model(
    name: str, model: type[BaseModel], rule: Rule, data: dict[str, Any], context: HandoffContext
) -> CheckResult:
    try:
        made = model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=False)
        return CheckResult(
            None, _limit(name, [_violation(name, each) for each in details if _is_primary(each, details)])
        )
    violations = list(rule(made, context))
    if violations:
        return CheckResult(None, _limit(name, violations))
    known = _known_keys(model)
    return CheckResult(made.model_dump(mode="json"), (), tuple(key for key in data if key not in known))


def _is_primary(error: ErrorDetails, errors: Sequence[ErrorDetails]) -> bool:
    """Return whether an error is not merely a consequence of another one.

    For example, a list is too short because invalid items were dropped.
    """
    location = error["loc"]
    return error["type"] != "too_short" or not any(
        other["loc"][: len(location)] == location and len(other["loc"]) > len(location) for other in errors
    )


def _known_keys(model: type[BaseModel]) -> frozenset[str]:
    known: set[str] = set()
    for name, field in model.model_fields.items():
        known.add(name)
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        known.update(choice for choice in choices if isinstance(choice, str))
    return frozenset(known)


def _violation(kind: str, error: ErrorDetails) -> Violation:
    location = _place(error["loc"]) or "the handoff"
    limits = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return Violation(f"{kind}.required", location, "missing", "add it as required by the schema")
        case "too_long" | "string_too_long":
            most = limits.get("max_length")
            return Violation(f"{kind}.size", location, f"longer than {most}", f"shorten it to at most {most}")
        case "too_short" | "string_too_short":
            return Violation(f"{kind}.empty", location, "empty", "fill it in")
        case "literal_error":
            expected = str(limits.get("expected"))
            return Violation(f"{kind}.choice", location, "not an allowed value", f"use {expected}")
        case _:
            message = error["msg"].removeprefix("Value error, ")[:300]
            return Violation(f"{kind}.form", location, message, "follow the schema")


def _limit(kind: str, violations: Sequence[Violation]) -> Sequence[Violation]:
    left = len(violations) - MAX_VIOLATIONS
    if left <= 0:
        return tuple(violations)
    more = Violation(f"{kind}.more", "the handoff", f"{left} more errors are not shown", "fix the others first")
    return (*violations[:MAX_VIOLATIONS], more)


def _check_schema_data(name: str, schema: dict[str, Any], data: dict[str, Any]) -> CheckResult:
    # An empty registry: external references are not resolved.
    validator = lazy.jsonschema.Draft202012Validator(schema, registry=lazy.referencing.Registry())
    remedy = "follow the schema"
    violations = [
        Violation(f"{name}.schema", _place(error.absolute_path) or "the handoff", error.message[:300], remedy)
        for error, _ in zip(validator.iter_errors(data), range(MAX_VIOLATIONS), strict=False)
    ]
    return (
        CheckResult(None, sorted(violations, key=lambda violation: violation.location))
        if violations
        else CheckResult(data)
    )


def _place(path: Iterable[Any]) -> str:
    location = ""
    for part in path:
        location += f"[{part}]" if isinstance(part, int) else f".{part}" if location else str(part)
    return location


def _export_keys(*keys: str) -> Exports:
    """Return a function that exports these keys, even if empty, for conditions."""
    return lambda data: {key: data[key] for key in keys if key in data}


def _plan_exports(data: Mapping[str, Any]) -> dict[str, Any]:
    plan = {key: data[key] for key in ("tasks", "timeline", "resources", "summary") if key in data}
    return {"plan": plan, **_export_keys("specifications", "dependencies")(data)}


#: The default needs of phases, by name.
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


def _models() -> Any:
    """Import and return the built-in models, which most processes do not use."""
    from orchestrator.domain.workflow import handoff_models  # noqa: PLC0415

    return handoff_models


def _builtin_kind(name: str, exports: Exports) -> HandoffKind:
    """Return a kind whose model is loaded on first use."""

    def load() -> tuple[type[BaseModel], Rule]:
        return getattr(_models(), name.capitalize()), getattr(_models(), f"check_{name}", _no_rule)

    def paths(data: Mapping[str, Any]) -> tuple[str, ...]:
        found: tuple[str, ...] = _models().find_artifact_paths(data)
        return found

    return _make_kind(name, load, exports, PHASE_NEEDS.get(name), paths if name == "build" else _no_paths)


#: The built-in kinds; their exported values have distinct names.
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
