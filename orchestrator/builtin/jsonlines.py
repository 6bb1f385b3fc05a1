"""The sink that appends each event to a file as a line of JSON.

A line has `position`, `time`, `event` and the event's fields. Configuration:

    sinks:
      log:
        use: jsonlines
        file: council.jsonl
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BufferedRandom
from typing import ClassVar, Self

import anyio.to_thread
import pluggy
from pydantic import BaseModel, ConfigDict
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterSink
from orchestrator.protocols import PathOption, RecordedEvent
from orchestrator.system.file_lock import lock_descriptor

#: Seconds to wait for the file's lock, and between two attempts.
LOCK_TIMEOUT = 10.0
_LOCK_PAUSE = 0.01

_BEGIN = b'{"position":'

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


class JsonLinesOptions(BaseModel):
    """The options of a sink with `use: jsonlines`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    file: PathOption
    """The file to append to, relative to this one; created if missing, accessible by its owner alone."""


class JsonLinesSink:
    """A sink that appends each event to a file durably and exactly once.

    Events already in the file are skipped. Several runs may share a file: each reads the new lines of the others under
    a lock first.
    """

    Options: ClassVar[type[BaseModel]] = JsonLinesOptions

    def __init__(self, options: JsonLinesOptions, /) -> None:
        """Set up the sink. The folder of the file may be created later."""
        self._path = options.file
        self._seen = 0
        """The number of bytes that have been read."""
        self._last: dict[str, tuple[int, int]] = {}
        """The newest position in the file, and the number of its events there, by run."""

    async def __aenter__(self) -> Self:
        """Open nothing: each batch opens the file by its path, so that it can be rotated."""
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Close nothing."""

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Append the events that are missing in the file; after an OSError none was added."""
        await anyio.to_thread.run_sync(self._append, events, abandon_on_cancel=True)

    def _append(self, events: Sequence[RecordedEvent]) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "a+b") as file:
            self._lock(file)
            self._read_new_lines(file)
            end = os.fstat(file.fileno()).st_size
            try:
                file.write(b"".join(self._missing(events)))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise

    def _lock(self, file: BufferedRandom) -> None:
        """Lock the file. Raises TimeoutError, because a waiting thread can't be cancelled."""
        attempts = Retrying(
            retry=retry_if_result(lambda is_taken: not is_taken),
            wait=wait_fixed(_LOCK_PAUSE),
            stop=stop_after_delay(LOCK_TIMEOUT),
        )
        try:
            attempts(lock_descriptor, file.fileno(), block=False)
        except RetryError:
            raise TimeoutError(f"another process keeps {self._path} locked") from None

    def _read_new_lines(self, file: BufferedRandom) -> None:
        """Read the lines added since the last call, and remove an incomplete last line."""
        if os.fstat(file.fileno()).st_size < self._seen:  # the file was truncated
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
                line += b"\n"  # noqa: PLW2901  the line as it is in the file now
            self._seen += len(line)

    def _count(self, line: bytes) -> None:
        try:
            value = json.loads(line)
            run, position = str(value["run"]), int(value["position"])
        except (ValueError, TypeError, KeyError):  # a line of another program
            return
        newest, times = self._last.get(run, (0, 0))
        if position >= newest:
            self._last[run] = (position, times + 1 if position == newest else 1)

    def _missing(self, events: Sequence[RecordedEvent]) -> Iterator[bytes]:
        """Yield the lines that are not in the file; events of one position come together."""
        times: Counter[tuple[str, int]] = Counter()
        for recorded in events:
            run = str(recorded.event.data.get("run"))
            if (recorded.position, times[run, recorded.position]) >= self._last.get(run, (0, 0)):
                yield _line(recorded)
            times[run, recorded.position] += 1


def _line(recorded: RecordedEvent) -> bytes:
    value = {"position": recorded.position, "time": recorded.time, "event": recorded.event.type, **recorded.event.data}
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


@hookimpl
def council_register_sinks(register: RegisterSink) -> None:
    """Register `use: jsonlines`."""
    register("jsonlines", JsonLinesSink)
