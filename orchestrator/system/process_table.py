"""Read process information from /proc (proc_pid_stat(5)).

Imports only the standard library, because internal programs use this."""

from __future__ import annotations

import os
from functools import cache

#: The boot id on systems without one, where all boots count as the same.
UNKNOWN_BOOT = "0" * 32


class ProcessStat:
    """A snapshot of a process.

    Both times are in kernel ticks, the start time since boot. The process id and start time together identify a
    process.
    """

    __slots__ = ("cpu_ticks", "parent", "session", "started", "state")

    def __init__(self, fields: list[bytes]) -> None:
        """Parse the fields, beginning with the state."""
        self.state, self.parent, self.session = fields[0].decode(), int(fields[1]), int(fields[3])
        self.cpu_ticks, self.started = int(fields[11]) + int(fields[12]), int(fields[19])

    @property
    def has_ended(self) -> bool:
        """Whether the process has exited and is waiting to be reaped."""
        return self.state in "ZX"

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped the process."""
        return self.state in "Tt"


def process_stat(pid: int) -> ProcessStat | None:
    """Return a process's snapshot, or None if it is missing or not visible. Blocks."""
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:  # noqa: PTH123  (pathlib is a slow import)
            # Skip the name, which may contain spaces and parentheses.
            return ProcessStat(file.read(1024).rpartition(b")")[2].split())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def start_ticks(pid: int) -> int | None:
    """Return the start time of a process, or None if it has exited. Blocks."""
    stat = process_stat(pid)
    return None if stat is None or stat.has_ended else stat.started


def process_ids() -> list[int]:
    """Return the ids of all processes; empty without /proc. Blocks."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208  (the same)
    except FileNotFoundError:
        return []


def find_lock_owner(inode: int) -> int | None:
    """Return a process that locked the file (proc_locks(5)), or None. Blocks."""
    try:
        with open("/proc/locks", encoding="ascii") as file:  # noqa: PTH123  (pathlib is a slow import)
            locks = [line.split() for line in file]
    except FileNotFoundError:
        return None
    owners = [int(lock[4]) for lock in locks if lock[1] != "->" and lock[5].rpartition(":")[2] == str(inode)]
    return next((owner for owner in owners if owner > 0), None)


@cache
def boot_id() -> str:
    """Return the id of the current boot. Data in memory is lost at the next boot.

    The id is 32 hexadecimal digits on Linux, and `UNKNOWN_BOOT` elsewhere.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123  (pathlib is a slow import)
            return file.read().strip().replace("-", "")
    except FileNotFoundError:
        return UNKNOWN_BOOT
