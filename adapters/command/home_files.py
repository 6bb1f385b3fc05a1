"""The files of a session's home, as configured in YAML.

files:
  .some-cli/config.json: {model: "{model}", telemetry: false}    # or text
settings:
  .some-cli/settings.json: {updates: false}                      # in addition to the user's own settings
links: [.some-cli/skills]
logins: [.some-cli/login.json]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, WithJsonSchema

from adapters.command.placeholders import check_placeholders, fill_placeholders, placeholder_names
from orchestrator.protocols import JsonObject

#: The placeholders in files and variables.
FILE_PLACEHOLDERS: Final = ("worktree", "task", "run", "attempt", "home", "model")
_OMITTED: Final = object()


def _check_path(path: str) -> str:
    pure = PurePosixPath(path)
    if path != str(pure) or not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"{path[:60]!r} is not a path in the home: write one such as .some-cli/config.json")
    return path


def check_text(text: str) -> str:
    """Return a text with placeholders. Raises ValueError if one is unknown."""
    return check_placeholders(text, FILE_PLACEHOLDERS) if text else text


def _check_content(content: Any) -> Any:
    match content:
        case str():
            check_text(content)
        case dict():
            _check_values(content)
        case _:
            raise ValueError("a file has text, or a mapping that is written as JSON: write one of them")
    return content


def _check_values(value: Any) -> None:
    match value:
        case str():
            check_text(value)
        case dict():
            for inner in value.values():
                _check_values(inner)
        case list():
            for inner in value:
                _check_values(inner)


#: A path relative to the home.
HomePath = Annotated[str, AfterValidator(_check_path)]
HomePaths = Annotated[tuple[HomePath, ...], Field(strict=False)]
#: Text, or a mapping that is written as JSON, with placeholders.
FileContent = Annotated[
    Any, AfterValidator(_check_content), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
]
JsonSettings = dict[str, Any]


def file_text(content: str | JsonObject, values: Mapping[str, str]) -> str:
    """Return the text of a file; entries that need a missing model are omitted."""
    if isinstance(content, str):
        return fill_placeholders([content], values)[0]
    return json.dumps(fill_json(content, values), indent=2) + "\n"


def fill_json(value: Any, values: Mapping[str, str]) -> Any:
    """Return a JSON value with filled placeholders, without entries that need a missing model."""
    filled = _fill(value, values)
    return None if filled is _OMITTED else filled


def _fill(value: Any, values: Mapping[str, str]) -> Any:
    match value:
        case str():
            is_missing = "model" in placeholder_names([value]) and not values["model"]
            return _OMITTED if is_missing else fill_placeholders([value], values)[0]
        case dict():
            entries = {key: _fill(inner, values) for key, inner in value.items()}
            return {key: inner for key, inner in entries.items() if inner is not _OMITTED}
        case list():
            return [inner for inner in (_fill(one, values) for one in value) if inner is not _OMITTED]
    return value
