"""Update the file metadata in a copied checkout's index (gitformat-index(5)).

Git considers a file unchanged only if its times, inode, owner and size match the index. In a copied checkout it would
therefore read every file, which takes longer than copying. It also reads each file that is not at least one clock
second older than the index (racy git), so it would read every file of a fresh checkout.

Imports only the standard library, because `orchestrator.repo.worktrees.files.scan_worker` runs it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
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
#: Nanoseconds by which mtimes are set before the time of the index.
_AGE: Final = 10 * 10**9
_32_BITS = 0xFFFFFFFF


def count_entries(index: Path) -> int:
    """Return the number of files in an index; 0 if the file is not an index. Blocks."""
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return 0
    count: int = _HEADER.unpack(header)[2]
    return count


def refresh_index_stats(index: Path, tree: Path) -> bool:
    """Update an index for the files in `tree`, and backdate these files. Blocks.

    The files must have the content that the index records. Returns False and leaves the index unchanged if it has
    another format or a file is missing.
    """
    data = bytearray(index.read_bytes())
    try:
        magic, version, count = _HEADER.unpack_from(data)
        if magic != b"DIRC" or version not in {2, 3}:
            return False
        folder, offset, timestamp = os.fsencode(tree) + b"/", _HEADER.size, time.time_ns() - _AGE
        for _ in range(count):
            offset = _refresh_entry(data, offset, folder, timestamp)
    except (OSError, struct.error, ValueError):
        return False
    data[-_SHA1:] = hashlib.sha1(data[:-_SHA1], usedforsecurity=False).digest()
    # Replaced atomically: a truncated index would be useless.
    staged = index.with_name(f"{index.name}.fitted")
    staged.write_bytes(data)
    staged.replace(index)
    return True


def _refresh_entry(data: bytearray, offset: int, folder: bytes, timestamp: int) -> int:
    """Update an index entry and its file's times; return the next entry's offset."""
    *_, mode = _ENTRY.unpack_from(data, offset)[:7]
    (flags,) = struct.unpack_from(">H", data, offset + _ENTRY.size - 2)
    begin, more = offset + _ENTRY.size, 0
    if flags & _EXTENDED:
        (more,) = struct.unpack_from(">H", data, begin)
        begin += 2
    end = begin + (flags & _NAME) if flags & _NAME < _NAME else data.index(b"\0", begin)
    if mode != _GITLINK and not more & _SKIP_WORKTREE:
        path = folder + data[begin:end]
        os.utime(path, ns=(timestamp, timestamp), follow_symlinks=False)
        status = os.lstat(path)
        seconds, rest = divmod(status.st_ctime_ns, 10**9)
        changed, changed_rest = divmod(status.st_mtime_ns, 10**9)
        identity = (status.st_dev & _32_BITS, status.st_ino & _32_BITS)
        _TIMES.pack_into(data, offset, seconds & _32_BITS, rest, changed & _32_BITS, changed_rest, *identity)
        _OWNER.pack_into(data, offset + 28, status.st_uid, status.st_gid, status.st_size & _32_BITS)
    # Each entry ends with one to eight NULs, so that its length is a multiple of eight.
    return offset + (end - offset) // 8 * 8 + 8
