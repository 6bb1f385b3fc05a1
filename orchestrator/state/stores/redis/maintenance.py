"""Verify, repair, prune and load the state on a server, one process at a time."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import uuid4

import anyio
from redis.asyncio.lock import Lock
from redis.exceptions import LockNotOwnedError, RedisError, WatchError

from orchestrator.domain.events.state import StateLogRepaired, StateRepaired
from orchestrator.protocols import VERSIONS_KEPT, Commit, Damage, Dump, Event, Key, VerificationReport, Write
from orchestrator.state.log.codec import LogLine, prune_line, without_damaged_payload
from orchestrator.state.log.loading import not_empty_error, read_dump_lines
from orchestrator.state.log.table import DocumentTable, TableEntry, repair_write
from orchestrator.state.stores.redis.records import UNREADABLE, decode_entry, encode_entry, encode_key, encode_record
from orchestrator.state.stores.redis.server_log import PART, Replay, ServerLog

_ID_SECONDS: Final = 3600
"""How long the id of a commit is known: after an outage, its caller may send it again."""


class Examination(NamedTuple):
    """The result of reading everything: a report, the documents, the log's documents."""

    report: VerificationReport
    first: int
    stored: DocumentTable
    logged: Replay


async def examine(log: ServerLog, lock: Lock) -> Examination:
    """Read the whole log, and compare it with the documents."""
    first = await log.first()
    stored, _ = await log.read_documents()
    logged = await log.replay(first, stored.position, lock)
    path = Path(f"{log.server.address}: {log.log}")
    damage = [
        Damage(path, None, None if line is None else _lost_keys(line), f"commit {position} is damaged")
        for position, line, _ in logged.damaged
    ]
    report = VerificationReport(stored.position, await log.size(), damage, *stored.compare(logged.table))
    return Examination(report, first, stored, logged)


def _lost_keys(line: LogLine) -> tuple[Key, ...]:
    return tuple(change.key for change in line.changes if change.length)


async def repair_state(
    log: ServerLog, lock: Lock, found: Examination, commit: Callable[[Commit], Awaitable[int]], now: float
) -> None:
    """Restore documents from the log; commit those of damaged commits again.

    Afterwards the log starts after the last damaged commit.
    """
    stored, logged = found.stored, found.logged
    keys = sorted(set(_keys(stored)) | set(_keys(logged.table)))
    known = {key: _newest(stored.entry(key), logged.table.entry(key)) for key in keys}
    wrong = {key: entry for key, entry in known.items() if entry != stored.entry(key)}

    async def restore(pipeline: Any) -> None:
        current = {key: await pipeline.hget(log.documents, encode_key(key)) for key in wrong}
        pipeline.multi()
        for key, text in current.items():
            if (None if text is None else decode_entry(text)) == stored.entry(key):  # not changed in the meantime
                pipeline.hset(log.documents, encode_key(key), encode_entry(wrong[key]))

    await log.client.transaction(restore, log.documents)
    lost = {key: entry for key, entry in known.items() if entry != logged.intact.entry(key)}
    await commit(_repair_commit(lost, len(found.report.damage), now))
    if logged.damaged:
        await prune(log, lock, lambda _line, _size: False, through=logged.damaged[-1].position)


def _keys(table: DocumentTable) -> Iterator[Key]:
    return (Key(kind, name) for kind, entries in table.kinds().items() for name in entries)


def _newest(stored: TableEntry | None, logged: TableEntry | None) -> TableEntry:
    """Return the newest readable state of a document."""
    if stored is None or stored.damaged or (logged and not logged.damaged and logged.position > stored.position):
        entry = logged or UNREADABLE
        return entry._replace(damaged=False, version=max(entry.version, 1))
    return stored


def _repair_commit(lost: dict[Key, TableEntry], damage: int, now: float) -> Commit:
    """Return a commit that writes documents' known values, or deletes those without."""
    writes, events = list[Write](), list[Event]()
    for key, entry in lost.items():
        writes.append(repair_write(key, entry, now))
        is_known = entry.value is not None
        events.append(Event.of(StateRepaired(key=str(key), lost_version=entry.version, is_known=is_known)))
    return Commit(writes, [*events, Event.of(StateLogRepaired(damage=damage))])


async def prune(log: ServerLog, lock: Lock, is_old: Callable[[LogLine, int], bool], *, through: int = 0) -> None:
    """Prune the oldest commits: those that are old, and all `through`.

    A commit is old by its time and by the size of the log after it. Only a damaged commit up to `through` is pruned;
    another one ends this.
    """
    first, size = await log.first(), await log.size()
    cut, versions, deleted = first, defaultdict[Key, deque[int]](lambda: deque(maxlen=VERSIONS_KEPT)), set[Key]()
    async with aclosing(log.lines(first, await log.position(), lock)) as commits:
        async for position, line, _ in commits:
            is_prunable = line and not line.is_damaged and (position <= first or is_old(line, size))
            if position > through and not is_prunable:
                break
            for change in without_damaged_payload(line).changes if line else ():
                versions[change.key].append(position)
                (deleted.discard if change.length else deleted.add)(change.key)
            if position > first:
                cut, size = position, size - (len(line.payload) if line else 0)
    if cut == first and not through:
        return
    for key in deleted:  # only the version number is needed, to continue from
        versions[key] = deque([versions[key][-1]], VERSIONS_KEPT)
    forgotten = (await log.client.time())[0] - _ID_SECONDS
    # Pruned records after `first` have no effect until `first` changes; only then are older versions superfluous.
    await _rewrite(log, lock, first, cut, versions, forgotten, is_live=True)
    async with log.client.pipeline() as pipeline:
        await pipeline.watch(lock.name)
        if not await lock.owned():
            raise LockNotOwnedError
        pipeline.multi()
        pipeline.hset(log.meta, "first", cut)
        pipeline.xtrim(log.log, minid=f"{cut + 1}-0", approximate=False)
        await pipeline.execute()
    await _rewrite(log, lock, first, first, versions, forgotten, is_live=False)
    if names := await log.client.zrangebyscore(log.settled, "-inf", forgotten):
        await log.client.hdel(log.commits, *names)
        await log.client.zrem(log.settled, *names)


async def _rewrite(
    log: ServerLog,
    lock: Lock,
    first: int,
    until: int,
    versions: dict[Key, deque[int]],
    forgotten: float,
    *,
    is_live: bool,
) -> None:
    """Write the pruned records of commits with these versions.

    They are the commits after `first` (`is_live`), or those before. Ids of commits since `forgotten` are kept.
    """
    async with log.client.pipeline(transaction=False) as pipeline:
        async for position, line, name in log.lines(first, until, lock):
            if (position > first) is not is_live:
                continue
            intact = without_damaged_payload(line) if line else None
            wanted = {change.key for change in (intact.changes if intact else ()) if position in versions[change.key]}
            if intact and wanted:
                pipeline.hset(log.pruned, str(position), encode_record(prune_line(intact, wanted)))
            else:
                pipeline.hdel(log.pruned, str(position))
            if name and line and line.time > forgotten:
                pipeline.zadd(log.settled, {name: line.time})
            elif name:
                pipeline.hdel(log.commits, name)
            await _execute_if_long(pipeline, lock)
        await pipeline.execute()


async def _execute_if_long(pipeline: Any, lock: Lock) -> None:
    if len(pipeline) >= PART:
        await pipeline.execute()
        await lock.reacquire()


async def load_dump(log: ServerLog, lock: Lock, dump: Dump) -> None:
    """Load a dump into an empty store.

    Its commits are staged under other keys, which become those of the store.
    """
    if position := await log.position():
        raise not_empty_error(str(log.server.address), position)
    try:
        await _stage(log, lock, dump)
        if dump.position:
            await _install(log, dump)
    finally:
        with anyio.CancelScope(shield=True), suppress(RedisError):
            await _unlink_staged(log)


async def _stage(log: ServerLog, lock: Lock, dump: Dump) -> None:
    await _unlink_staged(log)
    table = DocumentTable()
    async with log.client.pipeline(transaction=False) as pipeline, aclosing(read_dump_lines(dump)) as lines:
        async for line in lines:
            table.apply(line)
            if line.position > dump.first:
                pipeline.xadd(f"{log.staged}:log", {"record": encode_record(line)}, f"{line.position}-0")
            else:
                pipeline.hset(f"{log.staged}:pruned", str(line.position), encode_record(line))
            await _execute_if_long(pipeline, lock)
        pipeline.hset(f"{log.staged}:documents", "position", dump.position)
        for key in _keys(table):
            pipeline.hset(f"{log.staged}:documents", encode_key(key), encode_entry(table.entry(key) or UNREADABLE))
            await _execute_if_long(pipeline, lock)
        await pipeline.execute()


async def _install(log: ServerLog, dump: Dump) -> None:
    token = uuid4().hex
    try:
        async with log.client.pipeline() as pipeline:
            await pipeline.watch(log.documents)
            if position := int(await pipeline.hget(log.documents, "position") or 0):
                raise not_empty_error(str(log.server.address), position)
            names = [name for name in _STAGED if await pipeline.exists(f"{log.staged}:{name}")]
            pipeline.multi()
            for name in names:
                pipeline.rename(f"{log.staged}:{name}", log.key(name))
            pipeline.hset(log.meta, mapping={"first": dump.first, "loaded": token})
            await pipeline.execute()
    except WatchError:
        if await log.client.hget(log.meta, "loaded") != token.encode():  # otherwise only the reply was lost
            raise
    async with log.client.pipeline(transaction=False) as pipeline:
        pipeline.hset(log.meta, "loaded", token)
        await log.run_durably(pipeline)


_STAGED = ("log", "pruned", "documents")


async def _unlink_staged(log: ServerLog) -> None:
    await log.client.unlink(*(f"{log.staged}:{name}" for name in _STAGED))
