"""The wait that a forge asks for by headers."""

from __future__ import annotations

import pytest

from orchestrator.forges.http import rate_limit_wait

NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (200, {"retry-after": "5"}, None),
        (429, {"retry-after": "5"}, 5.0),
        (429, {"retry-after": "²"}, 60.0),
        (429, {"retry-after": "soon"}, 60.0),
        (429, {"retry-after": "9" * 400}, 86_400.0),
        (403, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1000030"}, 31.0),
        (403, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1"}, 1.0),
        (403, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1" + "0" * 300}, 86_400.0),
        (403, {"x-ratelimit-remaining": "7", "x-ratelimit-reset": "1000030"}, None),
    ],
)
def test_rate_limit_wait(status: int, headers: dict[str, str], expected: float | None) -> None:
    """Odd values are limited, or replaced by a minute."""
    assert rate_limit_wait(status, headers, NOW) == expected
