"""The commit log as opened by a process: its known state, and appending to it. Everything here blocks.

Any thread may call; calls that advance the known end of the log wait for each other.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final, TypeGuard

from orchestrator.errors import (
    DISK_FULL_ERRNOS,
    RESOURCE_REMEDIES,
    StateError,
    StateLost,
    StoreFull,
    StoreUnavailable,
)
from orchestrator.protocols import (
    CompactionResult,
    Damage,
    Key,
    StateSnapshot,
    VerificationReport,
)
from orchestrator.state.log import snapshot
from orchestrator.state.log.codec import (
    DecodedLine,
    EncodedCommit,
    IncompleteLine,
    encode_line,
    find_never_durable,
    get_writer_name,
)
from orchestrator.state.log.compaction import (
    build_repaired_table,
    find_prunable_segment,
    log_size,
    pack_closed_segments,
    prune_segments,
    remove_replaced_segments,
)
from orchestrator.state.log.loading import Staging, install_loaded, not_empty_error
from orchestrator.state.log.mounts import refuse_network_mount
from orchestrator.state.log.packing import Checksum, read_content_checksum
from orchestrator.state.log.reading import LogReplay, check_retained, replay_until
from orchestrator.state.log.segments import (
    HighWaterMark,
    LogCursor,
    LogLock,
    LogLostError,
    Segment,
    SegmentListing,
    append,
    create_segment,
    list_segments,
    pruned_through,
    rewrite,
    segment_size,
    truncate,
)
from orchestrator.state.log.table import CommitStage, DocumentTable, rebuild_state
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint
from orchestrator.system.files import make_durable, make_folder, sync_folder
from orchestrator.system.process_table import boot_id

_REMEDIES: Final = {
    **RESOURCE_REMEDIES,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount the file system writable",
    errno.EACCES: "give this user access to it",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG), "name a folder that exists or can be created"),
    errno.ESTALE: "repeat the command",
}
_AT_ONCE_BYTES: Final = 16 << 10
"""The bytes to read or write on the event loop at most: some ten recent commits, or commits without sync."""
_ENDS_KEPT: Final = 64
"""The former ends of the log from which a reader of later commits can start."""


@dataclass(slots=True)
class PendingCommit:
    """A commit in the queue for the next group, and later its outcome."""

    commit: EncodedCommit
    position: int = 0
    failure: StateError | StoreUnavailable | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the outcome is known."""
        return bool(self.position or self.failure)


class InlineResult(Enum):
    """The outcome of an attempt to commit on the event loop."""

    DONE = auto()
    BUSY = auto()
    """Another process is committing, which takes about as long as a call in a thread."""
    TOO_MUCH = auto()
    """It needs a sync, or has much to read or write."""


class Journal:
    """The log in a directory; call `open` first."""

    def __init__(self, directory: Path, clock: Clock, segment_bytes: int) -> None:
        """Use the log in `directory`; a segment is closed at `segment_bytes`."""
        self._directory = directory
        self._clock, self._by = clock, get_writer_name()
        self._segment_bytes = segment_bytes
        self._listing = SegmentListing(directory)
        self._replay = LogReplay()
        self._opened = ExitStack()
        self._lock: LogLock
        self._cursor: LogCursor
        self._saved = 0  # bytes of the log in the newest known snapshot
        self._seen: HighWaterMark | None = None  # the end of the log in the table
        self._ends = deque[HighWaterMark](maxlen=_ENDS_KEPT)  # earlier values of `_seen`, the newest last
        self._broken: OSError | None = None
        self._rolls = False  # whether the next commit begins a new segment
        # Held by the thread that moves the cursor. The event loop never waits for it, and not even a cancelled task
        # that is abandoned can let two threads in.
        self._io = threading.Lock()

    @property
    def table(self) -> DocumentTable:
        """The newest documents of the known part of the log."""
        return self._replay.table

    @property
    def damage(self) -> list[Damage]:
        """The damage found so far."""
        return self._replay.damage

    def mark(self) -> HighWaterMark | None:
        """Return the high-water mark; cheap enough for the event loop."""
        return self._lock.read()

    def open_cursor(self, after: int) -> LogCursor:
        """Return a cursor at position `after`, or at the nearest known place before it."""
        cursor = LogCursor(self._directory, after)
        end = max((one for one in list(self._ends) if one.position <= after), default=None)
        if end is not None and end.segment:
            cursor.jump(end)
        return cursor

    def check_not_replaced(self) -> None:
        """Raise OSError (ESTALE) if the log was moved or replaced."""
        self._lock.check_not_replaced()

    def try_refresh_inline(self) -> bool:
        """Read few new commits of other processes, without a thread; return whether the table is current."""
        mark = self._lock.read()
        if mark == self._seen:
            return True
        if mark is None or not self._io.acquire(blocking=False):
            return False
        try:
            if not self._is_near(mark):
                return False
            self._follow(mark)
            return True
        finally:
            self._io.release()

    def _is_near(self, mark: HighWaterMark) -> bool:
        return mark.segment == self._cursor.segment and mark.end - self._cursor.offset <= _AT_ONCE_BYTES

    def begin_segment(self) -> None:
        """Start a new segment with the next commit."""
        self._rolls = True

    def end(self) -> HighWaterMark:
        """Return the current end of the log."""
        with self._io, self._lock.held():
            self._recover()
            return HighWaterMark(self._cursor.segment, self._cursor.offset, self._replay.table.position)

    def check_empty(self) -> None:
        """Raise RefusedError unless the log is empty."""
        end = self.end()
        if end.segment:  # an empty segment is left by a commit that could not be made durable
            raise not_empty_error(str(self._directory), end.position)

    def put(self, staging: Staging) -> None:
        """Commit a staged load; the log must be empty."""
        with self._io, self._lock.held():
            self._recover()
            if self._cursor.segment:
                raise not_empty_error(str(self._directory), self._replay.table.position)
            staging.put()
            self._recover()

    def verify(self) -> VerificationReport:
        """Replay the whole log, and compare the result with the table."""
        replay = LogReplay()
        with closing(LogCursor(self._directory)) as cursor:
            replay_until(replay, cursor, self._lock.read())  # most of it while others may commit
            with self._io:
                self._follow(self._lock.read())
                mark = self._seen
                replay_until(replay, cursor, mark)
                replay.finish(mark.position if mark else 0, cursor.path, cursor.offset)
                damaged, differs = replay.table.compare(self._replay.table)
        if replay.damage:  # documents that are known but no longer in the log are lost by the damage
            damaged, differs = sorted({*damaged, *differs}), []
        return VerificationReport(
            replay.table.position, log_size(self._directory), tuple(replay.damage), damaged, differs
        )

    def documents_to_repair(self) -> list[Key]:
        """Return the documents whose known state differs from the log without its damaged lines.

        They include deleted documents, which could reappear, or whose versions could be reused.
        """
        with self._io, self._lock.held():
            self._recover()
            damaged, differs = build_repaired_table(self._directory).compare(self._replay.table)
            return [*damaged, *differs]

    def replace_damaged(self, damage: Sequence[Damage]) -> None:
        """Replace closed segments that have any of these damages by their readable lines."""
        paths = {one.path.name for one in damage}
        closed = list_segments(self._directory)[:-1]
        hit = [one for one in closed if paths & {one.path(self._directory).name for one in (one, one.packed())}]
        if hit:
            prune_segments(self._directory, hit[-1], self._lock.held(), self._directory / "damaged")
            with self._lock.held():
                remove_replaced_segments(self._directory)
            self._replay.damage.clear()

    def compact(self, older_than: float, largest: int) -> CompactionResult:
        """See `Store.compact`; only one process at a time."""
        before = log_size(self._directory)
        with self._lock.held():
            remove_replaced_segments(self._directory)
        pack_closed_segments(self._directory)
        with suppress(ValueError):  # it is damage, which is reported, and may be repaired
            while (last := find_prunable_segment(self._directory, older_than, largest)) is not None:
                prune_segments(self._directory, last, self._lock.held())
                with self._lock.held():
                    remove_replaced_segments(self._directory)
                self._renew_snapshot()
        return CompactionResult(before, log_size(self._directory), pruned_through(self._directory))

    def _renew_snapshot(self) -> None:
        """Write a snapshot of the log after segments were pruned."""
        with self._io, self._lock.held():
            self._recover()
            (pruned, *_) = list_segments(self._directory)
            made = read_content_checksum(pruned.path(self._directory).read_bytes())
            if made is not None:
                left = {first: part for first, part in self._cursor.sums.items() if first > pruned.last}
                self._cursor.sums = {pruned.first: made, **left}
                self._saved = 0
                self._save()

    def state_at(self, position: int) -> StateSnapshot:
        """See `Store.at`."""
        while True:
            check_retained(self._directory, position)
            first, mark = pruned_through(self._directory), self._lock.read()
            with suppress(FileNotFoundError), closing(LogCursor(self._directory)) as cursor:
                found = cursor.read(mark) if mark else ()
                lines = (one.item.line for one in found if isinstance(one.item, DecodedLine))
                state = rebuild_state(position, lines, first)
                if pruned_through(self._directory) == first:  # otherwise some may have been skipped
                    return state

    def open(self) -> None:
        """Read the log. Raises RefusedError on a network file system, OSError."""
        refuse_network_mount(self._directory)
        make_folder(self._directory)
        self._lock = self._opened.enter_context(closing(LogLock(self._directory)))
        self._cursor = LogCursor(self._directory)
        self._opened.callback(self._close_cursor)
        with self._io, self._lock.held():
            self._load()
            self._recover()
        self._opened.callback(self._save)

    def _load(self) -> None:
        """Start from the snapshot, if there is a valid one."""
        found = snapshot.read_snapshot(self._directory)
        if found is not None:
            self._replay = LogReplay(found.table)
            self._cursor.resume(found.sums)
            self._saved = _size(found.sums)

    def close(self) -> None:
        """Write a snapshot if useful, and close all files."""
        with self._io:
            self._opened.close()

    def _save(self) -> None:
        """Write a snapshot for the next opener, if it saves replaying enough of the log."""
        sums = self._cursor.sums
        if _size(sums) - self._saved < snapshot.MIN_NEW_BYTES or self._broken or self._replay.damage:
            return
        with suppress(OSError):  # it only saves time
            # Another process may have pruned the log.
            is_log = [one.first for one in list_segments(self._directory)] == list(sums)
            if is_log and self._cursor.has_checksum:
                snapshot.write_snapshot(self._directory, snapshot.Snapshot(self._replay.table, sums))

    def catch_up(self) -> None:
        """Read the commits of other processes."""
        with self._io:
            self._follow(self._lock.read())

    def _follow(self, mark: HighWaterMark | None) -> None:
        """Read the commits of other processes up to a mark; the caller holds `_io`."""
        # With the lock held, no process prunes the log while we move from one segment to the next.
        if mark is None or mark.segment != self._cursor.segment:
            with self._lock.held():
                self._recover()
        elif mark != self._seen:
            replay_until(self._replay, self._cursor, mark)
            self._replay.finish(mark.position, self._cursor.path, self._cursor.offset)
            self._note_end(mark)

    def commit(self, pending: deque[PendingCommit]) -> None:
        """Commit all pending commits and set their outcome; more may be added to the queue meanwhile."""
        with self._io:
            if pending:
                with self._fail_group_on_error(_take_all(pending)) as group, self._lock.held():
                    self._recover()
                    self._append(group)

    def try_commit_inline(self, pending: deque[PendingCommit]) -> InlineResult:
        """Commit like `commit`, if a thread hop would take longer."""
        size = sum(len(one.commit.payload) for one in pending)
        if size > _AT_ONCE_BYTES or any(one.commit.durable for one in pending) or not self._io.acquire(blocking=False):
            return InlineResult.TOO_MUCH
        try:
            group = list[PendingCommit]()
            with self._fail_group_on_error(group), self._lock.try_held() as is_held:
                if not is_held:
                    return InlineResult.BUSY
                mark = self._lock.read()
                is_roomy = self._cursor.offset < self._segment_bytes and not self._rolls
                if mark is None or not (is_roomy and self._is_near(mark) and self._is_complete(mark)):
                    return InlineResult.TOO_MUCH
                group += _take_all(pending)
                self._follow(mark)
                self._append(group)
            return InlineResult.DONE if group else InlineResult.TOO_MUCH
        finally:
            self._io.release()

    @contextmanager
    def _fail_group_on_error(self, group: list[PendingCommit]) -> Iterator[list[PendingCommit]]:
        """Set the outcome of a group's commits after a system error."""
        try:
            yield group
        except OSError as error:
            for one in group:
                one.position, one.failure = 0, to_store_error(self._directory, error)

    def _append(self, group: Sequence[PendingCommit]) -> None:
        known = self._seen or HighWaterMark(0, 0, 0)
        stage = CommitStage(self._replay.table, self._by, known.durable)
        staged = []
        now = round(self._clock.now(), 6)
        for one in group:
            try:
                staged.append((one, stage.add(one.commit, now)))
            except StateError as error:
                one.failure = error
        if not staged:
            return
        data = b"".join(encode_line(line) for line in stage.lines)
        self._write(known, data, stage.lines[-1].position, durable=any(one.commit.durable for one, _ in staged))
        self._replay.table.take(stage)
        for one, line in staged:
            one.position = line.position

    def _write(self, known: HighWaterMark, data: bytes, position: int, *, durable: bool) -> None:
        """Append after the `known` end, up to `position`, and publish it; after an OSError nothing is published."""
        if self._broken:
            raise self._broken
        cursor = self._cursor
        try:
            if cursor.segment == 0 or cursor.is_closed or cursor.offset >= self._segment_bytes or self._rolls:
                known = self._roll(known)
            end = append(cursor.path, cursor.offset, data, durable=durable)
            failpoint("state.appended")
            durable_end, known_durable = (end, position) if durable else (known.durable_end, known.durable)
            mark = HighWaterMark(cursor.segment, end, position, durable_end, known_durable, boot_id())
            self._lock.publish(mark)
            self._note_end(mark)
        except OSError:
            self._roll_back(known)
            raise
        failpoint("state.published")
        cursor.skip(data)

    def _roll(self, known: HighWaterMark) -> HighWaterMark:
        """Begin a new segment; return the new end."""
        self._rolls = False
        self._save()  # so that after a kill the next process replays one segment at most
        if known.durable < known.position and not self._cursor.is_closed:  # no later sync is of this file
            make_durable(self._cursor.path)
        first = known.position + 1
        create_segment(self._directory, first)
        failpoint("state.rolled")
        self._cursor.begin(first)
        return HighWaterMark(first, 0, known.position, 0, known.position, known.boot)

    def _roll_back(self, known: HighWaterMark) -> None:
        """Remove a partial write, and mark the end as uncertain for the next process that commits."""
        if self._cursor.segment:
            with suppress(OSError):  # the next process tries it again
                truncate(self._cursor.path, self._cursor.offset)
        try:
            self._lock.publish(known._replace(is_uncertain=True))
        except OSError as error:
            # The other processes don't know. The next opener checks the disk; this one must not append any more.
            self._broken = error

    def _recover(self) -> None:
        """Read the whole log, including leftovers of a dead appender; the caller holds the lock."""
        if self._cursor.segment == 0:
            install_loaded(self._directory)
        mark = self._lock.read()
        if mark is not None and self._is_complete(mark):
            self._follow(mark)
            return
        found_segments = self._listing.read() or [Segment(0)]
        newest, last = found_segments[-1], found_segments[-1].first
        is_settled = _is_settled(mark)
        if found_segments[0].last > self._replay.table.position:  # unread commits were pruned
            self._reset()
        size = segment_size(self._directory, newest) if last else 0
        cursor = self._cursor
        if mark and last and (not is_settled or mark[:2] != (last, size)):
            size = self._drop(mark, newest, size)
        if (last, size) < (cursor.segment, cursor.offset):
            raise LogLostError("the log is shorter than the part that was read before")
        lacks_end = False
        for found in cursor.read(HighWaterMark(last, size, 0)):
            if isinstance(found.item, IncompleteLine) and cursor.segment == last:
                truncate(found.path, found.offset)
                self._replay.report(found.path, found.offset, (), "removed an unfinished line of a killed process")
                continue
            self._replay.take(found)
            lacks_end = isinstance(found.item, DecodedLine) and not found.item.terminator and cursor.segment == last
        if lacks_end:
            append(cursor.path, cursor.offset, b"\n")
            cursor.skip(b"\n")
        self._replay.finish(_known_position(mark), cursor.path, cursor.offset)
        self._adopt(mark)

    def _is_complete(self, mark: HighWaterMark) -> bool:
        """Whether the log ends exactly at the mark, in the segment of the cursor."""
        found, cursor = self._listing.read(), self._cursor
        is_newest = bool(found) and cursor.segment == mark.segment == found[-1].first
        return is_newest and _is_settled(mark) and cursor.offset <= mark.end == cursor.size()

    def _drop(self, mark: HighWaterMark, newest: Segment, size: int) -> int:
        """Remove rejected data, and unreadable data that was never acknowledged; return the remaining size."""
        path, is_ours = newest.path(self._directory), mark.boot == boot_id()
        if mark.segment > newest.first or newest.is_pruned or newest.is_packed:
            return size
        start, position = 0, newest.first - 1
        if mark.segment == newest.first:
            start, position = (mark.end, mark.position) if is_ours else (mark.durable_end, mark.durable)
        if is_ours and mark.is_uncertain:
            truncate(path, min(start, size))
            return min(start, size)
        end = find_never_durable(path.read_bytes(), start, position)
        if end is None:
            return size
        truncate(path, end)
        self._replay.report(path, end, (), "removed unfinished writes of a killed process or of a power failure")
        return end

    def _adopt(self, mark: HighWaterMark | None) -> None:
        """Publish the end of the log, including commits that a dead appender wrote but did not acknowledge."""
        cursor, position = self._cursor, self._replay.table.position
        end = HighWaterMark(cursor.segment, cursor.offset, position, cursor.offset, position, boot_id())
        if mark is not None and mark._replace(durable_end=end.durable_end, durable=end.durable) == end:
            self._note_end(mark)
            return
        if cursor.segment:
            is_same = mark is not None and mark.segment == cursor.segment
            start = mark.durable_end if mark and is_same else 0
            if not is_same:
                sync_folder(self._directory)  # its creator may have been killed before
            if start < cursor.offset and not cursor.is_closed:
                rewrite(cursor.path, start, cursor.sums[cursor.segment])
        self._lock.publish(end)
        self._note_end(end)

    def _note_end(self, mark: HighWaterMark) -> None:
        self._seen = mark
        self._ends.append(mark)

    def _close_cursor(self) -> None:
        self._cursor.close()

    def _reset(self) -> None:
        self._close_cursor()
        self._replay, self._cursor = LogReplay(), LogCursor(self._directory)


def to_store_error(directory: Path, error: OSError) -> StoreUnavailable:
    """Return the store error for a system error."""
    if isinstance(error, LogLostError):
        return StateLost(directory, str(error.strerror))
    remedy = _REMEDIES.get(error.errno or 0, "check the disk and the system's log")
    kind = StoreFull if error.errno in DISK_FULL_ERRNOS else StoreUnavailable
    return kind(directory, error.strerror or str(error), remedy)


def _size(sums: Mapping[int, Checksum]) -> int:
    return sum(part.size for part in sums.values())


def _take_all(pending: deque[PendingCommit]) -> list[PendingCommit]:
    return [pending.popleft() for _ in range(len(pending))]


def _is_settled(mark: HighWaterMark | None) -> TypeGuard[HighWaterMark]:
    """Whether the mark covers everything that was written since the boot of the machine."""
    return mark is not None and mark.boot == boot_id() and not mark.is_uncertain


def _known_position(mark: HighWaterMark | None) -> int:
    """Return the minimum position of the log's end: after a reboot, that of the durable part."""
    if mark is None:
        return 0
    return mark.position if mark.boot == boot_id() else mark.durable
