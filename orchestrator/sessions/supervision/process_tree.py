"""Reap, interrupt, terminate and kill a CLI and all of its descendants.

The supervisor imports this in every session: keep imports few and within the standard library.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

from orchestrator.system.process_table import process_ids, process_stat

CHUNK_BYTES = 1 << 16
HAS_PROC = sys.platform == "linux"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class ProcessTree:
    """The CLI and all of its descendants.

    If `wrapped`, `cli` is a bubblewrap, its child is the init of a PID namespace, and the child of that is the CLI.
    Neither wrapper process may get SIGTERM: if either exits, all processes inside are killed at once.
    """

    def __init__(self, cli: int, wake: int, wrapped: bool) -> None:
        self.cli = cli
        self.status: int | None = None
        self._wake = wake
        self._wrapped = wrapped
        self._interrupted = cli
        self._held: int | None = None

    def reap(self) -> bool:
        """Reap exited children; return whether any process is left."""
        ended, is_alone = reap_children()
        self.status = ended.get(self.cli, self.status)
        return not is_alone

    def interrupt(self) -> bool:
        """Send SIGINT to the CLI itself; return False if it has not started yet.

        Call `terminate` next.

        Unlike a terminal, this does not signal the process group: the CLI needs its children alive to clean up; a
        program behind a wrapper that forwards signals would get two, which often means to exit at once; and bubblewrap
        is in the group as well.
        """
        if self._wrapped:
            program = self._inside()
            if program is None:
                return False
            self._interrupted = program
        send_signal(self._interrupted, signal.SIGINT)
        return True

    def is_shutting_down(self) -> bool:
        """Return whether the interrupted CLI is still alive."""
        return self.status is None and (not self._wrapped or _is_alive(self._interrupted))

    def _inside(self) -> int | None:
        """Stop the wrapper so that it outlives the CLI; return the CLI, if started."""
        send_signal(self.cli, signal.SIGSTOP)
        family = {self.cli: 0}
        for _ in "init", "CLI":  # twice, in case the init is listed after the CLI; 0 is no signal
            signal_new_children(0, family, set(), frozenset())
        # Orphans of the CLI are also children of the init, but started later.
        children = (pid for pid, parent in family.items() if family.get(parent) == self.cli)
        return min(children, key=_pid_inside, default=None)

    def terminate(self) -> bool:
        """Send SIGTERM to all; return False, without sending, if the CLI has not started."""
        if not HAS_PROC:
            send_signal(-self.cli, signal.SIGTERM)
            return True
        # A running wrapper would exit with the CLI, which would end the grace period of the CLI's children.
        if self._wrapped:
            send_signal(self.cli, signal.SIGSTOP)
        family = {os.getpid(): 0}
        spared = self._wrappers_parents()
        living: set[int] = set()
        while children := signal_new_children(signal.SIGTERM, family, set(), spared):
            living |= children
        if not self._wrapped:
            return True
        self._held = next((pid for pid, parent in family.items() if parent == self.cli), None)
        return any(family[pid] not in spared for pid in living)

    def release(self) -> bool:
        """Resume a wrapper once it is empty; return whether it is still stopped.

        Call after `terminate`.
        """
        if self._held is not None and not _is_alive(self._held):
            send_signal(self.cli, signal.SIGCONT)
            self._held = None
        return self._held is not None

    def kill(self) -> int:
        """Kill until no process is left; return how many were killed besides the CLI."""
        killed: set[int] = set()
        pause = 0.02  # seconds; the exit of a child wakes this earlier
        while self.reap():
            if HAS_PROC:
                killed |= kill_descendants(self._wrappers_parents())
            else:
                send_signal(-self.cli, signal.SIGKILL)
            if select.select([self._wake], [], [], pause)[0]:
                os.read(self._wake, CHUNK_BYTES)
            pause = min(2 * pause, 0.5)
        if not HAS_PROC:
            send_signal(-self.cli, signal.SIGKILL)
        return len(killed - {self.cli})

    def _wrappers_parents(self) -> frozenset[int]:
        return frozenset((os.getpid(), self.cli)) if self._wrapped else frozenset()


class ForkedSupervisors:
    """The supervisors that a process forked, and the orphans of killed ones."""

    def __init__(self) -> None:
        self.alive: set[int] = set()

    def clean_up(self) -> bool:
        """Reap exited supervisors and kill inherited orphans; return whether any is left."""
        ended, is_alone = reap_children()
        self.alive -= ended.keys()
        family = dict.fromkeys(self.alive, os.getpid())
        stop_children(family)
        for pid in family.keys() - self.alive:
            send_signal(pid, signal.SIGKILL)
        return not is_alone


def reap_children() -> tuple[dict[int, int], bool]:
    """Reap exited children; return wait statuses by pid, and whether none is left."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, True
        if pid == 0:
            return ended, False
        ended[pid] = status


def send_signal(pid: int, number: int) -> None:
    """Signal a process, or group if negative, unless it is missing or not ours."""
    try:  # noqa: SIM105  (contextlib is a slow import)
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def signal_new_children(number: int, family: dict[int, int], seen: set[int], spared: frozenset[int]) -> set[int]:
    """Scan /proc once; signal each child of `family` outside `seen` when found.

    Adds all scanned processes to `seen`, so that a second scan costs only new processes, and the children with their
    parents to `family`. Returns the children that are not zombies. Children of `spared` are found but not signalled. A
    child that is listed before its parent, after a wrap-around of pids, is found only by a scan with an empty `seen`.
    """
    children: set[int] = set()
    for pid in process_ids():
        if pid in seen:
            continue
        seen.add(pid)
        stat = process_stat(pid)
        if stat is not None and stat.parent in family and pid not in family:
            if stat.parent not in spared:
                send_signal(pid, number)
            family[pid] = stat.parent
            if not stat.has_ended:
                children.add(pid)
    return children


def stop_children(family: dict[int, int]) -> set[int]:
    """Stop our children outside `family` until no new one appears; return those alive.

    A process that repeatedly forks and exits is our child only for a moment each time. Reading the list of our
    children (proc_pid_task_children(5), if the kernel has it) is fast enough to hit one of these moments.
    """
    stopped: set[int] = set()
    while new := _children() - family.keys():
        for pid in new:
            send_signal(pid, signal.SIGSTOP)
        family.update(dict.fromkeys(new, os.getpid()))
        stopped |= new
    return {pid for pid in stopped if _is_alive(pid)}


def _children() -> set[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb", 0) as file:  # noqa: PTH123  (pathlib is a slow import)
            return set(map(int, file.read().split()))
    except FileNotFoundError:
        return set()


def kill_descendants(spared: frozenset[int]) -> set[int]:
    """Stop all descendants, so that none can fork, then kill them; return those that were alive.

    Children of `spared` are also killed, but not returned.
    """
    seen: set[int] = set()
    family = {os.getpid(): 0}
    living = stop_children(family)
    while children := signal_new_children(signal.SIGSTOP, family, seen, frozenset()):
        living |= children | stop_children(family)
    for pid in family.keys() - {os.getpid()}:
        send_signal(pid, signal.SIGKILL)
    return {pid for pid in living if family[pid] not in spared}


def prctl(option: int, value: int) -> None:
    """Set a process attribute if the system supports it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _pid_inside(pid: int) -> int:
    """Return the pid of a process in its own namespace; a missing process sorts last."""
    try:
        with open(f"/proc/{pid}/status", "rb", 0) as file:  # noqa: PTH123  (pathlib is a slow import)
            return int(file.read(CHUNK_BYTES).partition(b"\nNSpid:")[2].partition(b"\n")[0].split()[-1])
    except (FileNotFoundError, ProcessLookupError):
        return sys.maxsize


def _is_alive(pid: int) -> bool:
    stat = process_stat(pid)
    return stat is not None and not stat.has_ended
