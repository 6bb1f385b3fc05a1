"""How long to wait before a failed task is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

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


#: How long an adapter is parked that does not say until when, or says so wrongly time and again; seconds.
COOLDOWN_BACKOFF = Backoff(initial=30.0, factor=2.0, max=3600.0, jitter=False)
#: No account is believed to be limited for longer; the longest known limits are weekly.
MAX_COOLDOWN = 8 * 86400.0


def compute_cooldown_end(now: float, until: float | None, cooldowns: int) -> float:
    """Return when an adapter may be tried again that was parked for the `cooldowns`-th time in a row (from 1).

    `until` is what it said, if it did. An adapter whose word proves wrong is believed less each time: it is
    never tried sooner than the backoff allows, so that no limit is run into in a loop.
    """
    if until is None or not isfinite(until):
        return now + retry_delay(COOLDOWN_BACKOFF, cooldowns)
    least = retry_delay(COOLDOWN_BACKOFF, cooldowns - 1) if cooldowns > 1 else 1.0
    return now + min(max(until - now, least), MAX_COOLDOWN)
