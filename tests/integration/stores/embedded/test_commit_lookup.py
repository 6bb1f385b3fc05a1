"""Find a commit in a large segment without reading all of it, with large and damaged neighbours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from orchestrator.protocols import Commit, Key, Write
from orchestrator.state.log.codec import DecodedLine, scan
from orchestrator.state.log.segments import find_line
from orchestrator.state.stores.file import FileStore
from orchestrator.testing.clock import ManualClock

_SIZES = (10, 500, 3_000, 20_000, 400_000)


@pytest.mark.extended_variants
@pytest.mark.parametrize("damage", [0, 5])
async def test_each_commit_of_a_large_segment_is_found(tmp_path: Path, damage: int) -> None:
    """Every commit with a readable header, and no other."""
    chance = random.Random(7)
    async with FileStore.open(tmp_path, ManualClock()) as store:
        for number in range(400):
            text = "x" * chance.choices(_SIZES, (40, 40, 15, 4, 1))[0]
            await store.commit(Commit([Write(Key("task", str(number)), 0, {"text": text})], durable=False))
    (segment,) = tmp_path.glob("*.jsonl")
    data = bytearray(segment.read_bytes())
    starts = list(_starts(bytes(data)))
    assert len(data) > 1 << 20
    hit = chance.sample(range(400), damage)
    for one in hit:
        data[starts[one]] = ord("z")
    segment.write_bytes(data)
    for position in range(1, 401):
        line = find_line(tmp_path, position)
        assert (None if line is None else line.position) == (None if position - 1 in hit else position)
    assert find_line(tmp_path, 401) is None


def _starts(data: bytes) -> list[int]:
    offsets, offset = [], 0
    while offset < len(data):
        item = scan(data, offset)
        assert isinstance(item, DecodedLine)
        offsets.append(offset)
        offset = item.end
    return offsets
