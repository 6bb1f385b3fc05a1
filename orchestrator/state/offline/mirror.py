"""What a process has seen of a store: the documents, and of which it is known that there are no others."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from orchestrator.protocols import Commit, CommitRecord, Document, Dump, DumpedCommit, DumpedDocument, JsonObject, Key
from orchestrator.state.log.codec import encode_object
from orchestrator.state.log.writer_name import get_writer_name


class _Seen(NamedTuple):
    """A document's newest known version; `encoded` is None where it was deleted."""

    version: int
    encoded: bytes | None
    position: int
    time: float
    by: str
    ttl: float | None
    """How many seconds it had when it was written; what is only followed is taken to get as many again."""

    @property
    def expires(self) -> float | None:
        """From when on it is as if it were not there."""
        return None if self.ttl is None else self.time + self.ttl


_NEVER: Final = _Seen(0, None, 0, 0.0, "", None)


class Mirror:
    """The newest versions of documents that were read, written, or changed since.

    What was never seen is not known: neither what it says nor whether it is there.
    """

    def __init__(self, position: int) -> None:
        """Begin with nothing; all that is committed behind `position` will be followed."""
        self.position = position
        """Of the newest commit that is known."""
        self.followed = position
        """Of the newest up to which all are."""
        self._by = get_writer_name()
        self._seen: dict[Key, _Seen] = {}
        self._listed: dict[str, set[str]] = {}

    def read(self, key: Key, found: Document | None) -> None:
        """Take what was found at a key, None if nothing is there."""
        if found is None:  # what was there, and is known, was deleted, which is followed, or has expired
            self._seen.setdefault(key, _NEVER)
        elif not found.damaged:
            ttl = None if found.expires is None else found.expires - found.time
            self._put(key, _Seen(found.version, found.encoded, found.position, found.time, found.by, ttl))

    def listed(self, kind: str, prefix: str, found: Sequence[Document]) -> None:
        """Take what a list found, and that there was nothing else."""
        for document in found:
            self.read(document.key, document)
        self._listed.setdefault(kind, set()).add(prefix)

    def wrote(self, commit: Commit, position: int, now: float) -> None:
        """Take what was committed by this process."""
        for write in commit.writes:
            version = self._seen.get(write.key, _NEVER).version if write.expected == 0 else write.expected
            encoded = None if write.value is None else encode_object(write.key, write.value)
            self._put(write.key, _Seen(version + 1, encoded, position, now, self._by, write.ttl))
        self.position = max(self.position, position)

    def follow(self, record: CommitRecord) -> None:
        """Take what anybody committed."""
        for key, (version, value) in record.documents.items():
            ttl = self._seen.get(key, _NEVER).ttl
            encoded = None if value is None else encode_object(key, value)
            self._put(key, _Seen(version, encoded, record.position, record.time, record.by, ttl))
        for key in record.unreadable:
            self._seen.pop(key, None)
        self.position, self.followed = max(self.position, record.position), record.position

    def _put(self, key: Key, seen: _Seen) -> None:
        # What is read, written and followed side by side comes in any order.
        if seen.version > self._seen.get(key, _NEVER).version:
            self._seen[key] = seen
        self.position = max(self.position, seen.position)

    def newest(self, key: Key) -> tuple[int, JsonObject | None]:
        """Return the newest known version of a document and its value, None where there is none any more."""
        seen = self._seen.get(key, _NEVER)
        return seen.version, None if seen.encoded is None else json.loads(seen.encoded)

    def knows(self, key: Key) -> bool:
        """Whether it is known what is there, be it nothing."""
        return key in self._seen or any(key.id.startswith(prefix) for prefix in self._listed.get(key.kind, ()))

    def knows_all(self, kind: str, prefix: str) -> bool:
        """Whether it is known which documents of a kind there are whose id begins with a prefix."""
        return any(prefix.startswith(one) for one in self._listed.get(kind, ()))

    def dump(self) -> Dump:
        """Return all documents as a log that has only their newest versions."""
        return Dump(self.position, self.position, self._dumped())

    async def _dumped(self) -> AsyncGenerator[DumpedCommit]:
        there = [(seen.position or 1, key, seen) for key, seen in self._seen.items() if seen.version]
        there.sort(key=lambda one: one[:2])
        for position, group in groupby(there, key=lambda one: one[0]):
            found = [(key, seen) for _, key, seen in group]
            documents = [DumpedDocument(key, seen.version, seen.encoded, seen.expires) for key, seen in found]
            yield DumpedCommit(position, found[0][1].time, found[0][1].by, documents)
