"""A `Store` on a PostgreSQL server.

Each commit is one call of the function `commit`, which is one transaction. The server checks versions and guards, and
uses its own clock. Commits hold a lock until they are visible, so that watchers see positions in order. Each commit has
a unique id, so that it is applied once even if it is sent several times.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio

from orchestrator.errors import HistoryCompacted, RefusedError, StateLost
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
    Key,
    StateSnapshot,
    StoreStatistics,
    VerificationReport,
)
from orchestrator.state.log.codec import encode_commit
from orchestrator.state.log.commit_queue import CommitQueue
from orchestrator.state.log.loading import check_intact, not_empty_error, read_dump_parts
from orchestrator.state.stores.postgres.commits import CommitGroups
from orchestrator.state.stores.postgres.maintenance import read_dumped, read_server, repair_state, verify_state
from orchestrator.state.stores.postgres.notifications import Notifications
from orchestrator.state.stores.postgres.records import (
    check_names,
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
)

_POLL: Final = 0.25
"""The seconds after which watchers look for commits whose announcement was lost."""
_PAUSE: Final = 0.02
"""The minimum seconds between queries of a watcher, so that it reads frequent commits together."""
_SHARE: Final = 4
"""The pause in durations of a query: a server under load gets fewer queries, each with more commits."""
_RECORDS: Final = 50
"""The number of commits that watchers read at once."""


class PostgresStore:
    """A `Store` on a server, created by `open`."""

    def __init__(self, server: Server, notifications: Notifications) -> None:
        self._server, self._notifications = server, notifications
        self._queries = {name: server.sql(text) for name, text in read_queries().items()}
        self._groups = CommitGroups(server, self._queries)
        self._queue = CommitQueue(self._groups.commit)
        self.damage: Sequence[Damage] = ()
        """See `Store.damage`."""

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
        return await self._queue.commit(encoded)

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
        known = self._groups.position.newest
        ((position, _, _),) = await self._fetch("head")
        self._groups.position.note(position, known)
        return int(position)

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """See `Store.watch`.

        Another process's commit is announced, or seen within a quarter of a second.
        """
        while True:
            news, began = self._notifications.count, anyio.current_time()
            rows = await self._fetch("records", after=after, limit=_RECORDS)
            took = anyio.current_time() - began
            if after < rows[0][0]:
                raise HistoryCompacted(after, rows[0][0])
            commits = list(to_commits(row[1:] for row in rows if row[1] is not None))
            for commit in commits:
                if commit.position != after + 1:
                    raise StateLost(str(self._server.address), f"commit {after + 1} is missing")
                after = commit.position
                yield to_record(commit)
            if len(commits) < _RECORDS:
                await self._notifications.wait(news)
                await anyio.sleep_until(began + max(_PAUSE, min(_SHARE * took, _POLL)))

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """See `Store.history`."""
        rows = await self._fetch("history", kind=escape(key.kind), id=escape(key.id), limit=limit)
        return [to_version(row) for row in rows]

    async def at(self, position: int) -> StateSnapshot:
        """See `Store.at`."""
        async with self._snapshot() as connection:
            ((newest, first, _),) = await fetch(connection, self._queries["head"])
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
            server = await read_server(self._server, connection, self._queries)
        return StoreStatistics(
            position,
            first,
            count,
            int(size),
            log_bytes,
            [_key(*row) for row in expired],
            [(_key(kind, name), length) for kind, name, length in large],
            server,
        )

    async def verify(self) -> VerificationReport:
        """See `Store.verify`."""
        async with self._snapshot() as connection:
            return await self._verify(connection)

    async def _verify(self, connection: Connection) -> VerificationReport:
        report = await verify_state(connection, self._queries, f"{self._server.address}, {self._server.address.schema}")
        self.damage = report.damage
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
            ((newest, first, _),) = await fetch(connection, self._queries["head"])
            yield Dump(newest, first, read_dumped(self._server, connection, self._queries["dump"], newest))

    async def load(self, dump: Dump) -> None:
        """See `Store.load`: one transaction."""
        async with self._server.connection(MAINTENANCE_TIMEOUT) as connection, connection.transaction():
            ((is_free, position),) = await fetch(connection, self._queries["lock_empty"])
            if position or not is_free:
                raise not_empty_error(str(self._server.address), position)
            async for lines in read_dump_parts(dump):
                check_names(change.key for line in lines for change in line.changes)
                commits, versions = load_parameters(lines)
                await connection.execute(self._queries["load_commits"], commits)
                await connection.execute(self._queries["load_versions"], versions)
            if dump.position:
                await connection.execute(self._queries["install"])
                await connection.execute(self._queries["end_load"], {"position": dump.position, "first": dump.first})
                await connection.execute(self._server.sql("SELECT pg_notify('{channel}', '')"))

    async def _fetch(self, name: str, seconds: float = TIMEOUT, **parameters: Any) -> Sequence[tuple[Any, ...]]:
        return await self._server.fetch(self._queries[name], parameters, limit=seconds)

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Connection]:
        """Provide a connection whose queries all read the same state."""
        async with self._server.connection(MAINTENANCE_TIMEOUT) as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield connection


def _key(kind: str, name: str) -> Key:
    return Key(unescape(kind), unescape(name))
