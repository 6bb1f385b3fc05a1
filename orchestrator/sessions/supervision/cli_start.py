"""The start of a supervised CLI: fork it, set up its descriptors, limits and sandbox, and execute it.

A part of the supervisor, which imports little, and only of the standard library.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import termios

from orchestrator.sandbox import seccomp
from orchestrator.sandbox.landlock import restrict_thread
from orchestrator.sessions.supervision.capture import CHUNK_BYTES, OutputCapture
from orchestrator.sessions.supervision.process_tree import PR_SET_PDEATHSIG, prctl

# `typing` would add milliseconds to each session.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

WRAPPER_STATUS = 3  # the wrapper writes its status to this descriptor
WRAPPER_FILTER = 4  # the wrapper reads the system call filter from this descriptor
WRAPPER_ERROR = 5  # the program that starts the CLI in a wrapper reports errors to this descriptor
SIGNAL_EXIT_BASE = 128  # plus the signal's number: a wrapper's exit code if a signal ended its program
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class SpawnError(Exception):
    """The reason why the CLI could not be started; `number` is the errno, if any."""

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.exhausted = number in EXHAUSTED


class CommandSpec:
    """The command to run: the fields of `SupervisedCommand` as JSON, with absolute paths."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    stdin: str | None
    stdout: str
    stderr: str
    cap: int
    timeout: float
    grace: float
    interrupt: bool
    lock: str
    redact: str | None
    idle_timeout: float | None
    watched: list[str]
    wrapped: bool
    uses_loopback: bool
    landlock: list[tuple[str, str]] | None
    port: int | None
    filter: bytes | None
    terminal: str | None
    limits: dict[str, int]

    def __init__(self, fields: dict[str, Any]) -> None:
        sent = fields["filter"]
        self.__dict__.update(fields, filter=None if sent is None else bytes.fromhex(sent))


class WrapperReport:
    """The report of a bubblewrap around the CLI, which shows whether the CLI ran.

    Of its status documents (`--json-status-fd` in bwrap(1)), the one with `exit-code` is written only if the program
    was executed.
    """

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        self._error_read_end, self.error_write_end = os.pipe()
        for pipe in (self._read_end, self._error_read_end):
            os.set_blocking(pipe, False)

    def has_run(self) -> bool:
        """Return whether the CLI or its starter ran. Call once, after the wrapper exited."""
        try:
            return b'"exit-code"' in os.read(self._read_end, CHUNK_BYTES)
        except BlockingIOError:
            return False

    def read_error(self) -> SpawnError | None:
        """Return the error of the CLI's starter. Call once, after the wrapper exited."""
        try:
            return parse_spawn_error(os.read(self._error_read_end, CHUNK_BYTES))
        except BlockingIOError:
            return None


def parse_spawn_error(data: bytes) -> SpawnError | None:
    """Parse the errno and reason that a process wrote when it could not execute."""
    number, _, reason = data.decode(errors="replace").partition(" ")
    return SpawnError(reason, int(number)) if number else None


def read_wrapper_error(stderr: str, code: int) -> SpawnError | None:
    """Return the error that kept a wrapper from starting the CLI, from its stderr.

    Returns None if, according to the exit code, a signal ended the program in the wrapper.
    """
    with open(stderr, "rb") as file:  # noqa: PTH123  (pathlib is a slow import)
        lines = file.read(CHUNK_BYTES).decode(errors="replace").splitlines()
    message = next((line for line in reversed(lines) if line.startswith("bwrap: ")), "no error message")
    if not message.startswith("bwrap: ") and code > SIGNAL_EXIT_BASE:
        return None
    reason = message.removeprefix("bwrap: ")
    number = next((number for number in EXHAUSTED if reason.endswith(os.strerror(number))), None)
    program = reason.removeprefix("execvp ")
    return SpawnError(program if program != reason else f"the sandbox could not be created: {reason}", number)


def start_cli(spec: CommandSpec, streams: list[OutputCapture], wrapper: WrapperReport | None) -> int:
    """Start the CLI; return its pid once it runs. Raises SpawnError or OSError."""
    error_read, error_write = os.pipe()
    parent = os.getpid()
    outputs = [stream.write_end for stream in streams]
    if spec.terminal is None:
        inherited = [os.open(spec.stdin or os.devnull, os.O_RDONLY | os.O_CLOEXEC), *outputs]
    else:  # nothing is captured
        for fd in outputs:
            os.close(fd)
        inherited = [os.open(spec.terminal, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC) for _ in range(3)]
    if wrapper is not None:
        inherited.append(wrapper.write_end)
        if spec.filter is not None or spec.uses_loopback:
            inherited.append(make_readable_fd(spec.filter or b""))
        if spec.uses_loopback:
            inherited.append(wrapper.error_write_end)
    pid = os.fork()
    if pid == 0:
        exec_cli(spec, inherited, parent, error_write)
    for fd in (error_write, *inherited):
        os.close(fd)
    error = parse_spawn_error(os.read(error_read, CHUNK_BYTES))
    os.close(error_read)
    if error is not None:
        os.waitpid(pid, 0)
        raise error
    return pid


def make_readable_fd(data: bytes) -> int:
    """Return a file descriptor that yields a small amount of data."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def exec_cli(spec: CommandSpec, inherited: list[int], parent: int, error_fd: int) -> NoReturn:
    """Turn the forked child into the CLI; write the error to `error_fd` on failure."""
    step = spec.cwd
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
        error_fd = install_descriptors(inherited, error_fd)
        if spec.terminal is not None:
            make_controlling_terminal(0)
        step = "a limit could not be set"
        for name, limit in spec.limits.items():
            set_resource_limit(name, limit)
        if spec.landlock is not None:
            step = "the sandbox could not be created"
            restrict_thread(spec.landlock, spec.port)
            if spec.filter is not None:
                seccomp.install_filter(spec.filter)
        step = spec.argv[0]
        os.execvpe(step, spec.argv, spec.env)  # noqa: S606  (an argv, never a shell)
    except (OSError, ValueError) as exc:
        message = f"{getattr(exc, 'errno', None) or 0} {step}: {getattr(exc, 'strerror', None) or exc}"
        os.write(error_fd, message.encode("utf-8", "replace"))
    finally:
        os._exit(127)


def make_controlling_terminal(fd: int) -> None:
    """Make a terminal that of this process's new session, so that keys and resizes are delivered as signals."""
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def set_resource_limit(name: str, limit: int) -> None:
    """Limit a resource of this process and its children, up to the hard limit."""
    number = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(number)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(number, (limit, limit))


def install_descriptors(inherited: list[int], error_fd: int) -> int:
    """Renumber `inherited` from 0; return the new number of `error_fd`."""
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, WRAPPER_ERROR + 1) for fd in (*inherited, error_fd)]
    for target, fd in enumerate(above[:-1]):
        os.dup2(fd, target)
    return above[-1]
