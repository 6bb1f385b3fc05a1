"""A file with one JSON object a line for each event: `position`, `time`, `event`, and the event's own fields.

sinks:
  log:
    use: jsonlines
    file: council.jsonl
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BufferedRandom
from typing import ClassVar, Self

import anyio.to_thread
import pluggy
from pydantic import BaseModel, ConfigDict

from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterSink
from orchestrator.protocols import PathOption, RecordedEvent

#: Seconds to wait for the file's lock, and between two looks.
LOCK_TIMEOUT = 10.0
_LOCK_PAUSE = 0.01

_BEGIN = b'{"position":'

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


class JsonLinesOptions(BaseModel):
    """What stands under a sink that says `use: jsonlines`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    file: PathOption
    """The file that the lines are added to, relative to this one; made if it does not exist, for its owner alone."""


class JsonLinesSink:
    """Adds lines to a file, durably, each once: what is in the file already is not written again.

    Several runs may share a file: each looks under a lock what was added meanwhile.
    """

    Options: ClassVar[type[BaseModel]] = JsonLinesOptions

    def __init__(self, options: JsonLinesOptions, /) -> None:
        """Take the file's path; its folder must exist once there is something to write."""
        self._path = options.file
        self._seen = 0
        """Bytes of the file that were read."""
        self._last: dict[str, tuple[int, int]] = {}
        """By run: the newest position in the file, and how many of its events are there."""

    async def __aenter__(self) -> Self:
        """Open nothing: the file is opened for each batch, wherever it then is."""
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Close nothing."""

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Add the events that are not there yet; raises OSError with none of them added."""
        await anyio.to_thread.run_sync(self._append, events, abandon_on_cancel=True)

    def _append(self, events: Sequence[RecordedEvent]) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "a+b") as file:
            self._lock(file)
            self._read_news(file)
            end = os.fstat(file.fileno()).st_size
            try:
                file.write(b"".join(self._missing(events)))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise

    def _lock(self, file: BufferedRandom) -> None:
        """Lock the file; TimeoutError if somebody else holds it for too long: a thread that waits can't be ended."""
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process keeps {self._path} locked") from None
                time.sleep(_LOCK_PAUSE)

    def _read_news(self, file: BufferedRandom) -> None:
        """Read what was added since the last look, and mend a line of ours that was cut off."""
        if os.fstat(file.fileno()).st_size < self._seen:  # somebody emptied it
            self._seen, self._last = 0, {}
        file.seek(self._seen)
        for line in file:
            if line.endswith(b"\n"):
                self._count(line)
            elif line.startswith(_BEGIN) or _BEGIN.startswith(line):
                file.truncate(self._seen)
                return
            else:
                file.write(b"\n")
                line += b"\n"
            self._seen += len(line)

    def _count(self, line: bytes) -> None:
        try:
            value = json.loads(line)
            run, position = str(value["run"]), int(value["position"])
        except (ValueError, TypeError, KeyError):  # somebody else's
            return
        newest, times = self._last.get(run, (0, 0))
        if position >= newest:
            self._last[run] = (position, times + 1 if position == newest else 1)

    def _missing(self, events: Sequence[RecordedEvent]) -> Iterator[bytes]:
        """Yield the lines that are not in the file; events of one position come together."""
        times: Counter[tuple[str, int]] = Counter()
        for one in events:
            place = str(one.event.data.get("run")), one.position
            if (one.position, times[place]) >= self._last.get(place[0], (0, 0)):
                yield _line(one)
            times[place] += 1


def _line(one: RecordedEvent) -> bytes:
    value = {"position": one.position, "time": one.time, "event": one.event.type, **one.event.data}
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


@hookimpl
def council_register_sinks(register: RegisterSink) -> None:
    """Register `use: jsonlines`."""
    register("jsonlines", JsonLinesSink)
