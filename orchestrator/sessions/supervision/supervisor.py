"""Supervisor: a separate program that runs a CLI and ends all its processes.

It is started with `python -I -S` as a session leader, with a control pipe as standard input and a status pipe as
standard output. Or it is forked from a process started that way with a socket as standard input (`serve`), because
starting Python is most of the cost of a session. It imports little, and only of the standard library.

    control  one line of JSON, the fields of `CommandSpec`; the line `start` in reply to `locked`; optionally the line
             `stop` later; end of file means that the orchestrator is dead
    status   {"event": "locked"} once it holds the session's lock, {"event": "started", "pid": …} unless the start
             failed, and finally {"event": "ended", …} with the fields of
             `orchestrator.domain.runs.outcome.ProcessExit`; at any time
             {"event": "forked", "pid": …} of the process that forked it

Between `locked` and `start` the orchestrator checks that it still owns the session. A process that takes over the
session checks the lock afterwards, so one of the two always notices the other.

The supervisor holds an exclusive `flock` on the session's lock file from before the CLI starts until every descendant
is dead, and reports the exit after that. As child subreaper it inherits each orphan, whatever that forked, cleared or
ignored. Without a subreaper (macOS) only the process group of the CLI is killed, and processes that left the group
survive. It can't kill processes of other users (`sudo`): then it waits until they exit, and keeps the lock.

On every kind of stop all processes get SIGTERM, and SIGKILL after the grace period. A CLI with `interrupt` gets SIGINT
first and up to half of the grace period to clean up; then, or as soon as it has ended, the rest gets SIGTERM. So a
wrapper that dies before its program, or does not forward signals, costs the program at most half of the grace period.
Output is read all the while.

Its parts are `cli_start`, `process_tree`, `capture`, `idle_timeout`, and `orchestrator.sandbox.landlock`.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import select
import signal
import sys
import time

from orchestrator.sessions.supervision.capture import CHUNK_BYTES, OutputCapture
from orchestrator.sessions.supervision.cli_start import (
    EXHAUSTED,
    SIGNAL_EXIT_BASE,
    CommandSpec,
    SpawnError,
    WrapperReport,
    read_wrapper_error,
    start_cli,
)
from orchestrator.sessions.supervision.idle_timeout import IdleWatch
from orchestrator.sessions.supervision.process_tree import (
    PR_SET_CHILD_SUBREAPER,
    ForkedSupervisors,
    ProcessTree,
    prctl,
)
from orchestrator.system.process_table import start_ticks

# `typing` would add milliseconds to each session.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

CONTROL, STATUS = 0, 1
OWNER = "supervisor"  # the owner in the lock file of the session
LOCK_TIMEOUT = 2.0  # seconds; a process that only checks the lock keeps it for less
WRAPPER_POLL_SECONDS = 0.05  # seconds; between checks whether a wrapper is empty
INTERRUPT_GRACE_SHARE = 0.5  # of the grace period, for an interrupted CLI to clean up
EMPTY_REPORT: dict[str, object] = {
    "exit": None,
    "signal": None,
    "ended_by": "exit",
    "spawn_error": None,
    "stdout_bytes": 0,
    "stderr_bytes": 0,
    "killed": 0,
    "output_error": None,
    "exhausted": False,
}  # the report of a CLI that did not run


class Control:
    """The pipe from the orchestrator."""

    def __init__(self) -> None:
        self._unread = b""

    def read_line(self) -> bytes | None:
        """Wait for a whole line; return None if the pipe closes first."""
        while b"\n" not in self._unread:
            data = os.read(CONTROL, CHUNK_BYTES)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def request(self) -> str | None:
        """Return `stop`, `orphaned` (the pipe is closed) or None, without waiting."""
        os.set_blocking(CONTROL, False)
        try:
            data = os.read(CONTROL, CHUNK_BYTES)
        except BlockingIOError:
            data = None
        if data == b"":
            return "orphaned"
        self._unread += data or b""
        return "stop" if b"stop\n" in self._unread else None

    def wait_for_start(self, wake: int) -> str | None:
        """Wait until the CLI may start; return `stop` or `orphaned` if it may not.

        SIGTERM also means `stop`.
        """
        poll = select.poll()
        for fd in (CONTROL, wake):
            poll.register(fd, select.POLLIN)
        while (request := self.request()) is None and b"start\n" not in self._unread:
            for fd, _ in poll.poll():
                if fd == wake and signal.SIGTERM in os.read(wake, CHUNK_BYTES):
                    return "stop"
        return request


def acquire_lock(path: str) -> int:
    """Acquire the session's lock; return the descriptor that holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    give_up = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise SpawnError(f"{path}: an earlier process of this session still holds the lock") from None
            time.sleep(0.02)
        else:
            break
    os.ftruncate(file, 0)
    holder = {"pid": os.getpid(), "started": start_ticks(os.getpid()), "since": time.time(), "owner": OWNER}
    os.write(file, json.dumps(holder).encode())
    return file


def open_signal_wakeup() -> int:
    """Make SIGCHLD and SIGTERM wake up a `poll`; return the file descriptor to poll."""
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return wake


class SupervisionLoop:
    """Pumps the output of a running CLI until it ends or must be stopped."""

    def __init__(
        self, spec: CommandSpec, family: ProcessTree, control: Control, streams: list[OutputCapture], wake: int
    ) -> None:
        self._family, self._control, self._wake = family, control, wake
        self._streams = {stream.read_end: stream for stream in streams}
        self._grace, self._interrupt = spec.grace, spec.interrupt
        self._deadline = time.monotonic() + spec.timeout
        self._idle_watch = None if spec.idle_timeout is None else IdleWatch(spec.idle_timeout, spec.watched)
        self._ended_by: str | None = None
        self._cleanup_deadline: float | None = None  # of an interrupted CLI
        self._poll = select.poll()
        for fd in (CONTROL, wake, *self._streams):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> str:
        """Return the reason why the CLI ended; descendants may still be alive."""
        while True:
            if not self._family.reap():
                return self._ended_by or "exit"
            # During a stop, a wrapper that exits early does not shorten the grace period of other processes.
            if self._family.status is not None and self._ended_by is None:
                return "exit"
            if self._cleanup_deadline is not None and (
                time.monotonic() >= self._cleanup_deadline or not self._family.is_shutting_down()
            ):
                self._cleanup_deadline = None
                self._family.terminate()
            left = self._deadline - time.monotonic()
            if left <= 0 and self._ended_by is not None:
                return self._ended_by
            if left <= 0:
                self._stop("timeout")
            elif self._idle_watch is not None and self._ended_by is None and self._idle_watch.has_expired():
                self._stop("idle_timeout")
            for fd, _ in self._poll.poll(self._pause() * 1000 + 1):
                if self._handle(fd) == "orphaned":
                    return self._ended_by or "orphaned"

    def _pause(self) -> float:
        """Return the seconds until the next action that no event triggers."""
        left = max(0, (self._cleanup_deadline or self._deadline) - time.monotonic())
        if self._cleanup_deadline is not None:
            return min(left, WRAPPER_POLL_SECONDS)
        if self._ended_by is not None:
            return min(left, WRAPPER_POLL_SECONDS) if self._family.release() else left
        return left if self._idle_watch is None else min(left, self._idle_watch.seconds_until_check())

    def _handle(self, fd: int) -> str | None:
        request = None
        if fd == CONTROL:
            request = self._control.request()
        elif fd == self._wake:
            request = "stop" if signal.SIGTERM in os.read(self._wake, CHUNK_BYTES) else None
        elif self._streams[fd].pump() == 0:
            self._poll.unregister(fd)
        elif self._idle_watch is not None:
            self._idle_watch.note_output()
        if request == "stop":
            self._stop("stop")
        return request

    def _stop(self, reason: str) -> None:
        if self._ended_by is None:
            self._ended_by = reason
            is_interrupted = self._interrupt and self._family.interrupt()
            is_signalled = is_interrupted or self._family.terminate()
            now = time.monotonic()
            self._deadline = now + (self._grace if is_signalled else 0)
            self._cleanup_deadline = now + INTERRUPT_GRACE_SHARE * self._grace if is_interrupted else None


def write_status(event: dict[str, object], fd: int = STATUS) -> None:
    """Write a status line; ignore a closed pipe."""
    try:  # noqa: SIM105  (contextlib is a slow import)
        os.write(fd, json.dumps(event).encode() + b"\n")
    except BrokenPipeError:
        pass


def supervise(spec: CommandSpec, control: Control, wake: int) -> dict[str, object]:
    """Run the CLI; return its report. Raises SpawnError or OSError if it can't start."""
    lock = acquire_lock(spec.lock)
    try:
        return supervise_locked(spec, control, wake)
    finally:
        os.close(lock)


def supervise_locked(spec: CommandSpec, control: Control, wake: int) -> dict[str, object]:
    """Run the CLI under the lock and return its report."""
    # Ask for permission only now: if a process finds the lock free later, nothing of this session will start.
    write_status({"event": "locked"})
    if (request := control.wait_for_start(wake)) is not None:
        return {"ended_by": request}
    streams = [OutputCapture(path, spec.cap, spec.redact) for path in (spec.stdout, spec.stderr)]
    wrapper = WrapperReport() if spec.wrapped else None
    family = ProcessTree(start_cli(spec, streams, wrapper), wake, spec.wrapped)
    try:
        write_status({"event": "started", "pid": family.cli})
        ended_by = SupervisionLoop(spec, family, control, streams, wake).run()
    finally:
        killed = family.kill()
    for stream in streams:
        stream.finish()
    code = os.waitstatus_to_exitcode(family.status or 0)
    if wrapper is not None and ended_by == "exit" and code >= 0:
        if (error := wrapper.read_error()) is not None:
            raise error
        if not wrapper.has_run():
            if (error := read_wrapper_error(spec.stderr, code)) is not None:
                raise error
            code = SIGNAL_EXIT_BASE - code
    # Only a wrapper's exit code identifies the signal; other programs may choose such a code themselves.
    sent = (signal.SIGINT, signal.SIGTERM) if spec.interrupt else (signal.SIGTERM,)
    if wrapper is not None and ended_by != "exit" and code - SIGNAL_EXIT_BASE in sent:
        code = SIGNAL_EXIT_BASE - code
    return {
        "exit": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "ended_by": ended_by,
        "stdout_bytes": streams[0].total,
        "stderr_bytes": streams[1].total,
        "killed": killed,
        "output_error": streams[0].error or streams[1].error,
    }


def main() -> None:
    """Read a command, run it, and report."""
    os.dup2(STATUS, 2)  # the orchestrator also reads tracebacks of the supervisor
    control = Control()
    line = control.read_line()
    if line is None:
        return
    wake = open_signal_wakeup()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        report = supervise(CommandSpec(json.loads(line)), control, wake)
    except SpawnError as exc:
        report = {"spawn_error": str(exc), "exhausted": exc.exhausted}
    except re.error as exc:
        report = {"spawn_error": f"invalid pattern of secrets: {exc}"}
    except OSError as exc:
        reason = f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)
        report = {"spawn_error": reason, "exhausted": exc.errno in EXHAUSTED}
    write_status({"event": "ended", **EMPTY_REPORT, **report})


def serve() -> None:
    """Fork a supervisor for each request on the stdin socket, until it closes.

    The first line is the pattern of secrets that most sessions share, compiled here once for all of them. A
    request is one byte with the descriptors of the control and status pipes. Orphans of killed supervisors are
    inherited and killed, so this returns after the last of them.
    """
    import socket  # noqa: PLC0415  (only needed here)

    requests = socket.socket(fileno=os.dup(CONTROL))
    with open(CONTROL, "rb", 0, closefd=False) as first:
        try:  # noqa: SIM105  (contextlib is a slow import)
            re.compile(first.readline().rstrip(b"\n"))
        except re.error:  # the sessions report it
            pass
    wake = open_signal_wakeup()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    gc.freeze()  # keep memory shared with forked supervisors: the collector would copy it
    supervisors = ForkedSupervisors()
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(requests, select.POLLIN)
    is_open = True
    while supervisors.clean_up() or is_open:
        ready = {fd for fd, _ in poll.poll()}
        if wake in ready:
            os.read(wake, CHUNK_BYTES)
        if requests.fileno() not in ready:
            continue
        data, pipes, _, _ = socket.recv_fds(requests, 1, 2)
        if not data:
            is_open = False
            poll.unregister(requests)
            continue
        try:
            pid = os.fork()
        except OSError as exc:
            report = {"spawn_error": str(exc.strerror), "exhausted": exc.errno in EXHAUSTED}
            write_status({"event": "ended", **EMPTY_REPORT, **report}, pipes[1])
            pid = -1
        if pid == 0:
            requests.close()
            os.close(wake)
            supervise_forked(*pipes)
        if pid > 0:
            supervisors.alive.add(pid)
            write_status({"event": "forked", "pid": pid}, pipes[1])
        for fd in pipes:
            os.close(fd)


def supervise_forked(control: int, status: int) -> NoReturn:
    """Run as a supervisor with these two pipes; errors go to the status pipe."""
    try:
        os.setsid()
        for target, fd in ((CONTROL, control), (STATUS, status)):
            os.dup2(fd, target)
            os.close(fd)
        main()
    except BaseException:  # noqa: BLE001  the forked child must never continue the program of its parent
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
