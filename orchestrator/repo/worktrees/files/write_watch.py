"""Watch the folders of a checkout (inotify(7), Linux).

`WriteWatch` detects which files are opened for writing. Needed if timestamps don't reveal writes through a shared
mapping (`repo.worktrees.files.change_detection.detects_mmap_writes`): such a mapping needs a descriptor opened for
writing, whose last close is an event in the file's folder. A file written under another name has a newer ctime, because
that name had to be linked.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from orchestrator.sandbox.landlock import libc

_EVENT: Final = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
CLOSE_WRITE: Final = 0x8
#: Every change of a file or of a folder's entries: attributes, writes, moves, creation, deletion.
CHANGES: Final = 0x4 | CLOSE_WRITE | 0x40 | 0x80 | 0x100 | 0x200
_OVERFLOW, _ONLY_FOLDERS, _NO_FOLLOW = 0x4000, 0x01000000, 0x02000000
_READ_BYTES: Final = 1 << 16


class FolderWatch:
    """An inotify watch for the events of `mask` in folders; call `close` when done."""

    def __init__(self, tree: Path, folders: Iterable[str], mask: int) -> None:
        """Watch folders, named as in a `TreeSnapshot`, without their subfolders. Blocks.

        Raises OSError if the system has no inotify, or no watch is free.
        """
        if sys.platform != "linux":
            raise OSError("inotify is not supported on this system")
        self._tree, self._mask = tree, mask
        self._folders: dict[int, str] = {}
        self._fd = _check(libc().inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        with ExitStack() as undo:
            undo.callback(self.close)
            for folder in folders:
                self.add(folder)
            undo.pop_all()

    @property
    def count(self) -> int:
        """The number of watched folders."""
        return len(self._folders)

    def add(self, folder: str) -> None:
        """Watch another folder. Raises OSError like the constructor, and if it does not exist. Blocks."""
        path = os.fsencode(f"{self._tree}/{folder}")
        mask = ctypes.c_uint32(self._mask | _ONLY_FOLDERS | _NO_FOLLOW)
        self._folders[_check(libc().inotify_add_watch(self._fd, path, mask))] = folder

    def read(self) -> Iterator[str | None]:
        """Yield the paths of new events; None if events were lost. Blocks briefly."""
        while True:
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                return
            offset = 0
            while offset < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, offset)
                name = data[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0")
                offset += _EVENT.size + length
                if mask & _OVERFLOW:
                    yield None
                elif mask & self._mask and name:
                    yield self._folders[watch] + os.fsdecode(name)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)


class WriteWatch(FolderWatch):
    """A watch for files that are opened for writing."""

    def __init__(self, tree: Path, folders: Iterable[str]) -> None:
        """Watch folders; see `FolderWatch`."""
        super().__init__(tree, folders, CLOSE_WRITE)
        self._written: set[str] | None = set()

    def read_written(self) -> set[str] | None:
        """Return the written paths, or None if events were lost. Blocks briefly."""
        for path in self.read():
            if path is None or self._written is None:
                self._written = None
            else:
                self._written.add(path)
        return self._written


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
