"""Read loose objects from an object folder without git (gitformat-loose(5))."""

from __future__ import annotations

import hashlib
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_CHUNK = 1 << 20  # bytes
_MAX_HEADER = 64  # bytes: a kind and a size


class LooseObject(NamedTuple):
    """The kind (`blob`, `tree`, `commit`, `tag`), size in bytes, and the content read."""

    kind: str
    size: int
    content: bytes


def read_loose_object(objects: Path, name: str, limit: int | None = None) -> LooseObject | None:
    """Return an object with at most `limit` bytes of its content, or None. Blocks.

    Only our own git may write to the folder. Returns None if the object is not loose, or is damaged; git then reports
    the damage.
    """
    try:
        with (objects / name[:2] / name[2:]).open("rb") as file:
            packed = file.read() if limit is None else file.read(_MAX_HEADER + limit)
    except FileNotFoundError:
        return None
    with suppress(zlib.error, ValueError):
        return _read(packed, limit)
    return None


def has_valid_hash(file: Path, name: str) -> bool:
    """Return whether a file contains the object with that id, by hashing it. Blocks."""
    digest = hashlib.new("sha1" if len(name) == 40 else "sha256", usedforsecurity=False)
    decompressor = zlib.decompressobj()
    with suppress(OSError, zlib.error):
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as packed:
            while chunk := packed.read(_CHUNK):
                while chunk:
                    digest.update(decompressor.decompress(chunk, _CHUNK))
                    chunk = decompressor.unconsumed_tail
        return decompressor.eof and not decompressor.unused_data and digest.hexdigest() == name
    return False


def _read(packed: bytes, limit: int | None) -> LooseObject:
    unpacked = zlib.decompressobj().decompress(packed, 0 if limit is None else _MAX_HEADER + limit)
    header, _, content = unpacked.partition(b"\0")
    kind, size = header.decode().split(" ")
    return LooseObject(kind, int(size), content if limit is None else content[:limit])
