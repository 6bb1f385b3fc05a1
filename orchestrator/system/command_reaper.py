"""Kill the commands of a process that exits before them.

This is a separate program that survives the process. Its standard input is a pipe from the process, with lines `+PID`
for a command started as a session leader and `-PID` for one that has exited. End of file means that the process has
exited: remaining commands get `EXIT_TIMEOUT` seconds to finish, or `STOPPED_TIMEOUT` if stopped; then they are killed
with all descendants. This imports only the standard library.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from orchestrator.system.process_table import ProcessStat, process_ids, process_stat

#: Seconds for a command to finish: killing a push may leave a checkout to repair.
EXIT_TIMEOUT = 20.0
#: Seconds after which a command with a stopped process is killed.
STOPPED_TIMEOUT = 0.5
POLL_SECONDS = 0.02


def read_process_tree(leader: int) -> dict[int, ProcessStat]:
    """Return the live processes of a leader's session and all descendants."""
    stats = ((pid, process_stat(pid)) for pid in process_ids())
    everyone = {pid: stat for pid, stat in stats if stat is not None and not stat.has_ended}
    family = {pid for pid, stat in everyone.items() if stat.session == leader}
    new = family
    while new:
        new = {pid for pid, stat in everyone.items() if stat.parent in new} - family
        family |= new
    return {pid: everyone[pid] for pid in family}


def kill_tree(leader: int) -> None:
    """Kill the processes of a session and all descendants, including stopped ones."""
    killed: set[int] = set()
    while new := read_process_tree(leader).keys() - killed:
        for pid in new:
            try:  # noqa: SIM105  (contextlib is a slow import)
                os.kill(pid, signal.SIGKILL)
            except OSError:  # it has just exited, or belongs to another user
                pass
        killed |= new


def main() -> None:
    """Track commands until the pipe closes; then wait for the rest, or kill them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    left: set[int] = set()
    for line in sys.stdin.buffer:
        (left.add if line[:1] == b"+" else left.discard)(int(line[1:]))
    end = time.monotonic()
    while left:
        lasted = time.monotonic() - end
        for leader in tuple(left):
            family = read_process_tree(leader).values()
            is_stopped = any(stat.is_stopped for stat in family)
            if family and lasted >= (STOPPED_TIMEOUT if is_stopped else EXIT_TIMEOUT):
                kill_tree(leader)
            elif not family:
                left.discard(leader)
        time.sleep(POLL_SECONDS)
