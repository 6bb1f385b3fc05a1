"""Times of the log as a person may write them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from orchestrator.cli.commands.state.history import parse_instant
from orchestrator.state.documents.log_reader import find_newest_until

NOW = 1767323045.0  # 2026-01-02 03:04:05 UTC


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set a zone two hours ahead of UTC (POSIX counts the other way)."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EET-2")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2h", NOW - 7200),
        ("5m ago", NOW - 300),
        ("1d12h", NOW - 129_600),
        ("400d", NOW - 400 * 86400),
        ("2026-01-02T03:04:05Z", NOW),
        ("2026-01-02 03:04:05.5+00:00", NOW + 0.5),
        ("2026-01-02T05:04:05", NOW),
        ("2026-01-02", NOW - (5 * 3600 + 4 * 60 + 5)),
    ],
)
def test_times_are_parsed(zone: None, text: str, instant: float) -> None:
    """ISO 8601, in the local zone by default, or an age."""
    assert parse_instant(text, NOW) == instant


@pytest.mark.parametrize("text", ["", "ago", "yesterday", "2 h", "-2h", "2026-13-01", "20260102-030405-ab12/1", "0s"])
def test_invalid_time_is_rejected(text: str) -> None:
    """Such as a checkpoint id."""
    assert parse_instant(text, NOW) is None


def test_instant_before_year_one_is_handled(zone: None) -> None:
    """The system may not be able to convert the first day of the calendar."""
    assert parse_instant("0001-01-01", NOW) in {None, -62135604000.0}


@pytest.mark.parametrize(
    ("instant", "position"), [(0.0, None), (10.0, 1), (15.0, 4), (20.0, 4), (25.0, 4), (29.9, 4), (30.0, 5)]
)
def test_jumping_times_use_the_newest_position(instant: float, position: int | None) -> None:
    """The clock showed 10, 20, was set back to 12, and continued."""
    times = [(1, 10.0), (2, 20.0), (3, 12.0), (4, 15.0), (5, 30.0)]
    assert find_newest_until(times, instant) == position
