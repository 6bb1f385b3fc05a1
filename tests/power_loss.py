"""Simulated power loss of a file store: durable bytes are kept, others arbitrarily."""

from __future__ import annotations

from pathlib import Path
from random import Random

from orchestrator.state.log.segments import HighWaterMark

#: Sectors are written completely or not at all.
SECTOR = 512


def lose_power(place: Path, durable: int, dice: Random, mark: bytes | None = None) -> None:
    """Keep the first `durable` bytes of the newest segment and some sectors of the rest, and simulate a reboot.

    The durability mark may be an earlier one, if given.
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
    """Make the durability mark look older than the boot."""
    found = HighWaterMark.decode((place / "lock").read_bytes() if mark is None else mark)
    if found is not None:
        (place / "lock").write_bytes(found._replace(boot="f" * 32).encode())
