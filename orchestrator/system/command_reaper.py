"""Kill the commands of a process that ends before they do: a program of its own, so that it outlives any signal.

Its standard input is a pipe from that process, whose lines are `+PID` for a command that was started as the leader of
a session and `-PID` for one that has ended. The end of the pipe means that the process has ended: commands that are
left get `EXIT_TIMEOUT` seconds to finish, a frozen one `STOPPED_TIMEOUT`; then they are killed with all that descends from them.
Only the standard library is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from orchestrator.system.process_table import ProcessStat, process_ids, process_stat

#: Seconds that a command gets to finish: a push that is killed half done leaves a checkout to repair.
EXIT_TIMEOUT = 20.0
#: Seconds after which a command is killed of which a process is stopped.
STOPPED_TIMEOUT = 0.5
POLL_SECONDS = 0.02


def read_process_tree(leader: int) -> dict[int, ProcessStat]:
    """Return the processes of a leader's session that live, with all that descends from them."""
    stats = ((pid, process_stat(pid)) for pid in process_ids())
    everyone = {pid: stat for pid, stat in stats if stat is not None and not stat.has_ended}
    family = {pid for pid, one in everyone.items() if one.session == leader}
    new = family
    while new:
        new = {pid for pid, one in everyone.items() if one.parent in new} - family
        family |= new
    return {pid: everyone[pid] for pid in family}


def kill_tree(leader: int) -> None:
    """Kill a session of processes with all that descends from them, frozen ones too."""
    killed: set[int] = set()
    while new := read_process_tree(leader).keys() - killed:
        for pid in new:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:  # it has just ended, or is another user's
                pass
        killed |= new


def main() -> None:
    """Keep count of the commands until the pipe ends; then see to the end of those that are left."""
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
            is_stopped = any(one.state in "Tt" for one in family)
            if family and lasted >= (STOPPED_TIMEOUT if is_stopped else EXIT_TIMEOUT):
                kill_tree(leader)
            elif not family:
                left.discard(leader)
        time.sleep(POLL_SECONDS)
