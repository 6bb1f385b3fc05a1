"""Start a supervisor, send it a command, and wait for its report.

There is no thread per session, and nothing here waits for the pipes of the CLI. The status pipe of the supervisor is
the only source; it closes when the supervisor exits, which is when no process of the session is alive.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread

from orchestrator.domain.runs.outcome import ProcessExit
from orchestrator.errors import LockHeld, SessionError
from orchestrator.sessions.supervision.supervisor import OWNER
from orchestrator.system import process
from orchestrator.system.file_lock import FileLock, LockHolder

_MODULE = "orchestrator.sessions.supervision.supervisor"
_LOCKED, _FORKED = b'{"event": "locked"}', b'{"event": "forked", '
_FOLDER = Path("/")  # the supervisor's working folder, so that it keeps no worktree busy
_SERVER: ContextVar[process.ForkServer | None] = ContextVar("_SERVER", default=None)
#: Seconds for a supervisor to end its session by itself; normally it takes far less.
_REAP_PAUSE = 0.5
_KILL_TIMEOUT = 5.0  # seconds from SIGKILL to the exit of the last process, which normally takes milliseconds


@dataclass(frozen=True, slots=True)
class SupervisedCommand:
    """A CLI to run, with its whole `env`; `stdin` is a file to read, or None.

    The first `cap` bytes and the last MiB of each output are kept. After `timeout` seconds, or when the awaiting task
    is cancelled, all processes get SIGTERM, and SIGKILL after `grace` seconds. With `interrupt`, the CLI alone gets
    SIGINT first; all processes get SIGTERM once it has ended, at the latest after half of the grace period. The file
    `lock` is locked while any process of the session is alive.

    After `idle_timeout` seconds without output and without a change in the `watched` folders, the CLI is stopped, as
    after `timeout`. `redact` is the ASCII source of a bytes expression: its matches and private keys are not written to
    `stdout` and `stderr` (see `orchestrator.sessions.supervision.capture`). `limits` maps resource names of
    setrlimit(2) (`CORE`, `NOFILE`) to limits per process. `terminal` is the path of a pseudo-terminal that replaces
    `stdin` and the captured output.

    The other fields belong to the sandbox (`orchestrator.sessions.sandbox.policy`). `wrapped`: `argv` starts a
    bubblewrap that reports to file descriptor 3 and reads a filter from 4. `uses_loopback`: in it
    `orchestrator.sandbox.loopback` starts the CLI and reports to 5. `landlock` and `port`: arguments of
    `orchestrator.sandbox.landlock.restrict_thread`. `filter`: the result of
    `orchestrator.sandbox.seccomp.build_filter`, in hexadecimal.
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
    terminal: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)


async def run_supervised(
    command: SupervisedCommand,
    *,
    may_start: Callable[[], Awaitable[None]] | None = None,
    on_spawned: Callable[[], None] | None = None,
) -> ProcessExit:
    """Run a CLI and return its exit; none of its processes is alive afterwards.

    `may_start` is called under the session's lock right before the CLI starts; its error prevents the start.
    `on_spawned` is called when the CLI may be running. Cancellation stops the CLI as described in SupervisedCommand and
    is then propagated. Raises SessionError if the supervisor ended without a report, OSError if it could not be
    started.
    """
    async with _supervisor() as supervisor:
        is_sent = False
        try:
            await supervisor.send(_spec(command))
            is_sent = True
            if await supervisor.is_locked():
                if may_start is not None:
                    await may_start()
                await supervisor.send(b"start\n")
            if on_spawned is not None:
                on_spawned()
            return await supervisor.report()
        except anyio.get_cancelled_exc_class():
            # A partial command is never run, so closing the pipe is enough.
            if is_sent:
                with anyio.move_on_after(command.grace + _KILL_TIMEOUT, shield=True):
                    await supervisor.send(b"stop\n")
                    while not await supervisor.has_ended(_REAP_PAUSE):  # unless it is frozen (SIGSTOP)
                        await anyio.to_thread.run_sync(_stop_supervisor, command.lock)
            raise


async def wait_until_released(lock: Path, timeout: float) -> None:  # noqa: ASYNC109  (LockHeld names the holder)
    """Wait until no process of the session with this lock is alive.

    Only waits; does not stop the session. A missing lock file means that no process is alive. Raises LockHeld after
    `timeout` seconds.
    """
    if not await anyio.Path(lock).exists():
        return
    with suppress(FileNotFoundError):  # another process has just removed the leftovers of the session
        async with FileLock(lock).hold(timeout):
            pass


async def is_session_alive(lock: Path) -> bool:
    """Return whether the session is alive, or another process is checking its lock."""
    with suppress(FileNotFoundError):
        return await anyio.Path(lock).exists() and await FileLock(lock).is_held()
    return False


async def stop_supervised(lock: Path, marker: bytes, timeout: float) -> None:  # noqa: ASYNC109  (as `wait_until_released`)
    """Stop a session whose orchestrator lost it; return when no process is alive.

    A supervisor ends the session by itself unless it or its orchestrator is frozen. Then it is resumed and stopped, and
    all processes with `marker` in their environment are killed. Raises LockHeld after `timeout` seconds.
    """
    deadline = anyio.current_time() + timeout
    while True:
        try:
            await wait_until_released(lock, _REAP_PAUSE)
            break
        except LockHeld:
            if anyio.current_time() >= deadline:
                raise
        await anyio.to_thread.run_sync(process.kill_by_environment, marker)
        await anyio.to_thread.run_sync(_stop_supervisor, lock)
    await anyio.to_thread.run_sync(process.kill_by_environment, marker)


def _stop_supervisor(lock: Path) -> None:
    """Make the holder of a lock stop its session, even if it is frozen. Blocks."""
    holder = LockHolder.read(lock)
    if holder is not None and holder.owner == OWNER and holder.started is not None and holder.is_alive:
        with suppress(ProcessLookupError, PermissionError):
            for number in (signal.SIGTERM, signal.SIGCONT):
                os.kill(holder.pid, number)


@asynccontextmanager
async def open_fork_server(redact: str = "") -> AsyncIterator[None]:
    """Fork the supervisors of the block, and of its tasks, from one process.

    It is prepared for commands with the same `redact`. If it can't be started or has exited, supervisors start
    normally.
    """
    server: process.ForkServer | None = None
    with suppress(OSError):
        server = await anyio.to_thread.run_sync(
            process.ForkServer, *process.internal_program(_MODULE, "serve"), _FOLDER, f"{redact}\n".encode()
        )
    token = _SERVER.set(server)
    try:
        with nullcontext() if server is None else process.resumed_if_stopped(server.pid):
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
    values = {one.name: getattr(command, one.name) for one in fields(command)}
    values |= {"env": dict(command.env), "limits": dict(command.limits)}
    return json.dumps(values, default=lambda path: os.fspath(path.absolute())).encode() + b"\n"


class _Supervisor:
    """The control and status pipes of a running supervisor."""

    def __init__(
        self, control: IO[bytes] | None, status: IO[bytes] | None, child: subprocess.Popen[bytes] | None
    ) -> None:
        """Take ownership of the pipes; `child` is None if the fork server is the parent."""
        self._child = child
        self._control, self._status = _pipe(control), _pipe(status)
        self._lines, self._unread = list[bytes](), b""
        self._watched = ExitStack()
        if child is not None:
            self._watched.enter_context(process.resumed_if_stopped(child.pid))

    async def send(self, data: bytes) -> None:
        """Write to the control pipe; a broken pipe shows as a missing report."""
        view = memoryview(data)
        try:
            while view:
                await anyio.wait_writable(self._control)
                view = view[self._control.write(view) or 0 :]
        except BrokenPipeError:
            return

    async def is_locked(self) -> bool:
        """Wait for the first event; return whether the supervisor holds the lock."""
        while not self._lines and await self._read():
            pass
        return self._lines[:1] == [_LOCKED]

    async def wait_for_exit(self) -> None:
        """Wait until the status pipe closes, which is when the supervisor exits."""
        while await self._read():
            pass

    async def has_ended(self, timeout: float) -> bool:  # noqa: ASYNC109  (the caller may repeat the call)
        """Return whether the supervisor exits within `timeout` seconds."""
        with anyio.move_on_after(timeout) as scope:
            await self.wait_for_exit()
        return not scope.cancelled_caught

    async def _read(self) -> bool:
        """Read more of the status pipe; return False at its end."""
        await anyio.wait_readable(self._status)
        data = self._status.read(1 << 16)
        *lines, self._unread = (self._unread + (data or b"")).split(b"\n")
        for line in lines:
            if line.startswith(_FORKED):
                self._watched.enter_context(process.resumed_if_stopped(json.loads(line)["pid"]))
            else:
                self._lines.append(line)
        return data != b""

    async def report(self) -> ProcessExit:
        """Wait for the supervisor to exit and return its report."""
        await self.wait_for_exit()
        received = [line for line in (*self._lines, self._unread) if line.strip()]
        try:
            event = json.loads(received[-1] if received else b"")
        except ValueError:
            event = None
        if not isinstance(event, dict) or event.pop("event", None) != "ended":
            lines = [line.decode(errors="replace") for line in received]
            errors = [line for line in lines if not line.startswith('{"event": ')]
            reason = errors[-1] if errors else "it was killed"
            raise SessionError(f"the supervisor of the session ended without a report: {reason}")
        return ProcessExit(**event)

    async def close(self) -> None:
        """Close the control pipe, which kills all processes, and reap the supervisor."""
        self._control.close()
        with self._status, self._watched:
            with anyio.move_on_after(_KILL_TIMEOUT, shield=True):
                await self.wait_for_exit()
                if self._child is not None:
                    await anyio.to_thread.run_sync(self._child.wait)
                return
        raise SessionError("some processes of the session can't be killed")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # noqa: S101  (spawn makes both)
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
