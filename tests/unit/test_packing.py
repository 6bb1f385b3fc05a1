"""Packed segments: lossless, compressed, and damage stays local."""

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
    """For any bytes; the checksum is known without unpacking."""
    packed = pack(data)
    assert unpack(packed) == data
    assert read_content_checksum(packed) == Checksum(len(data), zlib.crc32(data))


def test_similar_lines_are_compressed(tmp_path: Path) -> None:
    """Any part can be read."""
    path = tmp_path / "s.jsonl.zst"
    path.write_bytes(pack(LINES))
    assert path.stat().st_size < len(LINES) / 10
    source = SegmentReader(path)
    assert source.size() == len(LINES)
    assert source.read(100, 1_000_000) == LINES[1_000_000:1_000_100]
    source.close()


@pytest.mark.skipif(shutil.which("zstdcat") is None, reason="zstd is not installed")
def test_zstdcat_can_read_it() -> None:
    """Standard tools can read everything."""
    done = subprocess.run(["zstdcat"], input=pack(LINES), capture_output=True, check=True)
    assert done.stdout == LINES


@pytest.mark.extended
def test_damage_affects_one_part() -> None:
    """Any changed byte is detected, and all other parts stay readable."""
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
    """For any length of the rest."""
    packed = pack(LINES)
    for size in [*range(60), *range(60, len(packed), 997)]:
        assert read_content_checksum(packed[:size]) is None
        assert LINES.startswith(unpack(packed[:size]))
