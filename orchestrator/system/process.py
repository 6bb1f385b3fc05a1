"""Start processes, each as a session leader.

No other module of this package starts any, except `orchestrator.sessions.supervision.supervisor`, a separate program,
which starts the CLI.
"""

from __future__ import annotations

import math
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NoReturn

import anyio
import anyio.to_thread

from orchestrator.sandbox.confinement import Confinement
from orchestrator.system import command_reaper
from orchestrator.system.failpoints import is_triggered
from orchestrator.system.process_table import process_stat

_POLL_SECONDS = 0.02  # between checks whether a program has exited: other processes may keep its streams open
#: Seconds after which an idle command, and a command with a stopped process (SIGSTOP), is killed.
IDLE_TIMEOUT, STOPPED_TIMEOUT = 300.0, 10.0
#: Seconds between checks whether an internal program is stopped.
RESUME_SECONDS = 2.0
_IDLE_POLL_SECONDS = 2.0  # between checks for activity
_FIRST_TIMEOUT = 5.0  # seconds for a fork server to read data that exceeds its socket buffer
_PIPE = 1 << 20  # bytes; the default maximum capacity of a pipe, see pipe(7)


@dataclass(frozen=True, slots=True)
class CompletedCommand:
    """The result of a command. `returncode` is negative if a signal killed it."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    input: bytes | None = None,  # noqa: A002  (the name that subprocess gives it)
    keep_fds: Sequence[int] = (),
    timeout: float | None = None,  # noqa: ASYNC109  (it kills the command, a cancel scope must not)
    memory: int | None = None,
    confinement: Confinement | None = None,
) -> CompletedCommand:
    """Run a short command, such as git, with exactly `env`.

    Standard input is `input` or empty. `keep_fds` stay open in the command: a lock with such a descriptor is not
    released before the command exits. The command survives this process by at most `command_reaper.EXIT_TIMEOUT`.
    Cancelling the caller does not interrupt the command. `memory` limits the bytes of the command and of each child
    (RLIMIT_DATA, setrlimit(2); Linux only). With a `confinement`, the command runs in a separate sandbox. Raises
    OSError if the program can't be started. After `timeout` seconds, `IDLE_TIMEOUT` without processor time, or
    `STOPPED_TIMEOUT` with a stopped process (Linux), the command is killed with all descendants and TimeoutError is
    raised.

    The output is read until all processes have closed it, so a command that may leave a daemon needs a timeout.
    """
    return await anyio.to_thread.run_sync(partial(_run, argv, env, cwd, input, keep_fds, timeout, memory, confinement))


def _run(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None,
    stdin: bytes | None,
    keep_fds: Sequence[int],
    timeout: float | None,
    memory: int | None,
    confinement: Confinement | None,
) -> CompletedCommand:
    def start(argv: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL if given is None else given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=keep_fds,
            start_new_session=True,
        )

    if keep_fds:
        _notify_reaper(b"-0\n")  # starts the reaper before the command; no process has this id
    with (
        nullcontext() if stdin is None else _file_of(stdin) as given,
        start(argv) if confinement is None else confinement.start(argv, start) as child,
    ):
        _limit_memory(child.pid, memory)
        if argv[0] == "git" and is_triggered("git.started"):
            os.killpg(child.pid, signal.SIGKILL)
        with _reaped_on_exit(child.pid) if keep_fds else nullcontext():
            try:
                stdout, stderr = _communicate(child, timeout)
            except TimeoutError as reason:
                # The leader is not reaped yet, so its session id has not been reused.
                command_reaper.kill_tree(child.pid)
                os.killpg(child.pid, signal.SIGKILL)
                raise TimeoutError(f"`{' '.join(argv)}` was killed: {reason}") from None
    return CompletedCommand(child.returncode, stdout, stderr)


def _file_of(data: bytes) -> IO[bytes]:
    """Return an in-memory file: a pipe would need a writer while the command runs."""
    file = os.fdopen(os.memfd_create("stdin"), "w+b") if hasattr(os, "memfd_create") else TemporaryFile()  # noqa: SIM115  (returned)
    file.write(data)
    file.seek(0)
    return file


def _communicate(child: subprocess.Popen[bytes], timeout: float | None) -> tuple[bytes, bytes]:
    """Wait for a command and return its output. Raises TimeoutError with the reason."""
    now = since = time.monotonic()
    deadline = math.inf if timeout is None else now + timeout
    before = -1
    while True:
        try:
            return child.communicate(timeout=min(deadline - now, _IDLE_POLL_SECONDS))
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if now >= deadline:
            raise TimeoutError(f"it ran longer than {timeout:g} s")
        family = command_reaper.read_process_tree(child.pid).values()
        ticks, is_stopped = sum(stat.cpu_ticks for stat in family), any(stat.is_stopped for stat in family)
        if ticks != before or not family:
            before, since = ticks, now
        if now - since >= (STOPPED_TIMEOUT if is_stopped else IDLE_TIMEOUT):
            how = "was stopped" if is_stopped else "did nothing"
            raise TimeoutError(f"it {how} for {now - since:.0f} s")


_programs: set[int] = set()
"""The running internal programs of this process, keyed by process id, to be resumed if stopped."""


@contextmanager
def resumed_if_stopped(pid: int) -> Iterator[None]:
    """Let `resume_stopped_programs` resume an internal program during the block."""
    _programs.add(pid)
    try:
        yield
    finally:
        _programs.discard(pid)


async def resume_stopped_programs() -> NoReturn:
    """Resume stopped internal programs (SIGSTOP) until cancelled (Linux).

    A stopped supervisor enforces no timeouts, and a stopped fork server starts no sessions.
    """
    while True:
        await anyio.sleep(RESUME_SECONDS)
        for pid in tuple(_programs):
            _resume_if_stopped(pid)


def _resume_if_stopped(pid: int) -> None:
    stat = process_stat(pid)
    if stat is not None and stat.state == "T":
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGCONT)


_reaper: tuple[int, IO[bytes]] | None = None
"""The process that started the reaper (this process may be a fork), and the reaper's standard input."""
_leaders: set[int] = set()
"""The running commands, in case the reaper is killed and replaced."""
_starting = threading.Lock()


def _notify_reaper(line: bytes) -> None:
    with _starting, suppress(OSError):  # the reaper is optional: continue if there are no file descriptors for it
        if _reaper is None or _reaper[0] != os.getpid():
            _leaders.clear()
            _start_reaper()
        try:
            _write_to_reaper(line)
        except BrokenPipeError:  # it was killed
            _start_reaper()
            _write_to_reaper(line)
        (_leaders.add if line[:1] == b"+" else _leaders.discard)(int(line[1:]))


def _write_to_reaper(line: bytes) -> None:
    assert _reaper is not None, "the reaper was started"  # noqa: S101  (for the type checker)
    _reaper[1].write(line)


def _start_reaper() -> None:
    global _reaper  # noqa: PLW0603  (one per process)
    argv, env = internal_program("orchestrator.system.command_reaper", "main")
    reads, writes = os.pipe()
    with open(reads, "rb", buffering=0) as theirs:  # noqa: PTH123  (a descriptor)
        pipe = open(writes, "wb", buffering=0)  # noqa: PTH123, SIM115  (closed with this process)
        devnull = subprocess.DEVNULL
        reaper = subprocess.Popen(argv, env=env, cwd="/", stdin=theirs, stdout=devnull, stderr=devnull,
                               start_new_session=True)  # fmt: skip
        reaper.returncode = 0  # never waited for: it exits right after this process
    _reaper = os.getpid(), pipe
    pipe.writelines(b"+%d\n" % leader for leader in _leaders)


@contextmanager
def _reaped_on_exit(leader: int) -> Iterator[None]:
    """Kill a command with all descendants if this process exits during the block."""
    _notify_reaper(b"+%d\n" % leader)
    try:
        yield
    finally:
        _notify_reaper(b"-%d\n" % leader)


def _limit_memory(pid: int, memory: int | None) -> None:
    if memory is not None and sys.platform == "linux":
        # Set by the parent: code between fork and exec may hang in a threaded program.
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (memory, memory))


async def run_untrusted(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    timeout: float,  # noqa: ASYNC109  (it kills the program, a cancel scope must not)
    max_output: int,
) -> CompletedCommand:
    """Run an untrusted program, such as a CLI to read its version.

    Its standard input is empty. Once it exits or prints more than `max_output` bytes, the rest of its process group is
    killed. Cancelling the caller does not interrupt it. After `timeout` seconds, its process group is killed and
    TimeoutError is raised. Raises OSError if the program can't be started.
    """
    return await anyio.to_thread.run_sync(partial(_run_untrusted, argv, env, cwd, timeout, max_output))


def _run_untrusted(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float, max_output: int
) -> CompletedCommand:
    deadline = time.monotonic() + timeout
    with subprocess.Popen(
        argv,
        env=env,
        cwd=cwd,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        try:
            stdout, stderr = _read_some(child, deadline, max_output)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        if time.monotonic() >= deadline:
            raise TimeoutError(f"`{' '.join(argv)}` was killed: it ran longer than {timeout:g} s")
    return CompletedCommand(child.returncode, stdout, stderr)


def _read_some(child: subprocess.Popen[bytes], deadline: float, max_output: int) -> tuple[bytes, bytes]:
    """Read until the child exits, prints over `max_output` bytes, or time is up."""
    streams = [pipe.fileno() for pipe in (child.stdout, child.stderr) if pipe is not None]
    read = dict.fromkeys(streams, b"")
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while time.monotonic() < deadline and sum(map(len, read.values())) <= max_output:
            # Check before reading the pipes, so that they contain all output if the child has exited.
            has_ended = _has_ended(child)
            for key, _ in selector.select(0 if has_ended else _POLL_SECONDS):
                data = os.read(key.fd, _PIPE)
                read[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
            if has_ended:
                break
    stdout, stderr = (read[stream][:max_output] for stream in streams)
    return stdout, stderr


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    if sys.platform == "linux":
        # Don't reap it: its process and group ids must not be reused yet.
        return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return child.poll() is not None


def internal_program(module: str, function: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment that run our function as a program.

    The program can import the standard library and this package, but no other installed packages.
    """
    # Imported instead of run as a script, because Python caches only the byte code of imports: saves 6 ms per start.
    code = f"import sys; sys.path.append(sys.argv.pop(1)); from {module} import {function}; {function}()"
    argv = [
        os.fspath(without_dotdot(Path(sys.executable))),
        "-I",
        "-S",
        "-c",
        code,
        os.fspath(Path(__file__).parents[2]),
    ]
    # A Python that is built as a shared library may need this to start.
    return argv, {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def internal_program_folders() -> tuple[Path, ...]:
    """Return the folders that an `internal_program` must be able to read. Blocks."""
    folders = (Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[1])
    return tuple(dict.fromkeys(map(without_dotdot, folders)))


def without_dotdot(path: Path) -> Path:
    """Return an absolute path without `..`, which may lead through hidden folders.

    Blocks.
    """
    path = path.absolute()
    return path.parent.resolve() / path.name if ".." in path.parts else path


async def spawn(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> subprocess.Popen[bytes]:
    """Start an interactive program and return immediately.

    Its stdin is an unbuffered pipe; its stdout and stderr share another. A started program is returned even if the
    caller is cancelled. The caller owns it and must close both pipes and wait for it.
    """
    return await anyio.to_thread.run_sync(partial(_spawn, argv, env, cwd))


def _spawn(argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=env,
        cwd=cwd,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_detached(
    arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start another instance of this program that survives this one. Blocks.

    It also survives the terminal. It becomes a session leader, and its standard error is appended to a file.
    """
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "orchestrator", *arguments],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


class ForkServer:
    """A program that forks a process per request: faster than starting a program.

    Its standard input is a socket. Each request is a byte with two pipe ends, one for reading and one for writing, for
    the forked process.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, first: bytes) -> None:
        """Start the server, and send it the bytes `first` before all requests. Blocks.

        Raises OSError if it can't be started.
        """
        self._requests, theirs = socket.socketpair()
        self._requests.settimeout(_FIRST_TIMEOUT)
        with ExitStack() as undo, theirs:
            undo.callback(self._requests.close)
            self._server = subprocess.Popen(
                argv,
                env=env,
                cwd=cwd,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            theirs.close()
            self._requests.sendall(first)
            undo.pop_all()
        self._requests.setblocking(False)  # a full queue fails, so that the caller starts the process itself

    def fork(self) -> tuple[IO[bytes], IO[bytes]]:
        """Fork a process; return its unbuffered input and output pipes. Blocks briefly.

        Raises OSError if no file descriptor is free, or the server has exited or is too busy.
        """
        with ExitStack() as ours, ExitStack() as theirs:
            reads, written = os.pipe()
            theirs.callback(os.close, reads)
            child_input = ours.enter_context(open(written, "wb", buffering=0))  # noqa: PTH123  (a descriptor)
            read, writes = os.pipe()
            theirs.callback(os.close, writes)
            child_output = ours.enter_context(open(read, "rb", buffering=0))  # noqa: PTH123  (a descriptor)
            socket.send_fds(self._requests, [b"\n"], [reads, writes])
            ours.pop_all()
            return child_input, child_output

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._server.pid

    def close(self) -> None:
        """Stop the server; forked processes continue. Blocks."""
        self._requests.close()
        while True:
            try:
                self._server.wait(RESUME_SECONDS)
            except subprocess.TimeoutExpired:
                _resume_if_stopped(self.pid)
            else:
                return


def kill_by_environment(marker: bytes) -> int:
    """Kill all processes with `marker` in their environment; return their number.

    Blocks. Used for leftovers of a session whose supervisor was killed. Processes that cleared their environment are
    not found; without /proc (macOS), none are found.
    """
    killed: set[int] = set()
    while True:
        marked = {int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _is_marked(folder, marker)}
        for pid in marked:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if marked <= killed:
            return len(killed)
        killed |= marked


def _is_marked(process: Path, marker: bytes) -> bool:
    try:
        return marker in (process / "environ").read_bytes()
    except OSError:  # the process has exited, or belongs to another user
        return False
