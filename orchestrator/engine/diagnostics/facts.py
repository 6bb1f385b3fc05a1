"""Collect facts about this machine and the size of a repository."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.scheduling.admission import AvailableResources
from orchestrator.repo.git.command import Git
from orchestrator.state.log.mounts import read_mount
from orchestrator.system.resources import raise_descriptor_limit, read_resources, remaining_processes


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and its available resources."""

    python: str
    """The version of Python."""
    system: str
    """The name of the system, such as Linux or Darwin."""
    resources: AvailableResources
    processes: int | None
    """The number of processes that can still be started; None: unlimited or unknown."""
    now: float
    """Wall-clock seconds."""
    installed: float | None
    """The modification time of this package's files (wall-clock seconds)."""


@dataclass(frozen=True, slots=True)
class StorageLocation:
    """A folder that a run writes to.

    If the folder is missing, the facts describe its nearest existing parent.
    """

    path: Path
    free: int | None
    """Bytes available to this process."""
    inodes: int | None
    """The number of files that can still be created; None if the file system has no such limit."""
    mount: Path | None
    file_system: str | None
    """The mount point of the file system, and its type; None if unknown."""
    error: str | None = None
    """The reason that it is not writable."""
    ahead: float = 0.0
    """Seconds by which its timestamps are ahead of the local clock."""


@dataclass(frozen=True, slots=True)
class RepositorySize:
    """The size of a repository, in bytes and files."""

    objects: int
    checkout: int
    files: int


def inspect_machine() -> Machine:
    """Inspect this machine; raise the descriptor limit as a run does. Blocks briefly."""
    raise_descriptor_limit()
    installed = None
    with suppress(OSError):
        installed = Path(__file__).stat().st_mtime
    return Machine(
        python=platform.python_version(),
        system=platform.system(),
        resources=read_resources(),
        processes=remaining_processes(),
        now=time.time(),
        installed=installed,
    )


def inspect_location(path: Path) -> StorageLocation:
    """Inspect a folder by writing and syncing an unnamed temporary file. Blocks."""
    folder = next((one for one in (path, *path.parents) if one.is_dir()), Path("/"))
    mount, file_system = read_mount(path) or (None, None)
    free = inodes = None
    with suppress(OSError):
        found = os.statvfs(folder)
        free, inodes = found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
    try:
        ahead = _probe_clock(folder)
    except OSError as error:
        return StorageLocation(path, free, inodes, mount, file_system, error.strerror or str(error))
    return StorageLocation(path, free, inodes, mount, file_system, ahead=ahead)


def _probe_clock(folder: Path) -> float:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"probe")
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime - time.time()


async def measure_repository(git: Git, commit: str) -> RepositorySize:
    """Return the size of a complete repository and of a commit's checkout."""
    counted = (await git("count-objects", "-v")).stdout.decode()
    facts = dict(line.split(": ", 1) for line in counted.splitlines() if ": " in line)
    listed = (await git("ls-tree", "-r", "-l", "-z", "--full-tree", commit)).stdout
    sizes = await anyio.to_thread.run_sync(_sizes, listed)
    # In KiB, see git-count-objects(1).
    return RepositorySize((int(facts["size"]) + int(facts["size-pack"])) << 10, sum(sizes), len(sizes))


def _sizes(listed: bytes) -> list[int]:
    fields = [entry.partition(b"\t")[0].split()[-1] for entry in listed.split(b"\0")[:-1]]
    return [int(size) if size.isdigit() else 0 for size in fields]
