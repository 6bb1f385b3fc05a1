"""Capture a CLI's output in a file, with a size limit and redacted secrets.

The supervisor imports this in every session: keep imports few and within the standard library.
"""

from __future__ import annotations

import os
import re

CHUNK_BYTES = 1 << 16
TAIL_BYTES = 1 << 20

REDACTED = b"[redacted]"
MAX_HELD_BYTES = 4 << 10  # of an incomplete line; the longest secret that is always found in a longer line
MAX_KEY_BYTES = 16 << 10  # the longest private key: RSA with 16384 bits takes 12.8 KiB
_CONTEXT_BYTES = 64  # before the searched bytes, for patterns with lookbehind
_MARK_BYTES = 64  # the longest partial last line of a key

_KEY_BEGIN = re.compile(rb"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----")
_KEY_END = re.compile(rb"-----END [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----")
_WORD = re.compile(rb"[A-Za-z0-9+/=_.~%-]*")


class StreamRedactor:
    """Replaces private keys and matches of `pattern`.

    `pattern` is the ASCII source of a bytes expression. Accepts bytes in chunks of any size, and holds back an
    incomplete line of at most MAX_HELD_BYTES so that secrets are found across chunks. A longer match is also replaced,
    with the rest of its word. A private key is omitted from its first to its last line, at most MAX_KEY_BYTES. Raises
    `re.error` for an invalid pattern.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern.encode("ascii"))
        self._bytes = b""
        self._next = 0  # in `_bytes`; the bytes before it were returned and are context
        self._key_left = 0  # bytes in which the end of a private key may follow
        self._in_word = False

    def feed(self, data: bytes) -> bytes:
        """Add bytes; return the bytes that can now be written."""
        # Most chunks of a few bytes are not worth a search.
        if b"\n" not in data and len(self._bytes) - self._next + len(data) <= MAX_HELD_BYTES and not self._key_left:
            self._bytes += data
            return b""
        return self._search(data, last=False)

    def flush(self) -> bytes:
        """Return the rest at the end of the stream."""
        return self._search(b"", last=True)

    def drop(self) -> int:
        """Drop the held bytes, as later ones are omitted; return their number."""
        dropped = len(self._bytes) - self._next
        self._bytes, self._next, self._key_left, self._in_word = b"", 0, 0, False
        return dropped

    def _search(self, data: bytes, *, last: bool) -> bytes:
        self._bytes += data
        output: list[bytes] = []
        while self._skip_secret():
            begin = _KEY_BEGIN.search(self._bytes, self._next)
            if begin is None:
                self._replace(output, len(self._bytes) if last else self._cut(), len(self._bytes))
                break
            self._replace(output, begin.start(), begin.start())
            output.append(REDACTED)
            self._next, self._key_left, self._in_word = begin.end(), MAX_KEY_BYTES, False
        done = max(0, self._next - _CONTEXT_BYTES)
        self._bytes = self._bytes[done:]
        self._next -= done
        return b"".join(output)

    def _skip_secret(self) -> bool:
        """Skip the continuation of a secret; return False if no bytes are left."""
        if self._in_word and (word := _WORD.match(self._bytes, self._next)):
            self._next = word.end()
            self._in_word = self._next == len(self._bytes)
        if self._key_left:
            limit = self._next + self._key_left
            if end := _KEY_END.search(self._bytes, self._next, limit + _MARK_BYTES):
                self._next, self._key_left = end.end(), 0
            elif len(self._bytes) >= limit + _MARK_BYTES:
                self._next, self._key_left = limit, 0
            else:
                skipped = max(0, min(len(self._bytes) - _MARK_BYTES, limit) - self._next)
                self._next += skipped
                self._key_left = max(1, self._key_left - skipped)
                return False
        return self._next < len(self._bytes)

    def _cut(self) -> int:
        """Return the end of the writable bytes: the last whole line, or within a long one."""
        line = self._bytes.rfind(b"\n", self._next) + 1
        return max(self._next, line, len(self._bytes) - MAX_HELD_BYTES)

    def _replace(self, output: list[bytes], cut: int, end: int) -> None:
        """Output the bytes before `cut` with matches, which may extend to `end`, replaced."""
        for match in self._pattern.finditer(self._bytes, self._next, end):
            if match.start() >= cut:
                break
            if match.end() > cut and end - match.start() <= MAX_HELD_BYTES:
                cut = match.start()
                break
            if match.start() == match.end():
                continue
            output += (self._bytes[self._next : match.start()], REDACTED)
            self._next = match.end()
            cut = max(cut, self._next)
            self._in_word = self._next == len(self._bytes)
        if self._next < cut:
            output.append(self._bytes[self._next : cut])
            self._next = cut
            self._in_word = False


def unsafe_prefix_length(data: bytes) -> int:
    """Return the number of bytes after a gap that may be the rest of a secret.

    These are the bytes up to the first whole line, at most MAX_HELD_BYTES, and the rest of a private key.
    """
    line = data.find(b"\n", 0, MAX_HELD_BYTES)
    rest = min(len(data), MAX_HELD_BYTES) if line < 0 else line + 1
    end = _KEY_END.search(data, 0, MAX_KEY_BYTES + _MARK_BYTES)
    if end is not None and _KEY_BEGIN.search(data, 0, end.start()) is None:
        rest = max(rest, end.end())
    return rest


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
