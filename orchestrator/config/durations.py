"""Lengths of time as people write them: `500ms`, `2s`, `30m`, `1h30m`, `2d`."""

from __future__ import annotations

import re
from typing import Any, Final

from orchestrator.config.problems import kind

LONGEST: Final = 30 * 86400.0
"""The longest duration that is taken, in seconds."""

_SECONDS: Final = (86400.0, 3600.0, 60.0, 1.0, 0.001)
_DURATION = re.compile("".join(f"(?:([0-9]{{1,12}}){unit})?" for unit in ("d", "h", "m", "s", "ms")))
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
