"""How long to wait before a failed task is tried again."""

from __future__ import annotations

from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState
from tenacity.wait import wait_exponential, wait_random_exponential


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff: `initial` seconds, times `factor` each time, at most `max` seconds.

    With `jitter` the wait is drawn evenly between nothing and that value ("full jitter", Brooker, AWS
    Architecture Blog, 2015), so that tasks that failed together don't come back together.
    """

    initial: float
    factor: float
    max: float
    jitter: bool


def retry_delay(backoff: Backoff, failures: int) -> float:
    """Return the seconds to wait after the `failures`-th failure (from 1)."""
    kind = wait_random_exponential if backoff.jitter else wait_exponential
    policy = kind(multiplier=backoff.initial, max=backoff.max, exp_base=backoff.factor)
    state = RetryCallState(retry_object=AsyncRetrying(), fn=None, args=(), kwargs={})
    state.attempt_number = failures
    return policy(state)
