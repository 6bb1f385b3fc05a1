r"""The rows of the tables, and the names in them.

PostgreSQL's text can't contain `\0`. In kinds, ids and authors, U+0000 becomes U+0001 U+0001, and U+0001 becomes U+0001
U+0002, which preserves order and prefixes. Values and events are bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

from orchestrator.errors import InvalidDocument
from orchestrator.protocols import (
    CommitRecord,
    Document,
    DocumentVersion,
    DumpedCommit,
    DumpedDocument,
    Event,
    Key,
)
from orchestrator.state.log.codec import EncodedCommit, LogLine, RecordedDocuments, split_events, split_values

MAX_NAME_BYTES: Final = 2_000
"""The maximum size of a kind and an id together: an index can't contain longer ones."""
_ESCAPED: Final = str.maketrans({"\0": "\1\1", "\1": "\1\2"})
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_WILDCARD: Final = re.compile(r"([\\%_])")


def escape(name: str) -> str:
    """Return a name as stored in the tables; invalid text becomes an unused name."""
    return name if name.isascii() and name.isprintable() else _SURROGATE.sub("\1\3", name.translate(_ESCAPED))


def unescape(name: str) -> str:
    """Return the original name."""
    return name.replace("\1\1", "\0").replace("\1\2", "\1") if "\1" in name else name


def prefix_pattern(prefix: str) -> str:
    """Return the pattern of `LIKE` for names with a prefix."""
    return _WILDCARD.sub(r"\\\1", escape(prefix)) + "%"


def check_names(keys: Iterable[Key]) -> None:
    """Raise InvalidDocument for a name that is too long for an index."""
    for key in keys:
        size = len(escape(key.kind).encode()) + len(escape(key.id).encode())
        if size > MAX_NAME_BYTES:
            raise InvalidDocument(f"{str(key)[:50]}…", f"its name has {size} bytes (limit: {MAX_NAME_BYTES})")


def group_parameters(commits: Sequence[EncodedCommit]) -> dict[str, Any]:
    """Return the parameters of the query `commit` for the commits of a group."""
    events = [b"[%b]" % split_events(commit.writes, commit.payload) for commit in commits]
    writes = [(number, write) for number, commit in enumerate(commits, 1) for write in commit.writes]
    guards = [(number, guard) for number, commit in enumerate(commits, 1) for guard in commit.guards]
    return {
        "commits": [commit.id for commit in commits],
        "events": events,
        "sizes": [
            len(of_commit) + 100 + sum(100 + write.length for write in commit.writes)
            for of_commit, commit in zip(events, commits, strict=True)
        ],
        "writers": [number for number, _ in writes],
        "kinds": [escape(write.key.kind) for _, write in writes],
        "ids": [escape(write.key.id) for _, write in writes],
        "expected": [write.expected for _, write in writes],
        "ttls": [write.ttl for _, write in writes],
        "values": [value for commit in commits for value in split_values(commit.writes, commit.payload)],
        "guarded": [number for number, _ in guards],
        "guard_kinds": [escape(guard.key.kind) for _, guard in guards],
        "guard_ids": [escape(guard.key.id) for _, guard in guards],
        "epochs": [guard.epoch for _, guard in guards],
    }


def load_parameters(lines: Sequence[LogLine]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of the queries `load_commits` and `load_versions`."""
    commits: dict[str, list[Any]] = {name: [] for name in ("positions", "times", "by", "events", "bytes")}
    names = ("kinds", "ids", "versions", "positions", "numbers", "previous", "expires", "values")
    versions: dict[str, list[Any]] = {name: [] for name in names}
    for line in lines:
        size = len(line.payload) + 100 + 100 * len(line.changes)
        events = b"[%b]" % split_events(line.changes, line.payload)
        _append(commits, (line.position, float(line.time), escape(line.writer), events, size))
        values = split_values(line.changes, line.payload)
        for number, (change, value) in enumerate(zip(line.changes, values, strict=True), 1):
            key, expires = change.key, None if change.expires is None else float(change.expires)
            head = (escape(key.kind), escape(key.id), change.version, line.position, number)
            _append(versions, (*head, change.previous, expires, value))
    return commits, versions


def _append(columns: dict[str, list[Any]], row: tuple[Any, ...]) -> None:
    for column, value in zip(columns.values(), row, strict=True):
        column.append(value)


def to_document(row: tuple[Any, ...]) -> Document:
    """Return the document of a row of `get`, `list` or `state_at`."""
    kind, name, version, value, position, time, by, expires = row
    return Document(Key(unescape(kind), unescape(name)), version, value, position, False, time, unescape(by), expires)


def to_commits(rows: Iterable[tuple[Any, ...]]) -> Iterator[DumpedCommit]:
    """Yield the commits of rows of `records` or `dump`.

    There is one row for each document of a commit, or one without.
    """
    for position, group in groupby(rows, itemgetter(0)):
        of_commit = list(group)
        _, time, by, events, *_ = of_commit[0]
        documents = tuple(
            DumpedDocument(Key(unescape(kind), unescape(name)), version, value, expires, previous)
            for _, _, _, _, kind, name, version, previous, expires, value in of_commit
            if kind is not None
        )
        yield DumpedCommit(position, time, unescape(by), documents, _to_events(events))


def to_record(commit: DumpedCommit) -> CommitRecord:
    """Return the record of a commit for watchers."""
    documents = RecordedDocuments({one.key: (one.version, one.encoded) for one in commit.documents})
    return CommitRecord(commit.position, commit.time, documents, commit.events, (), commit.writer)


def to_version(row: tuple[Any, ...]) -> DocumentVersion:
    """Return the version of a row of `history`."""
    version, position, time, by, value, events = row
    decoded = None if value is None else json.loads(value)
    return DocumentVersion(version, position, time, unescape(by), decoded, _to_events(events))


def _to_events(encoded: bytes) -> tuple[Event, ...]:
    return tuple(Event(*event) for event in json.loads(encoded))
