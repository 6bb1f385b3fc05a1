"""A snapshot of the newest documents, which avoids replaying a long log.

    <crc of the rest> <length of the index> <index> <values>

The log stays authoritative. A snapshot is written when a store is closed, read when one is opened, and used only if all
bytes of its part of the log still have the checksum from the replay, so damage is detected as without a snapshot. A
torn, outdated or missing snapshot only costs time, so it is not made durable.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise, repeat
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from pydantic_core import from_json

from orchestrator.state.log.packing import Checksum, read_content_checksum
from orchestrator.state.log.segments import Segment, list_segments
from orchestrator.state.log.table import DocumentTable, TableEntry
from orchestrator.system.failpoints import failpoint
from orchestrator.system.files import StagedFile

SNAPSHOT_FILE: Final = "snapshot"
#: The number of new log bytes from which a new snapshot is written.
MIN_NEW_BYTES: Final = 1 << 20

# Allocating memory for more bytes or documents at once takes longer than computing their checksum.
_READ_BYTES: Final = 1 << 16
_AT_ONCE: Final = 64
#: Errors from reading a damaged snapshot, whose checksum is only known at the end.
_DAMAGED: Final = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError)
_HEAD_BYTES: Final = 18  # two numbers of eight hexadecimal digits, each with a space


class Snapshot(NamedTuple):
    """The state after a part of the log.

    `sums` has the segments of that part in order, keyed by first position.
    """

    table: DocumentTable
    sums: Mapping[int, Checksum]


def write_snapshot(directory: Path, snapshot: Snapshot) -> None:
    """Replace the snapshot atomically. Blocks.

    After an OSError the old one is unchanged.
    """
    values: list[bytes] = []
    kinds = {}
    writers: dict[str, int] = {}
    for kind, entries in snapshot.table.kinds().items():
        found = list(entries.values())
        values += [entry.value or b"" for entry in found]
        kinds[kind] = {
            "ids": list(entries),
            "versions": [entry.version for entry in found],
            "positions": [entry.position for entry in found],
            "times": [entry.time for entry in found],
            "by": [writers.setdefault(entry.writer, len(writers)) for entry in found],
            "expire": {place: entry.expires for place, entry in enumerate(found) if entry.expires is not None},
            "lengths": [len(entry.value or b"") for entry in found],
        }
    sums = [(first, *part) for first, part in snapshot.sums.items()]
    state = {"position": snapshot.table.position, "sums": sums, "kinds": kinds, "writers": list(writers)}
    index = json.dumps(state).encode()
    rest = b"%08x " % len(index) + index + b"".join(values)
    staged = StagedFile(directory / SNAPSHOT_FILE)
    try:
        staged.file.writelines((b"%08x " % zlib.crc32(rest), rest))
        failpoint("state.snapshot_staged")
        staged.publish()
        failpoint("state.snapshot_written")
    finally:
        staged.discard()


def read_snapshot(directory: Path) -> Snapshot | None:
    """Return the snapshot if it exists and its part of the log is unchanged. Blocks."""
    try:
        with (directory / SNAPSHOT_FILE).open("rb") as file, ThreadPoolExecutor(1) as pool:
            head = file.read(_HEAD_BYTES)
            encoded = file.read(int(head[9:17], 16))
            index = from_json(encoded)
            sums = {first: Checksum(size, crc) for first, size, crc in index["sums"]}
            is_log = pool.submit(_is_log, directory, sums)  # reading and checksums release the GIL
            kinds, crc = {}, zlib.crc32(encoded, zlib.crc32(head[9:]))
            for kind, columns in index["kinds"].items():
                values, crc = _values(file, columns["lengths"], crc)
                kinds[kind] = _entries(columns, index["writers"], values)
            is_whole = head[:9] == b"%08x " % crc and not file.read(1)
            return Snapshot(DocumentTable(index["position"], kinds), sums) if is_whole and is_log.result() else None
    except _DAMAGED:
        return None


def _values(file: BinaryIO, lengths: Sequence[int], crc: int) -> tuple[list[bytes | None], int]:
    """Read the values of one kind; return them and the updated checksum."""
    values: list[bytes | None] = []
    for start in range(0, len(lengths), _AT_ONCE):
        ends = list(accumulate(lengths[start : start + _AT_ONCE], initial=0))
        data = file.read(ends[-1])
        crc = zlib.crc32(data, crc)
        values += [data[begin:end] or None for begin, end in pairwise(ends)]
    return values, crc


def _entries(
    columns: Mapping[str, Any], writers: Sequence[str], values: Sequence[bytes | None]
) -> dict[str, TableEntry]:
    by = [writers[place] for place in columns["by"]]
    rows = list(map(TableEntry, columns["versions"], values, columns["positions"], repeat(False), columns["times"], by))
    for place, expires in columns["expire"].items():
        rows[int(place)] = rows[int(place)]._replace(expires=expires)
    return dict(zip(columns["ids"], rows, strict=True))


def _is_log(directory: Path, sums: Mapping[int, Checksum]) -> bool:
    last = max(sums)
    known = [one for one in list_segments(directory) if one.first <= last]
    if [one.first for one in known] != list(sums):
        return False
    return all(_has(directory, one, sums[one.first], is_last=one.first == last) for one in known)


def _has(directory: Path, segment: Segment, part: Checksum, *, is_last: bool) -> bool:
    path = segment.path(directory)
    if segment.is_packed:
        return read_content_checksum(path.read_bytes()) == part
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size < part.size or (size > part.size and not is_last):
            return False
        left, crc = part.size, 0
        while left and (data := file.read(min(left, _READ_BYTES))):
            left, crc = left - len(data), zlib.crc32(data, crc)
    return (left, crc) == (0, part.crc)
