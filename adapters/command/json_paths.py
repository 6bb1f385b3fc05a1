"""Evaluate paths into JSON values, such as `choices.0.text` and `parts.*.text`.

A path is a list of names separated by dots. In a list a name is an index from 0; `*` matches every element.
`a.b + a.c` returns the values of both.
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
    """Return the values at a validated path, in order, without nulls."""
    return [found for part in _PLUS.split(path) for found in _at(value, part.split(".")) if found is not None]


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
    for element in inner:
        yield from _at(element, rest)


def _is_index(name: str, length: int) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10 and int(name) < length


def _check(path: str) -> str:
    for part in _PLUS.split(path):
        if not _PATH.fullmatch(part):
            remedy = "separate names with dots, as in usage.input_tokens, and two paths with ' + '"
            raise ValueError(f"{part[:_LONGEST_SHOWN]!r} is not a path into a line of JSON: {remedy}")
        if part.startswith("$"):
            raise ValueError(f"{part[:_LONGEST_SHOWN]!r} begins with '$': begin with a key of the line")
    return path


#: A validated path.
JsonPath = Annotated[str, AfterValidator(_check)]
