"""Whether a CLI is silent: it says nothing, and nothing changes in its folders.

Imported in every session by the supervisor: only the standard library, and little of it.
"""

from __future__ import annotations

import _thread
import os
import time

MAX_ENTRIES = 500_000
_CHECK_EVERY = 256  # entries
_LOOK_AGAIN = 0.02  # seconds; while a walk is under way


class FolderScan:
    """One walk over folders, in a thread of its own: a file system that does not answer stops nobody else.

    When `done`, `signature` is what was found, None if it could not be read to its end: an entry that was not
    there any more, a folder that may not be read, more than MAX_ENTRIES, or no end before `give_up` (of the
    monotonic clock). Modification shows in the inode's change time, which no program can set.
    """

    def __init__(self, folders: list[str], give_up: float) -> None:
        self.began = time.monotonic()
        self.ended = self.began
        self.done = False
        self.signature: tuple[int, int] | None = None
        self.give_up = give_up
        _thread.start_new_thread(self._run, (folders,))

    def _run(self, folders: list[str]) -> None:
        try:
            self.signature = self._walk(folders)
        except OSError:
            pass
        finally:
            self.ended = time.monotonic()
            self.done = True

    def _walk(self, folders: list[str]) -> tuple[int, int] | None:
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
    """Watches for `limit` seconds in which nothing is heard and no walk over `folders` finds a change.

    The folders are looked at only when nothing has been heard for a quarter of the limit, and then every
    quarter. It is over when the same was found by a first walk that had ended, and by another that began, at
    least `limit` seconds apart: between 1 and 1.5 times the limit after the last sign of life. A walk that
    fails says nothing, neither that the CLI is alive nor that it is not.
    """

    def __init__(self, limit: float, folders: list[str]) -> None:
        self._limit, self._folders = limit, folders
        self._quarter = limit / 4
        self._walk: FolderScan | None = None
        self.heard()

    def heard(self) -> None:
        """The CLI has said something."""
        self._next = time.monotonic() + self._quarter
        self._stale = self._walk is not None
        self._signature: tuple[int, int] | None = None
        self._since = 0.0

    def seconds_until_check(self) -> float:
        """Return in how many seconds `over` is to be asked."""
        return max(0.0, self._next - time.monotonic())

    def over(self) -> bool:
        """Go on with the watch; True if the CLI is silent."""
        now = time.monotonic()
        if now < self._next:
            return False
        walk = self._walk
        if walk is None:
            self._walk = FolderScan(self._folders, now + self._quarter)
            self._next = now + _LOOK_AGAIN
        elif not walk.done:
            # One that hangs is not joined by a second one.
            self._next = now + (_LOOK_AGAIN if now < walk.give_up else self._quarter)
        else:
            self._walk = None
            self._next = walk.ended + self._quarter
            stale, self._stale = self._stale, False
            return not stale and self._judge(walk)
        return False

    def _judge(self, walk: FolderScan) -> bool:
        if walk.signature is None:
            return False
        if walk.signature != self._signature:
            self._signature, self._since = walk.signature, walk.ended
            return False
        return walk.began - self._since >= self._limit
