"""What an HTTP status means: the one table for adapters and bridges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: What is not just a wrong request, by its status (RFC 9110; 499 is said by proxies whose client went away).
_STATUSES: Final[Mapping[int, str]] = {
    401: "auth",
    402: "auth",
    403: "auth",
    408: "transient",
    413: "limit",
    429: "rate_limited",
    499: "transient",
}


def failure_name_for_status(status: int) -> str | None:
    """Return the class of a failure, by name, by an HTTP status; None for one that is no failure."""
    if status >= 500:
        return "overloaded"
    return _STATUSES.get(status, "invalid") if status >= 400 else None
