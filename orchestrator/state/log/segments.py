"""The files of the commit log: segments, and a lock file with the high-water mark.

Segments are named by their first position; a segment that contains the remains of pruned segments also by its last
position. Closed segments may be packed (`orchestrator.state.log.packing`). Only the holder of the flock appends.
Readers take no lock: they read up to the mark, which advances only after the data is safe, so they never see data that
a failing disk loses. The mark itself is never made durable: after a reboot it may be outdated, and may include commits
that were not durable.
All functions block, and run in worker threads.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from orchestrator.state.log.codec import DecodedLine, IncompleteLine, LogLine, ScanResult, UnreadableBytes, scan
from orchestrator.state.log.packing import Checksum, SegmentReader
from orchestrator.system.file_lock import lock_descriptor, unlock_descriptor
from orchestrator.system.files import open_private, opened, sync_file, sync_folder
from orchestrator.system.process_table import UNKNOWN_BOOT, find_lock_owner, process_stat
from orchestrator.system.slow_waits import NOTICE_AFTER, logger

AT_ONCE_BYTES: Final = 16 << 10
"""The maximum bytes to read or write on the event loop: about ten recent commits, or commits without a sync."""
_READ_BYTES: Final = 1 << 20
_MARK_BYTES: Final = 148
_LOCK: Final = "lock"
_TICK: Final = 3_000_000_000  # nanoseconds: the coarsest timestamp resolution of any file system
_NAME: Final = re.compile(r"(\d{20})(?:-(\d{20}))?\.jsonl(\.zst)?")


class HighWaterMark(NamedTuple):
    """The end of the log: offset `end` of the segment with first position `segment`."""

    segment: int
    end: int
    position: int
    durable_end: int = 0
    """The offset up to which that segment is known to be durable; all earlier segments are durable."""
    durable: int = 0
    """The position up to which the log is durable."""
    boot: str = UNKNOWN_BOOT
    """The id of the machine boot in which it was written."""
    is_uncertain: bool = False
    """Whether a write failed: data after `end` was rejected, and non-durable data may never reach the disk."""

    def encode(self) -> bytes:
        """Return fixed-length text with a checksum, which detects partial writes."""
        text = b"%020d %020d %020d %020d %020d %b %d" % (*self[:5], self.boot.encode(), self.is_uncertain)
        return b"%b %08x" % (text, zlib.crc32(text))

    @classmethod
    def decode(cls, data: bytes) -> HighWaterMark | None:
        """Return the high-water mark, or None if `data` is not a mark."""
        fields = data.split(b" ")
        if len(data) != _MARK_BYTES or len(fields) != 8 or fields[7] != b"%08x" % zlib.crc32(data[:-9]):
            return None
        segment, end, position, durable_end, durable = map(int, fields[:5])
        return cls(segment, end, position, durable_end, durable, fields[5].decode(), fields[6] != b"0")


class LogLostError(OSError):
    """The log no longer contains data that was read from it."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EIO, why)


class Segment(NamedTuple):
    """A file of the log with the commits from `first` on."""

    first: int
    last: int = 0
    """If set, the segment has what pruning kept of the commits up to that position; otherwise all commits."""
    is_packed: bool = False

    @property
    def is_pruned(self) -> bool:
        """Whether the segment is pruned."""
        return self.last > 0

    def packed(self) -> Segment:
        """Return the segment in its packed form."""
        return self._replace(is_packed=True)

    def path(self, directory: Path) -> Path:
        """Return the segment's path."""
        last = f"-{self.last:020d}" if self.last else ""
        return directory / f"{self.first:020d}{last}.jsonl{'.zst' if self.is_packed else ''}"


@dataclass(frozen=True, slots=True)
class PrunedEnd:
    """The end of the pruned commits up to position `last`."""

    last: int


class ScannedItem(NamedTuple):
    """An item of the log with its file and offset.

    `is_pruned`: earlier positions may be missing because of pruning. `is_copy`: its bytes equal those of the previous
    line.
    """

    path: Path
    offset: int
    item: ScanResult | PrunedEnd
    is_pruned: bool = False
    is_copy: bool = False


class LogLock:
    """The permanent lock file, kept open, which contains the high-water mark."""

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / _LOCK)
        self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", 0)
        self._identity = _identity(os.fstat(self._file.fileno()))
        # A `flock` belongs to the open file: its threads would share it, and the first to unlock it would end it.
        self._mutex = threading.Lock()
        self._read: tuple[bytes, HighWaterMark | None] = b"", None

    def read(self) -> HighWaterMark | None:
        """Return the high-water mark; None if it is missing or torn.

        Cheap enough for the event loop.
        """
        data = os.pread(self._file.fileno(), _MARK_BYTES, 0)
        known, mark = self._read
        if data != known:
            mark = HighWaterMark.decode(data)
            self._read = data, mark
        return mark

    def publish(self, mark: HighWaterMark) -> None:
        """Publish the log up to `mark` to all readers."""
        data = mark.encode()
        os.pwrite(self._file.fileno(), data, 0)
        self._read = data, mark

    def check_not_replaced(self) -> None:
        """Raise OSError (ESTALE) if the lock file was replaced since it was opened.

        After a folder is moved or replaced by a copy, other processes lock a different file there.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            if _identity(os.stat(self._path)) == self._identity:  # noqa: PTH116  (called for each commit: pathlib takes twice as long)
                return
        raise OSError(errno.ESTALE, "it was moved or replaced while in use")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Exclude all other appenders, including other threads of this process. Blocks; not reentrant.

        Raises the errors of `check_not_replaced`.
        """
        with self._taken(block=True):
            yield

    @contextmanager
    def try_held(self) -> Iterator[bool]:
        """Take the lock like `held` if it is free; yield whether it was free.

        Raises the errors of `check_not_replaced`.
        """
        with self._taken(block=False) as is_taken:
            yield is_taken

    @contextmanager
    def _taken(self, *, block: bool) -> Iterator[bool]:
        if not self._mutex.acquire(blocking=block):
            yield False
            return
        try:
            with self._flocked(block=block) as is_taken:
                yield is_taken
        finally:
            self._mutex.release()

    @contextmanager
    def _flocked(self, *, block: bool) -> Iterator[bool]:
        fd = self._file.fileno()
        if not lock_descriptor(fd, block=False):
            if not block:
                yield False
                return
            notice = threading.Timer(NOTICE_AFTER, self._report_wait)
            notice.daemon = True
            notice.start()
            try:
                lock_descriptor(fd)
            finally:
                notice.cancel()
        try:
            self.check_not_replaced()
            yield True
        finally:
            unlock_descriptor(fd)

    def _report_wait(self) -> None:
        owner = find_lock_owner(self._identity[1])
        what = "another process" if owner is None else f"process {owner}"
        stat = None if owner is None else process_stat(owner)
        is_stopped = stat is not None and stat.is_stopped
        remedy = (
            f"which is stopped: `kill -CONT {owner}`, or `kill -9 {owner}`" if is_stopped else "which is writing it"
        )
        logger.warning("waiting for the lock of the state log, held by %s, %s", what, remedy)

    def close(self) -> None:
        """Close the file. Later use raises ValueError."""
        self._file.close()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def list_segments(directory: Path) -> list[Segment]:
    """Return the segments that make up the log, in order.

    Files that were replaced but left by a crash are ignored: those older than the newest pruned segment, and the
    unpacked form of a packed segment.
    """
    return _segments_of(os.listdir(directory))  # noqa: PTH208  (creates far fewer objects)


class SegmentListing:
    """A cache of a folder's segments, which are listed often but change rarely."""

    def __init__(self, directory: Path) -> None:
        """Cache the segments of a folder, reading it on demand."""
        self._directory = str(directory)
        self._changed = 0
        self._segments: list[Segment] = []

    def read(self) -> list[Segment]:
        """Return the segments like `list_segments`."""
        changed = os.stat(self._directory).st_mtime_ns  # noqa: PTH116  (called for each commit: pathlib takes twice as long)
        if changed != self._changed:
            now = time.time_ns()
            self._segments = _segments_of(os.listdir(self._directory))  # noqa: PTH208  (creates far fewer objects)
            # Another change shortly afterwards may have the same time.
            self._changed = changed if now - changed > _TICK else 0
        return self._segments


def _segments_of(names: list[str]) -> list[Segment]:
    matches = (_NAME.fullmatch(name) for name in names)
    found = [Segment(int(match[1]), int(match[2] or 0), match[3] is not None) for match in matches if match]
    pruned = max((one for one in found if one.is_pruned), key=lambda one: (one.last, one.is_packed), default=None)
    end = pruned.last if pruned else 0
    kept = [one for one in found if one.first > end and not one.is_pruned]
    whole = {one.first: one for one in sorted(kept, key=lambda one: one.is_packed)}
    return [*([pruned] if pruned else []), *(whole[first] for first in sorted(whole))]


def pruned_through(directory: Path) -> int:
    """Return the position up to which commits are pruned, or 0."""
    return next((one.last for one in list_segments(directory)), 0)


def open_segment(directory: Path, segment: Segment) -> SegmentReader:
    """Open a segment, or its packed form if it was packed in the meantime.

    Raises FileNotFoundError if it is missing.
    """
    try:
        return SegmentReader(segment.path(directory))
    except FileNotFoundError:
        return SegmentReader(segment.packed().path(directory))


def segment_size(directory: Path, segment: Segment) -> int:
    """Return the size of a segment's lines in bytes."""
    if not segment.is_packed:
        with suppress(FileNotFoundError):  # it was packed in the meantime
            return segment.path(directory).stat().st_size
    with closing(open_segment(directory, segment)) as source:
        return source.size()


class LogCursor:
    """A cursor in the log, for reading from its position on."""

    def __init__(self, directory: Path, after: int = 0) -> None:
        """Start at the beginning of the segment with the position after `after`."""
        self.segment, self.offset = 0, 0
        self.sums: dict[int, Checksum] = {}
        """The checksums of the content before the cursor, keyed by segment, if read from the beginning."""
        self.path = directory
        """The segment's file, or the directory if there is no segment."""
        self._directory = directory
        self._file = Segment(0)
        self._source: SegmentReader | None = None
        self._before = 0  # the position of the previous line; 0 if unknown
        self._start = _find_start(directory, after)

    @property
    def is_closed(self) -> bool:
        """Whether the segment can no longer grow."""
        return self._file.is_packed

    @property
    def has_checksum(self) -> bool:
        """Whether `sums` covers all content before the cursor in this segment."""
        return self.segment > 0 and self.sums[self.segment].size == self.offset

    def is_near(self, mark: HighWaterMark) -> bool:
        """Return True if the data up to a mark is short enough for the event loop."""
        return mark.segment == self.segment and mark.end - self.offset <= AT_ONCE_BYTES

    def is_replaced_by(self, pruned: Segment) -> bool:
        """Return True if the cursor's segment is one that was pruned into another."""
        return 0 < self.segment <= pruned.last and not self._file.is_pruned

    def size(self) -> int:
        """Return the current size of the segment's file in bytes; -1 if packed.

        A packed file can no longer grow.
        """
        return -1 if self.is_closed else self.path.stat().st_size

    def read(self, until: HighWaterMark) -> Iterator[ScannedItem]:
        """Yield the items up to `until`, moving after each one.

        The cursor stays before an incomplete line at the end.
        """
        while True:
            yield from self._rest(until)
            if self.segment >= until.segment or not self._next_segment():
                return

    def begin(self, first: int) -> None:
        """Move to the beginning of a new segment."""
        self._move(Segment(first))

    def jump(self, end: HighWaterMark) -> None:
        """Move to a former end of the log unless the cursor starts in a later segment."""
        if end.segment >= self._start:
            self._move(Segment(end.segment))
            self.offset = end.end

    def skip(self, data: bytes) -> None:
        """Move past data that this process has appended here."""
        self.offset += len(data)
        self._before = 0
        self._add(data)

    def restart(self, after: int) -> None:
        """Move to the beginning of the segment with the position after `after`, whose files were replaced."""
        self.close()
        self._start = _find_start(self._directory, after)
        self._file, self.segment, self.offset = Segment(0), 0, 0

    def resume(self, sums: Mapping[int, Checksum]) -> None:
        """Move to the known end of some segments, and continue in the last one."""
        self.sums = dict(sums)
        self.segment = max(sums)
        found = (one for one in list_segments(self._directory) if one.first == self.segment)
        self._file = next(found, Segment(self.segment))
        self.path = self._file.path(self._directory)
        self.offset = sums[self.segment].size

    def close(self) -> None:
        """Close the open segment."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _move(self, file: Segment) -> None:
        self.close()
        self._file, self.segment, self.offset, self._before = file, file.first, 0, 0
        self.path = file.path(self._directory)
        self.sums[file.first] = Checksum(0, 0)

    def _rest(self, until: HighWaterMark) -> Iterator[ScannedItem]:
        if self.segment == 0:
            return
        if self._source is None:
            self._source = open_segment(self._directory, self._file)
        source, end = self._source, self._source.size()
        if self.segment == until.segment and not self._file.is_pruned:
            end = min(end, until.end)
        path, span, is_cut_off, is_pruned = self.path, _READ_BYTES, False, self._file.is_pruned
        if source.is_damaged:
            yield ScannedItem(path, self.offset, UnreadableBytes(self.offset), is_pruned)
        while self.offset < end:
            start = self.offset
            data = source.read(min(span, end - start), start)
            for item_start, item in _items(data, is_whole=start + len(data) >= end):
                self.offset = start + (item_start if isinstance(item, IncompleteLine) else item.end)
                is_copy = self._is_copy(source, start + item_start, item, item.end - item_start)
                yield ScannedItem(path, start + item_start, item, is_pruned, is_copy)
                is_cut_off = isinstance(item, IncompleteLine)
            self._add(memoryview(data)[: self.offset - start])
            if is_cut_off:
                return
            span = _READ_BYTES if self.offset > start else 2 * span
        if is_pruned:
            yield ScannedItem(path, self.offset, PrunedEnd(self._file.last), is_pruned)

    def _is_copy(self, source: SegmentReader, offset: int, item: ScanResult, size: int) -> bool:
        """Return whether an item equals the bytes right before it."""
        if not isinstance(item, DecodedLine):
            return False
        before, self._before = self._before, item.line.position
        if before not in {0, item.line.position} or offset < size:
            return False
        both = source.read(2 * size, offset - size)
        return both[:size] == both[size:]

    def _add(self, data: bytes | memoryview) -> None:
        size, crc = self.sums[self.segment]
        self.sums[self.segment] = Checksum(size + len(data), zlib.crc32(data, crc))

    def _next_segment(self) -> bool:
        later = [one for one in list_segments(self._directory) if one.first > self.segment and one.first >= self._start]
        if not later:
            return False
        self._move(later[0])
        return True


def _find_start(directory: Path, after: int) -> int:
    return max((one.first for one in list_segments(directory) if one.first <= after + 1), default=0)


def _items(data: bytes, *, is_whole: bool) -> Iterator[tuple[int, ScanResult]]:
    """Yield the items in `data` with their offsets.

    Unless `data` is whole, omits items that more bytes might change.
    """
    start = 0
    while start < len(data):
        item = scan(data, start)
        at_end = isinstance(item, IncompleteLine) or (isinstance(item, DecodedLine) and not item.terminator)
        if at_end and not is_whole:
            return
        yield start, item
        start = item.end


def find_line(directory: Path, position: int) -> LogLine | None:
    """Return the line of a commit, or None if missing or unreadable."""
    while found := [one for one in list_segments(directory) if one.first <= position]:
        with suppress(FileNotFoundError), closing(open_segment(directory, found[-1])) as source:
            return _find_line(source.around(position), position)
    return None


def _find_line(data: bytes, position: int) -> LogLine | None:
    """Find a line by binary search; lines are ordered by position."""
    low, high = 0, len(data)
    while low < high:
        start = data.rfind(b"\n", low, (low + high) // 2) + 1 or low
        offset, line = start, None
        while offset < high and line is None:
            item = scan(data, offset)
            line = item.line if isinstance(item, DecodedLine) else None
            offset = item.end
        if line is not None and line.position == position:
            return line
        if line is None or line.position > position:
            high = start
        else:
            low = offset
    return None


def create_segment(directory: Path, first: int) -> None:
    """Create an empty segment, and make its name durable.

    After an OSError it may exist.
    """
    path = Segment(first).path(directory)
    os.close(open_private(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    sync_folder(directory)


def append(path: Path, offset: int, data: bytes, *, durable: bool = True) -> int:
    """Write `data` at `offset`, and return the end offset.

    After an OSError it may be partly written.
    """
    with opened(path, os.O_WRONLY) as fd:
        _write_at(fd, data, offset)
        if durable:
            sync_file(fd)
    return offset + len(data)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)


def truncate(path: Path, offset: int) -> None:
    """Truncate a file at `offset`, durably."""
    with opened(path, os.O_WRONLY) as fd:
        os.ftruncate(fd, offset)
        sync_file(fd)


def rewrite(path: Path, start: int, known: Checksum) -> None:
    """Write a file's content again from `start`, after a failed sync.

    The system reports a failed sync only once: the next sync succeeds although the data may never reach the disk.
    Raises OSError if this also fails, or if the file's content differs from `known`.
    """
    with opened(path, os.O_RDWR) as fd:
        data = os.pread(fd, known.size, 0)
        if Checksum(len(data), zlib.crc32(data)) != known:
            raise LogLostError("the log differs from the part that was read before")
        _write_at(fd, data[start:], start)
        sync_file(fd)
