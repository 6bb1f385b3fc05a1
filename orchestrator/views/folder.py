"""Write the folder of the views. Everything here blocks."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.errors import RefusedError
from orchestrator.system.failpoints import failpoint
from orchestrator.views.content import ViewChanges, ViewPosition
from orchestrator.views.names import CONTEXT, EVENTS, INDEX

#: The size of `events.jsonl` in bytes at which its older half is removed.
EVENTS_BYTES: Final = 16 << 20

_STAGED: Final = ".staged"
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class ViewFolder:
    """The folder of the views: each file is replaced atomically, only `events.jsonl` is appended to.

    The caller holds the lock of the views.
    """

    def __init__(self, path: Path, events_bytes: int = EVENTS_BYTES) -> None:
        self.path = path
        self._events_bytes = events_bytes
        self._prefix = secrets.token_hex(4)
        self._count = 0
        self._made: set[str] = set()
        """Folders that are known to exist."""

    def begin(self) -> None:
        """Create the folder if missing, and remove unfinished files and replacements."""
        for leftover in (self.path / _STAGED, *self.path.parent.glob(f"{self.path.name}.*.new")):
            shutil.rmtree(leftover, ignore_errors=True)
        self._made.clear()
        self._make("")
        self._make(_STAGED)

    def read_position(self) -> ViewPosition | None:
        """Return the position in `index.json`; None if it can't be read."""
        try:
            return ViewPosition.decode((self.path / INDEX).read_bytes())
        except OSError:
            return None

    def remove_index(self) -> None:
        """Remove `index.json`, so that the next update rebuilds the views."""
        (self.path / INDEX).unlink(missing_ok=True)

    def index_stamp(self) -> tuple[int, int, int] | None:
        """Return a stamp that changes with each new `index.json`; None if there is none."""
        try:
            status = (self.path / INDEX).lstat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def is_whole(self, names: Iterable[str], position: ViewPosition) -> bool:
        """Return True if these files exist and none is newer than `index.json`, which is written last."""
        newest = self.index_stamp()
        if newest is None:
            return False
        try:
            if any(entry.is_symlink() for entry in os.scandir(self.path)):
                return False
            base = f"{self.path}/"
            for name in (EVENTS, *names):
                status = os.lstat(base + name)
                is_ours = stat.S_ISREG(status.st_mode) and status.st_mtime_ns <= newest[2]
                if not is_ours or (status.st_size == 0 and name != EVENTS):
                    return False
            return (self.path / EVENTS).stat().st_size >= position.events
        except OSError:
            return False

    def resume(self, position: ViewPosition) -> None:
        """Continue from a position: remove newer events, and all files of sessions."""
        os.truncate(self.path / EVENTS, position.events)
        shutil.rmtree(self.path / CONTEXT, ignore_errors=True)

    def apply(self, changes: ViewChanges) -> None:
        """Write and remove files, and append events."""
        for name, data in changes.files.items():
            if data is not None:
                self.write(name, data)
                continue
            with suppress(FileNotFoundError):
                os.unlink(f"{self.path}/{name}")  # noqa: PTH108  as above
        if changes.events:
            self._append(b"".join(changes.events))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        self._count += 1
        staged = f"{self.path}/{_STAGED}/{self._prefix}-{self._count}"
        fd = os.open(staged, _CREATE, 0o600)
        try:
            _write_all(fd, data)
        finally:
            os.close(fd)
        self._make(name.rpartition("/")[0])
        try:
            os.rename(staged, f"{self.path}/{name}")  # noqa: PTH104  as above
        except FileNotFoundError:  # another program has removed the folder
            self._made.clear()
            self._make(name.rpartition("/")[0])
            os.rename(staged, f"{self.path}/{name}")  # noqa: PTH104  as above

    def conclude(self, position: ViewPosition) -> None:
        """Write the position, after all other files."""
        failpoint("views.written")
        self.write(INDEX, position.encode())

    def events_size(self) -> int:
        """Return the size of `events.jsonl` in bytes."""
        return (self.path / EVENTS).stat().st_size

    def create_replacement(self) -> ViewFolder:
        """Return a new, empty folder next to this one that can replace it."""
        replacement = ViewFolder(
            self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.new"), self._events_bytes
        )
        replacement.begin()
        replacement._append(b"")
        return replacement

    def replace_with(self, successor: ViewFolder) -> None:
        """Replace the content of this folder by that of another."""
        old = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.new")
        with suppress(FileNotFoundError):
            self.path.rename(old)
        successor.path.rename(self.path)
        self._made = set(successor._made)
        failpoint("views.replaced")
        shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _append(self, data: bytes) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.path / EVENTS, flags, 0o600)
        try:
            _write_all(fd, data)
            size = os.fstat(fd).st_size
            if size > self._events_bytes:
                start = size - self._events_bytes // 2
                newest = os.pread(fd, size - start + 1, start - 1)
                self.write(EVENTS, newest[newest.find(b"\n") + 1 :])
        finally:
            os.close(fd)

    def _make(self, folder: str) -> None:
        if folder in self._made:
            return
        if folder:
            self._make(folder.rpartition("/")[0])
        path = self.path / folder
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
            elif not folder:
                raise RefusedError(
                    f"{path} is not a folder", "remove it, so that the views can be written there"
                ) from None
            else:  # a link or file of another program: never write to its target
                path.unlink()
                path.mkdir(mode=0o700)
        self._made.add(folder)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
