"""Format points in time."""

from __future__ import annotations

from datetime import UTC, datetime


def format_local_time(instant: float) -> str:
    """Format a point in time (seconds since the epoch) in the local time zone."""
    return f"{datetime.fromtimestamp(instant, UTC).astimezone():%Y-%m-%d %H:%M:%S}"
