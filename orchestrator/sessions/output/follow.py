"""Follow the output file of a running program."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from orchestrator.errors import PluginFailed, plugin_code
from orchestrator.protocols import Adapter, SessionEvent
from orchestrator.sessions.output.log_files import TAIL_BYTES
from orchestrator.sessions.output.transcript import parse_lines

#: Bytes per read.
_CHUNK = 1 << 22


class OutputFollower:
    """Reads new lines of a file; with `newest_only`, starts in the last 64 KiB."""

    def __init__(self, adapter: Adapter, file: Path, *, newest_only: bool = False) -> None:
        self._adapter, self._file, self._newest_only = adapter, file, newest_only
        self.at = 0
        """The position in the file, in bytes."""

    def read(self) -> list[SessionEvent] | None:
        """Return the events of new whole lines; None without new lines. Blocks."""
        try:
            with self._file.open("rb") as stream:
                size = stream.seek(0, 2)
                begin = stream.seek(max(self.at, size - TAIL_BYTES) if self._newest_only else self.at)
                data = stream.read(min(size - begin, _CHUNK))
        except OSError:  # the file does not exist yet
            return None
        if begin > self.at:  # possibly in the middle of a line
            cut = data.find(b"\n") + 1
            begin, data = begin + cut, data[cut:]
        end = data.rfind(b"\n")
        if end < 0:
            # Skip a line that is longer than the limit of the parser.
            self.at += len(data) if len(data) == _CHUNK else 0
            return None
        self.at = begin + end + 1
        events: list[SessionEvent] = []
        for line in data[:end].split(b"\n"):
            with suppress(PluginFailed), plugin_code():  # a plugin error must not break a viewer
                events += parse_lines(self._adapter, [line])
        return events
