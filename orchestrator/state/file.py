"""The file store: all state of one machine in one directory, for any number of processes.

A commit is checked and appended under a flock by one thread for all that wait in this process: one write and one
`fdatasync` for the whole group. Reads are answered from memory after a look at the mark (one system call).
"""

from __future__ import annotations

import errno
import json
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import anyio
from anyio import to_thread

from orchestrator.clock import Clock
from orchestrator.config.store import named_folder
from orchestrator.errors import HistoryGone, LockHeld, RefusedError, StateError, StoreUnavailable
from orchestrator.failpoints import failpoint
from orchestrator.filelock import FileLock
from orchestrator.protocols import (
    HISTORY,
    Commit,
    Compacted,
    Damage,
    Document,
    Dump,
    DumpedCommit,
    Event,
    Key,
    Record,
    State,
    Statistics,
    Store,
    Verified,
    Version,
    Write,
)
from orchestrator.state import snapshot
from orchestrator.state.boot import boot_id
from orchestrator.state.compaction import log_size, pack_closed, remove_replaced, thin, to_thin
from orchestrator.state.dumping import damaged_at, lines_of, not_empty, refuse_unsound
from orchestrator.state.history import state_at, versions
from orchestrator.state.log import (
    Decoded,
    EncodedCommit,
    Incomplete,
    Line,
    encode_commit,
    encode_line,
    never_durable,
    to_dumped,
    to_record,
)
from orchestrator.state.mounts import refuse_network_mount
from orchestrator.state.packing import Sum, sum_of
from orchestrator.state.replay import Replay
from orchestrator.state.segments import (
    Cursor,
    Lock,
    Mark,
    Segment,
    Thinned,
    append,
    create_segment,
    cut,
    find_line,
    is_store,
    make_durable,
    make_folder,
    rewrite,
    segments,
    size_of,
    sync_folder,
    thinned_to,
)
from orchestrator.state.staging import Staging, put_loaded
from orchestrator.state.table import Stage
from orchestrator.state.writer import name_of_writer

T = TypeVar("T")

SEGMENT_BYTES: Final = 16 << 20
_POLL_FASTEST: Final = 0.01  # seconds
_POLL_SLOWEST: Final = 0.25
_AT_ONCE_BYTES: Final = 16 << 10  # read on the event loop: some ten commits, which were written just now
_FOLLOW_BYTES: Final = 1 << 20  # read or written per trip to a thread
_REMEDIES: Final = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "raise the disk quota or free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount the file system writable",
    errno.EACCES: "give this user access to it",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG), "name a folder that is there or can be made"),
    errno.ESTALE: "give the command again",
}


@dataclass(slots=True)
class _Turn:
    """A caller's place in the next group: its commit, then what came of it."""

    commit: EncodedCommit
    position: int = 0
    failure: StateError | StoreUnavailable | None = None

    @property
    def is_settled(self) -> bool:
        return bool(self.position or self.failure)


class FileStore:
    """A `Store` in a local directory; made by `open`."""

    def __init__(self, directory: Path, clock: Clock, segment_bytes: int) -> None:
        self._directory = directory
        self._clock, self._by = clock, name_of_writer()
        self._segment_bytes = segment_bytes
        self._compacting = FileLock(directory / "compaction.lock")
        self._replay = Replay()
        self._opened = ExitStack()
        self._lock: Lock
        self._cursor: Cursor
        self._saved = 0  # bytes of the log in the newest snapshot that is known
        self._seen = b""  # the mark up to which the table has the log
        self._broken: OSError | None = None
        self._rolls = False  # whether the next commit begins a new segment
        self._turns: deque[_Turn] = deque()
        self._group: anyio.Event | None = None
        """Set when the group is over that is being committed."""
        self._news = anyio.Event()
        # Our own threads: those of others may all be taken by slow work.
        self._threads = anyio.CapacityLimiter(8)
        # Held by the thread that moves the cursor. The event loop never waits for it, and a task that is
        # cancelled the hard way can't let two threads in.
        self._io = threading.Lock()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, directory: Path, clock: Clock, *, segment_bytes: int = SEGMENT_BYTES
    ) -> AsyncIterator[FileStore]:
        """Open the store in `directory`, which is made if need be; damage never prevents it.

        A segment is closed once it holds `segment_bytes`. Raises RefusedError on a network file system,
        StoreUnavailable if the directory can't be read and written.
        """
        store = cls(directory, clock, segment_bytes)
        try:
            await store._in_thread(store._open)
            yield store
        finally:
            with anyio.CancelScope(shield=True):
                await store._in_thread(store._close)

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`."""
        turn = _Turn(encode_commit(commit))
        self._turns.append(turn)
        with anyio.CancelScope(shield=True):
            while not turn.is_settled:
                if self._group is None:
                    await self._lead_group()
                else:
                    await self._group.wait()
        if turn.failure:
            raise turn.failure
        return turn.position

    async def _lead_group(self) -> None:
        """Commit what waits by now; what comes meanwhile is the next group's."""
        self._group = over = anyio.Event()
        try:
            await self._in_thread(self._commit_group)
        finally:
            self._group = None
            over.set()
            self._announce()

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        await self._refresh()
        return self._replay.table.get(key, self._clock.now())

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`."""
        await self._refresh()
        return self._replay.table.documents(kind, self._clock.now(), prefix)

    async def position(self) -> int:
        """See `Store.position`."""
        await self._refresh()
        return self._replay.table.position

    async def watch(self, after: int = 0) -> AsyncGenerator[Record]:
        """See `Store.watch`; a commit of another process is seen within a quarter of a second."""
        await self._in_thread(partial(_check_kept, self._directory, after))
        cursor = await self._in_thread(partial(Cursor, self._directory, after))
        seen, pause = b"", _POLL_FASTEST
        try:
            while True:
                with self._explained():
                    news, current = self._news, self._lock.read()
                mark = Mark.decode(current) if current != seen else None
                if mark is None:
                    with self._explained():
                        self._lock.check_place()
                    with anyio.move_on_after(pause):
                        await news.wait()
                    pause = min(1.25 * pause, _POLL_SLOWEST)
                    continue
                records, is_at_mark = await self._in_thread(
                    partial(_read_records, self._directory, cursor, mark, after)
                )
                for record in records:
                    after = record.position
                    yield record
                seen, pause = (current if is_at_mark else seen), _POLL_FASTEST
        finally:
            cursor.close()

    async def history(self, key: Key, limit: int = HISTORY) -> Sequence[Version]:
        """See `Store.history`."""
        await self._refresh()
        entry = self._replay.table.entry(key)
        return await self._in_thread(lambda: versions(entry, key, limit, partial(find_line, self._directory)))

    async def at(self, position: int) -> State:
        """See `Store.at`."""
        await self._refresh()
        return await self._in_thread(partial(self._state_at, position))

    async def compact(self, older_than: float, largest: int) -> Compacted:
        """See `Store.compact`: closed segments are packed, and the oldest thinned out.

        What can't be read wholly stays as it is. Where another process is at it, nothing is done.
        """
        with suppress(LockHeld):
            async with self._alone(0):
                return await self._in_thread(partial(self._compact, older_than, largest))
        size, first = await self._in_thread(lambda: (log_size(self._directory), thinned_to(self._directory)))
        return Compacted(size, size, first)

    async def statistics(self) -> Statistics:
        """See `Store.statistics`."""
        await self._refresh()
        now, folder = self._clock.now(), self._directory
        return await self._in_thread(lambda: self._replay.table.statistics(thinned_to(folder), log_size(folder), now))

    async def verify(self) -> Verified:
        """See `Store.verify`: all is read, whatever a snapshot says."""
        async with self._alone():
            await self._refresh()
            return await self._in_thread(self._verify)

    async def repair(self) -> Verified:
        """See `Store.repair`: segments with damage are replaced by what can be read of them, and kept in `damaged/`.

        The log does not go back behind them any more.
        """
        found = await self.verify()
        if found.damage or found.damaged:
            entries = {key: entry for key in found.damaged if (entry := self._replay.table.entry(key)) is not None}
            known = {key: None if entry.value is None else json.loads(entry.value) for key, entry in entries.items()}
            events = [
                Event("state.repaired", {"key": str(key), "lost": entry.version, "is_known": entry.value is not None})
                for key, entry in entries.items()
            ]
            now = self._clock.now()
            writes = [
                Write(key, entry.version if entry.exists(now) else 0, known[key]) for key, entry in entries.items()
            ]
            async with self._alone():
                self._rolls = True
                await self.commit(Commit(writes, [*events, Event("state.log_repaired", {"damage": len(found.damage)})]))
                await self._in_thread(partial(self._replace_damaged, found.damage))
        return await self.verify()

    @asynccontextmanager
    async def dump(self) -> AsyncIterator[Dump]:
        """See `Store.dump`; nothing is thinned out meanwhile."""
        async with self._alone():
            await self._refresh()
            refuse_unsound(await self._in_thread(self._verify))
            end = await self._in_thread(self._end)
            first = await self._in_thread(lambda: thinned_to(self._directory))
            with closing(await self._in_thread(partial(Cursor, self._directory))) as cursor:
                yield Dump(end.position, first, self._dumped(cursor, end))

    async def _dumped(self, cursor: Cursor, end: Mark) -> AsyncGenerator[DumpedCommit]:
        while commits := await self._in_thread(partial(_read_dumped, cursor, end)):
            for commit in commits:
                yield commit

    async def load(self, dump: Dump) -> None:
        """See `Store.load`; what it was killed in is brought to its end by whoever opens the store, or is as if it
        had never begun.
        """
        await self._in_thread(self._check_empty)
        if dump.position == 0:
            async with aclosing(lines_of(dump)) as lines:
                async for _ in lines:  # there is none, or it is refused
                    pass
            return
        async with self._alone():
            await self._in_thread(self._check_empty)
            staging = Staging(self._directory, dump.first, self._segment_bytes)
            try:
                await self._stage(staging, dump)
                await self._in_thread(partial(self._put, staging))
            finally:
                with anyio.CancelScope(shield=True):
                    await self._in_thread(staging.discard)
        self._announce()

    async def _stage(self, staging: Staging, dump: Dump) -> None:
        await self._in_thread(staging.begin)
        lines, size = list[Line](), 0
        async with aclosing(lines_of(dump)) as found:
            async for line in found:
                lines.append(line)
                size += len(line.payload)
                if size >= _FOLLOW_BYTES:
                    await self._in_thread(partial(staging.add, lines))
                    lines, size = [], 0
        await self._in_thread(partial(staging.add, lines))
        await self._in_thread(staging.finish)

    @property
    def damage(self) -> Sequence[Damage]:
        """See `Store.damage`."""
        return tuple(self._replay.damage)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        with self._explained():
            return await to_thread.run_sync(call, limiter=self._threads)

    @asynccontextmanager
    async def _alone(self, limit: float | None = None) -> AsyncIterator[None]:
        """Keep other processes from compacting; LockHeld after so many seconds."""
        async with AsyncExitStack() as stack:
            with self._explained():
                await stack.enter_async_context(self._compacting.hold(limit))
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: OSError) -> StoreUnavailable:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and the system's log")
        return StoreUnavailable(self._directory, error.strerror or str(error), remedy)

    def _announce(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def _refresh(self) -> None:
        with self._explained():
            current = self._lock.read()
            if current == self._seen or self._catch_up_at_once(current):
                return
        await self._in_thread(self._catch_up)

    def _catch_up_at_once(self, current: bytes) -> bool:
        """Take in what others have just committed if that is so little that a trip to a thread would take longer."""
        mark = Mark.decode(current)
        if mark is None or not self._io.acquire(blocking=False):
            return False
        try:
            is_near = mark.segment == self._cursor.segment and mark.end - self._cursor.offset <= _AT_ONCE_BYTES
            if is_near:
                self._follow(current)
            return is_near
        finally:
            self._io.release()

    # From here on: in worker threads only.

    def _end(self) -> Mark:
        """Return where the log ends now."""
        with self._io, self._lock.held():
            self._recover()
            return Mark(self._cursor.segment, self._cursor.offset, self._replay.table.position)

    def _check_empty(self) -> None:
        end = self._end()
        if end.segment:  # an empty segment is what a commit left that could not be made durable
            raise not_empty(str(self._directory), end.position)

    def _put(self, staging: Staging) -> None:
        with self._io, self._lock.held():
            self._recover()
            if self._cursor.segment:
                raise not_empty(str(self._directory), self._replay.table.position)
            staging.put()
            self._recover()

    def _verify(self) -> Verified:
        replay = Replay()
        with closing(Cursor(self._directory)) as cursor:
            _read_on(replay, cursor, Mark.decode(self._lock.read()))  # most of it while others may commit
            with self._io:
                self._follow(self._lock.read())
                mark = Mark.decode(self._seen)
                _read_on(replay, cursor, mark)
                replay.finish(mark.position if mark else 0, cursor.path, cursor.offset)
                damaged, differs = replay.table.compare(self._replay.table)
        if replay.damage:  # what we know and the log does not tell any more is what the damage has hit
            damaged, differs = sorted({*damaged, *differs}), []
        return Verified(replay.table.position, log_size(self._directory), tuple(replay.damage), damaged, differs)

    def _replace_damaged(self, damage: Sequence[Damage]) -> None:
        paths = {one.path.name for one in damage}
        closed = segments(self._directory)[:-1]
        hit = [one for one in closed if paths & {one.path(self._directory).name for one in (one, one.packed())}]
        if hit:
            thin(self._directory, hit[-1], self._lock.held(), self._directory / "damaged")
            with self._lock.held():
                remove_replaced(self._directory)
            self._replay.damage.clear()

    def _compact(self, older_than: float, largest: int) -> Compacted:
        before = log_size(self._directory)
        with self._lock.held():
            remove_replaced(self._directory)
        pack_closed(self._directory)
        with suppress(ValueError):  # it is damage, of which is told, and which may be mended
            while (last := to_thin(self._directory, older_than, largest)) is not None:
                thin(self._directory, last, self._lock.held())
                with self._lock.held():
                    remove_replaced(self._directory)
                self._renew_snapshot()
        return Compacted(before, log_size(self._directory), thinned_to(self._directory))

    def _renew_snapshot(self) -> None:
        """Have one of the log as it is after segments were thinned out."""
        with self._io, self._lock.held():
            self._recover()
            (thinned, *_) = segments(self._directory)
            made = sum_of(thinned.path(self._directory).read_bytes())
            if made is not None:
                left = {first: part for first, part in self._cursor.sums.items() if first > thinned.last}
                self._cursor.sums = {thinned.first: made, **left}
                self._saved = 0
                self._save()

    def _state_at(self, position: int) -> State:
        while True:
            _check_kept(self._directory, position)
            first, mark = thinned_to(self._directory), Mark.decode(self._lock.read())
            with suppress(FileNotFoundError), closing(Cursor(self._directory)) as cursor:
                found = cursor.read(mark) if mark else ()
                lines = (one.item.line for one in found if isinstance(one.item, Decoded))
                state = state_at(position, lines, first)
                if thinned_to(self._directory) == first:  # else some may have been passed over
                    return state

    def _open(self) -> None:
        refuse_network_mount(self._directory)
        make_folder(self._directory)
        self._lock = self._opened.enter_context(closing(Lock(self._directory)))
        self._cursor = Cursor(self._directory)
        self._opened.callback(self._close_cursor)
        with self._io, self._lock.held():
            self._load()
            self._recover()
        self._opened.callback(self._save)

    def _load(self) -> None:
        """Begin at the snapshot, if there is one of this log."""
        found = snapshot.read(self._directory)
        if found is not None:
            self._replay = Replay(found.table)
            self._cursor.resume(found.sums)
            self._saved = _size(found.sums)

    def _close(self) -> None:
        with self._io:
            self._opened.close()

    def _save(self) -> None:
        """Leave a snapshot for the next opener, if that spares it something."""
        sums = self._cursor.sums
        if _size(sums) - self._saved < snapshot.WORTH_BYTES or self._broken or self._replay.damage:
            return
        with suppress(OSError):  # it only saves time
            is_log = [one.first for one in segments(self._directory)] == list(sums)  # others may have thinned it out
            if is_log and self._cursor.is_summed:
                snapshot.write(self._directory, snapshot.Snapshot(self._replay.table, sums))

    def _catch_up(self) -> None:
        with self._io:
            self._follow(self._lock.read())

    def _follow(self, current: bytes) -> None:
        """Take in what others have committed up to a mark; `_io` must be held."""
        mark = Mark.decode(current)
        # Nobody thins the log out while we go from one segment to the next.
        if mark is None or mark.segment != self._cursor.segment:
            with self._lock.held():
                self._recover()
        elif current != self._seen:
            _read_on(self._replay, self._cursor, mark)
            self._replay.finish(mark.position, self._cursor.path, self._cursor.offset)
            self._seen = current

    def _commit_group(self) -> None:
        with self._io:
            group = [self._turns.popleft() for _ in range(len(self._turns))]
            if not group:
                return
            try:
                with self._lock.held():
                    self._recover()
                    self._append(group)
            except OSError as error:
                for turn in group:
                    turn.position, turn.failure = 0, self._unavailable(error)

    def _append(self, group: Sequence[_Turn]) -> None:
        known = Mark.decode(self._seen) or Mark(0, 0, 0)
        stage = Stage(self._replay.table, self._by, known.durable)
        staged = []
        now = round(self._clock.now(), 6)
        for turn in group:
            try:
                staged.append((turn, stage.add(turn.commit, now)))
            except StateError as error:
                turn.failure = error
        if not staged:
            return
        data = b"".join(encode_line(line) for line in stage.lines)
        self._write(known, data, stage.lines[-1].position, durable=any(turn.commit.durable for turn, _ in staged))
        self._replay.table.take(stage)
        for turn, line in staged:
            turn.position = line.position

    def _write(self, known: Mark, data: bytes, position: int, *, durable: bool) -> None:
        """Append behind what is `known`, up to `position`, and publish it, or, on an OSError, not at all."""
        if self._broken:
            raise self._broken
        cursor = self._cursor
        try:
            if cursor.segment == 0 or cursor.is_closed or cursor.offset >= self._segment_bytes or self._rolls:
                known = self._roll(known)
            end = append(cursor.path, cursor.offset, data, durable=durable)
            failpoint("state.appended")
            durable_end, known_durable = (end, position) if durable else (known.durable_end, known.durable)
            mark = Mark(cursor.segment, end, position, durable_end, known_durable, boot_id())
            self._seen = self._lock.publish(mark)
        except OSError:
            self._take_back(known)
            raise
        failpoint("state.published")
        cursor.skip(data)

    def _roll(self, known: Mark) -> Mark:
        """Begin a new segment; return what is known then."""
        self._rolls = False
        self._save()  # so that who comes after a kill need replay no more than one segment
        if known.durable < known.position and not self._cursor.is_closed:  # no later sync is of this file
            make_durable(self._cursor.path)
        first = known.position + 1
        create_segment(self._directory, first)
        failpoint("state.rolled")
        self._cursor.begin(first)
        return Mark(first, 0, known.position, 0, known.position, known.boot)

    def _take_back(self, known: Mark) -> None:
        """Drop what was written in part, and let whoever commits next, here or elsewhere, see to what is in doubt."""
        if self._cursor.segment:
            with suppress(OSError):  # that is tried once more, too
                cut(self._cursor.path, self._cursor.offset)
        try:
            self._lock.publish(known._replace(is_doubtful=True))
        except OSError as error:
            # Nobody else is told. What is on disk is found out by the next opener; this one must not append to it.
            self._broken = error

    def _recover(self) -> None:
        """Take in all that stands in the log, also what a dead appender left; the flock must be held."""
        if self._cursor.segment == 0:
            put_loaded(self._directory)
        found_segments = segments(self._directory) or [Segment(0)]
        newest, last = found_segments[-1], found_segments[-1].first
        if found_segments[0].last > self._replay.table.position:  # what we had yet to read was thinned out
            self._begin_anew()
        size = size_of(self._directory, newest) if last else 0
        current, cursor = self._lock.read(), self._cursor
        mark = Mark.decode(current)
        is_settled = mark is not None and mark.boot == boot_id() and not mark.is_doubtful
        place = (cursor.segment, cursor.offset, self._replay.table.position)
        if is_settled and mark and mark[:3] == place and place[:2] == (last, size):
            self._seen = current
            return
        if mark and last and (not is_settled or mark[:2] != (last, size)):
            size = self._drop(mark, newest, size)
        if (last, size) < (cursor.segment, cursor.offset):
            raise OSError(errno.EIO, "the log is shorter than what was read from it")
        lacks_end = False
        for found in cursor.read(Mark(last, size, 0)):
            if isinstance(found.item, Incomplete) and cursor.segment == last:
                cut(found.path, found.offset)
                self._replay.report(found.path, found.offset, (), "an unfinished line of a process that died: cut")
                continue
            self._replay.take(found)
            lacks_end = isinstance(found.item, Decoded) and not found.item.terminator and cursor.segment == last
        if lacks_end:
            append(cursor.path, cursor.offset, b"\n")
            cursor.skip(b"\n")
        self._replay.finish(_known_position(mark), cursor.path, cursor.offset)
        self._adopt(mark)

    def _drop(self, mark: Mark, newest: Segment, size: int) -> int:
        """Cut off what was refused, and what can't be read and was never acknowledged; return what is left."""
        path, is_ours = newest.path(self._directory), mark.boot == boot_id()
        if mark.segment > newest.first or newest.is_thinned or newest.is_packed:
            return size
        start, position = 0, newest.first - 1
        if mark.segment == newest.first:
            start, position = (mark.end, mark.position) if is_ours else (mark.durable_end, mark.durable)
        if is_ours and mark.is_doubtful:
            cut(path, min(start, size))
            return min(start, size)
        end = never_durable(path.read_bytes(), start, position)
        if end is None:
            return size
        cut(path, end)
        self._replay.report(path, end, (), "the unfinished work of a process or machine that stopped: cut")
        return end

    def _adopt(self, mark: Mark | None) -> None:
        """Publish the end of the log, and what a dead appender had written but not acknowledged."""
        cursor, position = self._cursor, self._replay.table.position
        end = Mark(cursor.segment, cursor.offset, position, cursor.offset, position, boot_id())
        if mark is not None and mark._replace(durable_end=end.durable_end, durable=end.durable) == end:
            self._seen = self._lock.read()
            return
        if cursor.segment:
            is_same = mark is not None and mark.segment == cursor.segment
            start = mark.durable_end if mark and is_same else 0
            if not is_same:
                sync_folder(self._directory)  # whoever began it may have died before
            if start < cursor.offset and not cursor.is_closed:
                rewrite(cursor.path, start, cursor.sums[cursor.segment])
        self._seen = self._lock.publish(end)

    def _close_cursor(self) -> None:
        self._cursor.close()

    def _begin_anew(self) -> None:
        self._close_cursor()
        self._replay, self._cursor = Replay(), Cursor(self._directory)


def open_file_store(url: str, clock: Clock, /) -> AbstractAsyncContextManager[Store]:
    """Open the store in the folder that a `file:` URL names; RefusedError if it names none of this machine."""
    folder = named_folder(url)
    assert folder is not None, "it is registered for this scheme"  # noqa: S101
    return FileStore.open(folder, clock)


def require_store(url: str) -> None:
    """Refuse (RefusedError) the URL of a folder that holds no store, where else an empty one would be made. Blocks."""
    folder = named_folder(url)
    if folder is not None and not is_store(folder):
        raise RefusedError(f"there is no state in {folder}", "name the folder of a store, such as .council/state")


def _size(sums: Mapping[int, Sum]) -> int:
    return sum(part.size for part in sums.values())


def _known_position(mark: Mark | None) -> int:
    """Return the position up to which the log must go: after a start of the machine, as far as it was durable."""
    if mark is None:
        return 0
    return mark.position if mark.boot == boot_id() else mark.durable


def _read_on(replay: Replay, cursor: Cursor, mark: Mark | None) -> None:
    for found in cursor.read(mark) if mark else ():
        replay.take(found)


def _read_dumped(cursor: Cursor, end: Mark) -> list[DumpedCommit]:
    """Return the next commits up to the end; RefusedError where one of them can't be read."""
    commits, size = list[DumpedCommit](), 0
    for found in cursor.read(end):
        if isinstance(found.item, Thinned):
            continue
        if not isinstance(found.item, Decoded) or found.item.line.is_damaged:
            raise damaged_at(commits[-1].position if commits else 0)
        commits.append(to_dumped(found.item.line))
        size += len(found.item.line.payload)
        if size >= _FOLLOW_BYTES:
            break
    return commits


def _check_kept(directory: Path, after: int) -> None:
    first = thinned_to(directory)
    if after < first:
        raise HistoryGone(after, first)


def _read_records(directory: Path, cursor: Cursor, until: Mark, after: int) -> tuple[list[Record], bool]:
    """Return the next records behind position `after`, and whether `until` is reached."""
    records, start = [], (cursor.segment, cursor.offset)
    try:
        for found in cursor.read(until):
            if cursor.segment != start[0]:
                _check_kept(directory, after)
            if isinstance(found.item, Decoded) and found.item.line.position > after:
                records.append(to_record(found.item.line))
                after = found.item.line.position
            if cursor.segment != start[0] or cursor.offset - start[1] >= _FOLLOW_BYTES:
                return records, False
    except FileNotFoundError:
        _check_kept(directory, after)
        raise
    return records, True
