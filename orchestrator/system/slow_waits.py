"""Lines on standard error about waits that take longer than usual."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

#: Seconds after which a wait for another process is reported.
NOTICE_AFTER: Final = 3.0

#: By default its warnings are printed on standard error.
logger: Final = logging.getLogger("orchestrator.waiting")


@contextmanager
def warn_if_slow(describe: Callable[[], str], after: float) -> Iterator[None]:
    """Report what is waited for if the body takes longer than `after` seconds; `describe` is called then."""
    timer = asyncio.get_running_loop().call_later(after, lambda: logger.warning("waiting for %s", describe()))
    try:
        yield
    finally:
        timer.cancel()
