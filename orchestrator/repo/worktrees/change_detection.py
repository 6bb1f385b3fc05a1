"""Which files of a checkout may have changed since some moment, by what the file system says of them.

Git compares times by the second, and must read what is as young as its index. Here a file counts as unchanged while its
path leads to the same inode and that has not changed since (its ctime, inode(7), in nanoseconds), which no program can
set. What is written through a shared mapping shows where the file system stamps that (`detects_mmap_writes`); git does not
see it elsewhere either.

Only the standard library is imported: `orchestrator.repo.worktrees.scan_worker` does this, too.

What is found this way is a hint to look at less when work is collected: where anything is odd git looks at everything.
When a checkout is cleaned it is the truth, and one of which nothing can be told is given up.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

#: Nanoseconds: two ticks of the slowest kernel, whose clock the stamps are taken from.
_TIMESTAMP_RESOLUTION: Final = 20_000_000
#: Nanoseconds by which two clocks differ that are not read at the same moment.
_JITTER: Final = 50_000_000
_MAX_CLOCK_SKEW: Final = 2_000_000_000  # nanoseconds
#: The clock that nobody can set, with the time that the machine slept where it knows that.
_STEADY: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class TreeDiff:
    """Paths as git has them; those of folders end with a slash where they are told apart."""

    changed: list[str] = field(default_factory=list)
    """Files that may not be what they were."""
    gone: list[str] = field(default_factory=list)
    """Files that are not there any more."""
    added: list[str] = field(default_factory=list)
    """Files and folders that were not there; nothing of what is in such a folder."""
    touched_folders: list[str] = field(default_factory=list)
    """Folders of which more than the content may have changed."""
    replaced: list[str] = field(default_factory=list)
    """Folders that are others than before: what was in them is gone."""
    ambiguous: list[str] = field(default_factory=list)
    """What was added, and empty folders that are gone, in such a way that only git can tell what it means."""

    def is_small(self, most: int) -> bool:
        """Whether git need look at nothing but these, which are at most so many."""
        count = len(self.changed) + len(self.gone) + len(self.added)
        return not self.ambiguous and not self.replaced and count <= most

    def without(self, passed_over: Callable[[str], bool]) -> TreeDiff:
        """Return the same but for the files that are to be passed over."""
        kept = ([path for path in paths if not passed_over(path)] for paths in (self.changed, self.gone, self.added))
        changed, gone, added = kept
        return replace(self, changed=changed, gone=gone, added=added)


class FolderSnapshot(NamedTuple):
    """What a folder was, by inodes."""

    inode: int
    files: Mapping[str, int]
    """Whatever is in it and no folder, by name."""
    folders: frozenset[str]
    """The names of those in it."""

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing in it."""
        return not self.files and not self.folders


@dataclass(frozen=True, slots=True)
class TreeSnapshot:
    """What the checkout in `tree` was like at one moment, kept where no session can write; made by `take`."""

    tree: Path
    folders: Mapping[str, FolderSnapshot]
    """By path, with a slash at the end but for that of the whole."""
    kept: frozenset[str]
    """Files and folders that are never looked at."""
    timestamp: int
    """The file system's clock, in nanoseconds."""
    clock_offset: int

    @classmethod
    def unknown(cls, tree: Path) -> TreeSnapshot:
        """Return stamps of a checkout of which nothing is known: no comparison will ever tell anything."""
        return cls(tree, {"": FolderSnapshot(0, {}, frozenset())}, frozenset(), 0, 0)

    @classmethod
    def take(cls, tree: Path, kept: Iterable[str] = ()) -> TreeSnapshot | None:
        """Look at a checkout that nobody writes to; None where the file system's times can't be relied on. Blocks."""
        unseen, folders = frozenset(kept), dict[str, FolderSnapshot]()
        with suppress(OSError):
            waiting = [""]
            while waiting:
                path = waiting.pop()
                folders[path] = folder = _scan_folder(tree, path, unseen)
                waiting.extend(f"{path}{name}/" for name in folder.folders)
            return _finish_snapshot(tree, folders, unseen)
        return None

    def count_files(self) -> int:
        """Return how many files there were."""
        return sum(len(folder.files) for folder in self.folders.values())

    def has(self, path: str) -> bool:
        """Whether there was such a file."""
        folder, _, name = path.rpartition("/")
        known = self.folders.get(f"{folder}/" if folder else "")
        return known is not None and name in known.files

    def is_empty(self, path: str) -> bool:
        """Whether there was such a folder, which ends with a slash, with nothing in it."""
        known = self.folders.get(path)
        return known is not None and known.is_empty

    def compare(self) -> TreeDiff | None:
        """Return what may differ by now; None if that can't be told. Blocks."""
        found, waiting = TreeDiff(touched_folders=["/"]), [""]
        with suppress(OSError):
            if self.tree.lstat().st_ino != self.folders[""].inode:
                return None
            while waiting:
                path = waiting.pop()
                descriptor = os.open(f"{self.tree}/{path}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    self._compare_folder(path, descriptor, found)
                    waiting.extend(self._same_folders(path, descriptor, found))
                finally:
                    os.close(descriptor)
            # A clock that was set back may have stamped a change with an earlier moment.
            if abs(_clock_offset() - self.clock_offset) < _JITTER:
                return found
        return None

    def renewed(self, paths: Iterable[str], kept: Iterable[str] | None = None) -> TreeSnapshot | None:
        """Return the stamps of now, where nothing but `paths`, and folders above them, differs from what was. Blocks.

        They may be files that were made, written or removed, or folders; what is in a new folder is named, too.
        """
        if not self.timestamp:
            return None
        unseen = self.kept if kept is None else frozenset(kept)
        folders = dict(self.folders)
        with suppress(OSError):
            for path in _with_parents(paths):
                if (path and (self.tree / path).is_symlink()) or not (self.tree / path).is_dir():
                    folders.pop(path, None)
                else:
                    folders[path] = _scan_folder(self.tree, path, unseen)
            return _finish_snapshot(self.tree, folders, unseen)
        return None

    def to_json(self) -> dict[str, Any]:
        """Return what `of_json` takes."""
        return {
            "folders": {path: [one.inode, one.files, sorted(one.folders)] for path, one in self.folders.items()},
            "kept": sorted(self.kept),
            "moment": self.timestamp,
            "clocks": self.clock_offset,
        }

    @classmethod
    def of_json(cls, tree: Path, stored: Mapping[str, Any]) -> TreeSnapshot:
        """Return stamps as they were stored; raises KeyError, TypeError or ValueError where they are damaged."""
        folders = {
            path: FolderSnapshot(inode, dict(files), frozenset(names))
            for path, (inode, files, names) in stored["folders"].items()
        }
        return cls(tree, folders, frozenset(stored["kept"]), int(stored["moment"]), int(stored["clocks"]))

    def _compare_folder(self, path: str, descriptor: int, found: TreeDiff) -> None:
        known, oldest = self.folders[path], self.timestamp - _TIMESTAMP_RESOLUTION
        if os.fstat(descriptor).st_ctime_ns > oldest or not path:
            if path:
                found.touched_folders.append(path)
            self._compare_names(path, os.listdir(descriptor), found)
        look = os.stat
        for name, inode in known.files.items():
            try:
                status = look(name, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                found.gone.append(path + name)
                continue
            if status.st_ino != inode or status.st_ctime_ns > oldest:
                if stat.S_ISDIR(status.st_mode):
                    found.gone.append(path + name)
                    found.added.append(path + name)
                else:
                    found.changed.append(path + name)

    def _compare_names(self, path: str, names: Iterable[str], found: TreeDiff) -> None:
        known = self.folders[path]
        for name in names:
            one = path + name
            if name in known.files or name in known.folders or one in self.kept or one == ".git":
                continue
            found.added.append(one)
            # Folders that began empty are submodules, and git has its own view of both.
            if name.lower() == ".git" or (path and known.is_empty):
                found.ambiguous.append(one)

    def _same_folders(self, path: str, descriptor: int, found: TreeDiff) -> Iterator[str]:
        """Yield the folders in a folder that are still the same; of others, tell that all in them is gone."""
        for name in self.folders[path].folders:
            one = f"{path}{name}/"
            try:
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                self._mark_gone(one, found)
                continue
            if stat.S_ISDIR(status.st_mode) and status.st_ino == self.folders[one].inode:
                yield one
                continue
            if stat.S_ISDIR(status.st_mode):
                found.replaced.append(one)
            else:
                found.added.append(one.rstrip("/"))
            self._mark_gone(one, found)

    def _mark_gone(self, path: str, found: TreeDiff) -> None:
        waiting = [path]
        while waiting:
            one = waiting.pop()
            known = self.folders[one]
            found.gone.extend(one + name for name in known.files)
            if known.is_empty:
                found.ambiguous.append(one)
            waiting.extend(f"{one}{name}/" for name in known.folders)


def detects_mmap_writes(folder: Path) -> bool:
    """Whether the file system under a folder stamps a file that is written through a shared mapping. Blocks.

    A tmpfs does not (no `page_mkwrite` in the kernel's mm/shmem.c), and then nobody can tell by a file's times that it
    was changed.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        begin, before = time.monotonic_ns(), os.fstat(file.fileno()).st_ctime_ns
        time.sleep(max(0, _TIMESTAMP_RESOLUTION - (time.monotonic_ns() - begin)) / 1e9)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapped:
            # Read before it is written: where that was all the kernel wanted to know, it lets the page be written, too.
            mapped[0] += 1
            return os.fstat(file.fileno()).st_ctime_ns > before


def _finish_snapshot(tree: Path, folders: Mapping[str, FolderSnapshot], kept: frozenset[str]) -> TreeSnapshot | None:
    """Return the stamps of a checkout that was written to until now; None where its times can't be relied on."""
    clocks = _clock_offset()
    # What was written before is to be clearly older than the moment.
    time.sleep(1.5 * _TIMESTAMP_RESOLUTION / 1e9)
    # Where ctime is no more than another name of mtime, this shows it.
    os.utime(tree, ns=(0, 0))
    moment = tree.stat().st_ctime_ns
    if abs(time.time_ns() - moment) >= _MAX_CLOCK_SKEW:
        return None
    return TreeSnapshot(tree, folders, kept, moment, clocks)


def _scan_folder(tree: Path, path: str, kept: frozenset[str]) -> FolderSnapshot:
    """Return what a folder is, but for the `.git` of the whole and what is kept."""
    files, folders = dict[str, int](), list[str]()
    with os.scandir(f"{tree}/{path}") as entries:
        for entry in entries:
            one = path + entry.name
            if one == ".git" or one in kept:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(sys.intern(entry.name))
            else:
                files[sys.intern(entry.name)] = entry.inode()
    return FolderSnapshot((tree / path).lstat().st_ino, files, frozenset(folders))


def _with_parents(paths: Iterable[str]) -> set[str]:
    """Return all folders that are, or are above, one of the paths; any of these may be one."""
    found = {""}
    for path in paths:
        one = f"{path.rstrip('/')}/"
        while one and one not in found:
            found.add(one)
            one = one[: one.rstrip("/").rfind("/") + 1]
    return found


def _clock_offset() -> int:
    """Return by how much the clock that can be set is ahead of the one that can't."""
    return time.time_ns() - time.clock_gettime_ns(_STEADY)
