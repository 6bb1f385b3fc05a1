"""Access files in agent-writable folders without following symlinks.

Each component of a path is opened relative to its parent folder with O_NOFOLLOW. If an agent exchanges a component
during this (`renameat2` with RENAME_EXCHANGE), the result is an error, never a path outside the folder. Opening the
whole path would check only the last component, and a check before the open would be a race.

This provides on every system what `openat2` provides on Linux with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and
RESOLVE_NO_MAGICLINKS: a path without `..` and without links can't leave its top folder.

All functions block; those with paths raise OSError (ELOOP or ENOTDIR for a link).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from orchestrator.system.files import name_in_errors

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: otherwise a FIFO would wait for a writer, and a device for its driver.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def open_folder(top: Path, path: str = "", *, make: bool = False) -> Iterator[int]:
    """Open a folder beneath `top`, which must not be a link.

    The folders above `top` are trusted. With `make`, missing folders beneath `top` are created, replacing any other
    files there.
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
    """Open a regular file beneath `top`. Raises EINVAL for other types except links."""
    folder, name = _split(path)
    with open_folder(top, folder) as within:
        descriptor = os.open(name, _FILE, dir_fd=within)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def read_file(top: Path, path: str, max_bytes: int, *, sole: bool = False) -> bytes:
    """Return the content of a regular file beneath `top`.

    Raises EFBIG if it has more than `max_bytes` and, with `sole`, EMLINK if the file has another hard link.
    """
    with os.fdopen(open_file(top, path), "rb", buffering=0) as file, name_in_errors(top / path):
        if sole and os.fstat(file.fileno()).st_nlink > 1:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK), path)
        data = bytearray()
        while len(data) <= max_bytes and (part := file.read(max_bytes + 1 - len(data))):
            data += part
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return bytes(data)


def write_file(top: Path, path: str, data: bytes, mode: int = 0o600) -> None:
    """Write a file atomically, replacing a file or link and creating missing folders.

    Raises EISDIR if the path is a folder.
    """
    folder, name = _split(path)
    temporary = f".{secrets.token_hex(8)}.new"
    with open_folder(top, folder, make=True) as within, ExitStack() as undo:
        undo.callback(_try_unlink, temporary, within)
        with (
            name_in_errors(top / path),
            os.fdopen(os.open(temporary, _NEW, mode, dir_fd=within), "wb") as file,
        ):
            file.write(data)
        os.rename(temporary, name, src_dir_fd=within, dst_dir_fd=within)
        undo.pop_all()


def _try_unlink(name: str, folder: int) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)


def make_link(top: Path, path: str, target: Path) -> None:
    """Create a symlink to `target`, replacing a file and creating missing folders."""
    folder, name = _split(path)
    with open_folder(top, folder, make=True) as within:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=within)
        os.symlink(target, name, dir_fd=within)


def file_type(top: Path, path: str) -> int | None:
    """Return the `stat.S_IFMT` type of a path, not following links, or None."""
    folder, name = _split(path)
    with suppress(OSError), open_folder(top, folder) as within:
        return stat.S_IFMT(os.stat(name, dir_fd=within, follow_symlinks=False).st_mode)
    return None


def remove_file(top: Path, path: str) -> None:
    """Remove a file or link beneath `top` if it exists."""
    folder, name = _split(path)
    with suppress(FileNotFoundError), open_folder(top, folder) as within:
        os.unlink(name, dir_fd=within)


def _names(path: str) -> list[str]:
    names = path.split("/") if path else []
    if any(name in {"", ".", ".."} for name in names):
        raise OSError(errno.EINVAL, "not a plain relative path", path)
    return names


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    if name not in _names(path)[-1:]:
        raise OSError(errno.EINVAL, "not a plain relative path", path)
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
