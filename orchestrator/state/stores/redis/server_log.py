"""The keys of a store on a server, and reading them.

PREFIX:documents  hash: key (JSON `["KIND","ID"]`) -> newest version, also of deleted documents; `position` -> position
PREFIX:log        stream: the commit at position N is the entry N-0, with its record and its id
PREFIX:pruned     hash: position -> record of a pruned commit; those after `first` belong to an unfinished compaction
PREFIX:commits    hash: id of a commit -> its position; until it is pruned, and at least for an hour
PREFIX:settled    sorted set: id of a pruned commit in PREFIX:commits -> time of the commit
PREFIX:meta       hash: format; `first`, the position of the oldest state that can be reproduced; the last load
PREFIX:lock       held by a process that reads or changes the whole log
PREFIX:staged:…   an unfinished load
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

import anyio
from redis.asyncio.lock import Lock
from redis.exceptions import LockError, RedisError

from orchestrator.errors import StoreUnavailable
from orchestrator.protocols import Key
from orchestrator.state.log.codec import LogLine, without_damaged_payload
from orchestrator.state.log.table import DocumentTable, TableEntry
from orchestrator.state.stores.redis.records import UNREADABLE, decode_entry, decode_key, decode_record
from orchestrator.state.stores.redis.server import Server

PART: Final = 100
"""The number of commits to read or write per call."""
_LOCK_SECONDS: Final = 60
_WATCH_MILLISECONDS: Final = 1_000
_SYNC_MILLISECONDS: Final = 4_000  # `appendfsync everysec` takes up to two seconds
_RECEIVE_MILLISECONDS: Final = 500  # both together take less than the timeout of a call


class StoredCommit(NamedTuple):
    """A commit in the log.

    `line` is None if it is unreadable, together with all missing ones before it.
    """

    position: int
    line: LogLine | None
    id: bytes | None = None


class Replay(NamedTuple):
    """The documents according to the log: with damage, and by intact commits only."""

    table: DocumentTable
    intact: DocumentTable
    damaged: Sequence[StoredCommit]


class ServerLog:
    """The keys of a store."""

    def __init__(self, server: Server) -> None:
        self.server, self.client = server, server.client
        self.documents, self.log, self.pruned = self.key("documents"), self.key("log"), self.key("pruned")
        self.commits, self.meta, self.staged = self.key("commits"), self.key("meta"), self.key("staged")
        self.settled = self.key("settled")

    def key(self, name: str) -> str:
        """Return the name of a key of the store."""
        return f"{self.server.address.prefix}:{name}"

    async def first(self) -> int:
        """Return the position of the oldest state that can be reproduced."""
        return int(await self.client.hget(self.meta, "first") or 0)

    async def position(self) -> int:
        """Return the position of the newest commit."""
        return int(await self.client.hget(self.documents, "position") or 0)

    async def size(self) -> int:
        """Return the estimated memory of the log on the server, in bytes."""
        return sum([await self.client.memory_usage(name) or 0 for name in (self.log, self.pruned)])

    @asynccontextmanager
    async def exclusive(self, *, is_waiting: bool = True) -> AsyncIterator[Lock]:
        """Exclude other processes from pruning, repairing and loading.

        Raises LockError if one does so, unless waiting.
        """
        lock: Lock = self.client.lock(self.key("lock"), _LOCK_SECONDS, blocking=is_waiting, thread_local=False)
        if not await lock.acquire():
            raise LockError("the log is locked")
        try:
            yield lock
        finally:
            with anyio.CancelScope(shield=True), suppress(RedisError):
                await lock.release()

    async def read_after(self, position: int) -> tuple[float, int, list[StoredCommit]]:
        """Return the time, the newest position, and the first commits after a position."""
        async with self.client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.hget(self.documents, "position")
            pipeline.xrange(self.log, f"{position + 1}-0", count=PART)
            (seconds, micros), newest, found = await pipeline.execute()
        return seconds + micros / 1e6, int(newest or 0), _decode_stream(found)

    async def wait_for(self, after: int) -> list[StoredCommit]:
        """Return the first commits after a position; empty after a second without any."""
        found = await self.server.watcher.xread({self.log: f"{after}-0"}, PART, _WATCH_MILLISECONDS)
        return _decode_stream(found[0][1]) if found else []

    async def find(self, position: int) -> LogLine | None:
        """Return the commit at a position, or None if it is missing or unreadable."""
        found = _decode_stream(await self.client.xrange(self.log, f"{position}-0", f"{position}-0"))
        if found:
            return found[0].line
        return decode_record(position, await self.client.hget(self.pruned, str(position)) or b"")

    async def lines(self, first: int, until: int, lock: Lock | None = None) -> AsyncGenerator[StoredCommit]:
        """Yield the commits of a log that was pruned up to `first`.

        Extends the lock after each part.
        """
        names = sorted(name for name in map(int, await self.client.hkeys(self.pruned)) if name <= min(first, until))
        for start in range(0, len(names), PART):
            part = names[start : start + PART]
            records = await self.client.hmget(self.pruned, list(map(str, part)))
            for position, record in zip(part, records, strict=True):
                if record is not None:  # otherwise a compaction has found newer versions of all its documents
                    yield StoredCommit(position, decode_record(position, record))
            await _extend(lock)
        position = first
        while position < until:
            found = _decode_stream(await self.client.xrange(self.log, f"{position + 1}-0", f"{until}-0", PART))
            for commit in found or [StoredCommit(until, None)]:
                if commit.position > position + 1 and commit.line:
                    yield StoredCommit(commit.position - 1, None)
                yield commit
                position = commit.position
            await _extend(lock)

    async def replay(self, first: int, until: int, lock: Lock | None = None) -> Replay:
        """Apply the commits up to a position."""
        table, intact, damaged = DocumentTable(), DocumentTable(), list[StoredCommit]()
        async for commit in self.lines(first, until, lock):
            table.position = commit.position - 1 if commit.position <= first else max(table.position, first)
            if commit.line is None:
                table.lose(commit.position - table.position)
            else:
                table.apply(commit.line)
                intact.apply(without_damaged_payload(commit.line))
            if commit.line is None or commit.line.is_damaged:
                damaged.append(commit)
        table.position = until
        return Replay(table, intact, damaged)

    async def read_documents(self) -> tuple[DocumentTable, list[Key]]:
        """Return all documents as stored, and the damaged ones."""
        stored = await self.client.hgetall(self.documents)
        position = int(stored.pop(b"position", 0))
        kinds: dict[str, dict[str, TableEntry]] = {}
        damaged = list[Key]()
        for name, text in stored.items():
            key, entry = decode_key(name), decode_entry(text)
            kinds.setdefault(key.kind, {})[key.id] = entry
            if entry.damaged:
                damaged.append(key)
        return DocumentTable(position, kinds), damaged

    async def read_table(self) -> DocumentTable:
        """Return all documents; damaged ones are read from the log."""
        table, damaged = await self.read_documents()
        if not damaged:
            return table
        logged = (await self.replay(await self.first(), table.position)).table
        kinds = {kind: dict(entries) for kind, entries in table.kinds().items()}
        for key in damaged:
            kinds[key.kind][key.id] = logged.entry(key) or UNREADABLE
        return DocumentTable(table.position, kinds)

    async def run_durably(self, pipeline: Any) -> list[Any]:
        """Execute a pipeline, and return its results once they are on the required disks."""
        wait = self.server.wait
        if wait is None:
            results: list[Any] = await pipeline.execute()
            return results
        if wait[1]:
            # Replicas report what is on their disks once a second, and when a wait begins: before they have synced the
            # commit. Once they have received it, the next report includes it.
            pipeline.wait(wait[1], _RECEIVE_MILLISECONDS)
        pipeline.waitaof(*wait, _SYNC_MILLISECONDS)
        *results, synced = await pipeline.execute()
        if any(count < required for count, required in zip(synced, wait, strict=True)):
            what = "a commit did not reach the disk, or all replicas, in time"
            raise StoreUnavailable(str(self.server.address), what, "check its disk and its replicas")
        return results


def _decode_stream(entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> list[StoredCommit]:
    found = [(int(name.partition(b"-")[0]), fields) for name, fields in entries]
    return [
        StoredCommit(position, decode_record(position, fields.get(b"record", b"")), fields.get(b"id"))
        for position, fields in found
    ]


async def _extend(lock: Lock | None) -> None:
    if lock is not None:
        await lock.reacquire()
