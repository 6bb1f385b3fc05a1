"""Write files atomically and durably. Everything here blocks."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from glob import glob
from pathlib import Path
from secrets import randbelow


def atomic_write(
    path: Path,
    data: bytes | str,
    *,
    mode: int = 0o600,
    durable: bool = False,
    replace: bool = True,
    is_locked: bool = False,
) -> None:
    """Write a file so that readers and crashes see the old or the new content.

    `durable`: the file survives a power failure. `is_locked`: the caller holds a lock for the file, so the temporary
    file has a fixed name and is reused after a crash. Without `replace`, raises FileExistsError if the file exists.
    """
    staged = StagedFile(path, mode=mode, is_locked=is_locked)
    try:
        with name_in_errors(path):
            staged.file.write(data.encode() if isinstance(data, str) else data)
        staged.publish(durable=durable, replace=replace)
    finally:
        staged.discard()


class StagedFile:
    """A temporary file, `<name>.<digits>.new`. Always call `discard` when done."""

    def __init__(self, path: Path, *, mode: int = 0o600, is_locked: bool = False) -> None:
        """Create the temporary file."""
        self._path = path
        flag = os.O_TRUNC if is_locked else os.O_EXCL
        self.path = path.with_name(f"{path.name}.new" if is_locked else f"{path.name}.{randbelow(10**12)}.new")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flag, 0o600)
        self.file = os.fdopen(descriptor, "wb")
        if mode != 0o600:
            os.fchmod(descriptor, mode)

    def publish(
        self, *, durable: bool = False, replace: bool = True, held: AbstractContextManager[None] | None = None
    ) -> None:
        """Move the file to its final path within the context `held`; see `atomic_write`."""
        with name_in_errors(self._path), self.file as file:
            file.flush()
            if durable:
                sync_file(file.fileno())
        with held or nullcontext():
            if replace or not self._link():
                self.path.replace(self._path)
        if durable:
            sync_folder(self._path.parent)

    def _link(self) -> bool:
        """Move the file to a free final path; return False if hard links don't work."""
        try:
            self._path.hardlink_to(self.path)
        except FileExistsError:
            raise
        except OSError:
            if os.path.lexists(self._path):
                raise FileExistsError(self._path) from None
            return False
        return True

    def discard(self) -> None:
        """Remove the temporary file unless it was published."""
        with suppress(OSError):  # on a full disk, the remaining data can't be written
            self.file.close()
        self.path.unlink(missing_ok=True)


def make_folder(directory: Path) -> None:
    """Create a private folder and its missing parents, and make their names durable."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in missing:
        with suppress(PermissionError):  # a folder that is writable but not readable
            sync_folder(folder.parent)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of files and folders to a new one; links are followed.

    Unlike `shutil.copytree`, stops at the first error, which has an errno: a full disk is recognized by it.
    """
    target.mkdir(parents=True)
    for path in source.iterdir():
        copy = copy_folder if path.is_dir() else shutil.copy
        copy(path, target / path.name)
    shutil.copymode(source, target)


def find_paths(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted paths in a folder that match a pattern, without those in folders removed meanwhile. Blocks."""
    # Path.glob raises FileNotFoundError if a folder that it has listed is removed.
    return sorted(folder / name for name in glob(pattern, root_dir=folder, include_hidden=True))  # noqa: PTH207


def sync_folder(directory: Path) -> None:
    """Make the entries of a folder durable."""
    with opened(directory, os.O_RDONLY) as fd:
        os.fsync(fd)


def make_durable(path: Path) -> None:
    """Make a file durable. After an OSError, it is unknown which new data is durable."""
    with opened(path, os.O_WRONLY) as fd:
        sync_file(fd)


def sync_file(fd: int) -> None:
    """Make the content of an open file durable."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync on macOS stops at the drive's cache
    else:
        os.fdatasync(fd)


def open_private(path: str, flags: int) -> int:
    """Open a file, private to its owner if created. Use as an `opener` for `open`."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open an existing file or folder, and yield the descriptor."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        with name_in_errors(path):
            yield fd
    finally:
        os.close(fd)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add a path to each OSError of the body that names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
