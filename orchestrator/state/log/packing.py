"""Closed segments in a fraction of their size: Zstandard frames (RFC 8878), which `zstdcat` reads.

Before all stands a skippable frame with what the content was and the CRC-32 of all that follows, so that it can be told
without unpacking whether a segment still holds what it held. The content is packed in parts of whole lines, each behind
a skippable frame with its lengths, its CRC-32 and its first position: damage takes one part along, not the rest, and to
look one commit up one part is unpacked.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from orchestrator.state.log.codec import DecodedLine, UnreadableBytes, scan

_MAGIC: Final = 0x184D2A50
_WHOLE: Final = struct.Struct("<IIQII")  # magic and length of a skippable frame, then its content
_PART: Final = struct.Struct("<IIIIIQ")
_MARK: Final = struct.pack("<II", _MAGIC, _PART.size - 8)
_PART_BYTES: Final = 1 << 20
_LEVEL: Final = 9
_NEAR_BYTES: Final = 256 << 10  # read at once around a line that is looked for


class Checksum(NamedTuple):
    """What some bytes were when they were read or written: how many, and their CRC-32."""

    size: int
    crc: int


class _Part(NamedTuple):
    """A good part: its first position, where its content begins, how much that is, and its frame."""

    first: int
    start: int
    length: int
    frame: memoryview


class Packer:
    """Packs lines of the log that come bit by bit."""

    def __init__(self) -> None:
        """Begin with none."""
        import zstandard

        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._first = 0
        self._content, self._packed_crc = Checksum(0, 0), 0

    def add(self, lines: bytes) -> bytes:
        """Return what stands for some more whole lines; it follows on what was returned before."""
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
        """Return what stands before all that was returned so far; it always has the same length."""
        return _WHOLE.pack(_MAGIC, _WHOLE.size - 8, *self._content, self._packed_crc)


def pack(data: bytes) -> bytes:
    """Return the packed form of lines of the log."""
    packer = Packer()
    packed = packer.add(data)
    return packer.head() + packed


def unpack(packed: bytes) -> bytes:
    """Return what was packed, without the parts that are damaged."""
    return b"".join(_unpack(part) for part in _parts(packed))


def read_content_checksum(packed: bytes) -> Checksum | None:
    """Return the sum of what was packed; None if these are not the bytes that it was packed to."""
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
    import zstandard

    return zstandard.ZstdDecompressor().decompress(part.frame)


class SegmentReader:
    """The content of a segment, packed or not."""

    def __init__(self, path: Path) -> None:
        """Open it; OSError if it is not there."""
        self._file = path.open("rb", buffering=0)
        self.is_damaged = False
        """Whether some of what was packed can't be read any more, and is missing."""
        self._parts: list[_Part] | None = None
        self._unpacked: tuple[_Part, bytes] | None = None
        if path.suffix == ".zst":
            with self._file:
                packed = self._file.readall()
            self._parts, self.is_damaged = list(_parts(packed)), read_content_checksum(packed) is None

    def size(self) -> int:
        """Return how many bytes there are by now."""
        if self._parts is None:
            return os.fstat(self._file.fileno()).st_size
        return self._parts[-1].start + self._parts[-1].length if self._parts else 0

    def read(self, size: int, offset: int) -> bytes:
        """Return so many bytes from an offset on, or all that there are."""
        if self._parts is None:
            return os.pread(self._file.fileno(), size, offset)
        found = [part for part in self._parts if part.start < offset + size and offset < part.start + part.length]
        content = b"".join(map(self._content, found))
        begin = offset - found[0].start if found else 0
        return content[begin : begin + size]

    def around(self, position: int) -> bytes:
        """Return some lines, with that of a commit among them if there is one."""
        if self._parts is not None:
            parts = [part for part in self._parts if part.first <= position]
            return self._content(parts[-1]) if parts else b""
        low, high = 0, self.size()
        while high - low > _NEAR_BYTES:
            found = self._line_behind((low + high) // 2, high)
            if found is None:  # what begins before may reach to the end
                break
            low, high = (found[0], high) if found[1] <= position else (low, found[0])
        return self.read(high - low, low)

    def _line_behind(self, offset: int, end: int) -> tuple[int, int] | None:
        """Return where the first good line between two offsets begins, and its position; None if there is none."""
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
        """Give it back."""
        self._file.close()

    def _content(self, part: _Part) -> bytes:
        """Return a part's content; the last one is kept, because who reads on will want it again."""
        if self._unpacked is None or self._unpacked[0] is not part:
            self._unpacked = part, _unpack(part)
        return self._unpacked[1]
