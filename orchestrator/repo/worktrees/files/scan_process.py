"""Scan all files of a large checkout in a separate process.

In our process, scanning thousands of files would make the event loop and all threads compete for the interpreter lock.
"""

from __future__ import annotations

import io
import pickle
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import anyio
import anyio.to_thread

from orchestrator.system import process

#: The number of files from which a separate process is worth its overhead.
_MIN_FILES: Final = 1_000
#: The working folder of the process, outside all worktrees.
_FOLDER: Final = Path("/")
#: Time limits in seconds: for one scan, after which the process is abandoned, and for the process to exit.
_LIMIT: Final = 120.0
_EXIT_TIMEOUT: Final = 5.0

T = TypeVar("T")


class FileScanner:
    """Runs one scan at a time; created by `open`."""

    def __init__(self) -> None:
        self._lock = anyio.Lock()
        self._process: _Process | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[FileScanner]:
        """Provide a scanner, whose process starts on first use, for the `with` block."""
        scanner = cls()
        try:
            yield scanner
        finally:
            with anyio.CancelScope(shield=True):
                await scanner._end()

    async def run(self, function: Callable[[], T], files: int) -> T:
        """Return the result of a function that scans `files` files.

        The function may be called twice: if the process fails, it runs again in a thread. It must be picklable, and
        need only the standard library and this package.
        """
        if files >= _MIN_FILES:
            async with self._lock:
                try:
                    return cast("T", await self._ask(function))
                except Exception:  # noqa: BLE001  an invalid answer may fail in any way
                    await self._end()
        return await anyio.to_thread.run_sync(function)

    async def _ask(self, function: Callable[[], object]) -> object:
        if self._process is None:
            argv, env = process.internal_program("orchestrator.repo.worktrees.files.scan_worker", "serve")
            self._process = _Process(await process.spawn(argv, env=env, cwd=_FOLDER))
        with process.resumed_if_stopped(self._process.pid), anyio.fail_after(_LIMIT):
            return await anyio.to_thread.run_sync(self._process.ask, function, abandon_on_cancel=True)

    async def _end(self) -> None:
        running, self._process = self._process, None
        if running is not None:
            await anyio.to_thread.run_sync(running.end)


class _Process:
    """Runs `orchestrator.repo.worktrees.files.scan_worker`."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self._output = io.BufferedReader(cast("io.RawIOBase", child.stdout))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def ask(self, function: Callable[[], object]) -> Any:
        """Run `function` in the process and return its result. Blocks.

        Raises an error if the process has exited.
        """
        input_ = cast("io.RawIOBase", self._child.stdin)
        request = memoryview(pickle.dumps(function))
        while request:
            request = request[input_.write(request) or 0 :]
        return pickle.load(self._output)  # noqa: S301  from our own process

    def end(self) -> None:
        """End the process by closing its input, or kill it. Blocks."""
        with suppress(OSError):
            cast("io.RawIOBase", self._child.stdin).close()
        try:
            self._child.wait(_EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._child.kill()
        # Only now, because closing blocks while a thread is reading.
        with suppress(OSError), self._child:
            pass
