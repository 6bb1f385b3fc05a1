"""Run one CLI and make sure that nothing it started outlives it: a program of its own.

It is started by `python -I -S` as leader of a session of its own, with a control pipe as standard input and a
status pipe as standard output; or it is forked from one that was started so and has a socket as standard input
(`serve`), because most of what a session costs us is the start of a Python. Only the standard library is imported,
and little of that.

    control  one line of JSON, the fields of `CommandSpec`; the line `start`, in answer to `locked`; later perhaps the line
             `stop`; its end means that the orchestrator is dead
    status   {"event": "locked"} once it holds the session's lock, {"event": "started", "pid": …} unless nothing
             could be started, and last of all {"event": "ended", …}, the fields of
             `orchestrator.sessions.supervision.supervisor_client.Ended`

The orchestrator looks between `locked` and `start` whether the session is still its own. Whoever takes that from it
looks whether the lock is held, afterwards: so one of them sees the other.

It holds an exclusive `flock` on the session's lock file from before the CLI starts until every descendant is dead,
and tells its end after that: as the child subreaper it inherits each orphan, whatever it forked, cleared or
ignored. Without a subreaper (macOS) only the CLI's process group is killed, and what left it lives on. It can
not kill what runs as another user (`sudo`): then it waits, and keeps the lock, until that has ended.

At a stop, whatever asks for it, every process gets SIGTERM, and SIGKILL when the grace is over. A CLI that is to be
interrupted gets SIGINT before that, and has up to half of the grace to tidy up; then, or as soon as it has ended,
comes SIGTERM for what is left. So a wrapper that dies and leaves its program behind, or that passes no signal on,
costs the program at most half of the grace. Its output is read all the while.

Its parts are `family` (the processes), `capture` and `redaction` (the output), `idle_timeout` and `landlock`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import select
import signal
import sys
import time

from orchestrator.sandbox import seccomp
from orchestrator.sandbox.landlock import restrict_thread
from orchestrator.sessions.supervision.capture import CHUNK_BYTES, OutputCapture
from orchestrator.sessions.supervision.idle_timeout import IdleWatch
from orchestrator.sessions.supervision.process_tree import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    ForkedSupervisors,
    ProcessTree,
    prctl,
)
from orchestrator.system.process_table import start_ticks

# `typing` costs milliseconds that each session would pay.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

CONTROL, STATUS = 0, 1
WRAPPER_STATUS = 3  # where `argv` tells a wrapper to report to
WRAPPER_FILTER = 4  # where it tells it to read a filter of system calls from
WRAPPER_ERROR = 5  # where what starts the CLI in a wrapper reports why it can't
OWNER = "supervisor"  # who holds the session's lock, in the words of its file
LOCK_TIMEOUT = 2.0  # seconds; longer than anyone who only looks whether the lock is free keeps it
WRAPPER_POLL_SECONDS = 0.05  # seconds; between looks into a wrapper, whether anybody lives there
INTERRUPT_GRACE_SHARE = 0.5  # the share of the grace in which a CLI that was interrupted is left alone
SIGNAL_EXIT_BASE = 128  # plus a signal's number: a wrapper's exit code where the signal has ended what it started
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
}  # what is told of a CLI of which nothing is known
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class SpawnError(Exception):
    """The CLI could not be started; the text says what and why, `number` is the errno if there is one."""

    def __init__(self, why: str, number: int | None = None) -> None:
        super().__init__(why)
        self.exhausted = number in EXHAUSTED


class CommandSpec:
    """What to run: absolute paths, seconds, bytes; `env` is all that the CLI sees of an environment."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.argv: list[str] = fields["argv"]
        self.env: dict[str, str] = fields["env"]
        self.cwd: str = fields["cwd"]
        self.stdin: str | None = fields["stdin"]
        self.stdout: str = fields["stdout"]
        self.stderr: str = fields["stderr"]
        self.cap: int = fields["cap"]
        self.timeout: float = fields["timeout"]
        self.grace: float = fields["grace"]
        self.interrupt: bool = fields["interrupt"]
        self.lock: str = fields["lock"]
        self.redact: str | None = fields["redact"]
        self.idle_timeout: float | None = fields["idle_timeout"]
        self.watched: list[str] = fields["watched"]
        self.wrapped: bool = fields["wrapped"]
        self.uses_loopback: bool = fields["passes_on"]
        self.landlock: list[tuple[str, str]] | None = fields["landlock"]
        self.port: int | None = fields["port"]
        self.filter: bytes | None = None if fields["filter"] is None else bytes.fromhex(fields["filter"])
        self.limits: dict[str, int] = fields["limits"]


class Control:
    """The pipe from the orchestrator."""

    def __init__(self) -> None:
        self._unread = b""

    def read_line(self) -> bytes | None:
        """Wait for one whole line; None if the pipe ended before."""
        while b"\n" not in self._unread:
            data = os.read(CONTROL, CHUNK_BYTES)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def request(self) -> str | None:
        """Return `stop`, `orphaned` (the pipe has ended) or None, without waiting."""
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
        """Wait until the CLI may start; return what ends the session before that: `stop`, which is SIGTERM, too,
        or `orphaned`.
        """
        poll = select.poll()
        for fd in (CONTROL, wake):
            poll.register(fd, select.POLLIN)
        while (request := self.request()) is None and b"start\n" not in self._unread:
            for fd, _ in poll.poll():
                if fd == wake and signal.SIGTERM in os.read(wake, CHUNK_BYTES):
                    return "stop"
        return request


class WrapperReport:
    """What a bubblewrap around the CLI reports: whether the CLI itself ever ran.

    From its documents (`--json-status-fd` in bwrap(1)) the one with `exit-code` is written only if the program
    could be executed.
    """

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        self._complaint, self.error_write_end = os.pipe()
        for pipe in (self._read_end, self._complaint):
            os.set_blocking(pipe, False)

    def ran(self) -> bool:
        """Return whether the CLI ran, or what was to start it; asked once, when all has ended."""
        try:
            return b'"exit-code"' in os.read(self._read_end, CHUNK_BYTES)
        except BlockingIOError:
            return False

    def read_error(self) -> SpawnError | None:
        """Return why what was to start the CLI could not; asked once, when all has ended."""
        try:
            return parse_spawn_error(os.read(self._complaint, CHUNK_BYTES))
        except BlockingIOError:
            return None


def parse_spawn_error(complaint: bytes) -> SpawnError | None:
    """Return the error that a program wrote which could not become another: its number, and why."""
    number, _, why = complaint.decode(errors="replace").partition(" ")
    return SpawnError(why, int(number)) if number else None


def read_wrapper_error(stderr: str, code: int) -> SpawnError | None:
    """Return what kept a wrapper from starting the CLI: the only thing that it wrote to its standard error.

    None if a signal ended what the wrapper had started; its exit code says so.
    """
    with open(stderr, "rb") as file:
        lines = file.read(CHUNK_BYTES).decode(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("bwrap: ")), "it did not say why")
    if not said.startswith("bwrap: ") and code > SIGNAL_EXIT_BASE:
        return None
    why = said.removeprefix("bwrap: ")
    number = next((number for number in EXHAUSTED if why.endswith(os.strerror(number))), None)
    program = why.removeprefix("execvp ")
    return SpawnError(program if program != why else f"the sandbox could not be made: {why}", number)


def acquire_lock(path: str) -> int:
    """Hold the session's lock from now until the file descriptor is closed."""
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
    signature = {"pid": os.getpid(), "started": start_ticks(os.getpid()), "since": time.time(), "owner": OWNER}
    os.write(file, json.dumps(signature).encode())
    return file


def start_cli(spec: CommandSpec, streams: list[OutputCapture], wrapper: WrapperReport | None) -> int:
    """Start the CLI and return its pid once its program runs; raises SpawnError or OSError."""
    stdin = os.open(spec.stdin or os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    complaint, complain = os.pipe()
    parent = os.getpid()
    given = [stdin, *(stream.write_end for stream in streams)]
    if wrapper is not None:
        given.append(wrapper.write_end)
        if spec.filter is not None or spec.uses_loopback:
            given.append(make_readable_fd(spec.filter or b""))
        if spec.uses_loopback:
            given.append(wrapper.error_write_end)
    pid = os.fork()
    if pid == 0:
        exec_cli(spec, given, parent, complain)
    for fd in (complain, *given):
        os.close(fd)
    error = parse_spawn_error(os.read(complaint, CHUNK_BYTES))
    os.close(complaint)
    if error is not None:
        os.waitpid(pid, 0)
        raise error
    return pid


def make_readable_fd(data: bytes) -> int:
    """Return a file descriptor from which a little data can be read."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def exec_cli(spec: CommandSpec, given: list[int], parent: int, complain: int) -> NoReturn:
    """Turn the forked child into the CLI; what prevents it is written to `complain`."""
    what = spec.cwd
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(127)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o022)
        os.chdir(spec.cwd)
        complain = install_descriptors(given, complain)
        what = "a limit could not be set"
        for name, most in spec.limits.items():
            set_resource_limit(name, most)
        if spec.landlock is not None:
            what = "the sandbox could not be made"
            restrict_thread(spec.landlock, spec.port)
            if spec.filter is not None:
                seccomp.install_filter(spec.filter)
        what = spec.argv[0]
        os.execvpe(what, spec.argv, spec.env)
    except (OSError, ValueError) as exc:
        why = f"{getattr(exc, 'errno', None) or 0} {what}: {getattr(exc, 'strerror', None) or exc}"
        os.write(complain, why.encode("utf-8", "replace"))
    finally:
        os._exit(127)


def set_resource_limit(name: str, most: int) -> None:
    """Let this process, and each that it starts, have no more of a resource; never more than it may have already."""
    number = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(number)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(number, (most, most))


def install_descriptors(given: list[int], complain: int) -> int:
    """Make `given` the file descriptors from 0 on; returns where `complain`, which may have been in the way, is."""
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, WRAPPER_ERROR + 1) for fd in (*given, complain)]
    for target, fd in enumerate(above[:-1]):
        os.dup2(fd, target)
    return above[-1]


def open_signal_wakeup() -> int:
    """Have the end of a child and SIGTERM wake a `poll`; returns the file descriptor to poll."""
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
    """The time in which the CLI runs: pumps its output until something ends it."""

    def __init__(
        self, spec: CommandSpec, family: ProcessTree, control: Control, streams: list[OutputCapture], wake: int
    ) -> None:
        self._family, self._control, self._wake = family, control, wake
        self._streams = {stream.read_end: stream for stream in streams}
        self._grace, self._interrupt = spec.grace, spec.interrupt
        self._deadline = time.monotonic() + spec.timeout
        self._idle_timeout = None if spec.idle_timeout is None else IdleWatch(spec.idle_timeout, spec.watched)
        self._ended_by: str | None = None
        self._tidied_by: float | None = None  # until when a CLI that was interrupted is left alone
        self._poll = select.poll()
        for fd in (CONTROL, wake, *self._streams):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> str:
        """Return what ended it; descendants may still be alive then."""
        while True:
            if not self._family.reap():
                return self._ended_by or "exit"
            # While it is being stopped, a wrapper's early end does not cut the others' grace short.
            if self._family.status is not None and self._ended_by is None:
                return "exit"
            if self._tidied_by is not None and (
                time.monotonic() >= self._tidied_by or not self._family.is_shutting_down()
            ):
                self._tidied_by = None
                self._family.terminate()
            left = self._deadline - time.monotonic()
            if left <= 0 and self._ended_by is not None:
                return self._ended_by
            if left <= 0:
                self._stop("timeout")
            elif self._idle_timeout is not None and self._ended_by is None and self._idle_timeout.over():
                self._stop("idle_timeout")
            for fd, _ in self._poll.poll(self._pause() * 1000 + 1):
                if self._handle(fd) == "orphaned":
                    return self._ended_by or "orphaned"

    def _pause(self) -> float:
        """Return for how many seconds there is nothing to do but to listen."""
        left = max(0, (self._tidied_by or self._deadline) - time.monotonic())
        if self._tidied_by is not None:
            return min(left, WRAPPER_POLL_SECONDS)
        if self._ended_by is not None:
            return min(left, WRAPPER_POLL_SECONDS) if self._family.release() else left
        return left if self._idle_timeout is None else min(left, self._idle_timeout.seconds_until_check())

    def _handle(self, fd: int) -> str | None:
        request = None
        if fd == CONTROL:
            request = self._control.request()
        elif fd == self._wake:
            request = "stop" if signal.SIGTERM in os.read(self._wake, CHUNK_BYTES) else None
        elif self._streams[fd].pump() == 0:
            self._poll.unregister(fd)
        elif self._idle_timeout is not None:
            self._idle_timeout.heard()
        if request == "stop":
            self._stop("stop")
        return request

    def _stop(self, reason: str) -> None:
        if self._ended_by is None:
            self._ended_by = reason
            tidies = self._interrupt and self._family.interrupt()
            asked = tidies or self._family.terminate()
            now = time.monotonic()
            self._deadline = now + (self._grace if asked else 0)
            self._tidied_by = now + INTERRUPT_GRACE_SHARE * self._grace if tidies else None


def write_status(**event: object) -> None:
    """Write one line of status; its reader may be gone."""
    try:
        os.write(STATUS, json.dumps(event).encode() + b"\n")
    except BrokenPipeError:
        pass


def supervise(spec: CommandSpec, control: Control, wake: int) -> dict[str, object]:
    """Run the CLI to its end and return the facts; raises SpawnError or OSError if it could not start."""
    lock = acquire_lock(spec.lock)
    try:
        return supervise_locked(spec, control, wake)
    finally:
        os.close(lock)


def supervise_locked(spec: CommandSpec, control: Control, wake: int) -> dict[str, object]:
    """Do what `supervise` does, under the lock."""
    # Asked only now: who finds the lock free later can rely on it that nothing of this session will start.
    write_status(event="locked")
    if (request := control.wait_for_start(wake)) is not None:
        return {"ended_by": request}
    streams = [OutputCapture(path, spec.cap, spec.redact) for path in (spec.stdout, spec.stderr)]
    wrapper = WrapperReport() if spec.wrapped else None
    family = ProcessTree(start_cli(spec, streams, wrapper), wake, spec.wrapped)
    try:
        write_status(event="started", pid=family.cli)
        ended_by = SupervisionLoop(spec, family, control, streams, wake).run()
    finally:
        killed = family.kill()
    for stream in streams:
        stream.finish()
    code = os.waitstatus_to_exitcode(family.status or 0)
    if wrapper is not None and ended_by == "exit" and code >= 0:
        if (error := wrapper.read_error()) is not None:
            raise error
        if not wrapper.ran():
            if (error := read_wrapper_error(spec.stderr, code)) is not None:
                raise error
            code = SIGNAL_EXIT_BASE - code
    # A wrapper's own exit code for what a signal has ended; of any other program's it could be its choice.
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
    """Read the spec, run it, report."""
    os.dup2(STATUS, 2)  # a traceback of our own is the orchestrator's to read, too
    control = Control()
    line = control.read_line()
    if line is None:
        return
    wake = open_signal_wakeup()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        facts = supervise(CommandSpec(json.loads(line)), control, wake)
    except SpawnError as exc:
        facts = {"spawn_error": str(exc), "exhausted": exc.exhausted}
    except re.error as exc:
        facts = {"spawn_error": f"the pattern of secrets is none: {exc}"}
    except OSError as exc:
        why = f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)
        facts = {"spawn_error": why, "exhausted": exc.errno in EXHAUSTED}
    write_status(event="ended", **(EMPTY_REPORT | facts))


def serve() -> None:
    """Fork a supervisor for each request that comes through the socket that is standard input, until that ends.

    A request is one byte, which brings the control pipe's and the status pipe's descriptor. What a supervisor leaves
    behind that was itself killed is inherited, and killed; so this ends after the last of them.
    """
    import gc
    import socket

    requests = socket.socket(fileno=os.dup(CONTROL))
    wake = open_signal_wakeup()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    gc.freeze()  # what no collection looks at stays shared with those that are forked
    supervisors = ForkedSupervisors()
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(requests, select.POLLIN)
    is_asked = True
    while supervisors.clean_up() or is_asked:
        ready = {fd for fd, _ in poll.poll()}
        if wake in ready:
            os.read(wake, CHUNK_BYTES)
        if requests.fileno() not in ready:
            continue
        data, pipes, _, _ = socket.recv_fds(requests, 1, 2)
        if not data:
            is_asked = False
            poll.unregister(requests)
            continue
        try:
            pid = os.fork()
        except OSError as exc:
            facts = {"spawn_error": str(exc.strerror), "exhausted": exc.errno in EXHAUSTED}
            os.write(pipes[1], json.dumps({"event": "ended", **EMPTY_REPORT, **facts}).encode() + b"\n")
            pid = -1
        if pid == 0:
            requests.close()
            os.close(wake)
            supervise_forked(*pipes)
        if pid > 0:
            supervisors.alive.add(pid)
        for fd in pipes:
            os.close(fd)


def supervise_forked(control: int, status: int) -> NoReturn:
    """Be the supervisor with these two pipes; what goes wrong in here goes to the status pipe."""
    try:
        os.setsid()
        for target, fd in ((CONTROL, control), (STATUS, status)):
            os.dup2(fd, target)
            os.close(fd)
        main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
