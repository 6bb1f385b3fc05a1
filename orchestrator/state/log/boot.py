"""Which start of the machine this is: what only stood in its memory is gone with the one before."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

#: Stands for a machine that does not say; all of its starts count as one.
UNKNOWN: Final = "0" * 32


@cache
def boot_id() -> str:
    """Return the 32 hexadecimal digits that Linux made up when it started; `UNKNOWN` elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
    except FileNotFoundError:
        return UNKNOWN
