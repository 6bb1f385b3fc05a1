"""Compact the log: pack closed segments, and prune old ones.

Pruning keeps each document's last versions. Compaction never changes the newest documents or their last versions. Each
step replaces files with a file that is already durable. After a crash the old files, the new file, or both exist, which
`segments` distinguishes.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from itertools import pairwise
from pathlib import Path
from secrets import token_hex

from orchestrator.protocols import VERSIONS_KEPT, Key
from orchestrator.state.log.codec import DecodedLine, LogLine, encode_line, prune_line, scan, without_damaged_payload
from orchestrator.state.log.packing import pack, read_content_checksum, unpack
from orchestrator.state.log.segments import (
    Segment,
    find_line,
    list_segments,
    open_segment,
)
from orchestrator.state.log.table import DocumentTable
from orchestrator.system.failpoints import failpoint
from orchestrator.system.files import StagedFile, sync_folder


def pack_closed_segments(directory: Path) -> None:
    """Pack each closed segment that is not packed yet. Blocks.

    Only one process at a time may call this. A segment is replaced only if unpacking reproduces its bytes.
    """
    for segment in list_segments(directory)[:-1]:
        if segment.is_packed:
            continue
        path = segment.path(directory)
        data = path.read_bytes()
        packed = pack(data)
        if unpack(packed) == data and read_content_checksum(packed) is not None:
            _put(segment.packed().path(directory), packed)
            failpoint("state.packed")
            path.unlink()


def prune_segments(
    directory: Path, last: Segment, held: AbstractContextManager[None], damaged: Path | None = None
) -> None:
    """Prune the segments up to `last` to each document's last versions. Blocks.

    `last` must be closed. Only one process at a time may call this. The store's lock is `held` during the replacement,
    because a reader that moves from one segment to the next would miss those in between. Call
    `remove_replaced_segments` afterwards. Raises ValueError if a line is unreadable, to preserve it. With a folder for
    `damaged` segments, unreadable lines are skipped instead, and the original segments are copied to that folder.
    """
    segments = list_segments(directory)
    old = segments[: segments.index(last) + 1]
    end = segments[segments.index(last) + 1].first - 1
    data = b"".join(map(encode_line, _retained_lines(directory, old, is_strict=damaged is None)))
    if damaged is not None:
        damaged.mkdir(mode=0o700, exist_ok=True)
        for segment in old:
            path = segment.path(directory)
            shutil.copyfile(path, damaged / f"{path.name}.{token_hex(4)}")
    _put(Segment(old[0].first, end, is_packed=True).path(directory), pack(data), held)
    failpoint("state.pruned")


def find_prunable_segment(directory: Path, older_than: float, largest: int) -> Segment | None:
    """Return the last segment to prune, by commit age or log size. Blocks.

    Returns None if all such segments are already pruned. The newest segment is never pruned.
    """
    segments, size, last = list_segments(directory), log_size(directory), None
    for segment, following in pairwise(segments):
        begin = find_line(directory, following.first)
        if size <= largest and (begin is None or begin.time > older_than):
            break
        if not segment.is_pruned:
            size, last = size - segment.path(directory).stat().st_size, segment
    return last


def log_size(directory: Path) -> int:
    """Return the size of all files of the log in bytes. Blocks."""
    while True:
        with suppress(FileNotFoundError):  # another process is replacing segments: list them again
            return sum(one.path(directory).stat().st_size for one in list_segments(directory))


def _retained_lines(directory: Path, old: Sequence[Segment], *, is_strict: bool) -> Iterator[LogLine]:
    """Yield the lines that pruning keeps, in order."""
    wanted: dict[Key, deque[int]] = defaultdict(lambda: deque(maxlen=VERSIONS_KEPT))
    deleted = set[Key]()
    for line in _lines(directory, old, is_strict=is_strict):
        for change in line.changes:
            wanted[change.key].append(line.position)
            (deleted.discard if change.length else deleted.add)(change.key)
    for key in deleted:  # only its last version number is needed, so that versions continue from it
        wanted[key] = deque([wanted[key][-1]])
    for line in _lines(directory, old, is_strict=is_strict):
        keys = {change.key for change in line.changes if line.position in wanted[change.key]}
        if keys:
            yield prune_line(line, keys)


def build_repaired_table(directory: Path) -> DocumentTable:
    """Return the log's table without damaged lines. Blocks."""
    table = DocumentTable()
    for line in _lines(directory, list_segments(directory), is_strict=False):
        table.apply(line)
    return table


def _lines(directory: Path, old: Sequence[Segment], *, is_strict: bool) -> Iterator[LogLine]:
    """Yield the lines of segments; damaged lines have only their deletions."""
    position = old[0].first - 1 if old else 0
    for segment in old:
        with closing(open_segment(directory, segment)) as source:
            data, offset = source.read(source.size(), 0), 0
            is_whole = not source.is_damaged
        while offset < len(data):
            item = scan(data, offset)
            line = item.line if isinstance(item, DecodedLine) else None
            follows = line is not None and (segment.is_pruned or line.position == position + 1)
            if is_strict and (line is None or line.is_damaged or not (follows and is_whole)):
                raise ValueError(f"{segment.path(directory)} can't be read completely")
            offset = item.end
            if line is not None and line.position > position:
                position = line.position
                yield without_damaged_payload(line)
        position = max(position, segment.last)


def _put(path: Path, data: bytes, held: AbstractContextManager[None] | None = None) -> None:
    """Write a file atomically and durably, entering `held` for the replacement."""
    staged = StagedFile(path)
    try:
        staged.file.write(data)
        staged.publish(durable=True, held=held)
    finally:
        staged.discard()


def remove_replaced_segments(directory: Path) -> None:
    """Remove replaced segments and unfinished files. Blocks.

    The caller must hold the store's lock.
    """
    log = {one.path(directory).name for one in list_segments(directory)}
    names = os.listdir(directory)  # noqa: PTH208  (only names are needed)
    replaced = [name for name in names if name.endswith((".jsonl", ".jsonl.zst")) and name not in log]
    if replaced:
        sync_folder(directory)  # the process that added the newer segments may have died before its sync
    for name in (*replaced, *(name for name in names if name.endswith(".new"))):
        (directory / name).unlink(missing_ok=True)
