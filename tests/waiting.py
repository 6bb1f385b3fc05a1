"""Waiting for a process to get somewhere: polls, because there is nothing to be told by."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], limit: float = 20.0) -> None:
    """Return as soon as the condition holds; fail after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
