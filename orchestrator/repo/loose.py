"""Objects that are files of their own in a folder of objects, read without git (gitformat-loose(5))."""

from __future__ import annotations

import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_LONGEST_HEADER = 64  # bytes: a kind and a number


class Loose(NamedTuple):
    """An object: its kind (`blob`, `tree`, `commit`, `tag`), its size in bytes, and what was read of its content."""

    kind: str
    size: int
    content: bytes


def read_loose(objects: Path, name: str, most: int | None = None) -> Loose | None:
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


def _read(packed: bytes, most: int | None) -> Loose:
    unpacked = zlib.decompressobj().decompress(packed, 0 if most is None else _LONGEST_HEADER + most)
    header, _, content = unpacked.partition(b"\0")
    kind, size = header.decode().split(" ")
    return Loose(kind, int(size), content if most is None else content[:most])
