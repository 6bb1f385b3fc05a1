"""Lock files and half-written objects that killed git commands left in our own repositories, and proof of that.

The owner of such a file existed before the file did. So once all git commands have ended that were running when one was
found, and it is still the same file, it is nobody's; commands that began later need not be waited for.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROCESSES: Final = Path("/proc")
_PAUSE: Final = 0.02  # seconds between two looks at processes


# What git calls the objects, packs and folders of them that it is writing (odb_mkstemp in its environment.c).
_OBJECTS: Final = ("tmp_*", "pack/tmp_*", "pack/.tmp-*", "[0-9a-f][0-9a-f]/tmp_obj_*")


@dataclass(frozen=True, slots=True)
class GitTempFile:
    """A file or folder that git removes when it is done; `variable` is in the environment of all who can own it."""

    path: Path
    variable: bytes


def list_locks(git_dir: Path) -> list[GitTempFile]:
    """Return the lock files in a repository, whether their owners live or not. Blocks."""
    return [GitTempFile(path, _variable("GIT_DIR", git_dir)) for path in git_dir.rglob("*.lock") if path.is_file()]


def list_partial_objects(git_dir: Path) -> list[GitTempFile]:
    """Return the objects in a repository that are not written yet, or never will be. Blocks."""
    found = [path for pattern in _OBJECTS for path in (git_dir / "objects").glob(pattern)]
    return [GitTempFile(path, _variable("GIT_DIR", git_dir)) for path in found]


def list_index_locks(index: Path) -> list[GitTempFile]:
    """Return the lock file of an index, if there is one. Blocks."""
    path = index.with_name(f"{index.name}.lock")
    return [GitTempFile(path, _variable("GIT_INDEX_FILE", index))] if path.is_file() else []


def remove_unowned(files: Iterable[GitTempFile], limit: float) -> None:
    """Remove those of some files that no living command can own; wait up to `limit` seconds for such. Blocks."""
    found = {file: inode for file in files if (inode := _inode(file.path)) is not None}
    if not _PROCESSES.is_dir():  # macOS: nothing can be proven
        return
    owners = {variable: _processes_with(variable) for variable in {file.variable for file in found}}
    deadline = time.monotonic() + limit
    while found:
        for file in [file for file in found if not owners[file.variable]]:
            if found.pop(file) == _inode(file.path):
                _remove(file.path)
        if not found or time.monotonic() >= deadline:
            return
        time.sleep(_PAUSE)
        owners = {variable: {one for one in living if _has(one, variable)} for variable, living in owners.items()}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_git_running(git_dir: Path) -> bool:
    """Whether a process has a repository of ours as its GIT_DIR; without /proc that can't be ruled out. Blocks."""
    return not _PROCESSES.is_dir() or bool(_processes_with(_variable("GIT_DIR", git_dir)))


def _variable(name: str, value: Path) -> bytes:
    return f"{name}={value}".encode(errors="surrogateescape")


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.lstat().st_ino
    return None


def _processes_with(variable: bytes) -> set[Path]:
    return {process for process in _PROCESSES.glob("[0-9]*") if _has(process, variable)}


def _has(process: Path, variable: bytes) -> bool:
    try:
        return variable in (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is not ours
        return False
