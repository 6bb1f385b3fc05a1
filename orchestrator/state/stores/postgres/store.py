"""A `Store` on a PostgreSQL server.

Each commit is one call of the function `commit`, which is one transaction. The server checks versions and guards, and
uses its own clock. Commits hold a lock until they are visible, so that watchers see positions in order. Each commit has
a unique id, so that it is applied once even if it is sent several times.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import psycopg

from orchestrator.errors import (
    HistoryCompacted,
    LeaseLost,
    RefusedError,
    StateError,
    StateLost,
    StoreUnavailable,
    VersionConflict,
)
from orchestrator.protocols import (
    LARGE_DOCUMENT_BYTES,
    VERSIONS_KEPT,
    Commit,
    CommitRecord,
    CompactionResult,
    Damage,
    Document,
    DocumentVersion,
    Dump,
    DumpedCommit,
    Key,
    StateSnapshot,
    StoreStatistics,
    VerificationReport,
)
from orchestrator.state.log.codec import EncodedCommit, LogLine, encode_commit, get_writer_name
from orchestrator.state.log.loading import check_intact, not_empty_error, read_dump_lines
from orchestrator.state.stores.postgres.maintenance import repair_state, verify_state
from orchestrator.state.stores.postgres.notifications import Notifications
from orchestrator.state.stores.postgres.records import (
    check_names,
    commit_parameters,
    escape,
    load_parameters,
    prefix_pattern,
    to_commits,
    to_document,
    to_record,
    to_version,
    unescape,
)
from orchestrator.state.stores.postgres.schema import prepare, read_queries
from orchestrator.state.stores.postgres.server import (
    MAINTENANCE_TIMEOUT,
    TIMEOUT,
    Connection,
    Server,
    fetch,
    is_disconnected,
)

_POLL: Final = 0.25
"""The seconds after which watchers look for commits whose announcement was lost."""
_GROUP: Final = 50
"""The maximum number of commits in a transaction."""
_GROUP_BYTES: Final = 8 << 20
_RECORDS: Final = 50
"""The number of commits that watchers read at once."""
_PART_BYTES: Final = 1 << 20
_UNKNOWN: Final = 1_000
"""The number of commits with an unknown outcome whose ids are remembered."""


class _PendingCommit:
    """A commit that waits for its group, and later its outcome."""

    __slots__ = ("commit", "failure", "id", "position")

    def __init__(self, name: str, commit: EncodedCommit) -> None:
        self.id, self.commit = name, commit
        self.position = 0
        self.failure: StateError | StoreUnavailable | None = None

    @property
    def is_settled(self) -> bool:
        return bool(self.position or self.failure)


class PostgresStore:
    """A `Store` on a server, created by `open`.

    Longer than most: 15 of its methods are the operations of `Store`.
    """

    def __init__(self, server: Server, notifications: Notifications) -> None:
        self._server, self._notifications = server, notifications
        self._queries = {name: server.sql(text) for name, text in read_queries().items()}
        self._by = escape(get_writer_name())
        self._seen = 0
        """The newest known position: a server that is behind it has lost commits."""
        self._unknown: dict[str, None] = {}
        """Ids of commits that may have been applied although their caller got an error."""
        self._pending: deque[_PendingCommit] = deque()
        self._group: anyio.Event | None = None
        """Set when the current group is committed."""
        self._damage: Sequence[Damage] = ()

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[PostgresStore]:
        """Open the store at a URL, creating its tables if they are missing.

        Raises RefusedError for an unsuitable server or newer tables, StoreUnavailable if it can't be used.
        """
        async with Server.connect(url) as server, Notifications(server, _POLL).open() as notifications:
            await prepare(server)
            yield cls(server, notifications)

    def local_paths(self) -> Sequence[Path]:
        """See `Store.local_paths`."""
        return ()

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`.

        After StoreUnavailable, the same commit can be sent again, and is applied once.
        """
        encoded = encode_commit(commit)
        check_names(write.key for write in commit.writes)
        pending = _PendingCommit(commit.id, encoded)
        self._pending.append(pending)
        with anyio.CancelScope(shield=True):
            await anyio.lowlevel.checkpoint()  # let other tasks add their commits to the group
            while not pending.is_settled:
                if self._group is None:
                    await self._lead_group()
                else:
                    await self._group.wait()
        if pending.failure:
            raise pending.failure
        return pending.position

    async def _lead_group(self) -> None:
        """Commit the next group; later commits are part of another one."""
        self._group = done = anyio.Event()
        group, size = list[_PendingCommit](), 0
        while self._pending and len(group) < _GROUP and (not group or size < _GROUP_BYTES):
            group.append(self._pending.popleft())
            size += len(group[-1].commit.payload)
        try:
            for pending, reply in zip(group, await self._send(group), strict=True):
                self._settle(pending, reply)
        except (StoreUnavailable, RefusedError) as error:
            for pending in group:
                pending.failure = error if isinstance(error, StoreUnavailable) else self._lost(0)
        finally:
            self._group = None
            done.set()

    async def _send(self, group: Sequence[_PendingCommit]) -> Sequence[Any]:
        """Return the server's reply to each commit of a group, in one transaction."""
        calls = (self._queries["commit"].replace("{n}", str(number)) for number in range(len(group)))
        query = "SELECT " + ", ".join(calls)
        parameters: dict[str, Any] = {"by": self._by, "is_repeated": any(one.id in self._unknown for one in group)}
        parameters["is_durable"] = any(one.commit.durable for one in group)
        for number, one in enumerate(group):
            parameters |= commit_parameters(one.commit, one.id, number)

        async def send(connection: Connection) -> Sequence[Any]:
            # A later attempt has a higher number, also that of a caller who tries again.
            parameters.update(attempt=time.time_ns(), seen=self._seen)
            try:
                (replies,) = await fetch(connection, query, parameters)
            except psycopg.Error:
                parameters["is_repeated"] = True
                raise
            return replies

        try:
            replies = await self._server.run(send)
        except StoreUnavailable as error:
            if is_disconnected(error.__cause__) or parameters["is_repeated"]:
                self._unknown |= dict.fromkeys(one.id for one in group)
                while len(self._unknown) > _UNKNOWN:
                    del self._unknown[next(iter(self._unknown))]
            raise
        for one in group:
            self._unknown.pop(one.id, None)
        return replies

    def _settle(self, pending: _PendingCommit, reply: Sequence[Any]) -> None:
        """Set the outcome of a commit."""
        commit = pending.commit
        match reply:
            case ["ok", position]:
                self._seen = max(self._seen, position)
                pending.position = position
            case ["conflict", number, found, by, when]:
                write = commit.writes[number - 1]
                pending.failure = VersionConflict(
                    str(write.key), write.expected, int(found), writer=unescape(by), time=float(when)
                )
            case ["lease", number, epoch]:
                guard = commit.guards[number - 1]
                pending.failure = LeaseLost(str(guard.key), guard.epoch, epoch)
            case ["lost", position]:
                pending.failure = self._lost(position)
            case _:
                raise AssertionError(reply)

    def _lost(self, position: int) -> StateLost:
        return StateLost(str(self._server.address), f"it is at position {position}, after it was at {self._seen}")

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        rows = await self._fetch("get", kind=escape(key.kind), id=escape(key.id))
        return to_document(rows[0]) if rows else None

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`."""
        return [
            to_document(row) for row in await self._fetch("list", kind=escape(kind), pattern=prefix_pattern(prefix))
        ]

    async def position(self) -> int:
        """See `Store.position`."""
        ((position, _, _),) = await self._fetch("head")
        if position < self._seen:
            raise self._lost(position)
        self._seen = position
        return int(position)

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """See `Store.watch`.

        Another process's commit is announced, or seen within a quarter of a second.
        """
        while True:
            rows = await self._fetch("records", after=after, limit=_RECORDS)
            if after < rows[0][0]:
                raise HistoryCompacted(after, rows[0][0])
            commits = list(to_commits(row[1:] for row in rows if row[1] is not None))
            for commit in commits:
                if commit.position != after + 1:
                    raise StateLost(str(self._server.address), f"commit {after + 1} is missing")
                after = commit.position
                yield to_record(commit)
            if not commits:
                await self._notifications.wait()

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """See `Store.history`."""
        rows = await self._fetch("history", kind=escape(key.kind), id=escape(key.id), limit=limit)
        return [to_version(row) for row in rows]

    async def at(self, position: int) -> StateSnapshot:
        """See `Store.at`."""
        async with self._snapshot() as connection:
            newest, first = await self._extent(connection)
            if position < first:
                raise HistoryCompacted(position, first)
            if position > newest:
                raise RefusedError(
                    f"position {position} does not exist yet (newest: {newest})", "use an earlier position"
                )
            times = await fetch(connection, self._queries["time_at"], {"position": position})
            rows = await fetch(connection, self._queries["state_at"], {"position": position})
        when = times[0][0] if times else 0.0
        found = [to_document(row) for row in rows if row[3] is not None]
        there = {one.key: one for one in found if one.expires is None or when < one.expires}
        return StateSnapshot(position, when, there)

    async def _extent(self, connection: Connection) -> tuple[int, int]:
        ((newest, first, _),) = await fetch(connection, self._queries["head"])
        return newest, first

    async def compact(self, older_than: float, largest: int) -> CompactionResult:
        """See `Store.compact`; if another process is compacting, this does nothing."""
        parameters = {"older_than": older_than, "largest": largest, "versions": VERSIONS_KEPT}
        ((before, after, first),) = await self._fetch("compact", MAINTENANCE_TIMEOUT, **parameters)
        return CompactionResult(before, after, first)

    async def statistics(self) -> StoreStatistics:
        """See `Store.statistics`."""
        async with self._snapshot() as connection:
            ((position, first, log_bytes),) = await fetch(connection, self._queries["head"])
            ((count, size),) = await fetch(connection, self._queries["totals"])
            expired = await fetch(connection, self._queries["expired"])
            large = await fetch(connection, self._queries["large"], {"bytes": LARGE_DOCUMENT_BYTES})
        return StoreStatistics(
            position,
            first,
            count,
            int(size),
            log_bytes,
            [_key(*row) for row in expired],
            [(_key(kind, name), length) for kind, name, length in large],
        )

    async def verify(self) -> VerificationReport:
        """See `Store.verify`."""
        async with self._snapshot() as connection:
            return await self._verify(connection)

    async def _verify(self, connection: Connection) -> VerificationReport:
        report = await verify_state(connection, self._queries, f"{self._server.address}, {self._server.address.schema}")
        self._damage = report.damage
        return report

    async def repair(self) -> VerificationReport:
        """See `Store.repair`.

        Afterwards the history before the damaged commits is no longer available.
        """
        report = await self.verify()
        if report.is_valid:
            return report
        commit = await self._server.run(lambda one: repair_state(one, self._queries, report), MAINTENANCE_TIMEOUT)
        await self.commit(commit)
        return await self.verify()

    @asynccontextmanager
    async def dump(self) -> AsyncIterator[Dump]:
        """See `Store.dump`: reads a snapshot of the database."""
        async with self._snapshot() as connection:
            check_intact(await self._verify(connection))
            newest, first = await self._extent(connection)
            yield Dump(newest, first, self._dumped(connection, newest))

    async def _dumped(self, connection: Connection, newest: int) -> AsyncGenerator[DumpedCommit]:
        rows = list[tuple[Any, ...]]()
        with self._server.translated():
            async with connection.cursor("dump", binary=True) as cursor:
                cursor.itersize = _RECORDS
                await cursor.execute(self._queries["dump"], {"position": newest})
                async for row in cursor:
                    if rows and row[0] != rows[0][0]:
                        (commit,) = to_commits(rows)
                        yield commit
                        rows = []
                    rows.append(row)
        for commit in to_commits(rows):
            yield commit

    async def load(self, dump: Dump) -> None:
        """See `Store.load`: one transaction."""
        async with self._server.connection(MAINTENANCE_TIMEOUT) as connection, connection.transaction():
            ((is_free, position),) = await fetch(connection, self._queries["lock_empty"])
            if position or not is_free:
                raise not_empty_error(str(self._server.address), position)
            lines, size = list[LogLine](), 0
            async for line in read_dump_lines(dump):
                lines.append(line)
                size += len(line.payload)
                if size >= _PART_BYTES:
                    await self._load(connection, lines)
                    lines, size = [], 0
            await self._load(connection, lines)
            if dump.position:
                await connection.execute(self._queries["install"])
                await connection.execute(self._queries["end_load"], {"position": dump.position, "first": dump.first})
                await connection.execute(self._server.sql("SELECT pg_notify('{channel}', '')"))

    async def _load(self, connection: Connection, lines: Sequence[LogLine]) -> None:
        check_names(change.key for line in lines for change in line.changes)
        commits, versions = load_parameters(lines)
        await connection.execute(self._queries["load_commits"], commits)
        await connection.execute(self._queries["load_versions"], versions)

    @property
    def damage(self) -> Sequence[Damage]:
        """See `Store.damage`."""
        return self._damage

    async def _fetch(self, name: str, seconds: float = TIMEOUT, **parameters: Any) -> Sequence[tuple[Any, ...]]:
        return await self._server.fetch(self._queries[name], parameters, limit=seconds)

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Connection]:
        """Lend a connection whose queries all read the same state."""
        async with self._server.connection(MAINTENANCE_TIMEOUT) as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield connection


def _key(kind: str, name: str) -> Key:
    return Key(unescape(kind), unescape(name))
