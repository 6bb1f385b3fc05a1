"""The newest version of each document in the log, keyed by kind and id.

Values stay encoded until they are read: opening a store needs no parsing, and each reader decodes its own copy.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

from orchestrator.errors import LeaseLost, RefusedError, VersionConflict
from orchestrator.protocols import (
    LARGE_DOCUMENT_BYTES,
    Document,
    DocumentVersion,
    Guard,
    Key,
    StateSnapshot,
    StoreStatistics,
    Write,
)
from orchestrator.state.log.codec import (
    MAX_TTL,
    EncodedCommit,
    EncodedWrite,
    LineChange,
    LogLine,
    iter_values,
    to_version,
)


class TableEntry(NamedTuple):
    """A document's newest version.

    `value` is encoded; None if deleted, or lost before it was read. `damaged`: this version's value is unknown, and
    `value` is an older one.
    """

    version: int
    value: bytes | None
    position: int
    damaged: bool = False
    time: float = 0.0
    writer: str = ""
    expires: float | None = None

    def exists(self, now: float) -> bool:
        """Return True if the document exists, even with an unknown value.

        A deleted document keeps only its version.
        """
        return (self.value is not None or self.damaged) and (self.expires is None or now < self.expires)


class DocumentTable:
    """The state as of `position`.

    Only one thread at a time may apply; all threads may read.
    """

    def __init__(self, position: int = 0, kinds: Mapping[str, dict[str, TableEntry]] | None = None) -> None:
        """Start empty, or with the entries of `kinds`."""
        self.position = position
        self._kinds: dict[str, dict[str, TableEntry]] = dict(kinds or {})
        self._sorted_ids: dict[str, list[str]] = {}
        # Held for a whole line, so that no reader sees a partial commit.
        self._lock = threading.Lock()

    def entry(self, key: Key) -> TableEntry | None:
        """Return the entry of a key, even for a deleted document."""
        return self._kinds.get(key.kind, {}).get(key.id)

    def compare(self, other: DocumentTable) -> tuple[list[Key], list[Key]]:
        """Return documents that are damaged in either table, and others that differ."""
        pairs = {
            Key(kind, name): (self.entry(Key(kind, name)), other.entry(Key(kind, name)))
            for table in (self, other)
            for kind, entries in table.kinds().items()
            for name in entries
        }
        damaged = [key for key, found in pairs.items() if any(entry and entry.damaged for entry in found)]
        differs = [key for key, (ours, theirs) in pairs.items() if ours != theirs]
        return sorted(damaged), sorted(set(differs) - set(damaged))

    def kinds(self) -> Mapping[str, Mapping[str, TableEntry]]:
        """Return all entries by kind and id, including deleted documents.

        Only for the applying thread.
        """
        return self._kinds

    def get(self, key: Key, now: float) -> Document | None:
        """Return the document, or None."""
        with self._lock:
            entry = self.entry(key)
        return _document(key, entry) if entry and entry.exists(now) else None

    def all_documents(self, now: float) -> dict[Key, Document]:
        """Return every document."""
        with self._lock:
            found = [(Key(kind, name), one) for kind, entries in self._kinds.items() for name, one in entries.items()]
        return {key: _document(key, entry) for key, entry in found if entry.exists(now)}

    def documents(self, kind: str, now: float, prefix: str = "") -> Sequence[Document]:
        """Return the documents of the given kind whose id starts with `prefix`, by id."""
        with self._lock:
            entries = self._kinds.get(kind, {})
            found = [(name, entries[name]) for name in self._ids(kind, prefix)]
        # Inlined `TableEntry.exists`, which would double the time for thousands of documents.
        there = [one for one in found if one[1].value is not None or one[1].damaged]
        return _Documents(kind, [one for one in there if one[1].expires is None or now < one[1].expires])

    def statistics(self, first: int, log_bytes: int, now: float) -> StoreStatistics:
        """Return the sizes; `first` and `log_bytes` are those of the log."""
        with self._lock:
            found = [(Key(kind, name), one) for kind, entries in self._kinds.items() for name, one in entries.items()]
            position = self.position
        there = [(key, len(one.value or b"")) for key, one in found if one.exists(now)]
        large = sorted(((key, size) for key, size in there if size > LARGE_DOCUMENT_BYTES), key=lambda one: -one[1])
        expired = sorted(key for key, one in found if one.value is not None and not one.exists(now))
        return StoreStatistics(position, first, len(there), sum(size for _, size in there), log_bytes, expired, large)

    def apply(self, line: LogLine) -> None:
        """Apply a line, which must have the next position."""
        if line.is_damaged:
            new = [(change, self._damaged(change, line)) for change in line.changes]
        else:
            new = [(change, _entry(line, change, value)) for change, value in iter_values(line)]
        with self._lock:
            for change, entry in new:
                self._put(change.key, entry)
            self.position = line.position

    def take(self, stage: CommitStage) -> None:
        """Apply the commits that were staged against this table."""
        with self._lock:
            for key, entry in stage.changed.items():
                self._put(key, entry)
            self.position = stage.position

    def lose(self, commits: int) -> None:
        """Skip lost commits, each of which may have changed any document.

        Versions advance by the maximum that those commits can have added, so that no version is ever reused.
        """
        with self._lock:
            for entries in self._kinds.values():
                for name, entry in entries.items():
                    version = entry.version + commits
                    entries[name] = entry._replace(version=version, damaged=entry.value is not None or entry.damaged)
            self.position += commits

    def _damaged(self, change: LineChange, line: LogLine) -> TableEntry:
        known = _entry(line, change, None)
        if change.length == 0:
            return known
        old = self.entry(change.key)
        return known._replace(damaged=True, value=old.value if old else None, expires=change.expires)

    def _put(self, key: Key, entry: TableEntry) -> None:
        kind, name = key
        entries = self._kinds.get(kind)
        if entries is None:
            entries = self._kinds[kind] = {}
        if name not in entries and kind in self._sorted_ids:
            insort(self._sorted_ids[kind], name)
        entries[name] = entry

    def _ids(self, kind: str, prefix: str) -> list[str]:
        ids = self._sorted_ids.get(kind)
        if ids is None:
            ids = self._sorted_ids[kind] = sorted(self._kinds.get(kind, ()))
        first = bisect_left(ids, prefix)
        # Sorted by code points, so that ids with the same prefix are adjacent.
        return ids[first : bisect_right(ids, prefix, first, key=lambda name: name[: len(prefix)])]


class _Documents(Sequence[Document]):
    """Documents of one kind, created on access."""

    def __init__(self, kind: str, entries: list[tuple[str, TableEntry]]) -> None:
        self._kind, self._entries = kind, entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...

    def __getitem__(self, index: int | slice) -> Document | Sequence[Document]:
        if isinstance(index, slice):
            return _Documents(self._kind, self._entries[index])
        name, entry = self._entries[index]
        return _document(Key(self._kind, name), entry)

    def __iter__(self) -> Iterator[Document]:
        return (_document(Key(self._kind, name), entry) for name, entry in self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash((self._kind, len(self._entries)))

    def __repr__(self) -> str:
        return repr(list(self))


class CommitStage:
    """Valid commits, in order, that are not yet applied to their table."""

    def __init__(self, table: DocumentTable, by: str, durable: int = 0) -> None:
        """Stage commits of the process `by` for a log that is durable up to a position."""
        self.lines: list[LogLine] = []
        self.position = table.position
        self.changed: dict[Key, TableEntry] = {}
        self._table, self._by, self._durable = table, by, durable

    def add(self, commit: EncodedCommit, time: float) -> LogLine:
        """Stage `commit` at the next position.

        Raises VersionConflict or LeaseLost if it is not valid.
        """
        for guard in commit.guards:
            self._check_guard(guard, time)
        changes = tuple(self._change(write, time) for write in commit.writes)
        line = LogLine(self.position + 1, time, changes, commit.payload, self._by, self._durable)
        for change, value in iter_values(line):
            self.changed[change.key] = _entry(line, change, value)
        self.position = line.position
        self.lines.append(line)
        return line

    def _entry(self, key: Key) -> TableEntry | None:
        return self.changed.get(key) or self._table.entry(key)

    def _change(self, write: EncodedWrite, now: float) -> LineChange:
        key, entry = write.key, self._entry(write.key)
        found = entry.version if entry and entry.exists(now) else 0
        if write.expected != found:
            writer, time = (entry.writer, entry.time) if entry else ("", 0.0)
            raise VersionConflict(str(key), write.expected, found, writer=writer, time=time)
        expires = None if write.ttl is None else now + write.ttl
        before = (entry.version, entry.position) if entry else (0, 0)
        return LineChange(key, before[0] + 1, write.length, before[1], expires)

    def _check_guard(self, guard: Guard, now: float) -> None:
        entry = self._entry(guard.key)
        # An older value proves nothing: the lost version may have had a new holder.
        known = entry is not None and entry.exists(now) and not entry.damaged
        epoch = json.loads(entry.value).get("epoch") if known and entry and entry.value else None
        if epoch != guard.epoch:
            raise LeaseLost(str(guard.key), guard.epoch, epoch)


def _entry(line: LogLine, change: LineChange, value: bytes | None) -> TableEntry:
    expires = change.expires if value else None
    return TableEntry(change.version, value, line.position, False, line.time, line.writer, expires)


def _document(key: Key, entry: TableEntry) -> Document:
    return Document(key, entry.version, entry.value or b"{}", *entry[2:])


def repair_write(key: Key, entry: TableEntry, now: float) -> Write:
    """Return the write of a document's known value; a deletion if it does not exist, or its value is unknown."""
    if not entry.exists(now):  # only its version number continues
        return Write(key, 0, None)
    known = None if entry.value is None else json.loads(entry.value)
    return Write(key, entry.version, known, None if entry.expires is None else min(entry.expires - now, MAX_TTL))


def read_versions(
    entry: TableEntry | None, key: Key, limit: int, line_at: Callable[[int], LogLine | None]
) -> list[DocumentVersion]:
    """Return the newest versions of a document, newest first.

    `line_at` returns a commit's line, or None. Each line has the position of the previous version.
    """
    versions: list[DocumentVersion] = []
    position = entry.position if entry else 0
    while position and len(versions) < limit:
        line = line_at(position)
        change = next((change for change in line.changes if change.key == key), None) if line else None
        if line is None or change is None:  # pruned or lost
            break
        versions.append(to_version(line, key))
        position = change.previous
    return versions


def rebuild_state(position: int, lines: Iterable[LogLine], first: int = 0) -> StateSnapshot:
    """Return the state after a commit, from the lines up to it.

    Some of the lines up to `first` may be missing.
    """
    table = DocumentTable()
    time = 0.0
    for line in lines:
        if line.position > position:
            break
        table.apply(line)
        time = line.time
    table.position = max(table.position, min(first, position))
    if table.position < position:
        raise RefusedError(
            f"position {position} does not exist yet (newest: {table.position})", "use an earlier position"
        )
    return StateSnapshot(table.position, time, table.all_documents(time))
