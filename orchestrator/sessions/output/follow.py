"""What a program says while it is at work, from the file that holds its standard output so far."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from orchestrator.protocols import Adapter, SessionEvent
from orchestrator.sessions.output.log_files import TAIL_BYTES
from orchestrator.sessions.output.transcript import parse_lines

#: Bytes that are read in one go.
_CHUNK = 1 << 22


class OutputFollower:
    """Reads on in a file of standard output, line by line; with `newest_only`, of much only the last 64 KiB."""

    def __init__(self, adapter: Adapter, file: Path, *, newest_only: bool = False) -> None:
        self._adapter, self._file, self._newest_only = adapter, file, newest_only
        self.at = 0
        """How many bytes were read."""

    def read(self) -> list[SessionEvent] | None:
        """Return what the whole lines mean that came since the last look; None where none did. Blocks."""
        try:
            with self._file.open("rb") as stream:
                size = stream.seek(0, 2)
                begin = stream.seek(max(self.at, size - TAIL_BYTES) if self._newest_only else self.at)
                data = stream.read(min(size - begin, _CHUNK))
        except OSError:  # there is none yet
            return None
        if begin > self.at:  # perhaps in the middle of a line
            cut = data.find(b"\n") + 1
            begin, data = begin + cut, data[cut:]
        end = data.rfind(b"\n")
        if end < 0:
            # A line that is longer than any that means something.
            self.at += len(data) if len(data) == _CHUNK else 0
            return None
        self.at = begin + end + 1
        events: list[SessionEvent] = []
        for line in data[:end].split(b"\n"):
            with suppress(Exception):  # a mistake of a plugin's must not end what only looks
                events += parse_lines(self._adapter, [line])
        return events
