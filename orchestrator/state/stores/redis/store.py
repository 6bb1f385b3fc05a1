"""A `Store` on a Redis or Valkey server: each commit is one call of `commit.lua`.

The server checks versions and guards, with its own clock. A commit whose reply was lost is sent again with the same id,
and applied once. Reads are answered from memory, after fetching the commits since the last read in one round trip.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import anyio
import orjson
from anyio import to_thread
from redis.exceptions import LockError

from orchestrator.errors import HistoryCompacted, RefusedError, StateLost, StoreUnavailable
from orchestrator.protocols import (
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
from orchestrator.state.log.codec import EncodedCommit, LogLine, encode_commit, get_writer_name, to_dumped, to_record
from orchestrator.state.log.loading import check_intact, damaged_log_error
from orchestrator.state.log.table import CommitStage, DocumentTable, read_versions, rebuild_state
from orchestrator.state.stores.redis.maintenance import examine, load_dump, prune, repair_state
from orchestrator.state.stores.redis.records import encode_key
from orchestrator.state.stores.redis.server import (
    PASSWORD,
    SET_PASSWORD,
    Server,
    connect,
    parse_url,
    read_server,
    translated,
)
from orchestrator.state.stores.redis.server_log import ServerLog
from orchestrator.state.stores.servers import KnownPosition, read_password
from orchestrator.system.clock import Clock

P = ParamSpec("P")
T = TypeVar("T")

FORMAT: Final = 1
_SCRIPT: Final = Path(__file__).with_name("commit.lua").read_bytes()
_ATTEMPTS: Final = 10
"""How often to send a commit that other processes' commits make valid again after it was refused."""


def _translates_errors(
    method: Callable[Concatenate[RedisStore, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[RedisStore, P], Coroutine[Any, Any, T]]:
    @wraps(method)
    async def translating(self: RedisStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with translated(self.address):
            return await method(self, *args, **kwargs)

    return translating


class RedisStore:
    """A `Store` on a server, created by `open`."""

    def __init__(self, server: Server, clock: Clock | None) -> None:
        self.address = server.address
        self._clock = clock
        self._log = ServerLog(server)
        self._apply = server.client.register_script(_SCRIPT)
        self._by = orjson.dumps(get_writer_name())
        self._table: DocumentTable | None = None
        """All documents as of the last read."""
        self._known = KnownPosition(str(server.address))
        self.damage: Sequence[Damage] = ()
        """See `Store.damage`."""

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, clock: Clock | None = None) -> AsyncIterator[RedisStore]:
        """Open the store at a URL; `clock` replaces that of the server, for tests.

        Raises RefusedError for unsuitable settings of the server or a newer format, and StoreUnavailable.
        """
        address = parse_url(url)
        password = await to_thread.run_sync(read_password, os.environ, "redis", PASSWORD, SET_PASSWORD)
        async with connect(address, password) as server:
            store = cls(server, clock)
            with translated(address):
                await store._check_format()
                await store.position()
            yield store

    async def _check_format(self) -> None:
        client, meta = self._log.client, self._log.meta
        while (text := await client.hget(meta, "format")) is None:
            await client.hsetnx(meta, "format", FORMAT)
        if (found := int(text)) > FORMAT:
            what = f"{self.address}: the state has format {found}, this version of council supports {FORMAT}"
            raise RefusedError(what, "upgrade cli-council")

    def local_paths(self) -> Sequence[Path]:
        """See `Store.local_paths`."""
        return ()

    @_translates_errors
    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`; a commit that was already applied is not applied again."""
        encoded = encode_commit(commit)
        with anyio.CancelScope(shield=True):
            for _ in range(_ATTEMPTS):
                reply = await self._send(encoded)
                match reply:
                    case int(position):
                        self._known.note(position, 0)
                        return position
                    case [b"refused", time]:
                        table, _ = await self._refresh()
                        CommitStage(table, "").add(encoded, float(time))  # raises the reason
                    case [b"damaged", key]:
                        raise StateLost(str(self.address), f"document {key.decode()} is damaged")
                    case [b"lost", position]:
                        raise self._known.lost(position)
        raise StoreUnavailable(str(self.address), "the documents of a commit keep changing", "try again")

    async def _send(self, commit: EncodedCommit) -> Any:
        now = "" if self._clock is None else repr(self._clock.now())
        arguments: list[Any] = [commit.id, now, self._by, self._known.newest, commit.payload, len(commit.guards)]
        for guard in commit.guards:
            arguments += (encode_key(guard.key), guard.epoch)
        arguments.append(len(commit.writes))
        for write in commit.writes:
            ttl = "" if write.ttl is None else repr(write.ttl)
            arguments += (encode_key(write.key), write.expected, write.length, ttl)
        keys = (self._log.documents, self._log.log, self._log.commits)
        if not commit.durable or self._log.server.wait is None:
            return await self._apply(keys, arguments)
        async with self._log.client.pipeline(transaction=False) as pipeline:
            await self._apply(keys, arguments, pipeline)
            return (await self._log.run_durably(pipeline))[0]

    async def _refresh(self) -> tuple[DocumentTable, float]:
        """Fetch the commits since the last read; return all documents and the time."""
        while True:
            known = self._known.newest
            table = self._table = self._table or await self._log.read_table()
            before = table.position
            time, position, found = await self._log.read_after(before)
            self._known.note(position, known)
            for commit in found:
                if commit.position == table.position + 1 and commit.line and not commit.line.is_damaged:
                    table.apply(commit.line)
            if table.position >= position:
                return table, time if self._clock is None else self._clock.now()
            if table.position == before:  # the next commit was pruned or is damaged
                self._table = None

    @_translates_errors
    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        table, now = await self._refresh()
        return table.get(key, now)

    @_translates_errors
    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`."""
        table, now = await self._refresh()
        return table.documents(kind, now, prefix)

    @_translates_errors
    async def position(self) -> int:
        """See `Store.position`."""
        known, position = self._known.newest, await self._log.position()
        self._known.note(position, known)
        return position

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """See `Store.watch`.

        A blocking read of the stream returns each commit immediately.
        """
        with translated(self.address):
            while True:
                first = await self._log.first()
                if after < first:
                    raise HistoryCompacted(after, first)
                for position, line, _ in await self._log.wait_for(after):
                    if position != after + 1 or line is None:
                        if after >= await self._log.first():
                            raise StateLost(str(self.address), f"commit {after + 1} is damaged")
                        break  # it was pruned in the meantime
                    after = position
                    yield to_record(line)

    @_translates_errors
    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """See `Store.history`."""
        table, _ = await self._refresh()
        entry, lines = table.entry(key), dict[int, LogLine]()
        position = entry.position if entry else 0
        while position and len(lines) < limit and (line := await self._log.find(position)):
            lines[position] = line
            position = next((change.previous for change in line.changes if change.key == key), 0)
        return read_versions(entry, key, limit, lines.get)

    @_translates_errors
    async def at(self, position: int) -> StateSnapshot:
        """See `Store.at`: reads the log up to the position."""
        while True:
            first, until = await self._log.first(), min(position, await self._log.position())
            if position < first:
                raise HistoryCompacted(position, first)
            found = [commit async for commit in self._log.lines(first, until)]
            if first == await self._log.first():  # otherwise it was pruned in the meantime
                break
        lines = [line for _, line, _ in found if line and not line.is_damaged]
        if len(lines) < len(found):
            raise StateLost(str(self.address), "a commit is damaged")
        return rebuild_state(position, lines, first)

    @_translates_errors
    async def compact(self, older_than: float, largest: int) -> CompactionResult:
        """See `Store.compact`; does nothing while another process reads the whole log."""
        before = await self._log.size()
        with suppress(LockError):
            async with self._log.exclusive(is_waiting=False) as lock:
                await prune(self._log, lock, lambda line, size: line.time < older_than or size > largest)
        return CompactionResult(before, await self._log.size(), await self._log.first())

    @_translates_errors
    async def statistics(self) -> StoreStatistics:
        """See `Store.statistics`."""
        table, now = await self._refresh()
        found = table.statistics(await self._log.first(), await self._log.size(), now)
        return replace(found, server=await read_server(self._log.server))

    @_translates_errors
    async def verify(self) -> VerificationReport:
        """See `Store.verify`."""
        async with self._log.exclusive() as lock:
            report = (await examine(self._log, lock)).report
        self.damage = report.damage
        return report

    @_translates_errors
    async def repair(self) -> VerificationReport:
        """See `Store.repair`; afterwards the log starts after the last damaged commit."""
        async with self._log.exclusive() as lock:
            found = await examine(self._log, lock)
            if not found.report.is_valid:
                _, now = await self._refresh()
                await repair_state(self._log, lock, found, self.commit, now)
                found = await examine(self._log, lock)
                self._table = None
        self.damage = found.report.damage
        return found.report

    @asynccontextmanager
    async def dump(self) -> AsyncIterator[Dump]:
        """See `Store.dump`; nothing is pruned during the dump."""
        with translated(self.address):
            async with self._log.exclusive() as lock:
                found = await examine(self._log, lock)
                check_intact(found.report)

                async def commits() -> AsyncGenerator[DumpedCommit]:
                    with translated(self.address):
                        async for position, line, _ in self._log.lines(found.first, found.report.position, lock):
                            if line is None or line.is_damaged:
                                raise damaged_log_error(position - 1)
                            yield to_dumped(line)

                yield Dump(found.report.position, found.first, commits())

    @_translates_errors
    async def load(self, dump: Dump) -> None:
        """See `Store.load`; a later load removes the leftovers of a killed one."""
        async with self._log.exclusive() as lock:
            await load_dump(self._log, lock, dump)
