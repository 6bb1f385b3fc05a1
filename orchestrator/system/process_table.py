"""What the kernel says of processes (proc_pid_stat(5)). Programs of ours need it: the standard library alone."""

from __future__ import annotations

import os


class ProcessStat:
    """A process at one moment: its state as one letter, its parent and session, how long it ran and when it started.

    Both times are in the kernel's ticks, the start since boot: together with an id it is that of one process alone.
    """

    __slots__ = ("parent", "ran", "session", "started", "state")

    def __init__(self, fields: list[bytes]) -> None:
        """Take the fields from the state on."""
        self.state, self.parent, self.session = fields[0].decode(), int(fields[1]), int(fields[3])
        self.ran, self.started = int(fields[11]) + int(fields[12]), int(fields[19])

    @property
    def has_ended(self) -> bool:
        """Whether only its parent's look at its exit status is missing."""
        return self.state in "ZX"


def process_stat(pid: int) -> ProcessStat | None:
    """Return what is known of a process; None if there is none, we may not see it, or there is no /proc. Blocks."""
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:
            # Behind the name, which may have spaces and brackets.
            return ProcessStat(file.read(1024).rpartition(b")")[2].split())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def start_ticks(pid: int) -> int | None:
    """Return when a process started; None for one that has ended, or without /proc. Blocks."""
    stat = process_stat(pid)
    return None if stat is None or stat.has_ended else stat.started


def process_ids() -> list[int]:
    """Return the ids of all processes; none without /proc. Blocks."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except FileNotFoundError:
        return []
