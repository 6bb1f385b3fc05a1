"""What there is of this machine and of a repository's size: gathered here, judged in `orchestrator.engine.diagnostics.findings`."""

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
    """The machine, and what it has left."""

    python: str
    """Its version."""
    system: str
    """As in Linux and Darwin."""
    room: AvailableResources
    processes: int | None
    """How many more there may be; None: no limit, or not known."""
    now: float
    """Wall-clock seconds."""
    installed: float | None
    """When this package was installed, by the file's time stamp (wall-clock seconds)."""


@dataclass(frozen=True, slots=True)
class StorageLocation:
    """A folder that is written to, or will be: then it is the nearest one above it that is told of."""

    path: Path
    free: int | None
    """Bytes that are left to us."""
    inodes: int | None
    """Files that can still be made; None where the file system does not count them."""
    mount: Path | None
    file_system: str | None
    """Where it is mounted, and its type; None where the system does not say."""
    trouble: str | None = None
    """Why nothing can be written there."""
    ahead: float = 0.0
    """Seconds by which its time stamps differ from our clock."""


@dataclass(frozen=True, slots=True)
class RepositorySize:
    """How large a repository is, in bytes and files."""

    objects: int
    checkout: int
    files: int


def inspect_machine() -> Machine:
    """Return what there is; blocks for some milliseconds. Raises our own limit of descriptors, as a run does."""
    raise_descriptor_limit()
    installed = None
    with suppress(OSError):
        installed = Path(__file__).stat().st_mtime
    return Machine(
        python=platform.python_version(),
        system=platform.system(),
        room=read_resources(),
        processes=remaining_processes(),
        now=time.time(),
        installed=installed,
    )


def inspect_location(path: Path) -> StorageLocation:
    """Return what can be known of a folder; blocks. Writes and syncs a file without a name, which leaves no trace."""
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
    """Return how large a repository and the checkout of a commit are; `git` runs in it, and it must be complete."""
    counted = (await git("count-objects", "-v")).stdout.decode()
    facts = dict(line.split(": ", 1) for line in counted.splitlines() if ": " in line)
    listed = (await git("ls-tree", "-r", "-l", "-z", "--full-tree", commit)).stdout
    sizes = await anyio.to_thread.run_sync(_sizes, listed)
    # In KiB, see git-count-objects(1).
    return RepositorySize((int(facts["size"]) + int(facts["size-pack"])) << 10, sum(sizes), len(sizes))


def _sizes(listed: bytes) -> list[int]:
    fields = [entry.partition(b"\t")[0].split()[-1] for entry in listed.split(b"\0")[:-1]]
    return [int(size) if size.isdigit() else 0 for size in fields]
