"""Parse and format durations and sizes, such as `1h30m`, `500KB` and `2GiB`."""

from __future__ import annotations

import re
from typing import Any, Final

from orchestrator.domain.wording import describe_value
from orchestrator.errors import InvalidValue

MAX_DURATION: Final = 30 * 86400.0
"""The longest duration in seconds."""
MAX_RETENTION: Final = 3650 * 86400.0
"""The longest retention in seconds."""

_SECONDS: Final = (86400.0, 3600.0, 60.0, 1.0, 0.001)
_DURATION = re.compile("".join(f"(?:([0-9]{{1,12}}){unit})?" for unit in ("d", "h", "m", "s", "ms")))
_SIZE = re.compile(r"([0-9]{1,16})(K|M|G|T)?(i)?B")
_COUNT = re.compile(r"([0-9]{1,16})(k|M)?")
_THOUSANDS: Final = {None: 1, "k": 1000, "M": 1_000_000}
MAX_COUNT: Final = 10**15
MAX_DOLLARS: Final = 1_000_000
_POWERS: Final = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}
MAX_SIZE_BYTES: Final = 1 << 50  # bytes
# The same formats for JSON Schema, as searches; only the parsers check ranges.
DURATION_PATTERN: Final = f"^(?=.*[1-9]){_DURATION.pattern}$"
OPTIONAL_DURATION_PATTERN: Final = f"^off$|{DURATION_PATTERN}"
SIZE_PATTERN: Final = f"^(?=.*[1-9]){_SIZE.pattern}$"
COUNT_PATTERN: Final = f"^(?=.*[1-9]){_COUNT.pattern}$"
_REMEDY: Final = "write whole numbers with units, such as 500ms, 2s, 30m, 1h30m or 2d"


def parse_duration(value: Any, *, longest: float = MAX_DURATION) -> float:
    """Return seconds; raise ValueError if not positive or longer than `longest`."""
    if type(value) is int and value > 0:
        remedy = f"add its unit, such as {value}s or {value}m"
        raise InvalidValue(f"a duration can't be the bare number {value}", remedy)
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None or not value:
        raise InvalidValue(f"a duration can't be {describe_value(value)}", _REMEDY)
    seconds = sum(int(count) * unit for count, unit in zip(match.groups(), _SECONDS, strict=True) if count)
    if seconds <= 0:
        raise InvalidValue(f"the duration {value} is zero", "write a positive one, such as 30m")
    if seconds > longest:
        raise InvalidValue(f"the duration {value} is too long", f"write at most {longest / 86400:.0f}d")
    return seconds


def format_duration(seconds: float | None) -> str:
    """Format a duration for `parse_optional_duration`, rounded to milliseconds."""
    if seconds is None:
        return "off"
    left, parts = round(seconds * 1000), []
    for unit, length in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, length)
        parts += [f"{count}{unit}"] if count else []
    return "".join(parts) or "0s"


def parse_optional_duration(value: Any, *, longest: float = MAX_DURATION) -> float | None:
    """Return seconds, or None for `off`; raise InvalidValue if invalid."""
    if value == "off":
        return None
    try:
        return parse_duration(value, longest=longest)
    except InvalidValue as error:
        raise InvalidValue(error.message, f"{error.remedy}, or off") from None


def check_seconds(seconds: float, *, longest: float = MAX_DURATION) -> float:
    """Validate seconds from Python; raise ValueError if not in (0, `longest`]."""
    if not 0 < seconds <= longest:
        days = f"{longest / 86400:.0f} days"
        raise InvalidValue(f"a duration can't be {seconds} s", f"use more than 0 and at most {longest:.0f} s, {days}")
    return float(seconds)


def parse_count(value: Any) -> int:
    """Parse a count, such as `2k` or `1M`; raise ValueError if not positive."""
    if type(value) is int and 0 < value <= MAX_COUNT:
        return value
    match = _COUNT.fullmatch(value) if isinstance(value, str) else None
    if match is None or not value:
        raise InvalidValue(
            f"a count can't be {describe_value(value)}", "write a positive whole number, such as 200000, 200k or 2M"
        )
    count = int(match[1]) * _THOUSANDS[match[2]]
    if not 0 < count <= MAX_COUNT:
        raise InvalidValue(f"the count {value} is out of range", f"write a positive one, at most {MAX_COUNT}")
    return count


def check_bytes(size: int) -> int:
    """Validate a size passed from Python; raise ValueError if it is out of range."""
    if not 0 < size <= MAX_SIZE_BYTES:
        raise InvalidValue(f"the size {size} is out of range", f"use more than 0 and at most {MAX_SIZE_BYTES} bytes")
    return size


def format_size(size: int) -> str:
    """Format a size for `parse_size`, in the largest unit without a fraction."""
    forms = [(size, "B")]
    for base, mark in ((1000, ""), (1024, "i")):
        forms += [
            (size // base**power, f"{unit}{mark}B")
            for unit, power in _POWERS.items()
            if unit and not size % base**power
        ]
    count, unit = min(forms)
    return f"{count}{unit}"


def parse_size(value: Any) -> int:
    """Parse bytes (1KB is 1000, 1KiB is 1024); raise ValueError if invalid."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise InvalidValue(
            f"a size can't be {describe_value(value)}", "write a whole number with a unit, such as 500KB, 50MB or 2GiB"
        )
    size: int = int(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]]
    if not 0 < size <= MAX_SIZE_BYTES:
        raise InvalidValue(f"the size {value} is out of range", "write a positive one, at most 1024TiB")
    return size


def format_size_short(size: int) -> str:
    """Format bytes for people, rounded to two or three digits: `0B`, `4.1KB`, `250MB`."""
    shown, unit = float(size), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if shown < 999.5:
            break
        shown, unit = shown / 1000, larger
    digits = 1 if unit != "B" and shown < 9.95 else 0
    return f"{shown:.{digits}f}{unit}"
