"""Which files of a checkout may have changed since some moment, by what the file system says of them.

Git compares times by the second, and must read what is as young as its index. Here a file counts as unchanged while its
path leads to the same inode and that has not changed since (its ctime, inode(7), in nanoseconds), which no program can
set. What is written through a shared mapping shows where the file system stamps that, which tmpfs does in newer kernels
only; git does not see it there either.

This is only ever a hint to look at less: where anything is odd nothing is said, and git looks at everything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Nanoseconds: two ticks of the slowest kernel, whose clock the stamps are taken from.
_TICKS: Final = 20_000_000
#: Nanoseconds by which two clocks differ that are not read at the same moment.
_JITTER: Final = 50_000_000
_NOW: Final = 2_000_000_000  # nanoseconds


@dataclass(frozen=True, slots=True)
class Candidates:
    """Paths as git has them: files that may have changed or are gone, files and folders that were not there."""

    changed: list[str]
    gone: list[str]
    added: list[str]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.changed) + len(self.gone) + len(self.added)


@dataclass(frozen=True, slots=True)
class Stamps:
    """What the checkout in `tree` was like at one moment, kept where no session can write; made by `take`."""

    tree: Path
    inodes: Mapping[str, int]
    """By path; that of a folder ends with a slash."""
    empty: frozenset[str]
    """Those of the folders that have nothing in them."""
    moment: int
    """The file system's clock, in nanoseconds."""
    clocks: int

    @classmethod
    def take(cls, tree: Path) -> Stamps | None:
        """Look at a checkout that nobody writes to; None where the file system's times can't be relied on. Blocks."""
        clocks, begin = _clocks(), time.monotonic_ns()
        with suppress(OSError):
            inodes = {path: entry.inode() for path, entry in _walk(tree, None)}
            empty = {path for path in inodes if path.endswith("/")} - {_folder(path) for path in inodes}
            # What was written before is to be clearly older than the moment.
            time.sleep(max(0, _TICKS - (time.monotonic_ns() - begin)) / 1e9)
            # Where ctime is no more than another name of mtime, this shows it.
            os.utime(tree, ns=(0, 0))
            moment = tree.stat().st_ctime_ns
            if abs(time.time_ns() - moment) < _NOW:
                return cls(tree, inodes, frozenset(empty), moment, clocks)
        return None

    def candidates(self, most: int) -> Candidates | None:
        """Return what may differ by now; None if that can't be told, or would be more than so many paths. Blocks."""
        found = Candidates([], [], [])
        seen: set[str] = set()
        with suppress(OSError, _OddError):
            for path, entry in _walk(self.tree, self.inodes):
                seen.add(path)
                self._judge(path, entry, found)
                if found.count > most:
                    return None
            found.gone.extend(path for path in self.inodes.keys() - seen if not path.endswith("/"))
            # A clock that was set back may have stamped a change with an earlier moment.
            if found.count <= most and abs(_clocks() - self.clocks) < _JITTER:
                return found
        return None

    def _judge(self, path: str, entry: os.DirEntry[str], found: Candidates) -> None:
        known = self.inodes.get(path)
        if known is None:
            self._check_added(path)
            found.added.append(path.rstrip("/"))
        elif path.endswith("/"):
            if known != entry.inode():  # other files may be in it that are as old
                raise _OddError
        elif known != entry.inode() or entry.stat(follow_symlinks=False).st_ctime_ns > self.moment - _TICKS:
            found.changed.append(path)

    def _check_added(self, path: str) -> None:
        folder = _folder(path)
        name = path[len(folder) :].rstrip("/")
        # Folders that began empty are submodules, and git has its own view of both.
        if name.lower() == ".git" or folder in self.empty:
            raise _OddError


class _OddError(Exception):
    """Only git can tell."""


def _walk(tree: Path, known: Mapping[str, int] | None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all that is in a checkout but its `.git`; with `known`, nothing of what is in other folders."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(f"{tree}/{folder}") as entries:
            for entry in entries:
                path = f"{folder}{entry.name}"
                if path == ".git":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    path += "/"
                    if known is None or path in known:
                        waiting.append(path)
                yield path, entry


def _folder(path: str) -> str:
    """Return the folder that a path is in, with its slash."""
    return path[: path.rstrip("/").rfind("/") + 1]


def _clocks() -> int:
    """Return by how much the clock that can be set is ahead of the one that can't."""
    return time.time_ns() - time.monotonic_ns()
