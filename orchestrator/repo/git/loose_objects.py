"""Objects that are files of their own in a folder of objects, read without git (gitformat-loose(5))."""

from __future__ import annotations

import hashlib
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_CHUNK = 1 << 20  # bytes
_LONGEST_HEADER = 64  # bytes: a kind and a number


class LooseObject(NamedTuple):
    """An object: its kind (`blob`, `tree`, `commit`, `tag`), its size in bytes, and what was read of its content."""

    kind: str
    size: int
    content: bytes


def read_loose_object(objects: Path, name: str, most: int | None = None) -> LooseObject | None:
    """Return an object of a folder that only our own git writes, and of its content at most so many bytes. Blocks.

    None where it is not there as a file of its own, or is damaged: git will say how.
    """
    try:
        with (objects / name[:2] / name[2:]).open("rb") as file:
            packed = file.read() if most is None else file.read(_LONGEST_HEADER + most)
    except FileNotFoundError:
        return None
    with suppress(zlib.error, ValueError):
        return _read(packed, most)
    return None


def has_valid_hash(file: Path, name: str) -> bool:
    """Whether a regular file holds the object of that name, found by hashing it (gitformat-loose(5)). Blocks."""
    digest = hashlib.new("sha1" if len(name) == 40 else "sha256", usedforsecurity=False)
    unpacking = zlib.decompressobj()
    with suppress(OSError, zlib.error):
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as packed:
            while chunk := packed.read(_CHUNK):
                while chunk:
                    digest.update(unpacking.decompress(chunk, _CHUNK))
                    chunk = unpacking.unconsumed_tail
        return unpacking.eof and not unpacking.unused_data and digest.hexdigest() == name
    return False


def _read(packed: bytes, most: int | None) -> LooseObject:
    unpacked = zlib.decompressobj().decompress(packed, 0 if most is None else _LONGEST_HEADER + most)
    header, _, content = unpacked.partition(b"\0")
    kind, size = header.decode().split(" ")
    return LooseObject(kind, int(size), content if most is None else content[:most])
