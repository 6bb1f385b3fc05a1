"""Compress closed segments as Zstandard frames (RFC 8878).

They are readable with `zstdcat`. The file starts with a skippable frame that has the checksum of the content and the
CRC-32 of the rest, so that a segment can be verified without unpacking. The content is packed in parts of whole lines,
each preceded by a skippable frame with its lengths, CRC-32 and first position. So damage affects only one part, and
reading a commit unpacks only one part.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from orchestrator import lazy
from orchestrator.state.log.codec import DecodedLine, UnreadableBytes, scan

_MAGIC: Final = 0x184D2A50
_WHOLE: Final = struct.Struct("<IIQII")  # magic and length of a skippable frame, then its content
_PART: Final = struct.Struct("<IIIIIQ")
_MARK: Final = struct.pack("<II", _MAGIC, _PART.size - 8)
_PART_BYTES: Final = 1 << 20
_LEVEL: Final = 9
_NEAR_BYTES: Final = 256 << 10  # bytes to read around a searched line


class Checksum(NamedTuple):
    """The size and CRC-32 of a byte string."""

    size: int
    crc: int


class _Part(NamedTuple):
    """An undamaged part: first position, offset and length, and its frame."""

    first: int
    start: int
    length: int
    frame: memoryview


class Packer:
    """Packs lines of the log incrementally."""

    def __init__(self) -> None:
        """Start without content."""
        self._compressor = lazy.zstandard.ZstdCompressor(level=_LEVEL)
        self._first = 0
        self._content, self._packed_crc = Checksum(0, 0), 0

    def add(self, lines: bytes) -> bytes:
        """Return more whole lines in packed form, continuing the data returned before."""
        parts = []
        for part in _split(lines):
            item = scan(part, 0)
            self._first = item.line.position if isinstance(item, DecodedLine) else self._first
            frame = self._compressor.compress(part)
            crc = _crc_of(frame, len(part), self._first)
            parts += [_PART.pack(_MAGIC, _PART.size - 8, len(frame), crc, len(part), self._first), frame]
        packed = b"".join(parts)
        self._content = Checksum(self._content.size + len(lines), zlib.crc32(lines, self._content.crc))
        self._packed_crc = zlib.crc32(packed, self._packed_crc)
        return packed

    def head(self) -> bytes:
        """Return the head for all data returned so far. Its length is constant."""
        return _WHOLE.pack(_MAGIC, _WHOLE.size - 8, *self._content, self._packed_crc)


def pack(data: bytes) -> bytes:
    """Return the packed form of lines of the log."""
    packer = Packer()
    packed = packer.add(data)
    return packer.head() + packed


def unpack(packed: bytes) -> bytes:
    """Return the unpacked content without damaged parts."""
    return b"".join(_unpack(part) for part in _parts(packed))


def read_content_checksum(packed: bytes) -> Checksum | None:
    """Return the checksum of the unpacked content; None if the file is damaged."""
    if len(packed) < _WHOLE.size:
        return None
    magic, length, size, crc, packed_crc = _WHOLE.unpack_from(packed)
    is_whole = zlib.crc32(memoryview(packed)[_WHOLE.size :]) == packed_crc
    return Checksum(size, crc) if is_whole and (magic, length) == (_MAGIC, _WHOLE.size - 8) else None


def _split(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        end = data.rfind(b"\n", start, start + _PART_BYTES) + 1 or data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end


def _parts(packed: bytes) -> Iterator[_Part]:
    offset, start, view = packed.find(_MARK), 0, memoryview(packed)
    while 0 <= offset <= len(packed) - _PART.size:
        _, _, frame_length, crc, length, first = _PART.unpack_from(packed, offset)
        frame = view[offset + _PART.size : offset + _PART.size + frame_length]
        is_good = len(frame) == frame_length and _crc_of(frame, length, first) == crc
        if is_good:
            yield _Part(first, start, length, frame)
            start += length
        offset = packed.find(_MARK, offset + (_PART.size + frame_length if is_good else 1))


def _crc_of(frame: bytes | memoryview, length: int, first: int) -> int:
    return zlib.crc32(frame, zlib.crc32(struct.pack("<IQ", length, first)))


def _unpack(part: _Part) -> bytes:
    return lazy.zstandard.ZstdDecompressor().decompress(part.frame)


class SegmentReader:
    """The content of a packed or unpacked segment."""

    def __init__(self, path: Path) -> None:
        """Open the segment. Raises OSError if it does not exist."""
        self._file = path.open("rb", buffering=0)
        self.is_damaged = False
        """Whether damaged parts are missing from the content."""
        self._parts: list[_Part] | None = None
        self._unpacked: tuple[_Part, bytes] | None = None
        if path.suffix == ".zst":
            with self._file:
                packed = self._file.readall()
            self._parts, self.is_damaged = list(_parts(packed)), read_content_checksum(packed) is None

    def size(self) -> int:
        """Return the current size of the content in bytes."""
        if self._parts is None:
            return os.fstat(self._file.fileno()).st_size
        return self._parts[-1].start + self._parts[-1].length if self._parts else 0

    def read(self, size: int, offset: int) -> bytes:
        """Return up to `size` bytes from an offset."""
        if self._parts is None:
            return os.pread(self._file.fileno(), size, offset)
        found = [part for part in self._parts if part.start < offset + size and offset < part.start + part.length]
        content = b"".join(map(self._content, found))
        begin = offset - found[0].start if found else 0
        return content[begin : begin + size]

    def around(self, position: int) -> bytes:
        """Return a range of lines that includes the line of a commit, if it exists."""
        if self._parts is not None:
            parts = [part for part in self._parts if part.first <= position]
            return self._content(parts[-1]) if parts else b""
        low, high = 0, self.size()
        while high - low > _NEAR_BYTES:
            found = self._line_behind((low + high) // 2, high)
            if found is None:  # the previous line may extend to the end
                break
            low, high = (found[0], high) if found[1] <= position else (low, found[0])
        return self.read(high - low, low)

    def _line_behind(self, offset: int, end: int) -> tuple[int, int] | None:
        """Return the offset and position of the first valid line in a range, or None."""
        size = _NEAR_BYTES // 4
        while True:
            data = self.read(min(size, end - offset), offset)
            start = data.find(b"\n") + 1
            while 0 < start < len(data):
                item = scan(data, start)
                if isinstance(item, DecodedLine):
                    return offset + start, item.line.position
                start = item.end if isinstance(item, UnreadableBytes) else len(data)
            if offset + size >= end:
                return None
            size *= 2

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _content(self, part: _Part) -> bytes:
        """Return a part's content, caching the last part for sequential reads."""
        if self._unpacked is None or self._unpacked[0] is not part:
            self._unpacked = part, _unpack(part)
        return self._unpacked[1]
