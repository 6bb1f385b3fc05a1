"""What a phase can hand over: kinds, each with a schema, what it is checked for, and the values that come of it. Pure.

What those hold that come with it is said in `handoff_models`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import Any, Final

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from orchestrator.client.commands import LARGEST_HANDOFF
from orchestrator.domain.documents.json_values import canonical, flaw_of
from orchestrator.domain.workflow.violations import MOST_VIOLATIONS, Violation, fault_of, found_by
from orchestrator.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Facts:
    """What a check needs to know of the world."""

    checksums: Mapping[str, str | None] = field(default_factory=dict)
    """By path: the SHA-256 of the file in the tree that was built, in hexadecimal digits; None where there is none.

    A path that is not here was not looked at, and is not judged.
    """


@dataclass(frozen=True, slots=True)
class Checked:
    """What was handed over as its kind has it, or what is wrong with it."""

    data: dict[str, Any] | None
    """None if anything is wrong."""
    violations: Sequence[Violation] = ()
    ignored: Sequence[str] = ()
    """The keys that its kind does not know."""


Check = Callable[[dict[str, Any], Facts], Checked]
Exports = Callable[[Mapping[str, Any]], dict[str, Any]]
Paths = Callable[[Mapping[str, Any]], tuple[str, ...]]
Needs = tuple[str, ...] | None


def _no_paths(_data: Mapping[str, Any]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of handoff. Made by `model_kind` or `schema_kind`."""

    name: str
    make_schema: Callable[[], dict[str, Any]]
    check: Check
    """Judges what was handed over; never raises."""
    exports: Exports
    """Returns the values that later phases inherit, from data that passed."""
    needs: Needs = None
    """The values that a phase of this kind is given where it declares nothing; None: all."""
    paths: Paths = _no_paths
    """Returns the paths whose checksums its check wants in `Facts`."""

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
class Validator:
    """What a plugin checks beside a kind's own check."""

    kind: str
    check: Callable[[dict[str, Any], Facts], Iterable[Violation]]
    """Yields what is wrong with data that passed the kind's own check."""


Rule = Callable[[Any, Facts], Iterable[Violation]]


def _no_rule(_model: Any, _facts: Facts) -> Iterable[Violation]:
    return ()


def model_kind(
    name: str,
    model: type[BaseModel],
    *,
    rule: Rule = _no_rule,
    exports: Exports | None = None,
    needs: Needs = None,
    paths: Paths = _no_paths,
) -> Kind:
    """Return the kind of what a pydantic model takes; `rule` says what else is wrong with an instance of it.

    Without `exports` it is one value of the kind's name.
    """
    return _made(name, lambda: (model, rule), exports or _whole(name), needs, paths)


def _made(
    name: str, load: Callable[[], tuple[type[BaseModel], Rule]], exports: Exports, needs: Needs, paths: Paths
) -> Kind:
    def check(data: dict[str, Any], facts: Facts) -> Checked:
        return _guarded(name, data, lambda plain: _check_model(name, *load(), plain, facts))

    def schema() -> dict[str, Any]:
        return load()[0].model_json_schema(schema_generator=_Lean)

    return Kind(name, cache(schema), check, exports, needs, paths)


class _Lean(GenerateJsonSchema):
    # Titles say in prompts what the names of the fields say already.
    def field_title_should_be_set(self, _schema: Any) -> bool:
        return False


def schema_kind(name: str, schema: Mapping[str, Any]) -> Kind:
    """Return the kind of what a JSON Schema (Draft 2020-12) allows; RefusedError if it is no such schema.

    Nothing is fetched: it can refer to nothing but itself.
    """
    return _schema_kind(name, canonical(dict(schema)))


@lru_cache(maxsize=64)
def _schema_kind(name: str, encoded: bytes) -> Kind:
    fixed: dict[str, Any] = json.loads(encoded)
    check_schema(fixed)

    def check(data: dict[str, Any], _facts: Facts) -> Checked:
        return _guarded(name, data, lambda plain: _check_schema_data(name, fixed, plain))

    return Kind(name, lambda: fixed, check, _whole(name))


def validated(kind: Kind, validators: Mapping[str, Validator]) -> Kind:
    """Return a kind that those of the validators (by name) check, too, that are made for it."""
    mine = {name: one.check for name, one in validators.items() if one.kind == kind.name}
    if not mine:
        return kind

    def check(data: dict[str, Any], facts: Facts) -> Checked:
        checked = kind.check(data, facts)
        if checked.data is None:
            return checked
        found = list[Violation]()
        for name, one in mine.items():
            # A check must not change what it judges.
            call = partial(one, copy.deepcopy(checked.data), facts)
            found += found_by(f"{kind.name}.{name}", f"validator {name!r}", call)
        return Checked(None, _bounded(kind.name, found)) if found else checked

    return replace(kind, check=check)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse what is no JSON Schema (Draft 2020-12), or refers to what lies elsewhere."""
    from jsonschema import Draft202012Validator, SchemaError  # noqa: PLC0415  only for schemas of the user's own

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


def _whole(name: str) -> Exports:
    return lambda data: {name: dict(data)}


def _guarded(kind: str, data: Any, check: Callable[[dict[str, Any]], Checked]) -> Checked:
    """Check what is a plain JSON object within the size limit; a fault of the check itself is a violation."""
    if not isinstance(data, dict):
        what = f"it is {type(data).__name__}, no JSON object"
        return Checked(None, (Violation(f"{kind}.object", "the handoff", what, "hand over a JSON object"),))
    flaw = flaw_of(data)
    if flaw is None and len(canonical(data)) > LARGEST_HANDOFF:
        flaw = f"it is larger than {LARGEST_HANDOFF} bytes"
    if flaw is not None:
        return Checked(None, (Violation(f"{kind}.json", "the handoff", flaw, "hand over a small, plain JSON object"),))
    try:
        return check(data)
    except Exception as error:  # noqa: BLE001  what a plugin's model or a schema of the user's does wrong is told
        fault = fault_of(error)
        remedy = "mend the plugin or the schema that defines this kind"
        return Checked(None, (Violation(f"{kind}.check", f"kind {kind!r}", f"its check failed: {fault}", remedy),))


def _check_model(name: str, model: type[BaseModel], rule: Rule, data: dict[str, Any], facts: Facts) -> Checked:
    try:
        made = model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=False)
        return Checked(None, _bounded(name, [_violation(name, one) for one in details if _is_own(one, details)]))
    found = list(rule(made, facts))
    if found:
        return Checked(None, _bounded(name, found))
    known = _known_keys(model)
    return Checked(made.model_dump(mode="json"), (), tuple(key for key in data if key not in known))


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
    left = len(found) - MOST_VIOLATIONS
    if left <= 0:
        return tuple(found)
    more = Violation(f"{kind}.more", "the handoff", f"{left} more mistakes are not told", "mend these first")
    return (*found[:MOST_VIOLATIONS], more)


def _check_schema_data(name: str, schema: dict[str, Any], data: dict[str, Any]) -> Checked:
    from jsonschema import Draft202012Validator  # noqa: PLC0415  only for schemas of the user's own
    from referencing import Registry  # noqa: PLC0415  the same

    # An empty registry: what a schema refers to is in it, or nowhere.
    validator = Draft202012Validator(schema, registry=Registry())
    remedy = "write it as the schema says"
    found = [
        Violation(f"{name}.schema", _place(error.absolute_path) or "the handoff", error.message[:300], remedy)
        for error, _ in zip(validator.iter_errors(data), range(MOST_VIOLATIONS), strict=False)
    ]
    return Checked(None, sorted(found, key=lambda one: one.place)) if found else Checked(data)


def _place(path: Iterable[Any]) -> str:
    place = ""
    for part in path:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    return place


def _those_of(*keys: str) -> Exports:
    """Export these keys; those that say nothing, too, since conditions ask for them."""
    return lambda data: {key: data[key] for key in keys if key in data}


def _plan_exports(data: Mapping[str, Any]) -> dict[str, Any]:
    plan = {key: data[key] for key in ("tasks", "timeline", "resources", "summary") if key in data}
    return {"plan": plan, **_those_of("specifications", "dependencies")(data)}


#: What phases of a name need where nothing else is said.
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
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


def _ours(name: str, exports: Exports) -> Kind:
    """Return a kind whose model is loaded when it is used: most programs use none."""

    def load() -> tuple[type[BaseModel], Rule]:
        from orchestrator.domain.workflow import handoff_models as models  # noqa: PLC0415  what the docstring says

        rules: Mapping[str, Rule] = {
            "plan": models.check_plan,
            "build": models.check_build,
            "review": models.check_review,
        }
        return getattr(models, name.capitalize()), rules.get(name, _no_rule)

    def paths(data: Mapping[str, Any]) -> tuple[str, ...]:
        from orchestrator.domain.workflow.handoff_models import artifact_paths  # noqa: PLC0415  the same

        return artifact_paths(data)

    return _made(name, load, exports, NEEDS.get(name), paths if name == "build" else _no_paths)


#: What is there without a plugin. No two export a value of the same name.
KINDS: Final[Mapping[str, Kind]] = {
    name: _ours(name, exports)
    for name, exports in (
        ("scout", _those_of(*_SCOUTED)),
        ("plan", _plan_exports),
        ("build", _those_of(*_BUILT)),
        ("test", _whole("test_results")),
        ("deploy", _whole("deployment")),
        ("review", _whole("review")),
    )
}
