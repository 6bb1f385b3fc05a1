"""Map HTTP statuses to failure classes, for adapters and bridges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Statuses other than invalid requests (RFC 9110; proxies use 499 after a client disconnects).
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
    """Return the failure class of an HTTP status, or None if it is not a failure."""
    if status >= 500:
        return "overloaded"
    return _STATUSES.get(status, "invalid") if status >= 400 else None
