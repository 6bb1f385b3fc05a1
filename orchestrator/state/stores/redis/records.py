"""The encoding of commits and documents on the server, which `commit.lua` shares.

Each text follows its checksum: its SHA-1 as hexadecimal digits, which scripts can compute. A document is
`VERSION POSITION TIME EXPIRES BY`, a newline, and its value (empty if deleted). A commit is a header, a newline and a
payload, with a checksum each, as in the log of the file store.
"""

from __future__ import annotations

import hashlib
from typing import Final

import orjson

from orchestrator.protocols import Key
from orchestrator.state.log.codec import LogLine, decode_header, encode_header
from orchestrator.state.log.table import TableEntry

_DIGEST: Final = 40
_NEVER: Final = b"-"

UNREADABLE: Final = TableEntry(0, None, 0, damaged=True)
"""The entry of a document of which nothing is readable."""


def _seal(text: bytes) -> bytes:
    return hashlib.sha1(text, usedforsecurity=False).hexdigest().encode() + text


def _unseal(sealed: bytes) -> bytes:
    """Return text without its checksum, or nothing if they don't match."""
    text = sealed[_DIGEST:]
    return text if _seal(text) == sealed else b""


def encode_key(key: Key) -> bytes:
    """Return the field name of a document."""
    return orjson.dumps([*key])


def decode_key(name: bytes) -> Key:
    """Return the key of a field name."""
    return Key(*orjson.loads(name))


def decode_entry(stored: bytes) -> TableEntry:
    """Return the entry of a document; `UNREADABLE` if it is damaged."""
    head, _, value = _unseal(stored).partition(b"\n")
    if not head:
        return UNREADABLE
    version, position, time, expires, by = head.split(b" ", 4)
    until = None if expires == _NEVER else float(expires)
    return TableEntry(int(version), value or None, int(position), False, float(time), orjson.loads(by), until)


def encode_entry(entry: TableEntry) -> bytes:
    """Return an entry as `commit.lua` writes it."""
    expires = _NEVER if entry.expires is None else repr(float(entry.expires)).encode()
    time, by = repr(float(entry.time)).encode(), orjson.dumps(entry.writer)
    return _seal(b"%d %d %b %b %b\n%b" % (entry.version, entry.position, time, expires, by, entry.value or b""))


def encode_record(line: LogLine) -> bytes:
    """Return an undamaged commit as `commit.lua` writes it."""
    return _seal(encode_header(line)) + b"\n" + _seal(line.payload)


def decode_record(position: int, record: bytes) -> LogLine | None:
    """Return the commit at a position; None if it is unreadable.

    If only its payload is damaged, it has no payload.
    """
    head, _, payload = record.partition(b"\n")
    header = _unseal(head)
    line = decode_header(header, _unseal(payload)) if header else None
    return line if line and line.position == position else None
