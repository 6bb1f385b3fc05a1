"""Detect idle CLIs: no output and no change in their folders.

The supervisor imports this in every session: keep imports few and within the standard library.
"""

from __future__ import annotations

import _thread
import os
import time

MAX_ENTRIES = 500_000
_CHECK_EVERY = 256  # entries
_SCAN_POLL_INTERVAL = 0.02  # seconds, during a scan


class FolderScan:
    """A scan of folders in a thread: a hanging file system blocks nothing else.

    When `done`, `fingerprint` is the result; None if the scan failed: an entry vanished, a folder is not readable,
    there are more than MAX_ENTRIES, or `give_up` (monotonic clock) was reached. Changes are detected by the inode's
    change time, which programs can't set.
    """

    def __init__(self, folders: list[str], give_up: float) -> None:
        self.began = time.monotonic()
        self.ended = self.began
        self.done = False
        self.fingerprint: tuple[int, int] | None = None
        self.give_up = give_up
        _thread.start_new_thread(self._run, (folders,))

    def _run(self, folders: list[str]) -> None:
        try:
            self.fingerprint = self._scan(folders)
        except OSError:
            pass
        finally:
            self.ended = time.monotonic()
            self.done = True

    def _scan(self, folders: list[str]) -> tuple[int, int] | None:
        pending = list(folders)
        count, digest = 0, 0
        for folder in folders:
            digest += _mark(os.lstat(folder))
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    digest += _mark(entry.stat(follow_symlinks=False))
                    count += 1
                    if count % _CHECK_EVERY == 0 and (count > MAX_ENTRIES or time.monotonic() > self.give_up):
                        return None
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        return count, digest % (1 << 64)


def _mark(status: os.stat_result) -> int:
    return hash((status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size))


class IdleWatch:
    """Detects `limit` seconds without output and without a change in `folders`.

    Scans the folders after a quarter of the limit without output, then every quarter. The watch expires when two scans
    have the same fingerprint and the second starts at least `limit` seconds after the end of the first: between 1 and
    1.5 times the limit after the last activity. A failed scan proves neither activity nor silence.
    """

    def __init__(self, limit: float, folders: list[str]) -> None:
        self._limit, self._folders = limit, folders
        self._quarter = limit / 4
        self._scan: FolderScan | None = None
        self.note_output()

    def note_output(self) -> None:
        """Restart the idle timer, because the CLI has printed output."""
        self._next = time.monotonic() + self._quarter
        self._stale = self._scan is not None
        self._fingerprint: tuple[int, int] | None = None
        self._since = 0.0

    def seconds_until_check(self) -> float:
        """Return the seconds until the next call of `has_expired`."""
        return max(0.0, self._next - time.monotonic())

    def has_expired(self) -> bool:
        """Start or read a scan if one is due; return whether the CLI is idle."""
        now = time.monotonic()
        if now < self._next:
            return False
        scan = self._scan
        if scan is None:
            self._scan = FolderScan(self._folders, now + self._quarter)
            self._next = now + _SCAN_POLL_INTERVAL
        elif not scan.done:
            # Don't start a second scan while one hangs.
            self._next = now + (_SCAN_POLL_INTERVAL if now < scan.give_up else self._quarter)
        else:
            self._scan = None
            self._next = scan.ended + self._quarter
            stale, self._stale = self._stale, False
            return not stale and self._is_idle(scan)
        return False

    def _is_idle(self, scan: FolderScan) -> bool:
        if scan.fingerprint is None:
            return False
        if scan.fingerprint != self._fingerprint:
            self._fingerprint, self._since = scan.fingerprint, scan.ended
            return False
        return scan.began - self._since >= self._limit
