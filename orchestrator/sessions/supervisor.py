"""Run one CLI and make sure that nothing it started outlives it: a program of its own.

It is started by `python -I -S` as leader of a session of its own, with a control pipe as standard input and a
status pipe as standard output. Only the standard library is imported, and little of that: its start is paid
for by every session.

    control  one line of JSON, the fields of `Spec`; later perhaps the line `stop`; its end means that the
             orchestrator is dead
    status   {"event": "started", "pid": …} unless nothing could be started, and last of all
             {"event": "ended", …}, the fields of `orchestrator.sessions.supervised.Ended`

It holds an exclusive `flock` on the session's lock file from before the CLI starts until it exits, which is
when every descendant is dead: as the child subreaper it inherits each orphan, whatever it forked, cleared or
ignored. Without a subreaper (macOS) only the CLI's process group is killed, and what left it lives on. It can
not kill what runs as another user (`sudo`): then it waits, and keeps the lock, until that has ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import sys
import time

# `typing` costs milliseconds that each session would pay.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

CONTROL, STATUS = 0, 1
CHUNK_BYTES = 1 << 16
TAIL_BYTES = 1 << 20
LOCK_PATIENCE = 2.0  # seconds; longer than anyone who only looks whether the lock is free keeps it
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
HAS_PROC = sys.platform == "linux"


class SpawnError(Exception):
    """The CLI could not be started; the text says what and why."""


class Spec:
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
        self.lock: str = fields["lock"]


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


class Stream:
    """One output of the CLI: the first `cap` bytes go to the file as they come, of the rest the tail is kept."""

    def __init__(self, path: str, cap: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)
        self._room = cap
        self._tail = bytearray()
        self._left_out = 0
        self.total = 0
        self.error: str | None = None
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)

    def pump(self) -> int | None:
        """Take a chunk of what is readable now: its size, 0 at the end, None if there is nothing yet."""
        try:
            data = os.read(self.read_end, CHUNK_BYTES)
        except BlockingIOError:
            return None
        self.total += len(data)
        head = data[: self._room]
        self._room -= len(head)
        self._write(head)
        self._tail += data[len(head) :]
        # Cut only when there is twice too much: a cut at each chunk would move the megabyte each time.
        if len(self._tail) > 2 * TAIL_BYTES:
            self._cut_tail()
        return len(data)

    def finish(self) -> None:
        """Drain the pipe, which no descendant writes to any more, and put the tail behind the head."""
        # A pipe that was handed to a stranger may never run dry.
        taken = 0
        while taken < TAIL_BYTES and (size := self.pump()):
            taken += size
        self._cut_tail()
        if self._left_out:
            self._write(b"\n[\xe2\x80\xa6 %d bytes left out \xe2\x80\xa6]\n" % self._left_out)
        self._write(self._tail)
        os.close(self._file)

    def _cut_tail(self) -> None:
        surplus = max(0, len(self._tail) - TAIL_BYTES)
        self._left_out += surplus
        del self._tail[:surplus]

    def _write(self, data: bytes | bytearray) -> None:
        # A full disk must not end the supervision: the CLI goes on, what it says is counted but lost.
        view = memoryview(data)
        while view and self.error is None:
            try:
                view = view[os.write(self._file, view) :]
            except OSError as exc:
                self.error = exc.strerror
        view.release()


class Family:
    """The CLI and everything that descends from it."""

    def __init__(self, cli: int, wake: int) -> None:
        self.cli = cli
        self.status: int | None = None
        self._wake = wake

    def reap(self) -> bool:
        """Collect who has ended; False when nobody is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.cli:
                self.status = status

    def terminate(self) -> None:
        """Ask all to end."""
        if HAS_PROC:
            family = {os.getpid()}
            while signal_new(signal.SIGTERM, family, set()):
                pass
        else:
            send(-self.cli, signal.SIGTERM)

    def kill(self) -> int:
        """Kill until nobody is left; return how many beside the CLI had to be killed."""
        killed: set[int] = set()
        pause = 0.02  # seconds; the end of a child wakes us earlier
        while self.reap():
            if HAS_PROC:
                killed |= kill_all()
            else:
                send(-self.cli, signal.SIGKILL)
            if select.select([self._wake], [], [], pause)[0]:
                os.read(self._wake, CHUNK_BYTES)
            pause = min(2 * pause, 0.5)
        if not HAS_PROC:
            send(-self.cli, signal.SIGKILL)
        return len(killed - {self.cli})


def send(pid: int, number: int) -> None:
    """Signal a process, or with a negative `pid` its group, that may be gone or another user's."""
    try:  # noqa: SIM105  (contextlib is a slow import)
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def signal_new(number: int, family: set[int], seen: set[int]) -> set[int]:
    """Look once through /proc and signal each child of `family` outside `seen` as soon as it is found.

    Adds all that it looked at to `seen`, so that a second look costs only what has been forked since the
    first, and the children to `family`; returns those that are not zombies. A child that is listed before its
    parent, which happens when pids wrap around, is found only by a look with a fresh `seen`.
    """
    found: set[int] = set()
    for name in os.listdir("/proc"):  # noqa: PTH208  (pathlib is a slow import)
        if not name.isdecimal() or (pid := int(name)) in seen:
            continue
        seen.add(pid)
        try:
            with open(f"/proc/{name}/stat", "rb", 0) as file:  # noqa: PTH123  (pathlib is a slow import)
                state, parent = file.read(1024).rpartition(b")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) in family and pid not in family:
            send(pid, number)
            family.add(pid)
            if state != b"Z":
                found.add(pid)
    return found


def kill_all() -> set[int]:
    """Stop every descendant, so that none can fork meanwhile, then kill them; return those that lived."""
    seen: set[int] = set()
    family = {os.getpid()}
    lived: set[int] = set()
    while found := signal_new(signal.SIGSTOP, family, seen):
        lived |= found
    for pid in family - {os.getpid()}:
        send(pid, signal.SIGKILL)
    return lived


def prctl(option: int, value: int) -> None:
    """Set a process attribute where the system has it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def take_lock(path: str) -> None:
    """Hold the session's lock from now until this process is gone."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    give_up = time.monotonic() + LOCK_PATIENCE
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
    os.write(file, json.dumps({"pid": os.getpid(), "since": time.time()}).encode())


def start(spec: Spec, streams: list[Stream]) -> int:
    """Start the CLI and return its pid once its program runs; raises SpawnError or OSError."""
    stdin = os.open(spec.stdin or os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    complaint, complain = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        become(spec, [stdin, *(stream.write_end for stream in streams)], parent, complain)
    for fd in (complain, stdin, *(stream.write_end for stream in streams)):
        os.close(fd)
    why = os.read(complaint, CHUNK_BYTES)
    os.close(complaint)
    if why:
        os.waitpid(pid, 0)
        raise SpawnError(why.decode())
    return pid


def become(spec: Spec, stdio: list[int], parent: int, complain: int) -> NoReturn:
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
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        what = spec.argv[0]
        os.execvpe(what, spec.argv, spec.env)  # noqa: S606  (an argv, never a shell)
    except (OSError, ValueError) as exc:
        os.write(complain, f"{what}: {getattr(exc, 'strerror', None) or exc}".encode("utf-8", "replace"))
    finally:
        os._exit(127)


def listen_for_signals() -> int:
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


class Watch:
    """The time in which the CLI runs: pumps its output until something ends it."""

    def __init__(self, spec: Spec, family: Family, control: Control, streams: list[Stream], wake: int) -> None:
        self._family, self._control, self._wake = family, control, wake
        self._streams = {stream.read_end: stream for stream in streams}
        self._grace = spec.grace
        self._deadline = time.monotonic() + spec.timeout
        self._ended_by: str | None = None
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
            left = self._deadline - time.monotonic()
            if left <= 0:
                if self._ended_by is not None:
                    return self._ended_by
                self._stop("timeout")
                continue
            for fd, _ in self._poll.poll(left * 1000 + 1):
                if self._handle(fd) == "orphaned":
                    return self._ended_by or "orphaned"

    def _handle(self, fd: int) -> str | None:
        request = None
        if fd == CONTROL:
            request = self._control.request()
        elif fd == self._wake:
            request = "stop" if signal.SIGTERM in os.read(self._wake, CHUNK_BYTES) else None
        elif self._streams[fd].pump() == 0:
            self._poll.unregister(fd)
        if request == "stop":
            self._stop("stop")
        return request

    def _stop(self, reason: str) -> None:
        if self._ended_by is None:
            self._ended_by = reason
            self._deadline = time.monotonic() + self._grace
            self._family.terminate()


def tell(**event: object) -> None:
    """Write one line of status; its reader may be gone."""
    try:  # noqa: SIM105  (contextlib is a slow import)
        os.write(STATUS, json.dumps(event).encode() + b"\n")
    except BrokenPipeError:
        pass


def supervise(spec: Spec, control: Control, wake: int) -> dict[str, object]:
    """Run the CLI to its end and return the facts; raises SpawnError or OSError if it could not start."""
    take_lock(spec.lock)
    # Asked only now: who finds the lock free later can rely on it that nothing of this session will start.
    if (request := control.request()) is not None:
        return {"ended_by": request}
    streams = [Stream(spec.stdout, spec.cap), Stream(spec.stderr, spec.cap)]
    family = Family(start(spec, streams), wake)
    try:
        tell(event="started", pid=family.cli)
        ended_by = Watch(spec, family, control, streams, wake).run()
    finally:
        killed = family.kill()
    for stream in streams:
        stream.finish()
    code = os.waitstatus_to_exitcode(family.status or 0)
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
    wake = listen_for_signals()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    nothing: dict[str, object] = {"exit": None, "signal": None, "ended_by": "exit", "spawn_error": None}
    nothing |= {"stdout_bytes": 0, "stderr_bytes": 0, "killed": 0, "output_error": None}
    try:
        facts = supervise(Spec(json.loads(line)), control, wake)
    except SpawnError as exc:
        facts = {"spawn_error": str(exc)}
    except OSError as exc:
        facts = {"spawn_error": f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)}
    tell(event="ended", **(nothing | facts))


if __name__ == "__main__":
    main()
