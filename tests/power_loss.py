"""What a loss of power leaves of a file store: all that was durable, and of the rest whatever had got to the disk."""

from __future__ import annotations

from pathlib import Path
from random import Random

from orchestrator.state.log.segments import HighWaterMark

#: What gets to the disk as a whole or not at all.
SECTOR = 512


def lose_power(place: Path, durable: int, dice: Random, mark: bytes | None = None) -> None:
    """Leave of the newest segment its first `durable` bytes, and some sectors of the rest; the machine starts anew.

    The mark is that of any moment before, if one is given.
    """
    newest = max(place.glob("*.jsonl"), default=None)
    if newest is not None:
        content = newest.read_bytes()
        end = dice.choice([durable, dice.randint(durable, len(content)), len(content)])
        left = bytearray(content[:end])
        if dice.random() < 0.5:
            for start in range(durable - durable % SECTOR, end, SECTOR):
                if dice.random() < 0.3:
                    begin, behind = max(start, durable), min(start + SECTOR, end)
                    left[begin:behind] = bytes(behind - begin)
        newest.write_bytes(left)
    simulate_reboot(place, mark)


def simulate_reboot(place: Path, mark: bytes | None = None) -> None:
    """Let the machine have started since the mark was written."""
    found = HighWaterMark.decode((place / "lock").read_bytes() if mark is None else mark)
    if found is not None:
        (place / "lock").write_bytes(found._replace(boot="f" * 32).encode())
