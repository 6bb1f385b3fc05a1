"""The orchestrator's end of the supervisor: start it, tell it what to run, wait for its report.

No thread is kept per session and nothing here waits for the CLI's own pipes: the supervisor's status pipe is
the only source, and it ends when the supervisor does, which is when nothing of the session lives any more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import anyio
import anyio.to_thread

from orchestrator.errors import LockHeld, SessionError
from orchestrator.sessions.supervision.supervisor import OWNER
from orchestrator.system import process
from orchestrator.system.file_lock import FileLock, LockHolder

_MODULE = "orchestrator.sessions.supervision.supervisor"
_LOCKED = b'{"event": "locked"}\n'
_FOLDER = Path("/")  # the supervisor's own, so that it keeps no worktree busy
_SERVER: ContextVar[process.ForkServer | None] = ContextVar("_SERVER", default=None)
#: Seconds that a supervisor gets to end its session by itself; far above what it takes.
_REAP_PAUSE = 0.5
_KILL_TIMEOUT = 5.0  # seconds from SIGKILL to the last process's end; measured in milliseconds


@dataclass(frozen=True, slots=True)
class SupervisedCommand:
    """One CLI to run: `env` is all the environment it gets, `stdin` a file to read (None: nothing to read).

    Of each output the first `cap` bytes and the last MiB are kept. After `timeout` seconds, or when the
    awaiting task is cancelled, all its processes get SIGTERM and after `grace` seconds SIGKILL. With `interrupt` the
    CLI itself, and nothing that it started, gets SIGINT first: all get SIGTERM once it has ended, but after half of
    the grace at the latest. `lock` is the file that is locked while anything of the session lives.

    After `idle_timeout` seconds without output and without a change beneath the folders `watched`, it is stopped as
    after `timeout`. `redact` is the ASCII source of an expression for bytes: what it finds is not written to
    `stdout` and `stderr`, and neither are private keys; see `orchestrator.sessions.supervision.redaction`. `limits` are the
    most that each process may have of a resource, by its name in setrlimit(2) (`CORE`, `NOFILE`). The last ones are
    the sandbox's (`orchestrator.sessions.sandbox.policy`): `wrapped` if `argv` starts a bubblewrap that reports to file
    descriptor 3 and reads a filter from 4, `passes_on` if in it `orchestrator.sandbox.loopback` starts the CLI and
    reports to 5, `landlock` and `port` what `orchestrator.sandbox.landlock.confine` is given, `filter` what
    `orchestrator.sandbox.seccomp.build` returned, in hexadecimal.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    stdin: Path | None
    stdout: Path
    stderr: Path
    cap: int
    timeout: float
    grace: float
    lock: Path
    interrupt: bool = False
    idle_timeout: float | None = None
    watched: tuple[Path, ...] = ()
    redact: str | None = None
    wrapped: bool = False
    uses_loopback: bool = False
    landlock: tuple[tuple[str, str], ...] | None = None
    port: int | None = None
    filter: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SupervisedExit:
    """How a CLI ended, when nothing of it lives any more.

    `exit` or `signal` is the CLI's own end; both are None when it never ran, and then `parse_spawn_error` says why
    if it was not stopped before. The byte counts are what it wrote, not what was kept. `killed` counts the
    processes beside the CLI that had to be killed; of those in a bubblewrap some are the kernel's to kill, and
    uncounted. `output_error` says why output could not be written. `exhausted` means that the `parse_spawn_error` is a
    lack of memory, disk, processes or descriptors, which may pass, and not of the program. In a bubblewrap, a CLI
    that signal N ended by itself is seen as `exit` 128 + N, as a shell sees it.
    """

    exit: int | None
    signal: int | None
    ended_by: Literal["exit", "timeout", "idle_timeout", "stop", "orphaned"]
    spawn_error: str | None
    stdout_bytes: int
    stderr_bytes: int
    killed: int
    output_error: str | None
    exhausted: bool = False


async def run_supervised(
    command: SupervisedCommand,
    *,
    may_start: Callable[[], Awaitable[None]] | None = None,
    on_spawned: Callable[[], None] | None = None,
) -> SupervisedExit:
    """Run a CLI to its end and return the facts; nothing that it started is alive then.

    `can_start_session` is called under the session's lock, right before the CLI starts, which its error prevents.
    `on_spawned` is called when the CLI perhaps runs. On cancellation the CLI is stopped as `SupervisedCommand` says
    before the cancellation goes on. Raises SessionError if the supervisor ended without its report, OSError if it
    could not be started.
    """
    async with _supervisor() as supervisor:
        ordered = False
        try:
            await supervisor.send(_spec(command))
            ordered = True
            if await supervisor.is_locked():
                if may_start is not None:
                    await may_start()
                await supervisor.send(b"start\n")
            if on_spawned is not None:
                on_spawned()
            return await supervisor.report()
        except anyio.get_cancelled_exc_class():
            # Half an order is never carried out: then the pipe's end is enough.
            if ordered:
                with anyio.move_on_after(command.grace + _KILL_TIMEOUT, shield=True):
                    await supervisor.send(b"stop\n")
                    while not await supervisor.has_ended(_REAP_PAUSE):  # by itself, unless it is stopped (SIGSTOP)
                        await anyio.to_thread.run_sync(_stop_supervisor, command.lock)
            raise


async def wait_until_released(lock: Path, timeout: float) -> None:
    """Return when nothing of the session that `lock` belongs to lives; raises LockHeld after `timeout` seconds.

    Does not start the session's end, only waits for it. A lock that was never made belongs to no process.
    """
    if not await anyio.Path(lock).exists():
        return
    with suppress(FileNotFoundError):  # whoever else sees to that session has just removed all that was left of it
        async with FileLock(lock).hold(timeout):
            pass


async def is_session_alive(lock: Path) -> bool:
    """Whether anything of the session that `lock` belongs to lives, or its lock is looked at just now."""
    with suppress(FileNotFoundError):
        return await anyio.Path(lock).exists() and await FileLock(lock).is_held()
    return False


async def stop_supervised(lock: Path, marker: bytes, timeout: float) -> None:
    """Return when nothing of a session lives whose orchestrator is gone, or has it no more; LockHeld as above.

    A supervisor ends a session by itself unless it is frozen, or its orchestrator is: then it is woken and stopped, and
    all processes are killed that have `marker` in their environment.
    """
    until = anyio.current_time() + timeout
    while True:
        try:
            await wait_until_released(lock, _REAP_PAUSE)
            break
        except LockHeld:
            if anyio.current_time() >= until:
                raise
        await anyio.to_thread.run_sync(process.kill_by_environment, marker)
        await anyio.to_thread.run_sync(_stop_supervisor, lock)
    await anyio.to_thread.run_sync(process.kill_by_environment, marker)


def _stop_supervisor(lock: Path) -> None:
    """Have the supervisor that signed a lock, if it lives, stop its session, though it is frozen. Blocks."""
    signed = LockHolder.read(lock)
    if signed is not None and signed.owner == OWNER and signed.started is not None and signed.is_alive:
        with suppress(ProcessLookupError, PermissionError):
            for number in (signal.SIGTERM, signal.SIGCONT):
                os.kill(signed.pid, number)


@asynccontextmanager
async def open_fork_server() -> AsyncIterator[None]:
    """Have what `run_supervised` starts in the body, and in tasks begun there, forked from one process that is ready.

    Where that can't be started, or is gone, all is as without it.
    """
    server: process.ForkServer | None = None
    with suppress(OSError):
        server = await anyio.to_thread.run_sync(
            process.ForkServer, *process.internal_program(_MODULE, "serve"), _FOLDER
        )
    token = _SERVER.set(server)
    try:
        yield
    finally:
        _SERVER.reset(token)
        if server is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(server.close)


def _forked() -> _Supervisor | None:
    server = _SERVER.get()
    if server is not None:
        with suppress(OSError):
            return _Supervisor(*server.fork(), None)
    return None


def _spec(command: SupervisedCommand) -> bytes:
    fields = {
        "argv": list(command.argv),
        "env": dict(command.env),
        "cwd": os.fspath(command.cwd.absolute()),
        "stdin": None if command.stdin is None else os.fspath(command.stdin.absolute()),
        "stdout": os.fspath(command.stdout.absolute()),
        "stderr": os.fspath(command.stderr.absolute()),
        "cap": command.cap,
        "timeout": command.timeout,
        "grace": command.grace,
        "interrupt": command.interrupt,
        "lock": os.fspath(command.lock.absolute()),
        "idle_timeout": command.idle_timeout,
        "watched": [os.fspath(folder.absolute()) for folder in command.watched],
        "redact": command.redact,
        "wrapped": command.wrapped,
        "passes_on": command.uses_loopback,
        "landlock": command.landlock,
        "port": command.port,
        "filter": command.filter,
        "limits": dict(command.limits),
    }
    return json.dumps(fields).encode() + b"\n"


class _Supervisor:
    """A running supervisor's two pipes."""

    def __init__(
        self, control: IO[bytes] | None, status: IO[bytes] | None, child: subprocess.Popen[bytes] | None
    ) -> None:
        """Take the pipes; what was forked is no child of ours."""
        self._child = child
        self._control, self._status = _pipe(control), _pipe(status)
        self._said = bytearray()

    async def send(self, data: bytes) -> None:
        """Write to the control pipe; that it is broken shows in the report that then is missing."""
        view = memoryview(data)
        try:
            while view:
                await anyio.wait_writable(self._control)
                view = view[self._control.write(view) or 0 :]
        except BrokenPipeError:
            return

    async def is_locked(self) -> bool:
        """Wait for what it reports first; whether that is that it holds the lock, and not its end."""
        while b"\n" not in self._said and await self._read():
            pass
        return self._said.startswith(_LOCKED)

    async def ended(self) -> None:
        """Wait for the end of the status pipe, which is the supervisor's own end."""
        while await self._read():
            pass

    async def has_ended(self, timeout: float) -> bool:
        """Whether it ends within so many seconds."""
        with anyio.move_on_after(timeout) as scope:
            await self.ended()
        return not scope.cancelled_caught

    async def _read(self) -> bool:
        """Read more of what it reports; False at its end."""
        await anyio.wait_readable(self._status)
        data = self._status.read(1 << 16)
        self._said += data or b""
        return data != b""

    async def report(self) -> SupervisedExit:
        """Wait for the end and return the facts."""
        await self.ended()
        last = self._said.rstrip().rpartition(b"\n")[2]
        try:
            event = json.loads(last)
        except ValueError:
            event = None
        if not isinstance(event, dict) or event.pop("event", None) != "ended":
            lines = self._said.decode(errors="replace").splitlines()
            errors = [line for line in lines if line.strip() and not line.startswith('{"event": ')]
            why = errors[-1] if errors else "it was killed"
            raise SessionError(f"the supervisor of the session ended without a report: {why}")
        return SupervisedExit(**event)

    async def close(self) -> None:
        """End the control pipe, upon which all is killed at once, and reap the supervisor."""
        self._control.close()
        with self._status:
            with anyio.move_on_after(_KILL_TIMEOUT, shield=True):
                await self.ended()
                if self._child is not None:
                    await anyio.to_thread.run_sync(self._child.wait)
                return
        raise SessionError("some processes of the session can't be killed")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe


@asynccontextmanager
async def _supervisor() -> AsyncIterator[_Supervisor]:
    supervisor = _forked()
    if supervisor is None:
        argv, env = process.internal_program(_MODULE, "main")
        child = await process.spawn(argv, env=env, cwd=_FOLDER)
        supervisor = _Supervisor(child.stdin, child.stdout, child)
    try:
        yield supervisor
    finally:
        await supervisor.close()
