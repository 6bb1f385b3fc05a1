"""Packed segments: whole, in a fraction of the size, and with damage that stays where it is."""

from __future__ import annotations

import random
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.state.log import packing
from orchestrator.state.log.packing import Checksum, SegmentReader, pack, read_content_checksum, unpack

LINES = b"".join(b'{"position": %d, "words": "some of the same in each line"}\n' % number for number in range(60_000))


@given(st.binary(max_size=5_000))
def test_packed_data_is_unpacked(data: bytes) -> None:
    """Any bytes do, and their sum is told without unpacking."""
    packed = pack(data)
    assert unpack(packed) == data
    assert read_content_checksum(packed) == Checksum(len(data), zlib.crc32(data))


def test_similar_lines_are_compressed(tmp_path: Path) -> None:
    """A source reads any part of them."""
    path = tmp_path / "s.jsonl.zst"
    path.write_bytes(pack(LINES))
    assert path.stat().st_size < len(LINES) / 10
    source = SegmentReader(path)
    assert source.size() == len(LINES)
    assert source.read(100, 1_000_000) == LINES[1_000_000:1_000_100]
    source.close()


@pytest.mark.skipif(shutil.which("zstdcat") is None, reason="zstd is not installed")
def test_zstdcat_can_read_it() -> None:
    """Someone with standard tools can see everything."""
    done = subprocess.run(["zstdcat"], input=pack(LINES), capture_output=True, check=True)
    assert done.stdout == LINES


@pytest.mark.extended
def test_damage_affects_one_part() -> None:
    """Whatever byte is another one is noticed, and all other parts are still read."""
    packed = pack(LINES)
    parts = list(packing._split(LINES))
    assert len(parts) > 2
    dice = random.Random(1)
    for offset in [*range(64), *(dice.randrange(len(packed)) for _ in range(300))]:
        damaged = packed[:offset] + bytes([packed[offset] ^ (1 << dice.randrange(8))]) + packed[offset + 1 :]
        assert read_content_checksum(damaged) != read_content_checksum(packed)
        left = unpack(damaged)
        assert left in {LINES, *(b"".join(parts[:lost] + parts[lost + 1 :]) for lost in range(len(parts)))}


def test_truncated_data_is_read_up_to_the_end() -> None:
    """No length of what is left is an error."""
    packed = pack(LINES)
    for size in [*range(60), *range(60, len(packed), 997)]:
        assert read_content_checksum(packed[:size]) is None
        assert LINES.startswith(unpack(packed[:size]))
