"""The real command without the import time: forks of one process with all modules loaded.

A test starts hundreds of commands, which would spend most of their time on the same imports. A fork is an ordinary
process with its own session, folder, environment, streams and failpoints, and exits like an interpreter. Tests of the
startup itself run `python -m orchestrator.cli.main`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import anyio
import anyio.abc
import portalocker  # noqa: F401  imported before the fork
import pydantic.dataclasses
import zstandard  # noqa: F401  imported before the fork

import adapters
import orchestrator
from orchestrator.cli.main import main
from orchestrator.system.failpoints import arm
from tests.faulty_store import fail_file_store

_MAX_REQUEST: Final = 1 << 20
#: Read at interpreter startup or on import of a library: with one of these set, a new interpreter is started.
_READ_AT_START: Final = ("PYTHON", "LC_", "LANG", "TMPDIR", "LD_", "GIT_PYTHON_")
_NOT_IMPORTED: Final = ("orchestrator.testing", "adapters.bridges")
_USUAL: Final = {"LC_ALL": "C.UTF-8"}


class ForkedCommand:
    """A started command, with the parts of `subprocess.Popen` that tests need."""

    def __init__(self, pid: int, process: int, told: socket.socket, stdout: io.TextIOBase, stderr: io.TextIOBase):
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | Any = None  # typeshed's type: not read before the end
        self._process, self._told = process, told

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._told.settimeout(timeout or 1e-6 if timeout is not None else None)
            try:
                data = self._told.recv(16)
            except TimeoutError:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            self.returncode = int(data)
            self._told.close()
            os.close(self._process)
        return int(self.returncode)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        deadline = None if timeout is None else time.monotonic() + timeout
        found: dict[io.TextIOBase, list[bytes]] = {self.stdout: [], self.stderr: []}
        with selectors.DefaultSelector() as selector:
            for stream in found:
                if not stream.closed:
                    selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
                for key, _ in selector.select(left):
                    assert isinstance(key.fileobj, io.TextIOBase)
                    if data := os.read(key.fd, 1 << 16):
                        found[key.fileobj].append(data)
                    else:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
        self.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
        out, err = (b"".join(parts).decode().replace("\r\n", "\n") for parts in found.values())
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stdout.close()
        self.stderr.close()
        self.wait()


StartedCommand = ForkedCommand | subprocess.Popen[str]


def start_command(arguments: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> StartedCommand:
    """Start `council` with these arguments in a new session, without input."""
    read = {name: value for name, value in environ.items() if name.startswith(_READ_AT_START)}
    read.pop("PYTHONPATH", None)  # inherited by the fork: additions extend the loaded modules
    if hasattr(os, "pidfd_open") and read == _USUAL:
        return _server().start(arguments, cwd, environ)
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli.main", *arguments],
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


class _Server:
    """The fork server of a test process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, size, _MAX_REQUEST)
        with theirs:
            # Nothing of the first test: tests search for their paths in processes' environments.
            kept = {name: value for name, value in os.environ.items() if name.startswith(("PATH", *_READ_AT_START))}
            first = subprocess.Popen(
                [sys.executable, "-m", "tests.command_server", str(theirs.fileno())],
                cwd=Path(__file__).parents[1],
                env={**kept, **_USUAL},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # as in the forks: a stream's behaviour depends on the file it was opened on
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        first.wait()  # it detaches the server, which tests must not find among our children
        assert first.stdout
        assert first.stderr
        self._stdout, self._stderr = first.stdout, first.stderr

    def start(self, arguments: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> ForkedCommand:
        """Have a command forked."""
        told, tell = socket.socketpair()
        out, err = os.pipe(), os.pipe()
        request = json.dumps({"arguments": list(arguments), "cwd": str(cwd), "environ": dict(environ)}).encode()
        with tell:
            socket.send_fds(self._socket, [request], [out[1], err[1], tell.fileno()])
        os.close(out[1])
        os.close(err[1])
        data, received, _, _ = socket.recv_fds(told, 16, 1)
        if not data:
            raise RuntimeError(self._stderr.read().decode())
        (process,) = received
        return ForkedCommand(int(data), process, told, os.fdopen(out[0]), os.fdopen(err[0]))

    def close(self) -> None:
        """End the server; running commands continue."""
        for one in (self._socket, self._stdout, self._stderr):
            one.close()


def _serve(ours: socket.socket) -> list[str] | None:
    """Fork a process for each request; return the command's arguments in the fork, None in the server at its end."""
    with selectors.DefaultSelector() as selector:
        selector.register(ours, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not ours:
                    _tell_end(selector, key)
                    continue
                data, fds, _, _ = socket.recv_fds(ours, _MAX_REQUEST, 3)
                if not data:
                    return None
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    ours.close()
                    return _become(json.loads(data), fds)
                process = os.pidfd_open(pid)
                tell = socket.socket(fileno=fds.pop())
                for fd in fds:
                    os.close(fd)
                socket.send_fds(tell, [b"%d" % pid], [process])
                selector.register(process, selectors.EVENT_READ, (pid, tell))


def _tell_end(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    pid, tell = key.data
    selector.unregister(key.fd)
    os.close(key.fd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with tell, contextlib.suppress(BrokenPipeError):
        tell.send(b"%d" % code)


def _become(request: Mapping[str, Any], fds: Sequence[int]) -> list[str]:
    """Set this process up like a new one for a request; return the command's arguments."""
    os.setsid()
    for number, fd in enumerate(fds[:2], start=1):
        os.dup2(fd, number)
    for fd in fds:
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    time.tzset()
    added = os.environ.get("PYTHONPATH", "")
    sys.path[:1] = [request["cwd"], *filter(None, added.split(os.pathsep))]
    arm(os.environ.get("COUNCIL_FAILPOINTS", ""))
    if failing := os.environ.get("COUNCIL_TEST_FAILING_CALL"):
        fail_file_store(*failing.split(" ", 1))
    return list(request["arguments"])


def _import_all() -> None:
    anyio.run(anyio.sleep, 0)  # lazy imports
    for package in (orchestrator, adapters):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith(_NOT_IMPORTED):
                importlib.import_module(module.name)
    _complete(pydantic.BaseModel)


def _complete(model: type[pydantic.BaseModel]) -> None:
    """Build the parts of derived models that are created on first use."""
    for derived in model.__subclasses__():
        if derived.__module__.startswith(("orchestrator.", "adapters.")):
            derived.model_rebuild()
        _complete(derived)


def _end(run: Callable[..., Any], arguments: Sequence[str]) -> NoReturn:
    """Run a command and exit like an interpreter, but without the slow teardown of modules."""
    code: Any = 1
    try:
        run(arguments, prog_name="council")
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    threading._shutdown()  # type: ignore[attr-defined]  # called by the interpreter
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    _import_all()
    gc.freeze()  # objects outside of garbage collection stay shared with forks
    if (given := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        _end(main, given)
