"""Resolve plain scalars by the core schema of YAML 1.2.

See yaml.org/spec/1.2.2, section 10.3.2.
"""

from __future__ import annotations

import math
import re
from typing import Final

from orchestrator.errors import InvalidValue

_WORDS: Final = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
# Beyond 64 bits, JSON readers interpret numbers differently, and int() rejects thousands of digits.
_LARGEST: Final = 2**63 - 1
_MOST_DIGITS: Final = 24
_NUMBER_STARTS: Final = frozenset("+-.0123456789")


def resolve_plain(text: str) -> bool | int | float | str | None:
    """Return an unquoted scalar's value; raise ValueError for an unsupported number."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMBER_STARTS:
        return text
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        return check_number(float(text))
    if _NOT_FINITE.fullmatch(text):
        return check_number(math.inf)
    return text


def check_number(number: float) -> float:
    """Return a supported number; raise ValueError for any other."""
    if not isinstance(number, int):
        if not math.isfinite(number):
            raise InvalidValue("this number is not finite", "use a finite number, or quote it if it is text")
    elif abs(number) > _LARGEST:
        raise InvalidValue("this number is too large", "use a number of at most 64 bits, or quote it if it is text")
    return number


def _integer(text: str) -> float:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return check_number(int(text, base) if len(text) <= _MOST_DIGITS else _LARGEST + 1)
