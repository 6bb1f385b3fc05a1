"""Lengths of time and sizes as people write them: `500ms`, `2s`, `1h30m`, `2d`; `500KB`, `50MB`, `2GiB`."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from orchestrator.config.problems import kind

LONGEST: Final = 30 * 86400.0
"""The longest duration that is taken, in seconds."""

_SECONDS: Final = (86400.0, 3600.0, 60.0, 1.0, 0.001)
_DURATION = re.compile("".join(f"(?:([0-9]{{1,12}}){unit})?" for unit in ("d", "h", "m", "s", "ms")))
_SIZE = re.compile(r"([0-9]{1,12})(K|M|G|T)?(i)?B")
_POWERS: Final = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}
LARGEST_SIZE: Final = 1 << 50  # bytes
_REMEDY: Final = "write whole numbers with units, as in 500ms, 2s, 30m, 1h30m or 2d"


def parse_duration(value: Any) -> float:
    """Return the seconds of a duration; ValueError, with the remedy, for anything but a positive one up to 30 days."""
    if type(value) is int and value > 0:
        remedy = f"add its unit, as in {value}s or {value}m"
        raise ValueError(f"a duration can't be the bare number {value}: {remedy}")
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None or not value:
        raise ValueError(f"a duration can't be {kind(value)}: {_REMEDY}")
    seconds = sum(int(count) * unit for count, unit in zip(match.groups(), _SECONDS, strict=True) if count)
    if seconds <= 0:
        raise ValueError(f"the duration {value} is zero: write a positive one, as in 30m")
    if seconds > LONGEST:
        raise ValueError(f"the duration {value} is too long: write at most 30d")
    return seconds


def parse_silence(value: Any) -> float:
    """Return the seconds of a duration, or infinity for `off`; ValueError otherwise."""
    if value == "off":
        return math.inf
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{error}, or off") from None


def parse_size(value: Any) -> int:
    """Return the bytes of a size (KB, MB, GB, TB are powers of 1000, KiB and so on of 1024); ValueError otherwise."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"a size can't be {kind(value)}: write a whole number with a unit, as in 500KB, 50MB or 2GiB")
    size: int = int(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]]
    if not 0 < size <= LARGEST_SIZE:
        raise ValueError(f"the size {value} is out of range: write a positive one, at most 1024TiB")
    return size
