"""Repositories for benchmarks, and the check for a suitable file system."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from benchmarks import code_base
from orchestrator.state.log.mounts import mount_of

_IDENTITY: Final = ("-c", "user.name=Benchmark", "-c", "user.email=benchmark@localhost")


def file_system_kind(folder: Path) -> str:
    """Return a folder's file system. Raises RuntimeError for ext4 without a journal."""
    table = Path("/proc/self/mountinfo")
    if not table.exists():
        return "an unknown file system"
    mount, kind = mount_of(folder.resolve(), table.read_text(encoding="utf-8", errors="surrogateescape"))
    if kind == "ext4" and not _has_journal(mount):
        raise RuntimeError(f"{mount} is ext4 without a journal: choose a folder on another file system with --folder")
    return kind


def _has_journal(mount: Path) -> bool:
    device = mount.stat().st_dev
    name = Path(f"/sys/dev/block/{device >> 8 & 0xFFF}:{device & 0xFF}").resolve().name
    # ext4 has its journal task there if it has a journal (fs/jbd2/journal.c in the kernel).
    return any(Path("/proc/fs/jbd2").glob(f"{name}-*"))


def make_repository(path: Path, files: int) -> Path:
    """Create a repository with that many files."""
    run_git(None, "init", "--quiet", "-b", "main", str(path))
    code_base.write_files(path, files)
    # Large files go directly into a pack, which is faster than a file for each object.
    run_git(path, "-c", "core.bigFileThreshold=1", "-c", "core.compression=1", "add", "--all")
    run_git(path, "commit", "--quiet", "-m", "Begin")
    return path


def clone(origin: Path, path: Path) -> Path:
    """Clone a repository without sharing objects."""
    run_git(None, "clone", "--quiet", "--no-local", str(origin), str(path))
    return path


def run_git(top: Path | None, *args: str) -> bytes:
    """Run git, return its output."""
    where = () if top is None else ("-C", str(top))
    argv = ["git", *where, *_IDENTITY, "-c", "gc.auto=0", "-c", "maintenance.auto=false", *args]
    return subprocess.run(argv, check=True, capture_output=True).stdout
