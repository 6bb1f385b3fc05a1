"""Measure the available file descriptors, memory, disk space and processes."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path

from orchestrator.domain.scheduling.admission import AvailableResources

#: Programs that close all possible descriptors take minutes with limits of a billion, as set by containers.
_MAX_DESCRIPTORS = 1 << 16
#: A disk with fewer free bytes is considered full.
_MIN_FREE_BYTES = 1 << 20


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open files; return the new limit.

    The new limit is the hard limit, or a maximum. Child processes inherit it. See getrlimit(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS rejects more than kern.maxfilesperproc, regardless of the hard limit.
        for value in (wanted, 10240):
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, value), hard))
                break
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def read_resources() -> AvailableResources:
    """Return the available resources. Reads a few small files."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = None if soft == resource.RLIM_INFINITY else soft
    return AvailableResources(limit, len(os.listdir("/dev/fd")) - 1, available_memory())  # noqa: PTH208  (only names are needed)


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes available without swapping, or None if not reported (macOS).

    The limits of our cgroups (v2) apply. See proc_meminfo(5) and
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files.
    """
    limits = [_available_on_machine(proc), *(_available_in_cgroup(folder) for folder in _own_cgroups(proc, cgroups))]
    return min((left for left in limits if left is not None), default=None)


def is_disk_full(*folders: Path | None) -> bool:
    """Return whether the file system of any of these folders is full. Blocks."""
    for folder in folders:
        with suppress(OSError):  # the folder does not exist
            disk = None if folder is None else os.statvfs(folder)
            if disk and (disk.f_bavail * disk.f_frsize < _MIN_FREE_BYTES or (disk.f_files and not disk.f_favail)):
                return True
    return False


def remaining_processes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the limit of processes and threads of the user and cgroups (v2).

    Returns None if there is no limit, or the system does not report it. See RLIMIT_NPROC in getrlimit(2), which does
    not apply to root, and https://docs.kernel.org/admin-guide/cgroup-v2.html#pid.
    """
    limits = [_tasks_left(folder) for folder in _own_cgroups(proc, cgroups)]
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if soft != resource.RLIM_INFINITY and os.getuid() != 0 and proc.is_dir():
        limits.append(max(0, soft - _threads_of(os.getuid(), proc)))
    return min((left for left in limits if left is not None), default=None)


def _tasks_left(folder: Path) -> int | None:
    try:
        return max(0, int((folder / "pids.max").read_text()) - int((folder / "pids.current").read_text()))
    except (OSError, ValueError):  # no such file, or `max`
        return None


def _threads_of(user: int, proc: Path) -> int:
    tables = [_table(process / "status") for process in proc.glob("[0-9]*")]
    return sum(table.get("Threads:", 0) for table in tables if table.get("Uid:") == user)


def _available_on_machine(proc: Path) -> int | None:
    meminfo = _table(proc / "meminfo")
    return meminfo["MemAvailable:"] * 1024 if "MemAvailable:" in meminfo else None


def _own_cgroups(proc: Path, cgroups: Path) -> list[Path]:
    """Return our cgroup and its ancestors, whose limits all apply."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    folder = cgroups / own
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(cgroups))]


def _available_in_cgroup(folder: Path) -> int | None:
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or `max`
        return None
    # The kernel reclaims inactive page cache before enforcing the limit, but counts it as used until then.
    return max(0, limit - used + _table(folder / "memory.stat").get("inactive_file", 0))


def _table(file: Path) -> dict[str, int]:
    try:
        lines = [line.split() for line in file.read_text(errors="replace").splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
