"""Points in time as arguments: a position of the log, a time, an age, a checkpoint, or `now`."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Final

from orchestrator.api.topics.history import StateHistory
from orchestrator.domain.settings.quantities import parse_duration
from orchestrator.errors import RefusedError

_POSITION: Final = re.compile(r"[0-9]{1,18}")
_CHECKPOINT: Final = re.compile(r"[^/]+/[0-9]+")
_LONGEST: Final = 100 * 366 * 86400.0  # seconds
_REMEDY: Final = (
    "write a position such as 120, a time such as 2026-01-02T03:04, an age such as 2h, the id of a checkpoint, or now"
)


async def resolve_position(past: StateHistory, text: str) -> int:
    """Return the position of a point in time; RefusedError for other text."""
    if text == "now":
        return await past.position()
    if _POSITION.fullmatch(text):
        return int(text)
    instant = parse_instant(text, time.time())
    if instant is not None:
        return await past.position_at(instant)
    found = await past.position_of(text)
    if found is None and _CHECKPOINT.fullmatch(text):
        raise RefusedError(f"there is no checkpoint {text!r}", "`council checkpoint list` lists them")
    if found is None:
        raise RefusedError(f"{text!r} is not a point in time", _REMEDY)
    return found


def parse_instant(text: str, now: float) -> float | None:
    """Return the instant (wall-clock seconds) of a time in ISO 8601 or so long before `now`; None for other text.

    A time that names no zone is one of the local zone.
    """
    try:
        return now - parse_duration(text.removesuffix("ago").rstrip(), longest=_LONGEST)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
