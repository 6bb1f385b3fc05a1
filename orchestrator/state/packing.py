"""Closed segments in a fraction of their size: Zstandard frames (RFC 8878), which `zstdcat` reads.

Before all stands a skippable frame with what the content was and the CRC-32 of all that follows, so that it can
be told without unpacking whether a segment still holds what it held. The content is packed in parts, each behind a
skippable frame with its length and its CRC-32: damage takes one part along, not the rest.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_MAGIC: Final = 0x184D2A50
_WHOLE: Final = struct.Struct("<IIQII")  # magic and length of a skippable frame, then its content
_PART: Final = struct.Struct("<IIII")
_MARK: Final = struct.pack("<II", _MAGIC, _PART.size - 8)
_PART_BYTES: Final = 1 << 20
_LEVEL: Final = 9


class Sum(NamedTuple):
    """What some bytes were when they were read or written: how many, and their CRC-32."""

    size: int
    crc: int


def pack(data: bytes) -> bytes:
    """Return the packed form."""
    import zstandard  # noqa: PLC0415  most processes never pack or unpack

    packer, parts = zstandard.ZstdCompressor(level=_LEVEL), []
    for start in range(0, len(data), _PART_BYTES):
        frame = packer.compress(data[start : start + _PART_BYTES])
        parts += [_PART.pack(_MAGIC, _PART.size - 8, len(frame), zlib.crc32(frame)), frame]
    packed = b"".join(parts)
    return _WHOLE.pack(_MAGIC, _WHOLE.size - 8, len(data), zlib.crc32(data), zlib.crc32(packed)) + packed


def unpack(packed: bytes) -> bytes:
    """Return what was packed, without the parts that are damaged."""
    import zstandard  # noqa: PLC0415

    unpacker = zstandard.ZstdDecompressor()
    return b"".join(unpacker.decompress(frame) for frame in _frames(packed))


def sum_of(packed: bytes) -> Sum | None:
    """Return the sum of what was packed; None if these are not the bytes that it was packed to."""
    if len(packed) < _WHOLE.size:
        return None
    magic, length, size, crc, packed_crc = _WHOLE.unpack_from(packed)
    is_whole = zlib.crc32(memoryview(packed)[_WHOLE.size :]) == packed_crc
    return Sum(size, crc) if is_whole and (magic, length) == (_MAGIC, _WHOLE.size - 8) else None


def _frames(packed: bytes) -> Iterator[bytes]:
    """Yield the frames that are what they were."""
    offset = packed.find(_MARK)
    while 0 <= offset <= len(packed) - _PART.size:
        _, _, length, crc = _PART.unpack_from(packed, offset)
        frame = packed[offset + _PART.size : offset + _PART.size + length]
        is_good = len(frame) == length and zlib.crc32(frame) == crc
        if is_good:
            yield frame
        offset = packed.find(_MARK, offset + (_PART.size + length if is_good else 1))


class Source:
    """The content of a segment, packed or not."""

    def __init__(self, path: Path) -> None:
        """Open it; OSError if it is not there."""
        self._file = path.open("rb", buffering=0)
        self._content: bytes | None = None
        if path.suffix == ".zst":
            with self._file:
                self._content = unpack(self._file.readall())

    def size(self) -> int:
        """Return how many bytes there are by now."""
        return len(self._content) if self._content is not None else os.fstat(self._file.fileno()).st_size

    def read(self, size: int, offset: int) -> bytes:
        """Return so many bytes from an offset on, or all that there are."""
        if self._content is not None:
            return self._content[offset : offset + size]
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        """Give it back."""
        self._file.close()
