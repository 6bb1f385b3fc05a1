"""Validate parts of a file by pydantic models, and report errors with positions."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config.source.document import UNREADABLE, Node
from orchestrator.config.source.problems import Position, Problems
from orchestrator.domain.wording import describe_value, quote_text, suggest
from orchestrator.errors import InvalidValue

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[int | str, ...]

# Remedies by pydantic error type (docs.pydantic.dev, "Validation Errors"), formatted with the error context.
_REMEDIES: Final = {
    "string_type": "use text, in quotes if it looks like another type",
    "int_type": "use a whole number, without quotes",
    "float_type": "use a number, without quotes",
    "float_parsing": "use a number, without quotes",
    "bool_type": "use true or false",
    "list_type": "use a list, such as [one, two]",
    "tuple_type": "use a list, such as [one, two]",
    "dict_type": "use a mapping of keys and values",
    "model_type": "use a mapping of keys and values",
    "literal_error": "use {expected}",
    "enum": "use {expected}",
    "greater_than": "use more than {gt}",
    "greater_than_equal": "use {ge} or more",
    "less_than": "use less than {lt}",
    "less_than_equal": "use {le} or less",
    "too_short": "use at least {min_length}",
    "too_long": "use at most {max_length}",
    "string_too_short": "use at least {min_length} characters",
    "string_too_long": "use at most {max_length} characters",
}


def validate(
    model: type[Model], node: Node, problems: Problems, *, without: Collection[str] = (), folder: Path | None = None
) -> Model | None:
    """Return `node`, except for the keys `without`, as `model`; None if invalid.

    Errors are added to `problems`. `folder` is the base of relative paths, which validators find in their context. They
    raise `InvalidValue`, and those of plugins may raise `ValueError("problem: remedy")`.
    """
    value = {key: item for key, item in node.value.items() if key not in without}
    try:
        return model.model_validate(value, context={"from_file": True, "folder": folder})
    except ValidationError as error:
        for details in error.errors(include_url=False, include_input=False):
            if details["loc"] not in {(key,) for key in without}:
                _note(details, model, node, problems)
        return None


def reject_empty_keys(node: Node | None, problems: Problems) -> None:
    """Report keys without a value, which a model would treat as missing."""
    for key, child in node.children.items() if node is not None else ():
        if child.value is None:
            problems.add(child.at, *_empty(f"{key}"))


def _note(details: ErrorDetails, model: type[BaseModel], root: Node, problems: Problems) -> None:
    location = details["loc"]
    found = _find(location, root)
    key = str(location[-1]) if location else ""
    if details["type"] == "extra_forbidden":
        known = suggest(key, _keys(model, location[:-1]), "the keys here")
        problems.add(found.key_at, f"unknown key {quote_text(key)}", known)
    elif found.node.value is UNREADABLE or _is_false_too_short(details, found.node.value):
        return
    elif details["type"] == "missing":
        problems.add(found.node.at, f"the key {key!r} is missing", f"add `{key}:` here")
    # pydantic appends this part for an error in the key itself.
    elif key == "[key]":
        name = str(location[-2])
        problem, remedy = _explain(details, name, f"the key {quote_text(name)}")
        is_unknown = details["type"] in {"enum", "literal_error"}
        problems.add(found.key_at, f"unknown key {quote_text(name)}" if is_unknown else problem, remedy)
    else:
        problems.add(found.node.at, *_explain(details, found.node.value, found.label))


def _is_false_too_short(details: ErrorDetails, value: Any) -> bool:
    """Return whether a list is too short only because pydantic ignores invalid items."""
    return details["type"] == "too_short" and len(value) >= details["ctx"]["min_length"]


class _Found(NamedTuple):
    node: Node
    label: str
    key_at: Position


def _find(location: Location, root: Node) -> _Found:
    found = _Found(root, "the file", root.at)
    for part in location:
        child = found.node.get(part)
        # A part without a node is a missing key, or pydantic's name of a union branch: both belong to this node.
        if child is not None:
            label = f"{found.label}[{part}]" if isinstance(part, int) else str(part)
            found = _Found(child, label, found.node.keys.get(str(part), child.at))
    return found


def _explain(details: ErrorDetails, value: Any, label: str) -> tuple[str, str]:
    if value is None:
        return _empty(label)
    facts = details.get("ctx", {})
    if details["type"] in {"value_error", "assertion_error"}:
        invalid = InvalidValue.of(facts["error"])
        return invalid.message, invalid.remedy
    word = _unquoted_braces(value)
    if word is not None and details["type"] == "string_type":
        return f"{label} is a mapping, because of its braces", f'quote it: "{{{word}}}"'
    remedy = _REMEDIES.get(details["type"])
    if remedy is None:
        return f"{label} is {describe_value(value)}", details["msg"]
    return f"{label} is {describe_value(value)}", remedy.format_map(facts)


def _empty(label: str) -> tuple[str, str]:
    return f"{label} is empty", "set a value, or omit the key"


def _unquoted_braces(value: Any) -> str | None:
    match value:
        case dict() if len(value) == 1 and list(value.values()) == [None]:
            return str(next(iter(value)))
        case _:
            return None


def _keys(model: type[BaseModel], location: Location) -> list[str]:
    """Return the known keys at a location in a model."""
    for part in location:
        field = model.model_fields.get(str(part))
        model = (field and _model_in(field.annotation)) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
