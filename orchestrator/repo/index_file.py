"""What git's index says of files, made to fit others with the same content: see gitformat-index(5).

Git takes a file for unchanged only where its times, inode, owner and size are those in the index; of a copied checkout
it would read every file to find out that nothing differs, which takes longer than copying it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct(">4sLL")
# ctime, mtime (each in seconds and nanoseconds), device and inode; mode; owner, group, size; name of the object; flags.
_ENTRY: Final = struct.Struct(">6LL3L20sH")
_TIMES: Final = struct.Struct(">6L")
_OWNER: Final = struct.Struct(">3L")
_EXTENDED, _NAME = 0x4000, 0x0FFF
_SKIP_WORKTREE = 0x4000
_GITLINK = 0o160000
_SHA1 = 20
_32_BITS = 0xFFFFFFFF


def fit_index(index: Path, tree: Path) -> bool:
    """Have an index tell of the files in `tree`, which have the content that it says. Blocks.

    False, with nothing changed, where its format is another than git writes unless it is told to, or a file is missing.
    """
    data = bytearray(index.read_bytes())
    try:
        magic, version, count = _HEADER.unpack_from(data)
        if magic != b"DIRC" or version not in {2, 3}:
            return False
        folder, offset = os.fsencode(tree) + b"/", _HEADER.size
        for _ in range(count):
            offset = _fit_entry(data, offset, folder)
    except (OSError, struct.error, ValueError):
        return False
    data[-_SHA1:] = hashlib.sha1(data[:-_SHA1], usedforsecurity=False).digest()
    index.write_bytes(data)
    return True


def _fit_entry(data: bytearray, offset: int, folder: bytes) -> int:
    """Fit the entry at an offset; return that of the next."""
    *_, mode = _ENTRY.unpack_from(data, offset)[:7]
    (flags,) = struct.unpack_from(">H", data, offset + _ENTRY.size - 2)
    begin, more = offset + _ENTRY.size, 0
    if flags & _EXTENDED:
        (more,) = struct.unpack_from(">H", data, begin)
        begin += 2
    end = begin + (flags & _NAME) if flags & _NAME < _NAME else data.index(b"\0", begin)
    if mode != _GITLINK and not more & _SKIP_WORKTREE:
        status = os.lstat(folder + data[begin:end])
        seconds, rest = divmod(status.st_ctime_ns, 10**9)
        changed, changed_rest = divmod(status.st_mtime_ns, 10**9)
        identity = (status.st_dev & _32_BITS, status.st_ino & _32_BITS)
        _TIMES.pack_into(data, offset, seconds & _32_BITS, rest, changed & _32_BITS, changed_rest, *identity)
        _OWNER.pack_into(data, offset + 28, status.st_uid, status.st_gid, status.st_size & _32_BITS)
    # Each entry ends with one to eight NULs, so that the next begins at a multiple of eight from here.
    return offset + (end - offset) // 8 * 8 + 8
