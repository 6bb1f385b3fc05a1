"""JSON that means one thing only: what agents hand over is read by no looser rule than it is passed on."""

from __future__ import annotations

import json
from math import isfinite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

#: How many lists and objects may be inside of each other.
MAX_DEPTH = 64
#: What text holds that no store and no file takes: half of a pair, and the end of a C string.
_ODD = frozenset(["\0", *map(chr, range(0xD800, 0xE000))])


def parse(data: bytes) -> Any:
    """Return the value that JSON in UTF-8 stands for; ValueError says why it stands for none.

    It has no name twice in one object, no number that is none, and nothing that `check` refuses.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 from byte {error.start} on") from None
    try:
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    check_value(value)
    return value


def check_value(value: Any) -> None:
    """Raise ValueError where a value, as `json` reads it, can't be passed on as it is."""
    level = [value]
    for depth in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if depth == MAX_DEPTH and isinstance(one, (dict, list)):
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            if isinstance(one, dict):
                _check_text(one)
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str):
                _check_text((one,))
            elif isinstance(one, float) and not isfinite(one):
                raise ValueError("it has a number that is infinite or none")
        level = inner


def _check_text(texts: Iterable[str]) -> None:
    for text in texts:
        if not text.isascii() or "\0" in text:
            found = _ODD.intersection(text)
            if found:
                raise ValueError(f"it has the character U+{ord(min(found)):04X}, which is no text")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice[:80]!r} twice")
    return members


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
