"""Detect from file metadata which files of a checkout may have changed.

Git compares times in seconds, and must read files that are as new as its index. Here, a file counts as unchanged while
its path leads to the same inode and its ctime (inode(7), in nanoseconds) is older than the snapshot; programs can't set
the ctime. Writes through a shared mapping are detected if the file system updates the ctime (`detects_mmap_writes`),
otherwise by `repo.worktrees.files.write_watch`.

Imports only the standard library, because `orchestrator.repo.worktrees.files.scan_worker` runs it.

When collecting work, the result only limits what is read: if anything is unusual, git reads everything. When cleaning a
checkout, the result is authoritative, and a checkout with an unknown result is discarded.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

#: Nanoseconds: two ticks of the slowest kernel clock, the source of timestamps.
_TIMESTAMP_RESOLUTION: Final = 20_000_000
#: Nanoseconds by which two `clock_offset` values may differ because the clocks are not read at the same instant.
_JITTER: Final = 50_000_000
_MAX_CLOCK_SKEW: Final = 2_000_000_000  # nanoseconds
#: A clock that can't be set. It includes time in which the machine sleeps, if the system supports that.
_STEADY: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class TreeDiff:
    """Changed paths in git's format; folders end with a slash."""

    changed: list[str] = field(default_factory=list)
    """Files that may have changed."""
    removed: list[str] = field(default_factory=list)
    """Files that no longer exist."""
    added: list[str] = field(default_factory=list)
    """New files and folders, without the contents of new folders."""
    touched_folders: list[str] = field(default_factory=list)
    """Folders that may have changed other than in their contents."""
    replaced: list[str] = field(default_factory=list)
    """Folders that were replaced by other folders; the files in the old folders count as removed."""
    ambiguous: list[str] = field(default_factory=list)
    """Added paths and removed empty folders that only git can interpret."""

    def is_small(self, limit: int) -> bool:
        """Return whether git need only look at these paths, and there are at most `limit`."""
        count = len(self.changed) + len(self.removed) + len(self.added)
        return not self.ambiguous and not self.replaced and count <= limit

    def without(self, is_excluded: Callable[[str], bool]) -> TreeDiff:
        """Return the diff without excluded files."""
        remaining = (
            [path for path in paths if not is_excluded(path)] for paths in (self.changed, self.removed, self.added)
        )
        changed, removed, added = remaining
        return replace(self, changed=changed, removed=removed, added=added)


class FolderSnapshot(NamedTuple):
    """The entries of a folder, by inode."""

    inode: int
    files: Mapping[str, int]
    """Everything except folders, by name."""
    folders: frozenset[str]
    """The names of its folders."""

    @property
    def is_empty(self) -> bool:
        """Whether the folder has no entries."""
        return not self.files and not self.folders


@dataclass(frozen=True, slots=True)
class TreeSnapshot:
    """The state of the checkout `tree`, stored where sessions can't write."""

    tree: Path
    folders: Mapping[str, FolderSnapshot]
    """The folders, keyed by path with a trailing slash; the top is ""."""
    preserved_paths: frozenset[str]
    """Files and folders excluded from comparison."""
    timestamp: int
    """The file system's clock, in nanoseconds."""
    clock_offset: int

    @classmethod
    def unknown(cls, tree: Path) -> TreeSnapshot:
        """Return a snapshot of an unknown state. Comparing it never yields a result."""
        return cls(tree, {"": FolderSnapshot(0, {}, frozenset())}, frozenset(), 0, 0)

    @classmethod
    def capture(cls, tree: Path, preserved_paths: Iterable[str] = ()) -> TreeSnapshot | None:
        """Scan a checkout without writers; return None if times are unreliable. Blocks."""
        preserved, folders = frozenset(preserved_paths), dict[str, FolderSnapshot]()
        with suppress(OSError):
            waiting = [""]
            while waiting:
                path = waiting.pop()
                folders[path] = folder = _scan_folder(tree, path, preserved)
                waiting.extend(f"{path}{name}/" for name in folder.folders)
            return _finish_snapshot(tree, folders, preserved)
        return None

    def count_files(self) -> int:
        """Return the number of files."""
        return sum(len(folder.files) for folder in self.folders.values())

    def has(self, path: str) -> bool:
        """Return whether this file existed."""
        folder, _, name = path.rpartition("/")
        known = self.folders.get(f"{folder}/" if folder else "")
        return known is not None and name in known.files

    def is_empty(self, path: str) -> bool:
        """Return whether this folder (with a trailing slash) existed and was empty."""
        known = self.folders.get(path)
        return known is not None and known.is_empty

    def compare(self) -> TreeDiff | None:
        """Return the possible changes since the snapshot; None if unknown. Blocks."""
        diff, waiting = TreeDiff(touched_folders=["/"]), [""]
        with suppress(OSError):
            if self.tree.lstat().st_ino != self.folders[""].inode:
                return None
            while waiting:
                path = waiting.pop()
                descriptor = self._open_folder(path, diff)
                if descriptor is None:
                    continue
                try:
                    if self._compare_folder(path, descriptor, diff):
                        waiting.extend(f"{path}{name}/" for name in self.folders[path].folders)
                finally:
                    os.close(descriptor)
            # If the clock was set back, a change may have an earlier time.
            if abs(_clock_offset() - self.clock_offset) < _JITTER:
                return diff
        return None

    def refreshed(self, paths: Iterable[str], preserved_paths: Iterable[str] | None = None) -> TreeSnapshot | None:
        """Return a newer snapshot if only `paths` and their parents changed. Blocks.

        The paths may be added, changed or removed files, or folders; the contents of a new folder must also be listed.
        """
        if not self.timestamp:
            return None
        preserved = self.preserved_paths if preserved_paths is None else frozenset(preserved_paths)
        folders = dict(self.folders)
        with suppress(OSError):
            for path in _with_parents(paths):
                if (path and (self.tree / path).is_symlink()) or not (self.tree / path).is_dir():
                    folders.pop(path, None)
                else:
                    folders[path] = _scan_folder(self.tree, path, preserved)
            return _finish_snapshot(self.tree, folders, preserved)
        return None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value for `of_json`."""
        return {
            "folders": {path: [each.inode, each.files, sorted(each.folders)] for path, each in self.folders.items()},
            "kept": sorted(self.preserved_paths),
            "moment": self.timestamp,
            "clocks": self.clock_offset,
        }

    @classmethod
    def of_json(cls, tree: Path, stored: Mapping[str, Any]) -> TreeSnapshot:
        """Parse a snapshot. Raises KeyError, TypeError or ValueError if damaged."""
        folders = {
            path: FolderSnapshot(inode, dict(files), frozenset(names))
            for path, (inode, files, names) in stored["folders"].items()
        }
        return cls(tree, folders, frozenset(stored["kept"]), int(stored["moment"]), int(stored["clocks"]))

    def _open_folder(self, path: str, diff: TreeDiff) -> int | None:
        """Return a folder's descriptor, or None after adding its files as removed."""
        try:
            # With a trailing slash, a link would be followed.
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(f"{self.tree}/{path.rstrip('/')}", flags)
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            diff.added.append(path.rstrip("/"))
        self._add_removed_folder(path, diff)
        return None

    def _compare_folder(self, path: str, descriptor: int, diff: TreeDiff) -> bool:
        """Compare a folder's files; return whether it is still the same folder."""
        known, oldest, status = self.folders[path], self.timestamp - _TIMESTAMP_RESOLUTION, os.fstat(descriptor)
        if status.st_ino != known.inode:
            diff.replaced.append(path)
            self._add_removed_folder(path, diff)
            return False
        if status.st_ctime_ns > oldest or not path:
            if path:
                diff.touched_folders.append(path)
            self._compare_names(path, os.listdir(descriptor), diff)
        for name, inode in known.files.items():
            try:
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                diff.removed.append(path + name)
                continue
            if status.st_ino != inode or status.st_ctime_ns > oldest:
                if stat.S_ISDIR(status.st_mode):
                    diff.removed.append(path + name)
                    diff.added.append(path + name)
                else:
                    diff.changed.append(path + name)
        return True

    def _compare_names(self, path: str, names: Iterable[str], diff: TreeDiff) -> None:
        known = self.folders[path]
        for name in names:
            full = path + name
            if name in known.files or name in known.folders or full in self.preserved_paths or full == ".git":
                continue
            diff.added.append(full)
            # Empty folders in a checkout are submodules; git treats both cases specially.
            if name.lower() == ".git" or (path and known.is_empty):
                diff.ambiguous.append(full)

    def _add_removed_folder(self, path: str, diff: TreeDiff) -> None:
        waiting = [path]
        while waiting:
            folder = waiting.pop()
            known = self.folders[folder]
            diff.removed.extend(folder + name for name in known.files)
            if known.is_empty:
                diff.ambiguous.append(folder)
            waiting.extend(f"{folder}{name}/" for name in known.folders)


def detects_mmap_writes(folder: Path) -> bool:
    """Return whether shared mappings update the ctime of a file. Blocks.

    A tmpfs does not (no `page_mkwrite` in the kernel's mm/shmem.c), so there a file's times don't reveal such a change.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        begin, before = time.monotonic_ns(), os.fstat(file.fileno()).st_ctime_ns
        time.sleep(max(0, _TIMESTAMP_RESOLUTION - (time.monotonic_ns() - begin)) / 1e9)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapped:
            # Read first: some kernels leave the page writable after a read fault, and then miss the write.
            mapped[0] += 1
            return os.fstat(file.fileno()).st_ctime_ns > before


def _finish_snapshot(
    tree: Path, folders: Mapping[str, FolderSnapshot], preserved_paths: frozenset[str]
) -> TreeSnapshot | None:
    """Return the snapshot of a fresh checkout; None if its times are unreliable."""
    clock_offset = _clock_offset()
    # Earlier writes must be measurably older than the timestamp.
    time.sleep(1.5 * _TIMESTAMP_RESOLUTION / 1e9)
    # Detects file systems that report mtime as ctime.
    os.utime(tree, ns=(0, 0))
    timestamp = tree.stat().st_ctime_ns
    if abs(time.time_ns() - timestamp) >= _MAX_CLOCK_SKEW:
        return None
    return TreeSnapshot(tree, folders, preserved_paths, timestamp, clock_offset)


def _scan_folder(tree: Path, path: str, preserved_paths: frozenset[str]) -> FolderSnapshot:
    """Return a folder's entries, except the root's `.git` and the preserved paths."""
    files, folders = dict[str, int](), list[str]()
    with os.scandir(f"{tree}/{path}") as entries:
        for entry in entries:
            full = path + entry.name
            if full == ".git" or full in preserved_paths:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(sys.intern(entry.name))
            else:
                files[sys.intern(entry.name)] = entry.inode()
    return FolderSnapshot((tree / path).lstat().st_ino, files, frozenset(folders))


def _with_parents(paths: Iterable[str]) -> set[str]:
    """Return all paths as folders, and all their parent folders."""
    folders = {""}
    for path in paths:
        folder = f"{path.rstrip('/')}/"
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder[: folder.rstrip("/").rfind("/") + 1]
    return folders


def _clock_offset() -> int:
    """Return the offset of the settable clock from the steady one, in nanoseconds."""
    return time.time_ns() - time.clock_gettime_ns(_STEADY)
