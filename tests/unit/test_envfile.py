"""Parsing `.env` lines into all possible secret values."""

from __future__ import annotations

import pytest

from orchestrator.repo.worktrees.provisions import parse_env_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("A_TOKEN=abc", {"abc"}),
        ("  export A_TOKEN = abc \n", {"abc"}),
        ("A_TOKEN=abc#1 # why\r\n", {"abc#1", "abc#1 # why"}),
        ("A_TOKEN='a \"b\" # c' # why", {'a "b" # c'}),
        (r'A_TOKEN="a\"b\nc"', {r"a\"b\nc", 'a"b\nc'}),
        ('A_KEY="first\nsecond"\nB=c', {"first\nsecond", "c"}),
        ("A_TOKEN=\nB=c", {"", "c"}),
        ("# A_TOKEN=abc\nno line\n1A=x", set()),
        ("A=1\nA=2", {"1", "2"}),
    ],
)
def test_all_readings_of_a_value_are_found(text: str, values: set[str]) -> None:
    """Parsers differ in quotes, escapes and comments."""
    assert {value for _, value in parse_env_values(text)} == values


def test_unclosed_quote_hides_no_line() -> None:
    """Lines that look like a continuation may contain values of their own."""
    assert ("B_TOKEN", "plain") in set(parse_env_values('A="open\nB_TOKEN=plain\nC="closed"\n'))
