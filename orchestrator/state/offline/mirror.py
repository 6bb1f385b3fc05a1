"""The documents of a store that this process has seen, and the prefixes of which it has seen all."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from orchestrator.protocols import Commit, CommitRecord, Document, Dump, DumpedCommit, DumpedDocument, JsonObject, Key
from orchestrator.state.log.codec import encode_object, get_writer_name


class _Seen(NamedTuple):
    """A document's newest known version; `encoded` is None where it was deleted."""

    version: int
    encoded: bytes | None
    position: int
    time: float
    by: str
    ttl: float | None
    """Seconds from its writing; a version known from the log alone is assumed to have the TTL of the one before."""

    @property
    def expires(self) -> float | None:
        """When it expires."""
        return None if self.ttl is None else self.time + self.ttl


_NEVER: Final = _Seen(0, None, 0, 0.0, "", None)


class Mirror:
    """The newest versions of the documents that were read, written, or changed since.

    Of a document that was never seen, neither the value nor the existence is known.
    """

    def __init__(self, position: int) -> None:
        """Start empty; all commits after `position` will be followed."""
        self.position = position
        """The position of the newest known commit."""
        self.followed = position
        """The position up to which all commits are known."""
        self._by = get_writer_name()
        self._seen: dict[Key, _Seen] = {}
        self._listed: dict[str, set[str]] = {}

    def record_read(self, key: Key, document: Document | None) -> None:
        """Record the document that was read at a key, None if there is none."""
        if document is None:  # a known document has expired, or was deleted, which is followed
            self._seen.setdefault(key, _NEVER)
        elif not document.damaged:
            ttl = None if document.expires is None else document.expires - document.time
            seen = _Seen(document.version, document.encoded, document.position, document.time, document.by, ttl)
            self._put(key, seen)

    def record_list(self, kind: str, prefix: str, documents: Sequence[Document]) -> None:
        """Record the documents of a list, and that there are no other ones."""
        for document in documents:
            self.record_read(document.key, document)
        self._listed.setdefault(kind, set()).add(prefix)

    def record_commit(self, commit: Commit, position: int, now: float) -> None:
        """Record a commit of this process."""
        for write in commit.writes:
            version = self._seen.get(write.key, _NEVER).version if write.expected == 0 else write.expected
            encoded = None if write.value is None else encode_object(write.key, write.value)
            self._put(write.key, _Seen(version + 1, encoded, position, now, self._by, write.ttl))
        self.position = max(self.position, position)

    def follow(self, record: CommitRecord) -> None:
        """Record a commit of any process, as read from the log."""
        for key, (version, value) in record.documents.items():
            ttl = self._seen.get(key, _NEVER).ttl
            encoded = None if value is None else encode_object(key, value)
            self._put(key, _Seen(version, encoded, record.position, record.time, record.by, ttl))
        for key in record.unreadable:
            self._seen.pop(key, None)
        self.position, self.followed = max(self.position, record.position), record.position

    def _put(self, key: Key, seen: _Seen) -> None:
        # Concurrent reads, writes and log records arrive in any order.
        if seen.version > self._seen.get(key, _NEVER).version:
            self._seen[key] = seen
        self.position = max(self.position, seen.position)

    def newest(self, key: Key) -> tuple[int, JsonObject | None]:
        """Return the newest known version of a document and its value, None if it was deleted."""
        seen = self._seen.get(key, _NEVER)
        return seen.version, None if seen.encoded is None else json.loads(seen.encoded)

    def knows(self, key: Key) -> bool:
        """Return True if it is known whether this document exists."""
        return key in self._seen or any(key.id.startswith(prefix) for prefix in self._listed.get(key.kind, ()))

    def knows_all(self, kind: str, prefix: str) -> bool:
        """Return True if all documents of a kind whose id begins with a prefix are known."""
        return any(prefix.startswith(listed) for listed in self._listed.get(kind, ()))

    def dump(self) -> Dump:
        """Return all documents as a log of their newest versions alone."""
        return Dump(self.position, self.position, self._dump_commits())

    async def _dump_commits(self) -> AsyncGenerator[DumpedCommit]:
        entries = [(seen.position or 1, key, seen) for key, seen in self._seen.items() if seen.version]
        entries.sort(key=lambda entry: entry[:2])
        for position, group in groupby(entries, key=lambda entry: entry[0]):
            commit = [(key, seen) for _, key, seen in group]
            documents = [DumpedDocument(key, seen.version, seen.encoded, seen.expires) for key, seen in commit]
            yield DumpedCommit(position, commit[0][1].time, commit[0][1].by, documents)
