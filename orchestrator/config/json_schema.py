"""Generate the JSON Schema (draft 2020-12) of the config file, for editors."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import SchemaSerializer, core_schema

from orchestrator.config.profiles import ProfileAdapterType
from orchestrator.config.schema import AdapterSettings, Config
from orchestrator.domain.settings.fields import TO_FILE
from orchestrator.protocols import AdapterType, JsonObject

#: The definition of the options of all profiles.
_PROFILE = "profile"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def field_docstrings(model: type) -> dict[str, str]:
    """Return the docstrings of the fields of a class by name, including inherited ones."""
    # Pydantic would extract docstrings when creating classes, which takes longer than any other part of most commands.
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not base.__module__.startswith(("builtins", "pydantic")):
            texts |= _docstrings_by_class(base.__module__).get(base.__qualname__, {})
    return texts


@cache
def _docstrings_by_class(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of the fields of each class of a module, by its qualified name."""
    return {name: dict(_documented(cls)) for name, cls in _classes(ast.parse(inspect.getsource(sys.modules[module])))}


def _classes(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            inner += f"{child.name}."
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner += f"{child.name}.<locals>."
        yield from _classes(child, inner)


def _documented(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, text in pairwise(cls.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                yield name, inspect.cleandoc(docstring)


class _Generator(GenerateJsonSchema):
    """Pydantic's generator without null: in a config file, keys are omitted instead."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        made, model = super().model_schema(schema), schema["cls"]
        for name, docstring in field_docstrings(model).items():
            if name in model.model_fields:
                made["properties"][model.model_fields[name].alias or name].setdefault("description", docstring)
        return made

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        default, made = schema.get("default"), self.generate_inner(schema["schema"])
        parts = default if isinstance(default, tuple) else [default]
        if default is None or any(isinstance(part, BaseModel) for part in parts):
            return made
        if isinstance(default, tuple | frozenset):
            default = sorted(default) if isinstance(default, frozenset) else [*default]
        elif type(default) in {int, float}:  # may have a unit in the file
            default = SchemaSerializer(schema["schema"]).to_python(default, mode="json", context=TO_FILE)
        return {**made, "default": default}

    def frozenset_schema(self, schema: core_schema.FrozenSetSchema) -> JsonSchemaValue:
        made = super().frozenset_schema(schema)
        del made["uniqueItems"]  # duplicates are allowed
        return made

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  pydantic's signature
        return False


def file_schema(adapter_types: Mapping[str, AdapterType]) -> JsonObject:
    """Return the schema of a config file with these adapter types."""
    schema = _schema_of(Config, "")
    definitions = schema["$defs"]
    entry = definitions[AdapterSettings.__name__]
    entry["properties"]["use"]["enum"] = sorted(adapter_types)
    profiles = [use for use, kind in sorted(adapter_types.items()) if isinstance(kind, ProfileAdapterType)]
    others = [use for use in sorted(adapter_types) if use not in profiles]
    conditions = [({"const": use}, use) for use in others] + ([({"enum": profiles}, _PROFILE)] if profiles else [])
    entry["allOf"] = [
        {"if": {"properties": {"use": use}, "required": ["use"]}, "then": {"$ref": f"#/$defs/use.{name}"}}
        for use, name in conditions
    ]
    del entry["required"]
    _allow_names_of_types(
        schema["properties"]["adapters"], {**dict.fromkeys(profiles, _PROFILE), **{use: use for use in others}}
    )
    for use in others:
        definitions |= _options(use, adapter_types[use].Options, entry["properties"])
    for use in profiles[:1]:
        # They differ only in their defaults.
        definitions |= _options(_PROFILE, adapter_types[use].Options, entry["properties"])
        schema_of_profiles = definitions[f"use.{_PROFILE}"]
        schema_of_profiles["description"] = "Options of an adapter with `use: NAME`, where NAME is a profile."
        for made in schema_of_profiles["properties"].values():
            if isinstance(made, dict):
                made.pop("default", None)
    return {"$schema": DIALECT, **schema}


def _allow_names_of_types(section: JsonObject, types: Mapping[str, str]) -> None:
    """Require `use` only of entries that are not named after a type; `types` has the definition of each."""
    (pattern, entry), *_ = section["patternProperties"].items()
    names = "|".join(map(re.escape, sorted(types)))
    section["patternProperties"] = {f"^(?!(?:{names})$){pattern.removeprefix('^')}": {**entry, "required": ["use"]}}
    section["properties"] = {
        use: {**entry, "if": {"not": {"required": ["use"]}}, "then": {"$ref": f"#/$defs/use.{name}"}}
        for use, name in sorted(types.items())
    }


def _options(use: str, options: type[BaseModel], common: Mapping[str, Any]) -> Iterator[tuple[str, JsonObject]]:
    """Yield the definitions for a type's options and the common adapter keys."""
    schema = _schema_of(options, f"use.{use}.")
    yield from ((f"use.{use}.{name}", definition) for name, definition in schema.pop("$defs", {}).items())
    schema["properties"] = {**dict.fromkeys(common, True), **schema.get("properties", {})}
    yield f"use.{use}", schema


def _schema_of(model: type[BaseModel], prefix: str) -> JsonObject:
    return model.model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}", schema_generator=_Generator)
