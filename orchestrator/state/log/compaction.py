"""Keeps the log small: closed segments are packed, and of old ones only the last versions of each document are left.

Nothing of this changes what the newest documents are, nor their last versions. Each step replaces files by one that was
made durable before, so that a crash leaves the old ones, the new one, or both, which `segments` tells apart.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from secrets import token_hex
from typing import Final

from orchestrator.protocols import VERSIONS_KEPT, Key
from orchestrator.state.log.codec import DecodedLine, LogLine, encode_line, prune_line, scan, without_damaged_payload
from orchestrator.state.log.packing import pack, read_content_checksum, unpack
from orchestrator.state.log.segments import (
    Segment,
    find_line,
    list_segments,
    make_durable,
    open_private,
    open_segment,
    sync_folder,
)
from orchestrator.state.log.table import DocumentTable
from orchestrator.system.failpoints import failpoint

_NEW: Final = ".new"


def pack_closed_segments(directory: Path) -> None:
    """Pack each closed segment that is not packed yet. Blocks.

    One process at a time. What can't be unpacked to what it was stays as it is.
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
    """Leave of all commits in the segments up to `last`, a closed one, the last versions of each document. Blocks.

    One process at a time. The store's lock is `held` for the moment from which on it is so: whoever goes from one
    segment to the next under it would miss those between. `remove_replaced_segments` is to follow. A ValueError says that
    something in them can't be read: it is not to be lost for good. With a folder for what is `damaged` it is passed
    over, and the segments go there.
    """
    found = list_segments(directory)
    old = found[: found.index(last) + 1]
    end = found[found.index(last) + 1].first - 1
    data = b"".join(map(encode_line, _retained_lines(directory, old, is_strict=damaged is None)))
    if damaged is not None:
        damaged.mkdir(mode=0o700, exist_ok=True)
        for segment in old:
            path = segment.path(directory)
            shutil.copyfile(path, damaged / f"{path.name}.{token_hex(4)}")
    _put(Segment(old[0].first, end, is_packed=True).path(directory), pack(data), held)
    failpoint("state.pruned")


def find_prunable_segment(directory: Path, older_than: float, largest: int) -> Segment | None:
    """Return the last segment that is to be thinned out: one of which all is older than that, or needs must go. Blocks.

    None where nothing is, because what is older is thinned out already. The newest segment is never.
    """
    found, size, last = list_segments(directory), log_size(directory), None
    for segment, following in pairwise(found):
        begin = find_line(directory, following.first)
        if size <= largest and (begin is None or begin.time > older_than):
            break
        if not segment.is_pruned:  # of which all is left
            size, last = size - segment.path(directory).stat().st_size, segment
    return last


def log_size(directory: Path) -> int:
    """Return the bytes of all files that make up the log. Blocks."""
    while True:
        with suppress(FileNotFoundError):  # another process is replacing some: listed anew
            return sum(one.path(directory).stat().st_size for one in list_segments(directory))


def _retained_lines(directory: Path, old: Sequence[Segment], *, is_strict: bool) -> Iterator[LogLine]:
    """Yield what is to be kept of the commits in some segments, in order."""
    wanted: dict[Key, deque[int]] = defaultdict(lambda: deque(maxlen=VERSIONS_KEPT))
    gone = set[Key]()
    for line in _lines(directory, old, is_strict=is_strict):
        for change in line.changes:
            wanted[change.key].append(line.position)
            (gone.discard if change.length else gone.add)(change.key)
    for key in gone:  # all that counts is its version, which goes on counting
        wanted[key] = deque([wanted[key][-1]])
    for line in _lines(directory, old, is_strict=is_strict):
        keys = {change.key for change in line.changes if line.position in wanted[change.key]}
        if keys:
            yield prune_line(line, keys)


def build_repaired_table(directory: Path) -> DocumentTable:
    """Return what the log tells once all that is damaged in it is passed over. Blocks."""
    table = DocumentTable()
    for line in _lines(directory, list_segments(directory), is_strict=False):
        table.apply(line)
    return table


def _lines(directory: Path, old: Sequence[Segment], *, is_strict: bool) -> Iterator[LogLine]:
    """Yield what some segments tell, in order: of a line with a bad payload, which documents it deleted."""
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
                raise ValueError(f"{segment.path(directory)} can't be read wholly")
            offset = item.end
            if line is not None and line.position > position:
                position = line.position
                yield without_damaged_payload(line)
        position = max(position, segment.last)


def _put(path: Path, data: bytes, held: AbstractContextManager[None] | None = None) -> None:
    """Write a file as a whole, durably, under a name that no log has until it is."""
    staged = path.with_name(f"{path.name}.{token_hex(6)}{_NEW}")
    try:
        with open(staged, "xb", opener=open_private) as file:
            file.write(data)
        make_durable(staged)
        with held or nullcontext():
            staged.rename(path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_replaced_segments(directory: Path) -> None:
    """Remove what is in the place of something newer, or was never finished. Blocks; the store's lock must be held."""
    log = {one.path(directory).name for one in list_segments(directory)}
    names = os.listdir(directory)
    replaced = [name for name in names if name.endswith((".jsonl", ".jsonl.zst")) and name not in log]
    if replaced:
        sync_folder(directory)  # whoever put the newer ones there may have died before
    for name in (*replaced, *(name for name in names if name.endswith(_NEW))):
        (directory / name).unlink(missing_ok=True)
