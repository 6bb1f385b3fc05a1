"""Plain JSON values: canonical encoding, digests, and validation."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from orchestrator.client.strict_json import MAX_DEPTH, check_value, parse

_INTEGERS: Final = range(-(2**63), 2**64)


def encode_canonical(value: Any) -> bytes:
    """Return the canonical encoding of plain JSON; raise ValueError for other values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def compute_digest(value: Any) -> str:
    """Return `sha256:` and 64 digits for plain JSON; raise ValueError otherwise."""
    return f"sha256:{hashlib.sha256(encode_canonical(value)).hexdigest()}"


def find_json_error(value: Any) -> str | None:
    """Return the reason why a value can't be stored as plain JSON; None if it can."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):  # deeper or recursive values are detected below
        flaw = next(filter(None, map(_find_flaw, level)), None)
        if flaw is not None:
            return flaw
        level = [
            inner
            for value_ in level
            for inner in (value_.values() if isinstance(value_, dict) else value_ if isinstance(value_, list) else ())
        ]
    try:
        check_value(value)
    except ValueError as error:
        return str(error)
    return None


def _find_flaw(value: Any) -> str | None:
    match value:
        case None | bool() | str() | float() | list():
            return None
        case int():
            return None if value in _INTEGERS else "it contains an integer of more than 64 bits"
        case dict():
            strange = next((key for key in value if not isinstance(key, str)), None)
            return None if strange is None else f"it contains a key of type {type(strange).__name__}"
        case _:
            return f"it contains a value of type {type(value).__name__}"


def parse_object(text: str) -> dict[str, Any]:
    """Parse a plain JSON object; raise ValueError with the reason if it is invalid."""
    value = parse(text.encode(errors="surrogatepass"))
    if not isinstance(value, dict):
        raise ValueError("it is not an object")  # noqa: TRY004  the text is invalid, not an argument
    flaw = find_json_error(value)
    if flaw is not None:
        raise ValueError(flaw)
    read: dict[str, Any] = value
    return read


def is_empty_value(value: Any) -> bool:
    """Return whether a JSON value is empty: null, or an empty string, list or object."""
    return value is None or value in ("", [], (), {})
