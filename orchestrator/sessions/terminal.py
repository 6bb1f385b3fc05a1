"""The user's terminal, on which the program of an attached session runs."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
import anyio.to_thread

_CHUNK_BYTES: Final = 1 << 16
#: Undoes the modes that a killed program leaves: the second screen, a hidden cursor, mouse reports, bracketed paste.
_RESET: Final = b"\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[0m\r\n"


class UserTerminal:
    """Connects the user's terminal to a pseudo-terminal of the program.

    The program gets a terminal of its own, because a sandboxed program could otherwise type on the user's terminal.
    """

    def __init__(self, is_complete: Callable[[], Awaitable[bool]]) -> None:
        """Use the terminal of this process; `is_complete` asks the user whether the work may land."""
        self.is_complete = is_complete
        self._stdin, self._stdout = 0, 1

    @asynccontextmanager
    async def open(self, on_hangup: Callable[[], None]) -> AsyncIterator[str]:
        """Yield the path of the program's terminal; `on_hangup` is called when the user's terminal is closed."""
        ours, theirs = os.openpty()
        before = termios.tcgetattr(self._stdin)
        try:
            os.set_blocking(ours, False)
            self._copy_size(ours)
            tty.setraw(self._stdin)
            async with anyio.create_task_group() as group:
                group.start_soon(self._follow_size, ours)
                group.start_soon(self._copy_input, ours, on_hangup)
                # A stopped program may still write, and must not wait for us.
                copying = anyio.CancelScope(shield=True)
                group.start_soon(self._copy_output, ours, copying)
                try:
                    yield os.ttyname(theirs)
                finally:
                    copying.cancel()
                    group.cancel_scope.cancel()
            with anyio.move_on_after(1, shield=True):  # the last output of the program
                await self._write_available(ours)
        finally:
            with suppress(termios.error):  # the terminal is closed
                termios.tcsetattr(self._stdin, termios.TCSAFLUSH, before)
            os.close(ours)
            os.close(theirs)

    async def reset(self) -> None:
        """Undo the modes that a program left which was killed."""
        with suppress(OSError):
            await self._show(_RESET)

    def _copy_size(self, ours: int) -> None:
        with suppress(termios.error):
            termios.tcsetwinsize(ours, termios.tcgetwinsize(self._stdin))

    async def _follow_size(self, ours: int) -> None:
        with anyio.open_signal_receiver(signal.SIGWINCH) as resized:
            async for _ in resized:
                self._copy_size(ours)

    async def _copy_input(self, ours: int, on_hangup: Callable[[], None]) -> None:
        with suppress(OSError):
            while True:
                await anyio.wait_readable(self._stdin)
                data = os.read(self._stdin, _CHUNK_BYTES)
                if not data:
                    break
                while data:
                    await anyio.wait_writable(ours)
                    data = data[os.write(ours, data) :]
        on_hangup()

    async def _copy_output(self, ours: int, copying: anyio.CancelScope) -> None:
        with copying:
            while True:
                await anyio.wait_readable(ours)
                await self._write_available(ours)

    async def _write_available(self, ours: int) -> None:
        with suppress(BlockingIOError):
            while True:
                data = os.read(ours, _CHUNK_BYTES)
                with suppress(OSError):  # the user's terminal is closed; the program must not wait for it
                    await self._show(data)

    async def _show(self, data: bytes) -> None:
        # In a thread: a user may pause the output of the terminal.
        while data:
            written = await anyio.to_thread.run_sync(os.write, self._stdout, data, abandon_on_cancel=True)
            data = data[written:]
