"""The one door through which this package starts processes; each gets a session of its own.

The exception is `orchestrator.sessions.supervision.supervisor`, a separate program, which starts the CLI.
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
from typing import IO

import anyio.to_thread

from orchestrator.sandbox.confinement import Confinement
from orchestrator.system import command_reaper
from orchestrator.system.failpoints import is_triggered

_POLL_SECONDS = 0.02  # seconds between two looks whether a program has ended: others may keep its streams open
#: Seconds after which a command that does nothing at all is killed, and one of which a process is stopped (SIGSTOP).
IDLE_TIMEOUT, STOPPED_TIMEOUT = 300.0, 10.0
_IDLE_POLL_SECONDS = 2.0  # seconds between two looks whether it does anything
_PIPE = 1 << 20  # bytes, the most that a pipe holds unless root says otherwise, see pipe(7)


@dataclass(frozen=True, slots=True)
class CompletedCommand:
    """How a command ended: `returncode` is negative for the signal that killed it."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    input: bytes | None = None,
    keep_fds: Sequence[int] = (),
    timeout: float | None = None,
    memory: int | None = None,
    confinement: Confinement | None = None,
) -> CompletedCommand:
    """Run a short command, such as git, to its end, with exactly `env` and with `input` or nothing to read.

    `keep_fds` stay open in the command: a lock whose descriptor it keeps is free only when it, too, has
    ended. It does not outlive this process by more than `keeper.LIMIT` then. Cancelling the caller does not cut the
    command short. After `timeout` seconds it is killed with all that it started, and TimeoutError raised; so it is
    after `IDLE_TIMEOUT` without any processor time, or after `STOPPED_TIMEOUT` where a process of it is stopped (Linux). A
    program that can't be started is an OSError. `memory` is how many bytes of its own the command, and each that it
    starts, may have (RLIMIT_DATA, setrlimit(2); Linux only). With a `confinement` it runs in a sandbox of its own.

    The output is read until every process that holds it has closed it, so a command that may leave a daemon
    behind needs a timeout.
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
        _notify_reaper(b"-0\n")  # it is there before the command is; no command has this id
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
            except TimeoutError as why:
                # The leader is not reaped yet, so its session's id can't be anyone else's.
                command_reaper.kill_tree(child.pid)
                os.killpg(child.pid, signal.SIGKILL)
                raise TimeoutError(f"`{' '.join(argv)}` was killed: {why}") from None
    return CompletedCommand(child.returncode, stdout, stderr)


def _file_of(data: bytes) -> IO[bytes]:
    """Return a file in memory to read data from: a pipe is only written to while its reader is waited for."""
    file = os.fdopen(os.memfd_create("stdin"), "w+b") if hasattr(os, "memfd_create") else TemporaryFile()
    file.write(data)
    file.seek(0)
    return file


def _communicate(child: subprocess.Popen[bytes], timeout: float | None) -> tuple[bytes, bytes]:
    """Return what a command printed, at its end. TimeoutError says why it is not waited for any longer."""
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
        ran, is_stopped = sum(one.ran for one in family), any(one.state in "Tt" for one in family)
        if ran != before or not family:
            before, since = ran, now
        if now - since >= (STOPPED_TIMEOUT if is_stopped else IDLE_TIMEOUT):
            how = "was stopped" if is_stopped else "did nothing"
            raise TimeoutError(f"it {how} for {now - since:.0f} s")


_reaper: tuple[int, IO[bytes]] | None = None
"""The process that started the keeper, which forks may be of, and the keeper's standard input."""
_leaders: set[int] = set()
"""The commands that a keeper which replaces a killed one has to learn of."""
_starting = threading.Lock()


def _notify_reaper(line: bytes) -> None:
    with _starting, suppress(OSError):  # without a keeper, or descriptors for one, all is as without it
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
    assert _reaper is not None, "it was started before"
    _reaper[1].write(line)


def _start_reaper() -> None:
    global _reaper
    argv, env = internal_program("orchestrator.system.command_reaper", "main")
    reads, writes = os.pipe()
    with open(reads, "rb", buffering=0) as theirs:
        pipe = open(writes, "wb", buffering=0)
        devnull = subprocess.DEVNULL
        one = subprocess.Popen(argv, env=env, cwd="/", stdin=theirs, stdout=devnull, stderr=devnull,
                               start_new_session=True)  # fmt: skip
        one.returncode = 0  # nobody waits for it: it ends right after this process
    _reaper = os.getpid(), pipe
    pipe.writelines(b"+%d\n" % leader for leader in _leaders)


@contextmanager
def _reaped_on_exit(leader: int) -> Iterator[None]:
    """Have a command killed, with all that it started, if this process ends while the body runs."""
    _notify_reaper(b"+%d\n" % leader)
    try:
        yield
    finally:
        _notify_reaper(b"-%d\n" % leader)


def _limit_memory(pid: int, memory: int | None) -> None:
    if memory is not None and sys.platform == "linux":
        # Set from without: code between fork and exec may hang a program that has threads.
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (memory, memory))


async def run_untrusted(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    timeout: float,
    most: int,
) -> CompletedCommand:
    """Run a program of which nothing is known, such as a CLI that is asked for its version.

    It has nothing to read. As soon as it has ended, or has printed more than `most` bytes, all that is left of its
    process group is killed; after `timeout` seconds, too, and TimeoutError is raised. What can't be started is an
    OSError. Cancelling the caller does not cut it short.
    """
    return await anyio.to_thread.run_sync(partial(_run_stranger, argv, env, cwd, timeout, most))


def _run_stranger(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float, most: int
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
            stdout, stderr = _read_some(child, deadline, most)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        if time.monotonic() >= deadline:
            raise TimeoutError(f"`{' '.join(argv)}` was killed: it ran longer than {timeout:g} s")
    return CompletedCommand(child.returncode, stdout, stderr)


def _read_some(child: subprocess.Popen[bytes], deadline: float, most: int) -> tuple[bytes, bytes]:
    """Read until the child has ended, has printed more than `most`, or it is too late."""
    streams = [pipe.fileno() for pipe in (child.stdout, child.stderr) if pipe is not None]
    read = dict.fromkeys(streams, b"")
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while time.monotonic() < deadline and sum(map(len, read.values())) <= most:
            # Asked before the pipes are read: what it wrote before its end is in them by then.
            is_over = _has_ended(child)
            for key, _ in selector.select(0 if is_over else _POLL_SECONDS):
                data = os.read(key.fd, _PIPE)
                read[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
            if is_over:
                break
    stdout, stderr = (read[stream][:most] for stream in streams)
    return stdout, stderr


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    if sys.platform == "linux":
        # Without reaping it, which would give its id and its group's away.
        return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return child.poll() is not None


def internal_program(module: str, function: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment by which a function of this package is a program of its own.

    It sees the standard library and this package, and nothing else that is installed.
    """
    # Imported rather than run as a script, because Python caches the byte code of imports only: 6 ms a start.
    code = f"import sys; sys.path.append(sys.argv.pop(1)); from {module} import {function}; {function}()"
    argv = [
        os.fspath(without_dotdot(Path(sys.executable))),
        "-I",
        "-S",
        "-c",
        code,
        os.fspath(Path(__file__).parents[2]),
    ]
    # A Python that was built as a shared library may not start without this.
    return argv, {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def internal_program_folders() -> tuple[Path, ...]:
    """Return the folders that a program of `internal_program` must be able to read. Blocks."""
    folders = (Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[1])
    return tuple(dict.fromkeys(map(without_dotdot, folders)))


def without_dotdot(path: Path) -> Path:
    """Return an absolute path without `..`, which could lead through a folder that a fence hides. Blocks."""
    path = path.absolute()
    return path.parent.resolve() / path.name if ".." in path.parts else path


async def spawn(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> subprocess.Popen[bytes]:
    """Start a program that is talked to while it runs, and return it as soon as it has been started.

    Its stdin is an unbuffered pipe, its stdout another, which stderr goes to as well. Once it has been
    started it is returned even to a cancelled caller, who owns it: close both pipes and wait for it.
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
    """Start this program once more, in a session of its own, with its standard error appended to a file. Blocks.

    It outlives this process and its terminal.
    """
    with log.open("ab") as errors:
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
    """A program that forks another for each request, which is faster than to start one.

    It has a socket as its standard input, and for each byte of that it gets two pipes, of which it gives the one
    to be read and the one to be written to a process that it forks.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        """Start it. Blocks; OSError if it can't be started."""
        self._requests, theirs = socket.socketpair()
        with theirs:
            try:
                self._server = subprocess.Popen(
                    argv,
                    env=env,
                    cwd=cwd,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except BaseException:
                self._requests.close()
                raise

    def fork(self) -> tuple[IO[bytes], IO[bytes]]:
        """Have a process forked; return what it reads and what it writes, unbuffered. Blocks, though not for long.

        OSError if there is no descriptor left, or the server is gone.
        """
        with ExitStack() as ours, ExitStack() as theirs:
            reads, written = os.pipe()
            theirs.callback(os.close, reads)
            given = ours.enter_context(open(written, "wb", buffering=0))
            read, writes = os.pipe()
            theirs.callback(os.close, writes)
            taken = ours.enter_context(open(read, "rb", buffering=0))
            socket.send_fds(self._requests, [b"\n"], [reads, writes])
            ours.pop_all()
            return given, taken

    def close(self) -> None:
        """End it; what it has forked lives on. Blocks."""
        self._requests.close()
        self._server.wait()


def kill_by_environment(marker: bytes) -> int:
    """Kill every process that has `marker` in its environment; return how many there were. Blocks.

    For what is left of a session whose supervisor was itself killed. A process that cleared its environment is
    not found, and without /proc (macOS) none is.
    """
    killed: set[int] = set()
    while True:
        found = {int(place.name) for place in Path("/proc").glob("[0-9]*") if _is_marked(place, marker)}
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if found <= killed:
            return len(killed)
        killed |= found


def _is_marked(process: Path, marker: bytes) -> bool:
    try:
        return marker in (process / "environ").read_bytes()
    except OSError:  # it has ended, or is not ours
        return False
