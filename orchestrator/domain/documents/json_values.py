"""Plain JSON: one way to write it down, so that a digest says whether it is the same; what is no such value. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from orchestrator.client.strict_json import MAX_DEPTH, check_value, parse

_INTEGERS: Final = range(-(2**63), 2**64)


def encode_canonical(value: Any) -> bytes:
    """Return plain JSON as bytes, the same for equal values; ValueError where it is none."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def compute_digest(value: Any) -> str:
    """Return the digest of plain JSON as `sha256:` and 64 digits; ValueError where it is none."""
    return f"sha256:{hashlib.sha256(encode_canonical(value)).hexdigest()}"


def find_json_error(value: Any) -> str | None:
    """Return why something is no plain JSON that the store takes; None if it is."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):  # what lies deeper, or in itself, is found below
        flaw = next(filter(None, map(_flaw_of_one, level)), None)
        if flaw is not None:
            return flaw
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
    try:
        check_value(value)
    except ValueError as error:
        return str(error)
    return None


def _flaw_of_one(value: Any) -> str | None:
    match value:
        case None | bool() | str() | float() | list():
            return None
        case int():
            return None if value in _INTEGERS else "it has an integer of more than 64 bits"
        case dict():
            strange = next((key for key in value if not isinstance(key, str)), None)
            return None if strange is None else f"it has a key that is of type {type(strange).__name__}"
        case _:
            return f"it has a value of type {type(value).__name__}"


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text is; ValueError with the reason where it is none, or not to be trusted."""
    value = parse(text.encode(errors="surrogatepass"))
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    flaw = find_json_error(value)
    if flaw is not None:
        raise ValueError(flaw)
    read: dict[str, Any] = value
    return read


def is_empty_value(value: Any) -> bool:
    """Whether a JSON value is there and holds nothing: null, or an empty text, list or mapping."""
    return value is None or value in ("", [], (), {})
