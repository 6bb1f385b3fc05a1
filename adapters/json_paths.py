"""Paths into a value of JSON, as a file writes them: `usage.input_tokens`, `choices.0.text`, `parts.*.text`.

A path is names with dots between. In a list a name is a number, which counts from 0; `*` stands for each that is there.
`a.b + a.c` is what both find.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Final

from pydantic import AfterValidator

_PATH: Final = re.compile(r"[^\s.+]+(?:\.[^\s.+]+)*")
_PLUS: Final = re.compile(r"\s+\+\s+")
_LONGEST_SHOWN: Final = 60


def values_at(value: Any, path: str) -> list[Any]:
    """Return what is found at a path that was checked, in its order; nothing is no value."""
    return [found for one in _PLUS.split(path) for found in _at(value, one.split(".")) if found is not None]


def _at(value: Any, names: list[str]) -> Iterator[Any]:
    if not names:
        yield value
        return
    name, rest = names[0], names[1:]
    if isinstance(value, dict):
        inner = [*value.values()] if name == "*" else [value[name]] if name in value else []
    elif isinstance(value, list):
        inner = value if name == "*" else [value[int(name)]] if _is_index(name, len(value)) else []
    else:
        inner = []
    for one in inner:
        yield from _at(one, rest)


def _is_index(name: str, length: int) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10 and int(name) < length


def _check(path: str) -> str:
    for one in _PLUS.split(path):
        if not _PATH.fullmatch(one):
            remedy = "write names with dots between, as in usage.input_tokens, and ' + ' between two of them"
            raise ValueError(f"{one[:_LONGEST_SHOWN]!r} is no path into a line of JSON: {remedy}")
        if one.startswith("$"):
            raise ValueError(f"{one[:_LONGEST_SHOWN]!r} begins with a '$': begin with the name of a key of the line")
    return path


#: A path, checked.
JsonPath = Annotated[str, AfterValidator(_check)]
