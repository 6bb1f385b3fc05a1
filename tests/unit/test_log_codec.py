"""The commit log codec: lossless, and damage is always detected and located."""

import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidDocument
from orchestrator.protocols import Commit, Event, JsonObject, Key, Write
from orchestrator.state.log.codec import (
    MAX_COMMIT_BYTES,
    MAX_DEPTH,
    DecodedLine,
    IncompleteLine,
    LineChange,
    LogLine,
    UnreadableBytes,
    encode_commit,
    encode_line,
    iter_values,
    scan,
    to_record,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=3)
COMMITS = st.builds(
    lambda documents, events: Commit(
        [Write(Key(*key), 0, value) for key, value in documents.items()], [Event(*event) for event in events]
    ),
    st.dictionaries(st.tuples(TEXT, TEXT), st.none() | OBJECTS, max_size=4),
    st.lists(st.tuples(TEXT, OBJECTS), max_size=3),
)


def line_of(commit: Commit, position: int = 1) -> LogLine:
    """Return the line of a first commit."""
    encoded = encode_commit(commit)
    changes = tuple(LineChange(write.key, write.expected + 1, write.length) for write in encoded.writes)
    return LogLine(position, 1.5, changes, encoded.payload)


SMALL = line_of(Commit([Write(Key("task", "a"), 0, {"n": 1}), Write(Key("task", "b"), 0, None)], [Event("e")]))
BYTES = encode_line(SMALL)
NEXT = encode_line(line_of(Commit(), position=2))


@given(st.lists(COMMITS, min_size=1, max_size=4))
def test_line_is_decoded_as_encoded(commits: list[Commit]) -> None:
    """Each commit is one line; scanning returns the same lines, values and events."""
    lines = [line_of(commit, position) for position, commit in enumerate(commits, 1)]
    data = b"".join(map(encode_line, lines))
    assert data.count(b"\n") == len(commits)
    offset = 0
    for line, commit in zip(lines, commits, strict=True):
        item = scan(data, offset)
        assert item == DecodedLine(item.end, line, b"\n")
        offset = item.end
        record = to_record(item.line)
        assert record.documents == {write.key: (1, write.value) for write in commit.writes}
        assert list(record.events) == list(commit.events)
        cut_out = [value and json.loads(value) for _, value in iter_values(item.line)]
        assert cut_out == [write.value for write in commit.writes]
    assert offset == len(data)


def test_truncated_line_is_incomplete() -> None:
    """At each length; a line without only its newline is complete."""
    for length in range(1, len(BYTES) - 1):
        assert scan(BYTES[:length], 0) == IncompleteLine(length)
    assert scan(BYTES[:-1], 0) == DecodedLine(len(BYTES) - 1, SMALL, b"")


@pytest.mark.parametrize("offset", range(len(BYTES)))
@pytest.mark.parametrize("change", [lambda byte: byte ^ 1, lambda byte: byte ^ 0x80, lambda _: ord("\n")])
def test_changed_byte_is_detected_in_its_line_only(offset: int, change: Callable[[int], int]) -> None:
    """With a damaged payload the header still names the commit; the next line is always found."""
    data = bytearray(BYTES + NEXT)
    data[offset] = change(data[offset])
    if data == BYTES + NEXT:
        return
    item = scan(bytes(data), 0)
    if isinstance(item, DecodedLine):
        assert item.line.is_damaged == (offset < len(BYTES) - 1)
        assert item.line.changes == SMALL.changes
        assert item.end == len(BYTES)
    while isinstance(item, UnreadableBytes) and item.end < len(BYTES):
        item = scan(bytes(data), item.end)
    assert item.end == len(BYTES)
    assert scan(bytes(data), len(BYTES)) == DecodedLine(len(data), line_of(Commit(), position=2), b"\n")


def test_line_with_lost_bytes_does_not_hide_the_next() -> None:
    """Lost bytes damage one line, although its length field is now wrong."""
    data = BYTES[:-8] + BYTES[-4:] + NEXT
    item = scan(data, 0)
    assert isinstance(item, DecodedLine)
    assert item.line.is_damaged
    assert item.end == len(BYTES) - 4


def test_damaged_line_still_has_its_deletions() -> None:
    """A reader of a damaged line gets its deletions and the names of the lost documents."""
    record = to_record(LogLine(SMALL.position, SMALL.time, SMALL.changes, b""))
    assert record.documents == {Key("task", "b"): (1, None)}
    assert record.unreadable == [Key("task", "a")]


def test_commit_above_the_limit_is_rejected() -> None:
    """Documents that fit alone are rejected together if their commit is too large."""
    value = {"x": "x" * (4_000_000)}
    writes = [Write(Key("task", str(number)), 0, value) for number in range(MAX_COMMIT_BYTES // 4_000_000 + 1)]
    with pytest.raises(InvalidDocument, match="commit"):
        encode_commit(Commit(writes))


@pytest.mark.parametrize("wrap", [lambda inner: {"in": inner}, lambda inner: [inner]])
def test_nesting_up_to_the_limit_is_accepted(wrap: Callable[[Any], Any]) -> None:
    """Through objects and lists; one level more is rejected."""
    value: Any = 1
    for _ in range(MAX_DEPTH - 1):
        value = wrap(value)
    encode_commit(Commit([Write(Key("task", "a"), 0, {"in": value})]))
    with pytest.raises(InvalidDocument, match="deeper"):
        encode_commit(Commit([Write(Key("task", "a"), 0, {"in": wrap(value)})]))


def test_recursive_value_is_rejected() -> None:
    """Including cycles that grow with each level."""
    value: JsonObject = {}
    value["left"], value["right"] = value, value
    with pytest.raises(InvalidDocument):
        encode_commit(Commit([Write(Key("task", "a"), 0, value)]))


@pytest.mark.parametrize("value", [{}, None])
@pytest.mark.parametrize("key", [Key("task", "\ud800"), Key("\ud800", "a"), Key("task", cast("str", 1))])
def test_name_that_is_not_text_is_rejected(key: Key, value: JsonObject | None) -> None:
    """An unpaired surrogate or a number cannot name a written or deleted document."""
    with pytest.raises(InvalidDocument):
        encode_commit(Commit([Write(key, 0, value)]))
