"""The file store: the state of one machine, for any number of processes.

One thread checks and appends all waiting commits of this process under a flock, with one write and one `fdatasync` for
the whole group. Small commits that need no sync are appended without that thread. Reads are answered from memory after
reading the high-water mark (one system call).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import anyio
from anyio import to_thread

from orchestrator.config.store import require_local_folder, store_folder
from orchestrator.domain.events.state import StateLogRepaired, StateRepaired
from orchestrator.errors import LockHeld
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
    Event,
    Key,
    StateSnapshot,
    Store,
    StoreStatistics,
    VerificationReport,
    Write,
)
from orchestrator.state.log.codec import encode_commit
from orchestrator.state.log.commit_queue import CommitQueue, PendingCommit
from orchestrator.state.log.compaction import log_size
from orchestrator.state.log.identity import ensure_log, require_log
from orchestrator.state.log.journal import InlineResult, Journal, translated
from orchestrator.state.log.loading import Staging, check_intact, read_dump_parts
from orchestrator.state.log.reading import check_retained, read_dumped_commits, read_records
from orchestrator.state.log.segments import HighWaterMark, LogCursor, find_line, pruned_through
from orchestrator.state.log.table import DocumentTable, read_versions, repair_write
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock

T = TypeVar("T")

SEGMENT_BYTES: Final = 16 << 20
_POLL: Final = 0.025
"""Seconds between looks of a watcher for commits of other processes: each takes up to 100 µs."""
_PAUSES: Final = (0.005, 0.005, 0.01, 0.01, 0)
"""Seconds between inline commit attempts while other processes commit, before a thread waits for them."""


class FileStore:
    """A `Store` in a local directory, created by `open`."""

    def __init__(self, directory: Path, clock: Clock, segment_bytes: int, folder: Path) -> None:
        self._directory, self._clock, self._segment_bytes, self._folder = directory, clock, segment_bytes, folder
        self._journal = Journal(directory, clock, segment_bytes)
        self._compacting = FileLock(directory / "compaction.lock")
        self._queue = CommitQueue(partial(_commit_group, self._journal, self._in_thread))
        # A separate limiter, because slow work may occupy all threads of the default one.
        self._threads = anyio.CapacityLimiter(8)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, directory: Path, clock: Clock, *, segment_bytes: int = SEGMENT_BYTES, folder: Path | None = None
    ) -> AsyncIterator[FileStore]:
        """Open the store in `directory`, creating it if missing.

        Damage never prevents opening. A segment is closed at `segment_bytes`. `folder` is the enclosing folder that
        belongs to the store. Raises RefusedError on a network file system, and StoreUnavailable if the directory can't
        be read and written.
        """
        store = cls(directory, clock, segment_bytes, folder or directory)
        try:
            await store._in_thread(store._journal.open)
            yield store
        finally:
            with anyio.CancelScope(shield=True):
                await store._in_thread(store._journal.close)

    def local_paths(self) -> Sequence[Path]:
        """See `Store.local_paths`."""
        return (self._folder,)

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`."""
        return await self._queue.commit(encode_commit(commit))

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        await self._refresh()
        return self._journal.log.table.get(key, self._clock.now())

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`."""
        await self._refresh()
        return self._journal.log.table.documents(kind, self._clock.now(), prefix)

    async def position(self) -> int:
        """See `Store.position`."""
        await self._refresh()
        return self._journal.log.table.position

    async def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """See `Store.watch`.

        Another process's commit is seen within 25 ms.
        """
        await self._in_thread(partial(check_retained, self._directory, after))
        cursor = await self._in_thread(partial(self._journal.log.open_cursor, after))
        seen = HighWaterMark(0, 0, 0)
        try:
            while True:
                news = self._queue.committed
                with translated(self._directory):
                    mark = self._journal.log.lock.read()
                if mark is None or mark == seen:
                    with translated(self._directory):
                        self._journal.log.lock.check_not_replaced()
                    with anyio.move_on_after(_POLL):
                        await news.wait()
                    continue
                read = partial(read_records, self._directory, cursor, mark, after)
                if cursor.is_near(mark):
                    with translated(self._directory):
                        records, is_at_mark = read()
                else:
                    records, is_at_mark = await self._in_thread(read)
                for record in records:
                    after = record.position
                    yield record
                seen = mark if is_at_mark else seen
        finally:
            cursor.close()

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """See `Store.history`."""
        await self._refresh()
        entry = self._journal.log.table.entry(key)
        return await self._in_thread(lambda: read_versions(entry, key, limit, partial(find_line, self._directory)))

    async def at(self, position: int) -> StateSnapshot:
        """See `Store.at`."""
        await self._refresh()
        return await self._in_thread(partial(self._journal.log.state_at, position))

    async def compact(self, older_than: float, largest: int) -> CompactionResult:
        """See `Store.compact`: packs closed segments, and prunes the oldest.

        Damaged segments are not changed. If another process is compacting, this does nothing.
        """
        with suppress(LockHeld):
            async with self._exclusive(0):
                return await self._in_thread(partial(self._journal.compact, older_than, largest))
        size, first = await self._in_thread(lambda: (log_size(self._directory), pruned_through(self._directory)))
        return CompactionResult(size, size, first)

    async def statistics(self) -> StoreStatistics:
        """See `Store.statistics`."""
        await self._refresh()
        now, folder = self._clock.now(), self._directory
        return await self._in_thread(
            lambda: self._journal.log.table.statistics(pruned_through(folder), log_size(folder), now)
        )

    async def verify(self) -> VerificationReport:
        """See `Store.verify`: reads the whole log, without a snapshot."""
        async with self._exclusive():
            await self._refresh()
            return await self._in_thread(self._journal.verify)

    async def repair(self) -> VerificationReport:
        """See `Store.repair`.

        Damaged segments are replaced by their readable lines, and the originals are moved to `damaged/`. Afterwards the
        log does not go back beyond them.
        """
        report = await self.verify()
        if report.damage or report.damaged:
            async with self._exclusive():
                keys = {*report.damaged, *await self._in_thread(self._journal.begin_repair)}
                commit = _repair_commit(self._journal.log.table, sorted(keys), len(report.damage), self._clock.now())
                await self.commit(commit)
                await self._in_thread(partial(self._journal.replace_damaged, report.damage))
        return await self.verify()

    @asynccontextmanager
    async def dump(self) -> AsyncIterator[Dump]:
        """See `Store.dump`; nothing is pruned during the dump."""
        async with self._exclusive():
            await self._refresh()
            check_intact(await self._in_thread(self._journal.verify))
            end = await self._in_thread(self._journal.end)
            first = await self._in_thread(lambda: pruned_through(self._directory))
            with closing(await self._in_thread(partial(LogCursor, self._directory))) as cursor:

                async def commits() -> AsyncGenerator[DumpedCommit]:
                    while part := await self._in_thread(partial(read_dumped_commits, cursor, end)):
                        for commit in part:
                            yield commit

                yield Dump(end.position, first, commits())

    async def load(self, dump: Dump) -> None:
        """See `Store.load`.

        If the process is killed, the next process that opens the store completes or discards the load.
        """
        await self._in_thread(self._journal.check_empty)
        if dump.position == 0:
            async with aclosing(read_dump_parts(dump)) as parts:
                async for _ in parts:  # there is no log yet; otherwise this raises RefusedError
                    pass
            return
        async with self._exclusive():
            await self._in_thread(self._journal.check_empty)
            staging = Staging(self._directory, dump.first, self._segment_bytes)
            try:
                await self._in_thread(staging.begin)
                async with aclosing(read_dump_parts(dump)) as parts:
                    async for lines in parts:
                        await self._in_thread(partial(staging.add, lines))
                await self._in_thread(staging.finish)
                await self._in_thread(partial(self._journal.put, staging))
            finally:
                with anyio.CancelScope(shield=True):
                    await self._in_thread(staging.discard)
        self._queue.announce()

    @property
    def damage(self) -> Sequence[Damage]:
        """See `Store.damage`."""
        return tuple(self._journal.log.replay.damage)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        with translated(self._directory):
            return await to_thread.run_sync(call, limiter=self._threads)

    @asynccontextmanager
    async def _exclusive(self, limit: float | None = None) -> AsyncIterator[None]:
        """Keep other processes from compacting. Raises LockHeld after `limit` seconds."""
        async with AsyncExitStack() as stack:
            with translated(self._directory):
                await stack.enter_async_context(self._compacting.hold(limit))
            yield

    async def _refresh(self) -> None:
        with translated(self._directory):
            if self._journal.try_refresh_inline():
                return
        await self._in_thread(self._journal.catch_up)


async def _commit_group(
    journal: Journal, in_thread: Callable[[Callable[[], None]], Awaitable[None]], pending: deque[PendingCommit]
) -> None:
    """Append all pending commits, without a thread if that needs no waiting."""
    for pause in _PAUSES:
        done = journal.try_commit_inline(pending)
        if done is InlineResult.DONE:
            return
        if done is InlineResult.TOO_MUCH:
            break
        await anyio.sleep(pause)
    await in_thread(partial(journal.commit, pending))


def _repair_commit(table: DocumentTable, keys: Sequence[Key], damage: int, now: float) -> Commit:
    """Return a commit that writes documents' known values, or deletes those without."""
    writes, events = list[Write](), list[StateRepaired]()
    for key in keys:
        entry = table.entry(key)
        if entry is None:
            continue
        writes.append(repair_write(key, entry, now))
        if entry.exists(now):  # otherwise nothing was lost
            is_known = entry.value is not None
            events.append(StateRepaired(key=str(key), lost_version=entry.version, is_known=is_known))
    return Commit(writes, [*map(Event.of, events), Event.of(StateLogRepaired(damage=damage))])


def open_if_file(url: str, clock: Clock) -> AbstractAsyncContextManager[Store] | None:
    """Open the store at a `file:` URL; return None for another scheme."""
    return None if store_folder(url) is None else open_file_store(url, clock)


def open_file_store(url: str, clock: Clock, /) -> AbstractAsyncContextManager[Store]:
    """Open the store in the folder of a `file:` URL.

    Raises RefusedError if it is not on this machine.
    """
    folder = require_local_folder(url)
    assert folder is not None, "it is registered for this scheme"  # noqa: S101  (for the type checker)
    return _opened(folder, clock)


@asynccontextmanager
async def _opened(folder: Path, clock: Clock) -> AsyncIterator[Store]:
    with translated(folder):
        log = await to_thread.run_sync(ensure_log, folder)
    async with FileStore.open(log, clock, folder=folder) as store:
        yield store


def require_store(url: str) -> None:
    """Raise RefusedError for a URL whose folder has no store. Blocks.

    Opening would create one.
    """
    if (folder := require_local_folder(url)) is not None:
        require_log(folder)
