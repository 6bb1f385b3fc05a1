"""The supervisor's hold on the CLI and on all that descends from it: reap, interrupt, ask to end, kill.

Imported in every session by the supervisor: only the standard library, and little of it.
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
    """The CLI and everything that descends from it.

    Where it is `wrapped`, `cli` is a bubblewrap, whose child is the init of a PID namespace, whose child is the
    CLI. Neither of the two may be asked to end: the end of either kills all that is inside at once.
    """

    def __init__(self, cli: int, wake: int, wrapped: bool) -> None:
        self.cli = cli
        self.status: int | None = None
        self._wake = wake
        self._wrapped = wrapped
        self._interrupted = cli
        self._held: int | None = None

    def reap(self) -> bool:
        """Collect who has ended; False when nobody is left."""
        ended, is_alone = reap_children()
        self.status = ended.get(self.cli, self.status)
        return not is_alone

    def interrupt(self) -> bool:
        """Interrupt the CLI itself; False if it has not begun inside its wrapper. `terminate` is to follow.

        Not its process group, although a terminal would: what it has started must live for it to tidy up, a program
        behind a wrapper that passes signals on would get two, which often means to end at once, and a bubblewrap is
        in the group, too.
        """
        if self._wrapped:
            program = self._inside()
            if program is None:
                return False
            self._interrupted = program
        send_signal(self._interrupted, signal.SIGINT)
        return True

    def is_shutting_down(self) -> bool:
        """Return whether the CLI that was interrupted is still there."""
        return self.status is None and (not self._wrapped or _lives(self._interrupted))

    def _inside(self) -> int | None:
        """Stop the wrapper, so that it does not end with the CLI, and return the CLI inside; None: it has not begun."""
        send_signal(self.cli, signal.SIGSTOP)
        family = {self.cli: 0}
        for _ in "init", "CLI":  # twice, in case the init is listed behind the CLI; 0 is no signal
            signal_new_children(0, family, set(), frozenset())
        # What the CLI's processes leave behind are children of the init, too, but begun later.
        children = (pid for pid, parent in family.items() if family.get(parent) == self.cli)
        return min(children, key=_pid_inside, default=None)

    def terminate(self) -> bool:
        """Ask all to end; False if there is nobody to be asked, because the CLI has not begun inside its wrapper."""
        if not HAS_PROC:
            send_signal(-self.cli, signal.SIGTERM)
            return True
        # It would end with the CLI and cut short the grace of what the CLI has started.
        if self._wrapped:
            send_signal(self.cli, signal.SIGSTOP)
        family = {os.getpid(): 0}
        spared = self._wrappers_parents()
        lived: set[int] = set()
        while found := signal_new_children(signal.SIGTERM, family, set(), spared):
            lived |= found
        if not self._wrapped:
            return True
        self._held = next((pid for pid, parent in family.items() if parent == self.cli), None)
        return any(family[pid] not in spared for pid in lived)

    def release(self) -> bool:
        """After `terminate`, let a wrapper end in which nobody lives any more; True as long as one is held."""
        if self._held is not None and not _lives(self._held):
            send_signal(self.cli, signal.SIGCONT)
            self._held = None
        return self._held is not None

    def kill(self) -> int:
        """Kill until nobody is left; return how many beside the CLI had to be killed."""
        killed: set[int] = set()
        pause = 0.02  # seconds; the end of a child wakes us earlier
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
    """The supervisors that a process has forked, and what those leave behind that were themselves killed."""

    def __init__(self) -> None:
        self.alive: set[int] = set()

    def clean_up(self) -> bool:
        """Collect who has ended and kill whom they left to us as their subreaper; False when nobody is left."""
        ended, is_alone = reap_children()
        self.alive -= ended.keys()
        family = dict.fromkeys(self.alive, os.getpid())
        stop_children(family)
        for pid in family.keys() - self.alive:
            send_signal(pid, signal.SIGKILL)
        return not is_alone


def reap_children() -> tuple[dict[int, int], bool]:
    """Wait for the children that have ended; return their wait statuses by pid, and whether there is none left."""
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
    """Signal a process, or with a negative `pid` its group, that may be gone or another user's."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def signal_new_children(number: int, family: dict[int, int], seen: set[int], spared: frozenset[int]) -> set[int]:
    """Look once through /proc and signal each child of `family` outside `seen` as soon as it is found.

    Adds all that it looked at to `seen`, so that a second look costs only what has been forked since the
    first, and the children with their parents to `family`; returns those that are not zombies. The children of
    `spared` are found, but not signalled. A child that is listed before its parent, which happens when pids
    wrap around, is found only by a look with a fresh `seen`.
    """
    found: set[int] = set()
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
                found.add(pid)
    return found


def stop_children(family: dict[int, int]) -> set[int]:
    """Stop our own children that are not in `family` yet, until there is no new one; return those that lived.

    Whoever forks and ends at once, again and again, is ours for a moment each time. The list of our children
    (proc_pid_task_children(5), where the kernel has it) is had so fast that one of these moments is hit.
    """
    stopped: set[int] = set()
    while new := _children() - family.keys():
        for pid in new:
            send_signal(pid, signal.SIGSTOP)
        family.update(dict.fromkeys(new, os.getpid()))
        stopped |= new
    return {pid for pid in stopped if _lives(pid)}


def _children() -> set[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb", 0) as file:
            return set(map(int, file.read().split()))
    except FileNotFoundError:
        return set()


def kill_descendants(spared: frozenset[int]) -> set[int]:
    """Stop every descendant, so that none can fork meanwhile, then kill them; return those that lived.

    The children of `spared` are killed like all others, but not returned.
    """
    seen: set[int] = set()
    family = {os.getpid(): 0}
    lived = stop_children(family)
    while found := signal_new_children(signal.SIGSTOP, family, seen, frozenset()):
        lived |= found | stop_children(family)
    for pid in family.keys() - {os.getpid()}:
        send_signal(pid, signal.SIGKILL)
    return {pid for pid in lived if family[pid] not in spared}


def prctl(option: int, value: int) -> None:
    """Set a process attribute where the system has it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _pid_inside(pid: int) -> int:
    """Return the pid that a process has in its own namespace; one that is gone is behind all others."""
    try:
        with open(f"/proc/{pid}/status", "rb", 0) as file:
            return int(file.read(CHUNK_BYTES).partition(b"\nNSpid:")[2].partition(b"\n")[0].split()[-1])
    except (FileNotFoundError, ProcessLookupError):
        return sys.maxsize


def _lives(pid: int) -> bool:
    stat = process_stat(pid)
    return stat is not None and not stat.has_ended
