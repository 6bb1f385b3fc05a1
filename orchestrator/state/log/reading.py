"""Read the log: replay it into a table, reporting damage, or return its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import HistoryCompacted
from orchestrator.protocols import CommitRecord, Damage, DumpedCommit, Key
from orchestrator.state.log.codec import DecodedLine, to_dumped, to_record
from orchestrator.state.log.loading import PART_BYTES, damaged_log_error
from orchestrator.state.log.segments import HighWaterMark, LogCursor, PrunedEnd, ScannedItem, pruned_through
from orchestrator.state.log.table import DocumentTable


class LogReplay:
    """Applies lines to a table in log order, and decides the effect of damage.

    Bytes that are not a valid line have no meaning by themselves: only the positions around them show whether commits
    are missing. They are kept as suspects until the next valid line or the known end.
    """

    def __init__(self, table: DocumentTable | None = None) -> None:
        """Start with the table of an already replayed part of the log, or an empty one."""
        self.table = DocumentTable() if table is None else table
        self.damage: list[Damage] = []
        self._suspects: list[ScannedItem] = []

    def take(self, found: ScannedItem) -> None:
        """Process the next scanned item of the log."""
        if isinstance(found.item, PrunedEnd):
            self._end_pruned(found.path, found.item.last)
            return
        if isinstance(found.item, DecodedLine) and found.is_copy:
            what = f"commit {found.item.line.position} occurs twice: the copy was skipped"
            self.report(found.path, found.offset, (), what)
            return
        if not isinstance(found.item, DecodedLine) or found.item.line.position <= self.table.position:
            self._suspects.append(found)
            return
        line = found.item.line
        if not found.is_pruned:  # pruned segments are checked when they end
            self._settle(line.position - 1 - self.table.position, found.path, found.offset)
        if line.is_damaged:
            keys = tuple(change.key for change in line.changes if change.length)
            self.report(found.path, found.offset, keys, f"commit {line.position} is damaged: older values were kept")
        elif found.item.terminator not in {b"\n", b""}:
            self.report(found.path, found.offset, (), f"commit {line.position} has no line end: nothing was lost")
        self.table.apply(line)

    def _end_pruned(self, path: Path, last: int) -> None:
        if self._suspects:
            what = f"lines of pruned commits up to {last} are unreadable: every document may be out of date"
            self.report(path, self._suspects[0].offset, None, what)
            self.table.lose(last)
            self._suspects.clear()
        self.table.position = last

    def finish(self, position: int, path: Path, offset: int) -> None:
        """Check the end of the log, whose newest commit is at `position` or later."""
        missing = position - self.table.position
        self._settle(max(missing, 1) if self._suspects else missing, path, offset)

    def report(self, path: Path, offset: int, keys: Sequence[Key] | None, what: str) -> None:
        """Add a damage report."""
        self.damage.append(Damage(path, offset, keys, what))

    def _settle(self, missing: int, path: Path, offset: int) -> None:
        if self._suspects:
            path, offset = self._suspects[0].path, self._suspects[0].offset
        if missing > 0:
            first = self.table.position + 1
            last = self.table.position + missing
            gone = f"commit {first} is" if missing == 1 else f"commits {first} to {last} are"
            what = f"{gone} unreadable: every document may be out of date"
            self.report(path, offset, None, what)
            self.table.lose(missing)
        elif self._suspects:
            self.report(path, offset, (), "skipped bytes that are not a commit; no commit is missing")
        self._suspects.clear()


def replay_until(replay: LogReplay, cursor: LogCursor, mark: HighWaterMark | None) -> None:
    """Replay the log from a cursor up to a high-water mark."""
    for found in cursor.read(mark) if mark else ():
        replay.take(found)


def read_dumped_commits(cursor: LogCursor, end: HighWaterMark) -> list[DumpedCommit]:
    """Return the next commits up to the end.

    Raises RefusedError if one of them is unreadable.
    """
    commits, size = list[DumpedCommit](), 0
    for found in cursor.read(end):
        if isinstance(found.item, PrunedEnd):
            continue
        if not isinstance(found.item, DecodedLine) or found.item.line.is_damaged:
            raise damaged_log_error(commits[-1].position if commits else 0)
        commits.append(to_dumped(found.item.line))
        size += len(found.item.line.payload)
        if size >= PART_BYTES:
            break
    return commits


def check_retained(directory: Path, after: int) -> None:
    """Raise HistoryCompacted if commits after position `after` were pruned."""
    first = pruned_through(directory)
    if after < first:
        raise HistoryCompacted(after, first)


def read_records(
    directory: Path, cursor: LogCursor, until: HighWaterMark, after: int
) -> tuple[list[CommitRecord], bool]:
    """Return the next records after position `after`, and whether `until` is reached."""
    records, start = [], (cursor.segment, cursor.offset)
    try:
        for found in cursor.read(until):
            if cursor.segment != start[0]:
                check_retained(directory, after)
            if isinstance(found.item, DecodedLine) and found.item.line.position > after:
                records.append(to_record(found.item.line))
                after = found.item.line.position
            if cursor.segment != start[0] or cursor.offset - start[1] >= PART_BYTES:
                return records, False
    except FileNotFoundError:  # the segment was pruned before it was opened
        check_retained(directory, after)
        cursor.restart(after)
        return records, False
    return records, True
