"""Warn about waits that take longer than usual."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

#: Seconds after which a wait for another process is reported.
NOTICE_AFTER: Final = 3.0

#: By default, its warnings are printed to standard error.
logger: Final = logging.getLogger("orchestrator.waiting")


@contextmanager
def warn_if_slow(describe: Callable[[], str], after: float) -> Iterator[None]:
    """Log the activity that `describe` returns if the block exceeds `after` seconds."""
    timer = asyncio.get_running_loop().call_later(after, lambda: logger.warning("waiting for %s", describe()))
    try:
        yield
    finally:
        timer.cancel()
