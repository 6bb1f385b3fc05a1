"""The commit log as opened by a process, for reading and appending. Blocks.

Thread-safe; calls that advance the known end of the log wait for each other.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Final

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
    VerificationReport,
)
from orchestrator.state.log.codec import encode_line, get_writer_name
from orchestrator.state.log.commit_queue import PendingCommit
from orchestrator.state.log.compaction import (
    build_repaired_table,
    find_prunable_segment,
    log_size,
    pack_closed_segments,
    prune_segments,
    remove_replaced_segments,
)
from orchestrator.state.log.loading import Staging, not_empty_error
from orchestrator.state.log.mounts import refuse_network_mount
from orchestrator.state.log.open_log import OpenLog
from orchestrator.state.log.packing import read_content_checksum
from orchestrator.state.log.reading import LogReplay, replay_until
from orchestrator.state.log.segments import (
    AT_ONCE_BYTES,
    HighWaterMark,
    LogCursor,
    LogLostError,
    append,
    create_segment,
    list_segments,
    pruned_through,
    truncate,
)
from orchestrator.state.log.table import CommitStage
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint
from orchestrator.system.files import make_durable, make_folder
from orchestrator.system.process_table import boot_id

_REMEDIES: Final = {
    **RESOURCE_REMEDIES,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount the file system read-write",
    errno.EACCES: "give the current user access to it",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG), "use a folder that exists or can be created"),
    errno.ESTALE: "repeat the command",
}


class InlineResult(Enum):
    """The outcome of an attempt to commit on the event loop."""

    DONE = auto()
    BUSY = auto()
    """Another process is committing, which takes about as long as a thread hop."""
    TOO_MUCH = auto()
    """The commit needs a sync, or has much to read or write."""


class Journal:
    """The log in a directory; call `open` first."""

    def __init__(self, directory: Path, clock: Clock, segment_bytes: int) -> None:
        """Use the log in `directory`; a segment is closed at `segment_bytes`."""
        self._directory = directory
        self._clock, self._by = clock, get_writer_name()
        self._segment_bytes = segment_bytes
        self._opened = ExitStack()
        self.log: OpenLog
        """The known state of the log, set by `open`."""
        self._broken: OSError | None = None
        self._rolls = False  # whether the next commit begins a new segment
        # Held by the thread that moves the cursor. The event loop never waits for it. Even if a cancelled task abandons
        # its thread, no second thread can enter.
        self._io = threading.Lock()

    def try_refresh_inline(self) -> bool:
        """Read a few new commits without a thread; return True if now current."""
        if self.log.lock.read() == self.log.end:
            return True
        if not self._io.acquire(blocking=False):
            return False
        try:
            return self.log.follow_near()
        finally:
            self._io.release()

    def end(self) -> HighWaterMark:
        """Return the current end of the log."""
        with self._io, self.log.lock.held():
            self.log.recover()
            return HighWaterMark(self.log.cursor.segment, self.log.cursor.offset, self.log.replay.table.position)

    def check_empty(self) -> None:
        """Raise RefusedError unless the log is empty."""
        end = self.end()
        if end.segment:  # a commit that could not be made durable leaves an empty segment
            raise not_empty_error(str(self._directory), end.position)

    def put(self, staging: Staging) -> None:
        """Commit a staged load. The log must be empty."""
        with self._io, self.log.lock.held():
            self.log.recover()
            if self.log.cursor.segment:
                raise not_empty_error(str(self._directory), self.log.replay.table.position)
            staging.put()
            self.log.recover()

    def verify(self) -> VerificationReport:
        """Replay the whole log and compare the result with the table."""
        replay = LogReplay()
        with closing(LogCursor(self._directory)) as cursor:
            replay_until(replay, cursor, self.log.lock.read())  # mostly while others may commit
            with self._io:
                self.log.follow(self.log.lock.read())
                mark = self.log.end
                replay_until(replay, cursor, mark)
                replay.finish(mark.position if mark else 0, cursor.path, cursor.offset)
                damaged, differs = replay.table.compare(self.log.replay.table)
        if replay.damage:  # documents that are known but no longer in the log were lost through the damage
            damaged, differs = sorted({*damaged, *differs}), []
        return VerificationReport(
            replay.table.position, log_size(self._directory), tuple(replay.damage), damaged, differs
        )

    def begin_repair(self) -> list[Key]:
        """Return documents whose known state differs from the undamaged log, and start a new segment.

        They include deleted documents, which could reappear or whose versions could be reused. The segment starts with
        the next commit.
        """
        with self._io, self.log.lock.held():
            self.log.recover()
            self._rolls = True
            damaged, differs = build_repaired_table(self._directory).compare(self.log.replay.table)
            return [*damaged, *differs]

    def replace_damaged(self, damage: Sequence[Damage]) -> None:
        """Replace closed segments that have any of this damage with their readable lines."""
        paths = {one.path.name for one in damage}
        closed = list_segments(self._directory)[:-1]
        hit = [one for one in closed if paths & {one.path(self._directory).name for one in (one, one.packed())}]
        if hit:
            prune_segments(self._directory, hit[-1], self.log.lock.held(), self._directory / "damaged")
            with self.log.lock.held():
                remove_replaced_segments(self._directory)
            self.log.replay.damage.clear()

    def compact(self, older_than: float, largest: int) -> CompactionResult:
        """See `Store.compact`. Only one process at a time may call this."""
        before = log_size(self._directory)
        with self.log.lock.held():
            remove_replaced_segments(self._directory)
        pack_closed_segments(self._directory)
        with suppress(ValueError):  # this is damage, which is reported and can be repaired
            while (last := find_prunable_segment(self._directory, older_than, largest)) is not None:
                prune_segments(self._directory, last, self.log.lock.held())
                with self.log.lock.held():
                    remove_replaced_segments(self._directory)
                self._renew_snapshot()
        return CompactionResult(before, log_size(self._directory), pruned_through(self._directory))

    def _renew_snapshot(self) -> None:
        """Write a snapshot of the log after segments were pruned."""
        with self._io, self.log.lock.held():
            self.log.recover()
            (pruned, *_) = list_segments(self._directory)
            made = read_content_checksum(pruned.path(self._directory).read_bytes())
            if made is not None and not self._broken:
                left = {first: part for first, part in self.log.cursor.sums.items() if first > pruned.last}
                self.log.cursor.sums = {pruned.first: made, **left}
                self.log.save_snapshot(is_outdated=True)

    def open(self) -> None:
        """Read the log.

        Raises RefusedError on a network file system, and OSError if it can't be read.
        """
        refuse_network_mount(self._directory)
        make_folder(self._directory)
        self.log = self._opened.enter_context(closing(OpenLog(self._directory)))
        with self._io, self.log.lock.held():
            self.log.load_snapshot()
            self.log.recover()
        self._opened.callback(self._save)

    def _save(self) -> None:
        if not self._broken:
            self.log.save_snapshot()

    def close(self) -> None:
        """Write a snapshot if useful, and close all files."""
        with self._io:
            self._opened.close()

    def catch_up(self) -> None:
        """Read the commits of other processes."""
        with self._io:
            self.log.follow(self.log.lock.read())

    def commit(self, pending: deque[PendingCommit]) -> None:
        """Commit all pending commits and set their outcomes; more may be queued."""
        with self._io:
            if pending:
                with _failing_on_error(_take_all(pending), self._directory) as group:
                    self.log.follow(self.log.lock.read())  # most of it without the lock, for which others wait
                    with self.log.lock.held():
                        self.log.recover()
                        self._append(group)

    def try_commit_inline(self, pending: deque[PendingCommit]) -> InlineResult:
        """Commit like `commit` if that is faster than a thread hop."""
        size = sum(len(one.commit.payload) for one in pending)
        if size > AT_ONCE_BYTES or any(one.commit.durable for one in pending) or not self._io.acquire(blocking=False):
            return InlineResult.TOO_MUCH
        try:
            group = list[PendingCommit]()
            with _failing_on_error(group, self._directory):
                if not self.log.follow_near():  # most of it without the lock, for which others wait
                    return InlineResult.TOO_MUCH
                with self.log.lock.try_held() as is_held:
                    if not is_held:
                        return InlineResult.BUSY
                    mark = self.log.lock.read()
                    is_roomy = self.log.cursor.offset < self._segment_bytes and not self._rolls
                    if mark is None or not (is_roomy and self.log.cursor.is_near(mark) and self.log.is_complete(mark)):
                        return InlineResult.TOO_MUCH
                    group += _take_all(pending)
                    self.log.follow(mark)
                    self._append(group)
            return InlineResult.DONE if group else InlineResult.TOO_MUCH
        finally:
            self._io.release()

    def _append(self, group: Sequence[PendingCommit]) -> None:
        known = self.log.end or HighWaterMark(0, 0, 0)
        stage = CommitStage(self.log.replay.table, self._by, known.durable)
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
        self.log.replay.table.take(stage)
        for one, line in staged:
            one.position = line.position

    def _write(self, known: HighWaterMark, data: bytes, position: int, *, durable: bool) -> None:
        """Append after the `known` end, up to `position`, and publish the result.

        After an OSError nothing is published.
        """
        if self._broken:
            raise self._broken
        cursor = self.log.cursor
        try:
            if cursor.segment == 0 or cursor.is_closed or cursor.offset >= self._segment_bytes or self._rolls:
                known = self._roll(known)
            end = append(cursor.path, cursor.offset, data, durable=durable)
            failpoint("state.appended")
            durable_end, known_durable = (end, position) if durable else (known.durable_end, known.durable)
            mark = HighWaterMark(cursor.segment, end, position, durable_end, known_durable, boot_id())
            self.log.lock.publish(mark)
            self.log.note_end(mark)
        except OSError:
            self._roll_back(known)
            raise
        failpoint("state.published")
        cursor.skip(data)

    def _roll(self, known: HighWaterMark) -> HighWaterMark:
        """Begin a new segment; return the new end."""
        self._rolls = False
        self._save()  # so that if this process is killed the next one replays at most one segment
        if known.durable < known.position and not self.log.cursor.is_closed:  # later syncs do not include this file
            make_durable(self.log.cursor.path)
        first = known.position + 1
        create_segment(self._directory, first)
        failpoint("state.rolled")
        self.log.cursor.begin(first)
        return HighWaterMark(first, 0, known.position, 0, known.position, known.boot)

    def _roll_back(self, known: HighWaterMark) -> None:
        """Remove a partial write; mark the end as uncertain for the next writer."""
        if self.log.cursor.segment:
            with suppress(OSError):  # the next process tries again
                truncate(self.log.cursor.path, self.log.cursor.offset)
        try:
            self.log.lock.publish(known._replace(is_uncertain=True))
        except OSError as error:
            # Other processes don't know. The next opener checks the disk; this process must no longer append.
            self._broken = error


@contextmanager
def translated(directory: Path) -> Iterator[None]:
    """Raise StoreUnavailable for system errors."""
    try:
        yield
    except OSError as error:
        raise to_store_error(directory, error) from error


@contextmanager
def _failing_on_error(group: list[PendingCommit], directory: Path) -> Iterator[list[PendingCommit]]:
    """Set the outcomes of a group's commits after a system error."""
    try:
        yield group
    except OSError as error:
        for one in group:
            one.position, one.failure = 0, to_store_error(directory, error)


def to_store_error(directory: Path, error: OSError) -> StoreUnavailable:
    """Convert a system error to a store error."""
    if isinstance(error, LogLostError):
        return StateLost(directory, str(error.strerror))
    remedy = _REMEDIES.get(error.errno or 0, "check the disk and the system log")
    kind = StoreFull if error.errno in DISK_FULL_ERRNOS else StoreUnavailable
    return kind(directory, error.strerror or str(error), remedy)


def _take_all(pending: deque[PendingCommit]) -> list[PendingCommit]:
    return [pending.popleft() for _ in range(len(pending))]
