"""Instants as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def format_local_time(instant: float) -> str:
    """Return an instant (seconds since the epoch) as a person here reads it."""
    return f"{datetime.fromtimestamp(instant, UTC).astimezone():%Y-%m-%d %H:%M:%S}"
