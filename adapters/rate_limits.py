"""Extract the reset time of an account's usage limit from a program's message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo

from adapters.failures import one_line
from adapters.json_output import as_count, as_text, parse_object
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_AMOUNT: Final = (
    r"[0-9]{1,9}(?:\.[0-9]{1,12})?\s?"
    r"(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)"
)
#: `try again in 2 hours 5 minutes`, `Suggested retry after 3600s`, `will reset after 5h12m20s`.
_AFTER: Final = re.compile(
    rf"\b(?:retry|again|resets?|available)\s+(?:after|in)\s+(?P<amounts>{_AMOUNT}(?:(?:,|\sand)?\s?{_AMOUNT})*)",
    re.IGNORECASE,
)
_PART: Final = re.compile(r"([0-9.]+)\s?(ms|milli|[smhd])", re.IGNORECASE)
#: `usage limit reached|1760000000`.
_EPOCH: Final = re.compile(r"(?:\||\b(?:at|until)\s)(?P<epoch>1[0-9]{9})\b")
_ISO: Final = re.compile(
    r"\b(?:at|after|until|resets|again)\s"
    r"(?P<iso>20[0-9]{2}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?"
    r"(?:Z|[+-][0-9]{2}:?[0-9]{2})?)"
)
#: `try again at Mar 3rd, 2026 4:05 PM`, `resets 3pm (Europe/Berlin)`: in local time unless a time zone follows.
_CLOCK: Final = re.compile(
    r"\b(?:(?:again|resets?)\s(?:at\s|on\s)?|until\s)"
    r"(?:(?P<month>Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?\s(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?"
    r"(?:,\s(?P<year>20[0-9]{2}))?(?:,|\sat)?\s)?"
    r"(?P<hour>1[0-2]|0?[0-9])(?::(?P<minute>[0-5][0-9]))?\s?(?P<half>[ap])\.?m\b"
    r"(?:\.?\s\((?P<zone>[A-Za-z_]+(?:/[\w+-]+)*)\))?",
    re.IGNORECASE,
)
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
#: A time without a date that is this many seconds in the past means tomorrow. Such times have no seconds, and may be
# read late.
_PAST: Final = timedelta(hours=1)


def limit_reset_time(text: str, now: float) -> float | None:
    """Return the last reset time of a limit in the text (wall-clock seconds), or None."""
    found = sorted(_named(text, now))
    return found[-1][1] if found else None


def with_reset_time(failed: Failed | None, now: float) -> Failed | None:
    """Return a failure; a limit without a reset time gets the one in its reason."""
    if failed is None or failed.failure is not FailureClass.RATE_LIMITED or failed.until is not None:
        return failed
    return replace(failed, until=limit_reset_time(failed.reason, now))


def parse_limit(log: str) -> Failed | None:
    """Return the limit that a plugin of ours reported in a log before it ended the CLI, or None.

    The line is a JSON object with the `type` council.limited, a `message`, and `until` in milliseconds.
    """
    values = (parse_object(line) for line in log.splitlines()[::-1] if "council.limited" in line)
    found = next((value for value in values if value and value.get("type") == "council.limited"), None)
    if found is None:
        return None
    until, message = as_count(found.get("until")), one_line(as_text(found.get("message")))
    return Failed(
        FailureClass.RATE_LIMITED, message or "the account reached its limit", until / 1000 if until else None
    )


def _named(text: str, now: float) -> Iterator[tuple[int, float]]:
    """Yield each instant with its position in the text."""
    for match in _AFTER.finditer(text):
        parts = _PART.findall(match["amounts"])
        yield match.start(), now + sum(float(amount) * _UNITS[_unit(name)] for amount, name in parts)
    for match in _EPOCH.finditer(text):
        yield match.start(), float(match["epoch"])
    for match in _ISO.finditer(text):
        try:
            instant = datetime.fromisoformat(match["iso"])
        except ValueError:
            continue
        yield match.start(), (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()
    for match in _CLOCK.finditer(text):
        if (on_clock := _on_clock(match, now)) is not None:
            yield match.start(), on_clock


def _unit(name: str) -> str:
    return "ms" if name.lower() in {"ms", "milli"} else name[0].lower()


def _on_clock(match: re.Match[str], now: float) -> float | None:
    zone: tzinfo | None = None
    try:
        zone = ZoneInfo(match["zone"]) if match["zone"] else None
        today = datetime.fromtimestamp(now, zone)
        hour = int(match["hour"]) % 12 + (12 if match["half"].lower() == "p" else 0)
        then = today.replace(hour=hour, minute=int(match["minute"] or 0), second=0, microsecond=0)
        if match["month"] is None:
            then += timedelta(days=1) if then < today - _PAST else timedelta()
        else:
            month, year = _MONTHS.index(match["month"].lower()) + 1, int(match["year"] or today.year)
            then = then.replace(year=year, month=month, day=int(match["day"]))
            if match["year"] is None and then < today - timedelta(days=30):
                then = then.replace(year=year + 1)
        # Programs print no seconds: a session at the start of that minute would meet the limit again.
        return (then + timedelta(minutes=1) if match["minute"] else then).timestamp()
    except (ValueError, OverflowError, OSError, KeyError):  # no such zone or date
        return None
