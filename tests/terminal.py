"""A program on a pseudo-terminal, and its screen."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte

# Makes this the controlling terminal, so that keys and resizes are delivered as signals.
_ON_TERMINAL = """
import fcntl, os, signal, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Terminal:
    """`council` with arguments on its own terminal; `nohup` makes it ignore hangups."""

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        environ: Mapping[str, str],
        *,
        columns: int = 110,
        rows: int = 30,
        nohup: bool = False,
    ) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self._master, slave = os.openpty()
        self._set_size(columns, rows)
        wrapper = [sys.executable, "-S", "-c", _ON_TERMINAL, "nohup" if nohup else ""]
        self._child = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "orchestrator.cli.main", *arguments],
            cwd=cwd,
            env={"TERM": "xterm-256color", **environ},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)

    @property
    def text(self) -> str:
        """Return the current screen."""
        self._take()
        return "\n".join(line.rstrip() for line in self._screen.display)

    @property
    def is_running(self) -> bool:
        """Return whether the program runs."""
        return self._child.poll() is None

    @property
    def cursor_is_shown(self) -> bool:
        """Return whether the cursor is visible."""
        return not self._screen.cursor.hidden

    @property
    def title(self) -> str:
        """Return the title of the terminal."""
        return str(self._screen.title)

    def row(self, beginning: str) -> str:
        """Return the first line with this prefix, or an empty text."""
        return next((line for line in self.text.splitlines() if line.startswith(beginning)), "")

    def resize(self, columns: int, rows: int) -> None:
        """Resize the window."""
        self._take()
        self._screen.resize(rows, columns)
        self._set_size(columns, rows)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def send_signal(self, number: int) -> None:
        """Send a signal to the program."""
        self._child.send_signal(number)

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self._master)
        self._master = -1

    def wait(self, limit: float = 60.0) -> int:
        """Read until the program ends and return its exit code."""
        deadline = time.monotonic() + limit
        while self._child.poll() is None:
            assert time.monotonic() < deadline, f"the program does not end: {self.text}"
            self._take(0.05)
            time.sleep(0.01)
        self._take()
        return self._child.returncode

    def close(self) -> None:
        """End all remaining processes."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGKILL)
            self._child.wait()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _take(self, pause: float = 0.0) -> None:
        """Process all pending output."""
        while self._master >= 0 and select.select([self._master], [], [], pause)[0]:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # the program ended
                return
            if not data:
                return
            self.raw += data
            self._stream.feed(data)
            pause = 0.0
