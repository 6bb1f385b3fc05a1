"""What failed, by the HTTP status or by the words that a program passes on from a model's API, and how it is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from orchestrator.domain.failures import FailureClass

LONGEST_REASON: Final = 300
"""Characters of what a program says that are told."""

#: What is not just a wrong request, by its status (RFC 9110; 499 is said by proxies whose client went away).
_STATUSES: Final[Mapping[int, FailureClass]] = {
    401: FailureClass.AUTH,
    402: FailureClass.AUTH,
    403: FailureClass.AUTH,
    408: FailureClass.TRANSIENT,
    413: FailureClass.LIMIT,
    429: FailureClass.RATE_LIMITED,
    499: FailureClass.TRANSIENT,
}


def class_of_status(status: int) -> FailureClass | None:
    """Return the class of a failure by an HTTP status; None for one that is no failure."""
    if status >= 500:
        return FailureClass.OVERLOADED
    return _STATUSES.get(status, FailureClass.INVALID) if status >= 400 else None


def class_in(text: str, words: Mapping[FailureClass, re.Pattern[str]]) -> FailureClass | None:
    """Return the first class the words of which a text has; None if it has none of them."""
    return next((failure for failure, pattern in words.items() if pattern.search(text)), None)


def one_line(text: str) -> str:
    """Return as much of a text as is told, on one line."""
    return " ".join(text.split())[:LONGEST_REASON]
