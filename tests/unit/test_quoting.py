"""Quoting: text of others cannot leave its delimiters."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.security.quoting import format_value, quote_block, quote_lines, remove_control_characters

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.text())
def test_text_can_not_leave_its_delimiters(text: str) -> None:
    """Each visible line starts with a bar."""
    assert all(line.startswith("| ") for line in "\n".join(quote_lines(text)).splitlines())


@given(st.text())
def test_plain_line_stays_one_line(text: str) -> None:
    line = remove_control_characters(text)
    assert len(line) == len(text)
    assert len(line.splitlines()) <= 1
    assert all(one.isprintable() or one == "\t" for one in line)


@given(JSON)
def test_values_are_complete_if_they_fit(value: object) -> None:
    """The JSON parses to the same value, except for hidden characters."""
    reported = format_value(value, 100_000)
    if isinstance(value, str):
        assert reported == "\n".join(map(remove_control_characters, value.splitlines()))
    elif all(one.isprintable() for one in json.dumps(value, ensure_ascii=False)):
        assert json.loads(reported) == value


def test_long_value_is_truncated_with_a_note() -> None:
    """The note has the number of omitted characters."""
    assert format_value("abcdef", 6) == "abcdef"
    assert format_value("abcdefgh", 6) == "abcdef\n(… 2 more characters omitted)"


def test_text_is_between_two_delimiters() -> None:
    assert quote_block("a\nb", "1f", "output") == "[1f output begins]\na\nb\n[1f output ends]"
