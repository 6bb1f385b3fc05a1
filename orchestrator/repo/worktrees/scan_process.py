"""Has what looks at each file of a large checkout done in a process of its own.

In ours, each of thousands of files would be one more turn for all threads, and for the event loop, to wait for.
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

#: From so many files on, it is worth telling another process of them.
_MANY: Final = 1_000
#: The process's own folder, so that it keeps no worktree busy.
_FOLDER: Final = Path("/")
#: Seconds for one thing, after which the process is given up; and for it to end.
_LIMIT: Final = 120.0
_EXIT_TIMEOUT: Final = 5.0

T = TypeVar("T")


class FileScanner:
    """Does one thing after another; made by `open`."""

    def __init__(self) -> None:
        self._turn = anyio.Lock()
        self._process: _Process | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[FileScanner]:
        """Have one for the body; its process is started when it is first needed, and ended with the body."""
        walker = cls()
        try:
            yield walker
        finally:
            with anyio.CancelScope(shield=True):
                await walker._end()

    async def run(self, function: Callable[[], T], files: int) -> T:
        """Return what a function does that looks at so many files.

        It may be called twice: where the process fails, once more in a thread of ours. It consists of what `pickle`
        takes, and needs nothing that is not in the standard library or in this package.
        """
        if files >= _MANY:
            async with self._turn:
                try:
                    return cast("T", await self._ask(function))
                except Exception:
                    await self._end()
        return await anyio.to_thread.run_sync(function)

    async def _ask(self, function: Callable[[], object]) -> object:
        if self._process is None:
            argv, env = process.internal_program("orchestrator.repo.worktrees.scan_worker", "serve")
            self._process = _Process(await process.spawn(argv, env=env, cwd=_FOLDER))
        with anyio.fail_after(_LIMIT):
            return await anyio.to_thread.run_sync(self._process.ask, function, abandon_on_cancel=True)

    async def _end(self) -> None:
        running, self._process = self._process, None
        if running is not None:
            await anyio.to_thread.run_sync(running.end)


class _Process:
    """Runs `orchestrator.repo.worktrees.scan_worker`."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self._answers = io.BufferedReader(cast("io.RawIOBase", child.stdout))

    def ask(self, function: Callable[[], object]) -> Any:
        """Return its answer. Blocks; an error of some kind if it is gone."""
        questions = cast("io.RawIOBase", self._child.stdin)
        question = memoryview(pickle.dumps(function))
        while question:
            question = question[questions.write(question) or 0 :]
        return pickle.load(self._answers)

    def end(self) -> None:
        """End it, which it does with its input, or else is made to. Blocks."""
        with suppress(OSError):
            cast("io.RawIOBase", self._child.stdin).close()
        try:
            self._child.wait(_EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._child.kill()
        # Only now: a thread that still reads from it would keep us waiting.
        with suppress(OSError), self._child:
            pass
