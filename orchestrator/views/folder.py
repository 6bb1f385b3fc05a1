"""The folder of the views. Everything here blocks."""

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

#: How large `events.jsonl` becomes before its older half goes.
EVENTS_BYTES: Final = 16 << 20

_STAGED: Final = ".staged"
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class ViewFolder:
    """Files for reading, each written aside and put in its place as a whole; only `events.jsonl` grows in place.

    Whoever writes holds a lock that keeps others from it.
    """

    def __init__(self, path: Path, events_bytes: int = EVENTS_BYTES) -> None:
        self.path = path
        self._events_bytes = events_bytes
        self._prefix = secrets.token_hex(4)
        self._count = 0
        self._made: set[str] = set()
        """Folders that are known to be there."""

    def begin(self) -> None:
        """Make the folder where it is missing, and remove what was begun and never came to its place."""
        for left in (self.path / _STAGED, *self.path.parent.glob(f"{self.path.name}.*.new")):
            shutil.rmtree(left, ignore_errors=True)
        self._made.clear()
        self._make("")
        self._make(_STAGED)

    def read_position(self) -> ViewPosition | None:
        """Return how far the views say that they are; None where that can't be read."""
        try:
            return ViewPosition.decode((self.path / INDEX).read_bytes())
        except OSError:
            return None

    def remove_index(self) -> None:
        """Have nobody go on from here."""
        (self.path / INDEX).unlink(missing_ok=True)

    def index_stamp(self) -> tuple[int, int, int] | None:
        """Return what tells whether another `index.json` is there than before; None where there is none."""
        try:
            found = (self.path / INDEX).lstat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def is_whole(self, names: Iterable[str], stand: ViewPosition) -> bool:
        """Whether these files are there and nothing has been written since `index.json`, the last that is."""
        newest = self.index_stamp()
        if newest is None:
            return False
        try:
            if any(entry.is_symlink() for entry in os.scandir(self.path)):
                return False
            base = f"{self.path}/"
            for name in (EVENTS, *names):
                found = os.lstat(base + name)
                is_ours = stat.S_ISREG(found.st_mode) and found.st_mtime_ns <= newest[2]
                if not is_ours or (found.st_size == 0 and name != EVENTS):
                    return False
            return (self.path / EVENTS).stat().st_size >= stand.events
        except OSError:
            return False

    def resume(self, stand: ViewPosition) -> None:
        """Go on from there: what came behind it is written anew, sessions too."""
        os.truncate(self.path / EVENTS, stand.events)
        shutil.rmtree(self.path / CONTEXT, ignore_errors=True)

    def apply(self, changes: ViewChanges) -> None:
        """Write what is to be written, and remove what is to go."""
        for name, data in changes.files.items():
            if data is not None:
                self.write(name, data)
                continue
            with suppress(FileNotFoundError):
                os.unlink(f"{self.path}/{name}")
        if changes.events:
            self._append(b"".join(changes.events))

    def write(self, name: str, data: bytes) -> None:
        """Put a file in its place."""
        self._count += 1
        staged = f"{self.path}/{_STAGED}/{self._prefix}-{self._count}"
        fd = os.open(staged, _CREATE, 0o600)
        try:
            _write_all(fd, data)
        finally:
            os.close(fd)
        self._make(name.rpartition("/")[0])
        try:
            os.rename(staged, f"{self.path}/{name}")
        except FileNotFoundError:  # somebody has removed the folder
            self._made.clear()
            self._make(name.rpartition("/")[0])
            os.rename(staged, f"{self.path}/{name}")

    def conclude(self, stand: ViewPosition) -> None:
        """Say how far the views are, once all else is written."""
        failpoint("views.written")
        self.write(INDEX, stand.encode())

    def events_size(self) -> int:
        """Return how many bytes of events there are."""
        return (self.path / EVENTS).stat().st_size

    def create_replacement(self) -> ViewFolder:
        """Return an empty folder beside this one that may take its place."""
        made = ViewFolder(self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.new"), self._events_bytes)
        made.begin()
        made._append(b"")
        return made

    def replace_with(self, successor: ViewFolder) -> None:
        """Have what is in another folder instead of what is in this one."""
        old = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.new")
        with suppress(FileNotFoundError):
            self.path.rename(old)
        successor.path.rename(self.path)
        self._made = set(successor._made)
        failpoint("views.replaced")
        shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Remove all of it."""
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
                raise RefusedError(f"{path} is no folder", "remove it, so that the views can be made there") from None
            else:  # nothing of ours: what it leads to is not written
                path.unlink()
                path.mkdir(mode=0o700)
        self._made.add(folder)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
