"""The log as known to a process, and recovery from killed processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, TypeGuard

from orchestrator.errors import RefusedError
from orchestrator.protocols import StateSnapshot
from orchestrator.state.log import snapshot
from orchestrator.state.log.codec import DecodedLine, IncompleteLine, find_never_durable
from orchestrator.state.log.loading import install_loaded
from orchestrator.state.log.packing import Checksum
from orchestrator.state.log.reading import LogReplay, check_retained, replay_until
from orchestrator.state.log.segments import (
    HighWaterMark,
    LogCursor,
    LogLock,
    LogLostError,
    Segment,
    SegmentListing,
    append,
    list_segments,
    pruned_through,
    rewrite,
    segment_size,
    truncate,
)
from orchestrator.state.log.table import DocumentTable, rebuild_state
from orchestrator.system.files import sync_folder
from orchestrator.system.process_table import boot_id

_ENDS_KEPT: Final = 64
"""The former ends of the log from which a reader of later commits can start."""


class OpenLog:
    """An open log. Blocks; only one thread at a time may read, recover or append."""

    def __init__(self, directory: Path) -> None:
        """Open the log in a directory; call `recover` to read it."""
        self._directory = directory
        self._listing = SegmentListing(directory)
        self.lock = LogLock(directory)
        self.replay = LogReplay()
        self.cursor = LogCursor(directory)
        self._saved = 0  # bytes of the log in the newest known snapshot
        self.end: HighWaterMark | None = None
        """The end of the part of the log that is in the table; None if unknown."""
        self._ends = deque[HighWaterMark](maxlen=_ENDS_KEPT)  # earlier values of `end`, the newest last

    @property
    def table(self) -> DocumentTable:
        """The newest documents in the known part of the log."""
        return self.replay.table

    def close(self) -> None:
        """Close all files."""
        self.cursor.close()
        self.lock.close()

    def open_cursor(self, after: int) -> LogCursor:
        """Return a cursor at position `after` or at the nearest known place before it."""
        cursor = LogCursor(self._directory, after)
        end = max((one for one in list(self._ends) if one.position <= after), default=None)
        if end is not None and end.segment:
            cursor.jump(end)
        return cursor

    def state_at(self, position: int) -> StateSnapshot:
        """See `Store.at`."""
        while True:
            check_retained(self._directory, position)
            first, mark = pruned_through(self._directory), self.lock.read()
            with suppress(FileNotFoundError), closing(LogCursor(self._directory)) as cursor:
                found = cursor.read(mark) if mark else ()
                lines = (one.item.line for one in found if isinstance(one.item, DecodedLine))
                try:
                    state = rebuild_state(position, lines, first)
                except RefusedError:
                    if pruned_through(self._directory) == first:
                        raise
                    continue
                if pruned_through(self._directory) == first:  # otherwise lines may have been skipped
                    return state

    def load_snapshot(self) -> None:
        """Start from the snapshot if it is valid."""
        found = snapshot.read_snapshot(self._directory)
        if found is not None:
            self.replay = LogReplay(found.table)
            self.cursor.resume(found.sums)
            self._saved = _size(found.sums)

    def save_snapshot(self, *, is_outdated: bool = False) -> None:
        """Write a snapshot if worthwhile; never for a damaged log.

        It is worthwhile if it saves the next opener enough reading. With `is_outdated`, the existing snapshot is no
        longer valid.
        """
        sums = self.cursor.sums
        saved = 0 if is_outdated else self._saved
        if _size(sums) - saved < snapshot.MIN_NEW_BYTES or self.replay.damage:
            return
        with suppress(OSError):  # it only saves time
            # Another process may have pruned the log.
            is_log = [one.first for one in list_segments(self._directory)] == list(sums)
            if is_log and self.cursor.has_checksum:
                snapshot.write_snapshot(self._directory, snapshot.Snapshot(self.replay.table, sums))

    def follow(self, mark: HighWaterMark | None) -> None:
        """Read the commits of other processes up to a high-water mark.

        The caller must serialize calls.
        """
        # While the lock is held, no process prunes the log while we move from one segment to the next.
        if mark is None or mark.segment != self.cursor.segment:
            with self.lock.held():
                self.recover()
        elif mark != self.end:
            replay_until(self.replay, self.cursor, mark)
            self.replay.finish(mark.position, self.cursor.path, self.cursor.offset)
            self.note_end(mark)

    def follow_near(self) -> bool:
        """Read the new commits if they are few; return True if now current."""
        mark = self.lock.read()
        if mark is None or not self.cursor.is_near(mark):
            return False
        self.follow(mark)
        return True

    def recover(self) -> None:
        """Read the whole log, including a dead appender's leftovers.

        The caller must hold the lock.
        """
        if self.cursor.segment == 0:
            install_loaded(self._directory)
        mark = self.lock.read()
        if mark is not None and self.is_complete(mark):
            self.follow(mark)
            return
        found_segments = self._listing.read() or [Segment(0)]
        newest, last = found_segments[-1], found_segments[-1].first
        is_settled = _is_settled(mark)
        pruned = found_segments[0]
        if pruned.last > self.replay.table.position or self.cursor.is_replaced_by(pruned):
            self._reset()
        size = segment_size(self._directory, newest) if last else 0
        cursor = self.cursor
        if mark and last and (not is_settled or mark[:2] != (last, size)):
            size = self._drop(mark, newest, size)
        if (last, size) < (cursor.segment, cursor.offset):
            raise LogLostError("the log is shorter than the part that was read before")
        lacks_end = False
        for found in cursor.read(HighWaterMark(last, size, 0)):
            if isinstance(found.item, IncompleteLine) and cursor.segment == last:
                truncate(found.path, found.offset)
                self.replay.report(found.path, found.offset, (), "removed an unfinished line of a killed process")
                continue
            self.replay.take(found)
            lacks_end = isinstance(found.item, DecodedLine) and not found.item.terminator and cursor.segment == last
        if lacks_end:
            append(cursor.path, cursor.offset, b"\n")
            cursor.skip(b"\n")
        self.replay.finish(_known_position(mark), cursor.path, cursor.offset)
        self._adopt(mark)

    def is_complete(self, mark: HighWaterMark) -> bool:
        """Return True if the log ends at the high-water mark, in the cursor's segment."""
        found, cursor = self._listing.read(), self.cursor
        is_newest = bool(found) and cursor.segment == mark.segment == found[-1].first
        return is_newest and _is_settled(mark) and cursor.offset <= mark.end == cursor.size()

    def _drop(self, mark: HighWaterMark, newest: Segment, size: int) -> int:
        """Remove rejected and never acknowledged data; return the remaining size."""
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
        self.replay.report(path, end, (), "removed unfinished writes of a killed process or of a power failure")
        return end

    def _adopt(self, mark: HighWaterMark | None) -> None:
        """Publish the end of the log, including a dead appender's commits."""
        cursor, position = self.cursor, self.replay.table.position
        end = HighWaterMark(cursor.segment, cursor.offset, position, cursor.offset, position, boot_id())
        if mark is not None and mark._replace(durable_end=end.durable_end, durable=end.durable) == end:
            self.note_end(mark)
            return
        if cursor.segment:
            is_same = mark is not None and mark.segment == cursor.segment
            start = mark.durable_end if mark and is_same else 0
            if not is_same:
                sync_folder(self._directory)  # its creator may have been killed before syncing
            if start < cursor.offset and not cursor.is_closed:
                rewrite(cursor.path, start, cursor.sums[cursor.segment])
        self.lock.publish(end)
        self.note_end(end)

    def note_end(self, mark: HighWaterMark) -> None:
        """Record that the table contains the log up to a high-water mark."""
        self.end = mark
        self._ends.append(mark)

    def _reset(self) -> None:
        self.cursor.close()
        self.replay, self.cursor = LogReplay(), LogCursor(self._directory)


def _size(sums: Mapping[int, Checksum]) -> int:
    return sum(part.size for part in sums.values())


def _is_settled(mark: HighWaterMark | None) -> TypeGuard[HighWaterMark]:
    """Return True if the high-water mark covers all writes since the boot."""
    return mark is not None and mark.boot == boot_id() and not mark.is_uncertain


def _known_position(mark: HighWaterMark | None) -> int:
    """Return the lowest possible end of the log: after a reboot, the durable part."""
    if mark is None:
        return 0
    return mark.position if mark.boot == boot_id() else mark.durable
