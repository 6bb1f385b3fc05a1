"""Secrets are taken out of a stream of bytes before it is written anywhere.

Imported in every session by the supervisor: only the standard library, and little of it.
"""

from __future__ import annotations

import re

REDACTED = b"[redacted]"
MAX_HELD_BYTES = 4 << 10  # of an unfinished line; the longest secret that is surely found where a line is longer
MAX_KEY_BYTES = 16 << 10  # the longest private key: RSA with 16384 bits takes 12.8 KiB
_CONTEXT_BYTES = 64  # before the bytes in question, for a pattern that looks behind
_MARK_BYTES = 64  # the longest part of a key's last line that may have come alone

_KEY_BEGIN = re.compile(rb"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----")
_KEY_END = re.compile(rb"-----END [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----")
_WORD = re.compile(rb"[A-Za-z0-9+/=_.~%-]*")


class StreamRedactor:
    """Replaces what `pattern`, the ASCII source of an expression for bytes, finds, and private keys.

    Give it the bytes as they come: it keeps back an unfinished line, at most HOLD_BYTES of it, so that a secret
    is found however it arrives. A match that is longer is replaced all the same, and so is the rest of its
    word. From the first line of a private key to its last line, or KEY_BYTES further, all is left out. Raises
    `re.error` for a pattern that is none.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern.encode("ascii"))
        self._bytes = b""
        self._next = 0  # in `_bytes`; what is before has been given out and is context
        self._key_left = 0  # bytes in which the end of a private key may come
        self._in_word = False

    def feed(self, data: bytes) -> bytes:
        """Return what may be written now."""
        # Most of what arrives byte by byte is not worth a search.
        if b"\n" not in data and len(self._bytes) - self._next + len(data) <= MAX_HELD_BYTES and not self._key_left:
            self._bytes += data
            return b""
        return self._search(data, last=False)

    def flush(self) -> bytes:
        """Return the rest at the end of the stream."""
        return self._search(b"", last=True)

    def drop(self) -> int:
        """Forget what is kept back, because what comes next is left out; return how many bytes."""
        dropped = len(self._bytes) - self._next
        self._bytes, self._next, self._key_left, self._in_word = b"", 0, 0, False
        return dropped

    def _search(self, data: bytes, *, last: bool) -> bytes:
        self._bytes += data
        given: list[bytes] = []
        while self._pass_over():
            begin = _KEY_BEGIN.search(self._bytes, self._next)
            if begin is None:
                self._replace(given, len(self._bytes) if last else self._cut(), len(self._bytes))
                break
            self._replace(given, begin.start(), begin.start())
            given.append(REDACTED)
            self._next, self._key_left, self._in_word = begin.end(), MAX_KEY_BYTES, False
        done = max(0, self._next - _CONTEXT_BYTES)
        self._bytes = self._bytes[done:]
        self._next -= done
        return b"".join(given)

    def _pass_over(self) -> bool:
        """Leave out what goes on with a secret; False if it takes all there is."""
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
                passed = max(0, min(len(self._bytes) - _MARK_BYTES, limit) - self._next)
                self._next += passed
                self._key_left = max(1, self._key_left - passed)
                return False
        return self._next < len(self._bytes)

    def _cut(self) -> int:
        """Return where the bytes end that can be given out: after the last whole line, or later in a long one."""
        line = self._bytes.rfind(b"\n", self._next) + 1
        return max(self._next, line, len(self._bytes) - MAX_HELD_BYTES)

    def _replace(self, given: list[bytes], cut: int, end: int) -> None:
        """Give out what is before `cut`, without what is found; matches may reach to `end`."""
        for match in self._pattern.finditer(self._bytes, self._next, end):
            if match.start() >= cut:
                break
            if match.end() > cut and end - match.start() <= MAX_HELD_BYTES:
                cut = match.start()
                break
            if match.start() == match.end():
                continue
            given += (self._bytes[self._next : match.start()], REDACTED)
            self._next = match.end()
            cut = max(cut, self._next)
            self._in_word = self._next == len(self._bytes)
        if self._next < cut:
            given.append(self._bytes[self._next : cut])
            self._next = cut
            self._in_word = False


def unsafe_prefix_length(data: bytes) -> int:
    """Return how many of the bytes that follow a gap may be the rest of a secret.

    Those up to the first whole line, at most HOLD_BYTES, and the rest of a private key.
    """
    line = data.find(b"\n", 0, MAX_HELD_BYTES)
    rest = min(len(data), MAX_HELD_BYTES) if line < 0 else line + 1
    end = _KEY_END.search(data, 0, MAX_KEY_BYTES + _MARK_BYTES)
    if end is not None and _KEY_BEGIN.search(data, 0, end.start()) is None:
        rest = max(rest, end.end())
    return rest
