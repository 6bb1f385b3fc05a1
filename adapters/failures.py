"""What failed, by the HTTP status or by the words that a program passes on from a model's API, and how it is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from adapters.bridges.http_status import failure_name_for_status
from orchestrator.domain.runs.failures import FailureClass

MAX_REASON_CHARS: Final = 300
"""Characters of what a program says that are told."""


def failure_class_for_status(status: int) -> FailureClass | None:
    """Return the class of a failure by an HTTP status; None for one that is no failure."""
    name = failure_name_for_status(status)
    return None if name is None else FailureClass(name)


def match_failure_class(text: str, words: Mapping[FailureClass, re.Pattern[str]]) -> FailureClass | None:
    """Return the first class the words of which a text has; None if it has none of them."""
    return next((failure for failure, pattern in words.items() if pattern.search(text)), None)


def one_line(text: str) -> str:
    """Return as much of a text as is told, on one line."""
    return " ".join(text.split())[:MAX_REASON_CHARS]
