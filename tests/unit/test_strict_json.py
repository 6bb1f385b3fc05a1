"""Strict JSON from agents, and values on command lines from arguments, files and stdin."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.client import values
from orchestrator.client.commands import MAX_HANDOFF_BYTES, SESSION_COMMANDS
from orchestrator.client.session import SessionRequestError
from orchestrator.client.strict_json import MAX_DEPTH, check_value, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@given(VALUES)
def test_plain_values_are_parsed(value: Any) -> None:
    """In any notation."""
    for is_ascii in (True, False):
        assert parse(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not valid JSON: Expecting value at line 1, column 1"),
        (b'{"a": 1,\n}', "at line 2, column 1"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "infinite"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (rb'["\ud800"]', r"U\+D800"),
        (rb'{"\u0000": 1}', r"U\+0000"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels deep"),
        (b"[" * 100_000, f"more than {MAX_DEPTH} levels deep"),
        (b"9" * 5000, "integer"),
    ],
    ids=range(14),
)
def test_ambiguous_json_is_rejected(data: bytes, why: str) -> None:
    """The error has the reason and the position."""
    with pytest.raises(ValueError, match=why):
        parse(data)


def test_deepest_value_is_parsed() -> None:
    """A byte order mark is skipped."""
    check_value(parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH))
    assert parse(b"\xef\xbb\xbf{}") == {}


class Typed(io.TextIOWrapper):
    """Replace stdin with these bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("8080", 8080),
        ("text", "text"),
        ("two words", "two words"),
        ("null", None),
        ("true", True),
        ("NaN", "NaN"),
        (' {"a": [1]}', {"a": [1]}),
        ('"8080"', "8080"),
        ("", ""),
    ],
)
def test_argument_is_json_or_text(word: str, value: Any) -> None:
    """Text that does not look like JSON is a string."""
    assert values.parse_value(word) == value


@pytest.mark.parametrize("word", ["{", '["a"', '{"a": 1, "a": 2}', '"a'])
def test_invalid_json_is_rejected(word: str) -> None:
    """Otherwise a typo would be shared as text."""
    with pytest.raises(SessionRequestError, match="invalid value"):
        values.parse_value(word)


def test_value_is_read_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON or text."""
    monkeypatch.setattr(sys, "stdin", Typed(b'{"a":\n1}\n'))
    assert values.parse_value("-") == {"a": 1}
    monkeypatch.setattr(sys, "stdin", Typed("größer\n".encode()))
    assert values.parse_value("-") == "größer\n"


def test_handoff_is_read_from_a_file_or_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is one object."""
    command = SESSION_COMMANDS["submit_handoff"]
    (tmp_path / "plan.json").write_text('{"tasks": []}')
    assert values.resolve_arguments(command, {"data": str(tmp_path / "plan.json")}) == {"data": {"tasks": []}}
    monkeypatch.setattr(sys, "stdin", Typed(b'{"tasks": [1]}'))
    assert values.resolve_arguments(command, {"data": "-"}) == {"data": {"tasks": [1]}}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "not a JSON object"),
        ("", ": not valid JSON"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        (" " * (MAX_HANDOFF_BYTES + 1), f"exceeds the limit of {MAX_HANDOFF_BYTES} bytes"),
        (None, "plan.json: No such file"),
    ],
    ids=range(5),
)
def test_invalid_handoff_is_rejected(tmp_path: Path, text: str | None, why: str) -> None:
    """The error has the fix."""
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SessionRequestError, match=why) as refused:
        values.resolve_arguments(SESSION_COMMANDS["submit_handoff"], {"data": str(file)})
    assert refused.value.remedy
