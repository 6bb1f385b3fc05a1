"""Strict JSON for handoffs and shared values.

Rejects input that other parsers might read differently.
"""

from __future__ import annotations

import json
from math import isfinite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

#: The maximum nesting of lists and objects.
MAX_DEPTH = 64
#: Characters that no store or file accepts: surrogates, and the terminator of C strings.
_INVALID_CHARACTERS = frozenset(["\0", *map(chr, range(0xD800, 0xE000))])


def parse(data: bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError with the reason.

    Rejects duplicate names in an object, NaN and infinities, and everything that `check_value` rejects.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    check_value(value)
    return value


def check_value(value: Any) -> None:
    """Raise ValueError if a value that `json` has parsed can't be stored unchanged."""
    level = [value]
    for depth in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if depth == MAX_DEPTH and isinstance(item, (dict, list)):
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
            if isinstance(item, dict):
                _check_text(item)
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                _check_text((item,))
            elif isinstance(item, float) and not isfinite(item):
                raise ValueError("contains a number that is infinite or NaN")
        level = inner


def _check_text(texts: Iterable[str]) -> None:
    for text in texts:
        if not text.isascii() or "\0" in text:
            invalid = _INVALID_CHARACTERS.intersection(text)
            if invalid:
                raise ValueError(f"contains the invalid character U+{ord(min(invalid)):04X}")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object contains {twice[:80]!r} twice")
    return members


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
