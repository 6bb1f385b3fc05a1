"""Reads and writes files in folders that an agent may write to, without following a symlink.

Each component of a path is opened relative to the folder before it with O_NOFOLLOW. What an agent exchanges meanwhile
(`renameat2` with RENAME_EXCHANGE) leads to an error and never out of the folder. Opening by the whole path checks
the last component only, and a check before an open is too early.

The walk gives on every system what `openat2` gives on Linux with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and
RESOLVE_NO_MAGICLINKS: a path without `..` whose components are no links can't leave the folder that it starts in.

Only the standard library is imported. All functions block; those of paths raise OSError (ELOOP or ENOTDIR for a link).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO would wait for a writer, a device for its driver.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def open_folder(top: Path, path: str = "", *, make: bool = False) -> Iterator[int]:
    """Open a folder beneath `top`, which is no link itself; the folders above `top` are trusted.

    With `make`, the missing folders beneath `top` are made, and what is there but is no folder is removed.
    """
    descriptor = os.open(top, _FOLDER)
    try:
        for name in _names(path):
            below = _open_subfolder(descriptor, name, make=make)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(top: Path, path: str) -> int:
    """Return a descriptor of a regular file beneath `top`, for reading; EINVAL for anything else that is no link."""
    folder, name = _split(path)
    with open_folder(top, folder) as within:
        descriptor = os.open(name, _FILE, dir_fd=within)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return descriptor


def read_file(top: Path, path: str, largest: int, *, sole: bool = False) -> bytes:
    """Return the content of a regular file beneath `top`.

    EFBIG if it has more than `largest` bytes. With `sole`, EMLINK if the file has another name, perhaps elsewhere.
    """
    with os.fdopen(open_file(top, path), "rb", buffering=0) as file:
        if sole and os.fstat(file.fileno()).st_nlink > 1:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK), path)
        data = bytearray()
        while len(data) <= largest and (part := file.read(largest + 1 - len(data))):
            data += part
    if len(data) > largest:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return bytes(data)


def write_file(top: Path, path: str, data: bytes, mode: int = 0o600) -> None:
    """Put a new file in the place of whatever file or link is there; missing folders are made.

    EISDIR if a folder is there.
    """
    folder, name = _split(path)
    aside = f".{secrets.token_hex(8)}.new"
    with open_folder(top, folder, make=True) as within:
        try:
            with os.fdopen(os.open(aside, _NEW, mode, dir_fd=within), "wb") as file:
                file.write(data)
            os.rename(aside, name, src_dir_fd=within, dst_dir_fd=within)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside, dir_fd=within)
            raise


def make_link(top: Path, path: str, target: Path) -> None:
    """Put a symlink to `target` in the place of whatever file or link is there; missing folders are made."""
    folder, name = _split(path)
    with open_folder(top, folder, make=True) as within:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=within)
        os.symlink(target, name, dir_fd=within)


def file_type(top: Path, path: str) -> int | None:
    """Return the file type beneath `top` as `stat.S_IFMT` has it, of a link its own; None if nothing is there."""
    folder, name = _split(path)
    with suppress(OSError), open_folder(top, folder) as within:
        return stat.S_IFMT(os.stat(name, dir_fd=within, follow_symlinks=False).st_mode)
    return None


def remove_file(top: Path, path: str) -> None:
    """Remove a file or a link beneath `top`, if it is there."""
    folder, name = _split(path)
    with suppress(FileNotFoundError), open_folder(top, folder) as within:
        os.unlink(name, dir_fd=within)


def _names(path: str) -> list[str]:
    names = path.split("/") if path else []
    if any(name in {"", ".", ".."} for name in names):
        raise OSError(errno.EINVAL, "it is no plain relative path", path)
    return names


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    if name not in _names(path)[-1:]:
        raise OSError(errno.EINVAL, "it is no plain relative path", path)
    return folder, name


def _open_subfolder(folder: int, name: str, *, make: bool) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=folder)
    except OSError:
        if not make:
            raise
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    os.mkdir(name, 0o700, dir_fd=folder)
    return os.open(name, _FOLDER, dir_fd=folder)
