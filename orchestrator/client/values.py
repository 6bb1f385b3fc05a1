"""Values on a command line: given as a word, in a file, or on standard input."""

from __future__ import annotations

import sys

from orchestrator.client import strict_json
from orchestrator.client.commands import (
    MAX_HANDOFF_BYTES,
    MAX_SHARED_BYTES,
    OBJECT,
    STANDARD_INPUT,
    VALUE,
    SessionCommand,
)
from orchestrator.client.session import SessionRequestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

#: Text with one of these prefixes is treated as JSON, not as a plain string.
_JSON_PREFIXES = ("{", "[", '"')


def resolve_arguments(command: SessionCommand, words: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the words of value and object arguments with their values.

    Raises SessionRequestError.
    """
    arguments = dict(words)
    for argument in command.arguments:
        if argument.name in arguments and argument.kind == VALUE:
            arguments[argument.name] = parse_value(arguments[argument.name])
        elif argument.name in arguments and argument.kind == OBJECT:
            arguments[argument.name] = _read_object(arguments[argument.name])
    return arguments


def parse_value(word: str) -> Any:
    """Return the value of a word: JSON, or else the text itself.

    Raises SessionRequestError.
    """
    data = _read_bytes(None, MAX_SHARED_BYTES) if word == STANDARD_INPUT else word.encode(errors="surrogateescape")
    try:
        return strict_json.parse(data)
    except ValueError as error:
        text = data.decode(errors="surrogateescape")
        if text.lstrip().startswith(_JSON_PREFIXES):
            raise SessionRequestError(
                f"invalid value: {error}", "use valid JSON, or text that does not look like JSON"
            ) from None
        return text


def _read_object(name: str) -> dict[str, Any]:
    source = "standard input" if name == STANDARD_INPUT else name
    remedy = "provide one JSON object"
    try:
        value = strict_json.parse(_read_bytes(None if name == STANDARD_INPUT else name, MAX_HANDOFF_BYTES))
    except OSError as error:
        raise SessionRequestError(
            f"can't read {name}: {error.strerror}", "use a file that contains the JSON object"
        ) from None
    except ValueError as error:
        raise SessionRequestError(f"invalid content of {source}: {error}", remedy) from None
    if not isinstance(value, dict):
        raise SessionRequestError(f"invalid content of {source}: not a JSON object", remedy)
    return value


def _read_bytes(file: str | None, limit: int) -> bytes:
    """Read a file or standard input.

    Raises OSError, and SessionRequestError if the input exceeds `limit`.
    """
    if file is None:
        data = sys.stdin.buffer.read(limit + 1)
    else:
        with open(file, "rb") as opened:  # noqa: PTH123  pathlib takes 10 ms
            data = opened.read(limit + 1)
    if len(data) > limit:
        raise SessionRequestError(
            f"{file or 'standard input'} exceeds the limit of {limit} bytes", "include only what other sessions need"
        )
    return data
