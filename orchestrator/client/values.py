"""Values as they are given on a command line: in a word, in a file, or on standard input."""

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

#: What text begins with that is meant to be JSON, and not to stand for itself.
_JSON = ("{", "[", '"')


def resolve_arguments(command: SessionCommand, words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command with values in place of the words that say where these are; raises AskError."""
    found = dict(words)
    for one in command.arguments:
        if one.name in found and one.kind == VALUE:
            found[one.name] = parse_value(found[one.name])
        elif one.name in found and one.kind == OBJECT:
            found[one.name] = _object_in(found[one.name])
    return found


def parse_value(word: str) -> Any:
    """Return the value that a word stands for: JSON, or else the text itself; raises AskError."""
    data = _bytes_of(None, MAX_SHARED_BYTES) if word == STANDARD_INPUT else word.encode(errors="surrogateescape")
    try:
        return strict_json.parse(data)
    except ValueError as error:
        text = data.decode(errors="surrogateescape")
        if text.lstrip().startswith(_JSON):
            raise SessionRequestError(
                f"the value can't be taken: {error}", "give JSON, or text that looks like none"
            ) from None
        return text


def _object_in(name: str) -> dict[str, Any]:
    what = "standard input" if name == STANDARD_INPUT else name
    try:
        value = strict_json.parse(_bytes_of(None if name == STANDARD_INPUT else name, MAX_HANDOFF_BYTES))
    except OSError as error:
        raise SessionRequestError(
            f"{name} can't be read: {error.strerror}", "name a file with the JSON object"
        ) from None
    except ValueError as error:
        raise SessionRequestError(f"what is in {what} can't be taken: {error}", "write one JSON object there") from None
    if not isinstance(value, dict):
        raise SessionRequestError(f"what is in {what} is no object", "write one JSON object there")
    return value


def _bytes_of(file: str | None, most: int) -> bytes:
    """Return what is in a file, or on standard input; raises OSError, AskError for too much."""
    if file is None:
        data = sys.stdin.buffer.read(most + 1)
    else:
        with open(file, "rb") as opened:
            data = opened.read(most + 1)
    if len(data) > most:
        raise SessionRequestError(
            f"{file or 'standard input'} has more than {most} bytes", "give what others need, and no more"
        )
    return data
