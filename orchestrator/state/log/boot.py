"""Identify the current boot of the machine: data that was only in memory is lost at a reboot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

#: The id on systems without a boot id; all of their boots count as one.
UNKNOWN: Final = "0" * 32


@cache
def boot_id() -> str:
    """Return the boot id of Linux, 32 hexadecimal digits; `UNKNOWN` on other systems."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
    except FileNotFoundError:
        return UNKNOWN
