"""Capture a CLI's output in a file, with a size limit and redacted secrets.

The supervisor imports this in every session: keep imports few and within the standard library.
"""

from __future__ import annotations

import os

from orchestrator.sessions.supervision.redaction import StreamRedactor, unsafe_prefix_length

CHUNK_BYTES = 1 << 16
TAIL_BYTES = 1 << 20


class OutputCapture:
    """An output stream: the first `cap` bytes, then the tail.

    The first `cap` bytes are written immediately. With `redact`, a pattern as for StreamRedactor, secrets are replaced,
    whole lines are written, and nothing that may be part of a secret is kept next to the omitted bytes.
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
        """Read a chunk; return its size, 0 at the end, or None if nothing is available."""
        try:
            data = os.read(self.read_end, CHUNK_BYTES)
        except BlockingIOError:
            return None
        self.total += len(data)
        head = data[: self._room]
        self._room -= len(head)
        self._write(head if self._redactor is None else self._redactor.feed(head))
        self._tail += data[len(head) :]
        # Truncate at twice the limit: truncating for each chunk would move a megabyte each time.
        if len(self._tail) > 2 * TAIL_BYTES:
            self._cut_tail(len(self._tail) - TAIL_BYTES)
        return len(data)

    def finish(self) -> None:
        """Drain the pipe after all writers have ended, and append the tail to the file."""
        # An unrelated process that inherited the pipe may write forever.
        drained = 0
        while drained < TAIL_BYTES and (size := self.pump()):
            drained += size
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
        # A full disk must not end the supervision: the CLI continues, and its output is counted but lost.
        view = memoryview(data)
        while view and self.error is None:
            try:
                view = view[os.write(self._file, view) :]
            except OSError as exc:
                self.error = exc.strerror
