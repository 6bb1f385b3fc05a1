"""Detect which files of a checkout are opened for writing (inotify(7), Linux).

Needed if timestamps don't reveal writes through a shared mapping
(`repo.worktrees.files.change_detection.detects_mmap_writes`): such a mapping needs a descriptor opened for writing,
whose last close is an event in the file's folder. A file written under another name has a newer ctime, because that
name had to be linked.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from orchestrator.sandbox.landlock import libc

_EVENT: Final = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_CLOSE_WRITE, _OVERFLOW, _ONLY_FOLDERS, _NO_FOLLOW = 0x8, 0x4000, 0x01000000, 0x02000000
_READ_BYTES: Final = 1 << 16


class WriteWatch:
    """An inotify watch on existing folders; call `close` when done."""

    def __init__(self, tree: Path, folders: Iterable[str]) -> None:
        """Watch folders, named as in a `TreeSnapshot`, without their subfolders. Blocks.

        Raises OSError if the system has no inotify, or no watch is free.
        """
        if sys.platform != "linux":
            raise OSError("inotify is not supported on this system")
        self._folders: dict[int, str] = {}
        self._written: set[str] | None = set()
        self._fd = _check(libc().inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        with ExitStack() as undo:
            undo.callback(self.close)
            for folder in folders:
                path = os.fsencode(f"{tree}/{folder}")
                mask = ctypes.c_uint32(_CLOSE_WRITE | _ONLY_FOLDERS | _NO_FOLLOW)
                self._folders[_check(libc().inotify_add_watch(self._fd, path, mask))] = folder
            undo.pop_all()

    def read_written(self) -> set[str] | None:
        """Return the written paths, or None if events were lost. Blocks briefly."""
        while True:
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                return self._written
            offset = 0
            while offset < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, offset)
                name = data[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0")
                offset += _EVENT.size + length
                if mask & _OVERFLOW:
                    self._written = None
                elif mask & _CLOSE_WRITE and self._written is not None:
                    self._written.add(self._folders[watch] + os.fsdecode(name))

    def close(self) -> None:
        """End the watch."""
        os.close(self._fd)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
