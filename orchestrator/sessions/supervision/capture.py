"""What a CLI says goes from a pipe to a file: bounded, and without secrets.

Imported in every session by the supervisor: only the standard library, and little of it.
"""

from __future__ import annotations

import os

from orchestrator.sessions.supervision.redaction import StreamRedactor, unsafe_prefix_length

CHUNK_BYTES = 1 << 16
TAIL_BYTES = 1 << 20


class OutputCapture:
    """One output of the CLI: the first `cap` bytes go to the file as they come, of the rest the tail is kept.

    With `redact`, a pattern as for Redactor, secrets are replaced, whole lines are written, and next to the
    bytes that are left out nothing is kept that may be half a secret.
    """

    def __init__(self, path: str, cap: int, redact: str | None) -> None:
        self._redactor = None if redact is None else StreamRedactor(redact)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)
        self._room = cap
        self._tail = bytearray()
        self._left_out = 0
        self.total = 0
        self.error: str | None = None
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)

    def pump(self) -> int | None:
        """Take a chunk of what is readable now: its size, 0 at the end, None if there is nothing yet."""
        try:
            data = os.read(self.read_end, CHUNK_BYTES)
        except BlockingIOError:
            return None
        self.total += len(data)
        head = data[: self._room]
        self._room -= len(head)
        self._write(head if self._redactor is None else self._redactor.feed(head))
        self._tail += data[len(head) :]
        # Cut only when there is twice too much: a cut at each chunk would move the megabyte each time.
        if len(self._tail) > 2 * TAIL_BYTES:
            self._cut_tail(len(self._tail) - TAIL_BYTES)
        return len(data)

    def finish(self) -> None:
        """Drain the pipe, which no descendant writes to any more, and put the tail behind the head."""
        # A pipe that was handed to a stranger may never run dry.
        taken = 0
        while taken < TAIL_BYTES and (size := self.pump()):
            taken += size
        self._cut_tail(max(0, len(self._tail) - TAIL_BYTES))
        if self._left_out:
            if self._redactor is not None:
                self._cut_tail(unsafe_prefix_length(bytes(self._tail)))
                self._left_out += self._redactor.drop()
            self._write(b"\n[\xe2\x80\xa6 %d bytes left out \xe2\x80\xa6]\n" % self._left_out)
        tail = bytes(self._tail)
        self._write(tail if self._redactor is None else self._redactor.feed(tail) + self._redactor.flush())
        os.close(self._file)

    def _cut_tail(self, surplus: int) -> None:
        self._left_out += surplus
        del self._tail[:surplus]

    def _write(self, data: bytes) -> None:
        # A full disk must not end the supervision: the CLI goes on, what it says is counted but lost.
        view = memoryview(data)
        while view and self.error is None:
            try:
                view = view[os.write(self._file, view) :]
            except OSError as exc:
                self.error = exc.strerror
