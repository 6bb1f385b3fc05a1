"""Classify failures by HTTP status or message, and shorten their reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from adapters.bridges.http_status import failure_name_for_status
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass

MAX_REASON_CHARS: Final = 300
"""Maximum characters of a program's message to show."""


def failure_class_for_status(status: int) -> FailureClass | None:
    """Return the failure class of an HTTP status, or None if it is not a failure."""
    name = failure_name_for_status(status)
    return None if name is None else FailureClass(name)


def match_failure_class(text: str, patterns: Mapping[FailureClass, re.Pattern[str]]) -> FailureClass | None:
    """Return the first class whose pattern matches the text, or None."""
    return next((failure for failure, pattern in patterns.items() if pattern.search(text)), None)


def make_failure(failure: FailureClass, reason: str, log_in: str, until: float | None = None) -> Failed:
    """Return a failure; the reason for a login failure includes `log_in`."""
    return Failed(failure, f"{reason.rstrip('.')}: {log_in}" if failure is FailureClass.AUTH else reason, until)


def one_line(text: str) -> str:
    """Return the part of the text to show, on one line."""
    return " ".join(text.split())[:MAX_REASON_CHARS]
