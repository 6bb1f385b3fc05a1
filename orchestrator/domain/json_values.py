"""Plain JSON: one way to write it down, so that a digest says whether it is the same; what is no such value. Pure."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Final

#: How deep objects and lists may lie in each other.
DEEPEST: Final = 32
#: Bytes of what is read as one object.
LARGEST: Final = 1024 * 1024

_INTEGERS: Final = range(-(2**63), 2**64)


def canonical(value: Any) -> bytes:
    """Return plain JSON as bytes, the same for equal values; ValueError where it is none."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_of(value: Any) -> str:
    """Return the digest of plain JSON as `sha256:` and 64 digits; ValueError where it is none."""
    return f"sha256:{hashlib.sha256(canonical(value)).hexdigest()}"


def flaw_of(value: Any) -> str | None:
    """Return why something is no plain JSON that the store takes; None if it is."""
    level, deep = [value], 0
    while level:
        if deep > DEEPEST:
            return f"it is nested more than {DEEPEST} deep"
        below: list[Any] = []
        for one in level:
            flaw = _flaw_of_one(one)
            if flaw is not None:
                return flaw
            if isinstance(one, dict):
                below += [*one, *one.values()]
            elif isinstance(one, list | tuple):
                below += one
        level, deep = below, deep + 1
    return None


def _flaw_of_one(value: Any) -> str | None:
    match value:
        case None | bool():
            return None
        case str():
            return "it has half a character" if _is_broken(value) else None
        case int():
            return None if value in _INTEGERS else "it has an integer of more than 64 bits"
        case float():
            return None if math.isfinite(value) else "it has a number that is not finite"
        case list() | tuple():
            return None
        case dict():
            strange = next((key for key in value if not isinstance(key, str)), None)
            return None if strange is None else f"it has a key that is a {type(strange).__name__}"
        case _:
            return f"it has a {type(value).__name__}"


def _is_broken(text: str) -> bool:
    return any("\ud800" <= one <= "\udfff" for one in text) if not text.isascii() else False


def mended(value: Any) -> Any:
    """Return parsed JSON with whole characters only: programs that cut text in two leave half of one."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _is_broken(value) else value
    if isinstance(value, list):
        return [mended(one) for one in value]
    if isinstance(value, dict):
        return {mended(key): mended(one) for key, one in value.items()}
    return value


def read_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text is; ValueError with the reason where it is none, or not to be trusted.

    A key that is there twice, or a number that JSON does not have, is a mistake and not a matter of taste.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes")
    try:
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_refused)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is {_named(value)}, not an object")  # noqa: TRY004  what is read is wrong, not a type
    # Before anything walks it by recursion.
    flaw = _depth_flaw(value)
    if flaw is not None:
        raise ValueError(flaw)
    value = mended(value)
    flaw = flaw_of(value)
    if flaw is not None:
        raise ValueError(flaw)
    read: dict[str, Any] = value
    return read


def _depth_flaw(value: Any) -> str | None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [below for one in level for below in _below(one)]
        if not level:
            return None
    return f"it is nested more than {DEEPEST} deep"


def _below(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return members


def _refused(constant: str) -> Any:
    raise ValueError(f"it has the number {constant}, which JSON does not have")


def _named(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
