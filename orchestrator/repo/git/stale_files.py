"""Remove lock files and partial objects of killed git commands.

The owner of such a file started before the file was created. So once all git commands that were running when the file
was found have exited, an unchanged file has no owner. There is no need to wait for commands started later.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator.system.files import find_paths

_PROCESSES: Final = Path("/proc")
_POLL_INTERVAL: Final = 0.02  # seconds


# Git's names for objects, packs and folders that it is writing (odb_mkstemp in its environment.c).
_OBJECTS: Final = ("tmp_*", "pack/tmp_*", "pack/.tmp-*", "[0-9a-f][0-9a-f]/tmp_obj_*")


@dataclass(frozen=True, slots=True)
class GitTempFile:
    """A file that git removes on exit; its owners have `variable` in the environment."""

    path: Path
    variable: bytes


def list_locks(git_dir: Path) -> list[GitTempFile]:
    """Return the lock files in a repository, with or without a living owner. Blocks."""
    # Not Path.rglob, which fails if git removes a folder meanwhile.
    paths = (Path(folder, name) for folder, _, names in os.walk(git_dir) for name in names if name.endswith(".lock"))
    return [GitTempFile(path, _variable("GIT_DIR", git_dir)) for path in paths]


def list_partial_objects(git_dir: Path) -> list[GitTempFile]:
    """Return the partial objects in a repository, with or without a writer. Blocks."""
    paths = [path for pattern in _OBJECTS for path in find_paths(git_dir / "objects", pattern)]
    return [GitTempFile(path, _variable("GIT_DIR", git_dir)) for path in paths]


def list_index_locks(index: Path) -> list[GitTempFile]:
    """Return the lock file of an index, if it exists. Blocks."""
    path = index.with_name(f"{index.name}.lock")
    return [GitTempFile(path, _variable("GIT_INDEX_FILE", index))] if path.is_file() else []


def remove_unowned(files: Iterable[GitTempFile], limit: float) -> None:
    """Remove files without an owner, after waiting up to `limit` seconds. Blocks."""
    pending = {file: inode for file in files if (inode := _inode(file.path)) is not None}
    if not _PROCESSES.is_dir():  # macOS: owners are unknown
        return
    owners = {variable: _processes_with(variable) for variable in {file.variable for file in pending}}
    deadline = time.monotonic() + limit
    while pending:
        for file in [file for file in pending if not owners[file.variable]]:
            if pending.pop(file) == _inode(file.path):
                _remove(file.path)
        if not pending or time.monotonic() >= deadline:
            return
        time.sleep(_POLL_INTERVAL)
        owners = {
            variable: {process for process in living if _has(process, variable)} for variable, living in owners.items()
        }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_git_running(git_dir: Path) -> bool:
    """Return whether a process uses our repository; True without /proc. Blocks."""
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
    except OSError:  # it has exited, or belongs to another user
        return False
