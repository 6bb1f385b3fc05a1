"""Follow the files of a session while it writes them, to predict merge conflicts.

Events of the kernel (inotify) name the changed paths, so the cost does not depend on the size of the checkout. If the
system has no watch left, the whole checkout is compared, at most as often as `_SCAN_SHARE` allows. Nothing read here is
landed or shown: the result may be incomplete while the session writes.

Files are opened without following links. Git reads only the session's ignore files, in a sandbox.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import anyio.to_thread

from orchestrator.errors import GitError
from orchestrator.repo.git.command import LINK_MODE, Git
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees.checkouts import HeldSlot
from orchestrator.repo.worktrees.files.write_watch import CHANGES, FolderWatch
from orchestrator.system import untrusted_files

#: The maximum share of one core for comparing whole checkouts, of all sessions together.
_SCAN_SHARE: Final = 0.01
#: Larger files are not read, in bytes.
_MAX_FILE: Final = 4 << 20
#: The maximum number of files in new folders that are followed; larger folders are usually generated.
_MAX_NEW_FILES: Final = 5_000
#: A repository in the checkout, whose files git does not commit.
_GIT: Final = ".git"
#: Seconds for git to read the ignore files.
_IGNORE_TIMEOUT: Final = 10.0


class FileState(NamedTuple):
    """The current state of a changed file."""

    path: str
    mode: str
    """Its mode in git; empty if it is missing."""
    content: bytes


class LiveFiles:
    """The changes of a running session since its start; call `close` when done."""

    def __init__(self, git: Git, held: HeldSlot, rules: IntakeRules, excludes: Path, *, is_watched: bool) -> None:
        """Start to follow the files of a slot; unless `is_watched`, compare them regularly. Blocks.

        `git` runs in a repository without an index; its ignore patterns are written to the file `excludes` in it.
        """
        self._held, self._rules, self._tree = held, rules, held.slot.tree
        excludes.write_text("".join(f"{pattern}\n" for pattern in rules.ignored))
        flags = (*git.flags, "-c", f"core.excludesFile={excludes}")
        self._git = replace(git, flags=flags).confined(readable=(self._tree, excludes))
        self._watch: FolderWatch | None = None
        if is_watched:
            with suppress(OSError):
                self._watch = FolderWatch(self._tree, held.contents.snapshot.folders, CHANGES)
        self._is_outdated, self._next_scan = True, 0.0
        self._extras = frozenset(held.contents.record.extras)
        self.present: set[str] = set()
        """The files that were added or changed."""
        self.removed: set[str] = set()
        """The files that were removed."""
        self._touched: set[str] = set()
        self._new: set[str] = set()
        self._ignored: set[str] = set()

    @property
    def watches(self) -> int:
        """The number of inotify watches."""
        return 0 if self._watch is None else self._watch.count

    def poll(self) -> bool:
        """Read new events; return whether files may have changed since `read_changes`. Blocks briefly."""
        for path in () if self._watch is None else self._watch.read():
            if path is None:
                self._is_outdated = True
            elif path.rpartition("/")[2] != _GIT:
                self._touched.add(path)
        return self._is_outdated or bool(self._touched)

    async def read_changes(self, unwatched: int) -> list[FileState]:
        """Return the files that changed according to `poll`, or that may have changed.

        `unwatched` is the number of sessions without watches, whose checkouts are compared.
        """
        paths, self._touched = await anyio.to_thread.run_sync(self._without_temporary, self._touched), set()
        if self._is_outdated:
            paths |= await self._scan(max(unwatched, 1))
        if not paths:
            return []
        try:
            found = await anyio.to_thread.run_sync(self._expand, await self._without_ignored(paths))
            return await anyio.to_thread.run_sync(self._read, await self._without_ignored(found))
        except (GitError, OSError):  # the session is replacing the ignore files, for example
            self._is_outdated = True
            return []

    def close(self) -> None:
        """Stop following the files."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _without_temporary(self, paths: set[str]) -> set[str]:
        """Return the paths without new files that are already gone: many programs replace files with them. Blocks."""
        new = (path for path in paths if path not in self.present and not self._is_tracked(path))
        missing = {path for path in new if not self._exists(path)}
        return paths - (missing - self._present_folders()) if missing else paths

    def _present_folders(self) -> set[str]:
        return {parent for path in self.present for parent in _with_parents(path)} - self.present

    def _exists(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        with suppress(OSError), untrusted_files.open_folder(self._tree, folder) as within:
            os.stat(name, dir_fd=within, follow_symlinks=False)
            return True
        return False

    async def _scan(self, sessions: int) -> set[str]:
        began = time.monotonic()
        if began < self._next_scan:
            return set()
        diff = await self._held.compare()
        self._next_scan = time.monotonic() + (time.monotonic() - began) * sessions / _SCAN_SHARE
        self._is_outdated = self._watch is None or diff is None
        if diff is None:
            return set()
        # A file that was added and is missing now is not in the diff.
        return {*diff.changed, *diff.removed, *diff.added, *(path.rstrip("/") for path in diff.replaced), *self._new}

    async def _without_ignored(self, paths: Collection[str]) -> set[str]:
        """Return the paths that git does not ignore; tracked paths are never ignored."""
        if any(path.rpartition("/")[2] == ".gitignore" for path in paths):
            self._ignored.clear()
            self._new.clear()
        remaining = {path for path in paths if not any(parent in self._ignored for parent in _with_parents(path))}
        if unknown := [path for path in remaining if path not in self._new and not self._is_tracked(path)]:
            env = {"GIT_WORK_TREE": str(self._tree)}
            ignored = await self._git.ignored(unknown, self._tree, env, limit=_IGNORE_TIMEOUT)
            self._ignored |= ignored
            self._new |= set(unknown) - ignored
            remaining -= ignored
        return remaining

    def _is_tracked(self, path: str) -> bool:
        return self.was_committed(path) or f"{path}/" in self._held.contents.snapshot.folders

    def was_committed(self, path: str) -> bool:
        """Return whether a file existed at the start, and was not created by setup."""
        return self._held.contents.snapshot.has(path) and path not in self._extras

    def _expand(self, paths: Iterable[str]) -> set[str]:
        """Return files, with the earlier and current files in the place of folders. Blocks."""
        found, folders = set[str](), self._present_folders()
        for path in paths:
            found.add(path)
            found.update(self._committed_below(f"{path}/"))
            found.update(self._walk(path))
            if path in folders:
                found.update(known for known in self.present if known.startswith(f"{path}/"))
        return found

    def _committed_below(self, folder: str) -> Iterator[str]:
        folders, waiting = self._held.contents.snapshot.folders, [folder]
        while waiting:
            known = folders.get(at := waiting.pop())
            if known is not None:
                yield from (at + name for name in known.files)
                waiting.extend(f"{at}{name}/" for name in known.folders)

    def _walk(self, top: str) -> Iterator[str]:
        """Yield the files of a folder, and watch its folders. Blocks."""
        waiting, count = [top], 0
        while waiting and count < _MAX_NEW_FILES:
            path = waiting.pop()
            with suppress(OSError), untrusted_files.open_folder(self._tree, path) as folder:
                if self._watch is not None:
                    # First, so that no later file is missed. If the folder is replaced by a link in between, events of
                    # another folder name files that do not exist here.
                    self._watch.add(f"{path}/")
                with os.scandir(folder) as entries:
                    names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
                names.pop(_GIT, None)
                count += len(names)
                waiting.extend(f"{path}/{name}" for name, is_folder in names.items() if is_folder)
                yield from (f"{path}/{name}" for name, is_folder in names.items() if not is_folder)

    def _read(self, paths: Iterable[str]) -> list[FileState]:
        return [state for path in sorted(paths) if (state := self._read_file(path)) is not None]

    def _read_file(self, path: str) -> FileState | None:
        """Return the state of a file; None if it has none, or may not be committed."""
        folder, _, name = path.rpartition("/")
        try:
            with untrusted_files.open_folder(self._tree, folder) as within:
                status = os.stat(name, dir_fd=within, follow_symlinks=False)
                mode = status.st_mode
                link = os.fsencode(os.readlink(name, dir_fd=within)) if stat.S_ISLNK(mode) else None
        except OSError:
            return self._remove(path)
        if stat.S_ISDIR(mode):
            return self._remove(path)
        if status.st_size > _MAX_FILE or self._rules.check_file(path, status.st_size) is not None:
            return None
        try:
            content = untrusted_files.read_file(self._tree, path, _MAX_FILE) if link is None else link
        except OSError:  # replaced in the meantime: another event follows
            return None
        self.present.add(path)
        self.removed.discard(path)
        return FileState(
            path, LINK_MODE if link is not None else "100755" if mode & stat.S_IXUSR else "100644", content
        )

    def _remove(self, path: str) -> FileState | None:
        was_committed, is_known = self.was_committed(path), path in self.present
        self.present.discard(path)
        if was_committed:
            self.removed.add(path)
        return FileState(path, "", b"") if was_committed or is_known else None


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition("/")[0]
