"""Backoff of failed tasks, and cooldown of adapters."""

from __future__ import annotations

from math import isfinite

from tenacity import AsyncRetrying, RetryCallState
from tenacity.wait import wait_exponential, wait_random_exponential

from orchestrator.domain.settings.run_settings import Backoff


def retry_delay(backoff: Backoff, failures: int) -> float:
    """Return the seconds to wait after the `failures`-th failure (from 1).

    With `jitter`, each wait is uniformly distributed between 0 and its full length ("full jitter", Brooker, AWS
    Architecture Blog, 2015), so that tasks that failed together are not retried together.
    """
    kind = wait_random_exponential if backoff.jitter else wait_exponential
    policy = kind(multiplier=backoff.initial, max=backoff.max, exp_base=backoff.factor)
    state = RetryCallState(retry_object=AsyncRetrying(), fn=None, args=(), kwargs={})
    state.attempt_number = failures
    return policy(state)


#: The cooldown, in seconds, of an adapter that reports no end of its limit, or repeatedly a wrong one.
COOLDOWN_BACKOFF = Backoff(initial=30.0, factor=2.0, max=3600.0, jitter=False)
#: The longest accepted cooldown in seconds; the longest known limits are weekly.
MAX_COOLDOWN = 8 * 86400.0


def compute_cooldown_end(now: float, until: float | None, cooldowns: int) -> float:
    """Return the end of an adapter's cooldown, its `cooldowns`-th in a row (from 1).

    `until` is the time that the adapter reported, if any. After repeated cooldowns it is never used before the backoff
    ends, so that wrong times do not cause a loop of rate-limited attempts.
    """
    if until is None or not isfinite(until):
        return now + retry_delay(COOLDOWN_BACKOFF, cooldowns)
    least = retry_delay(COOLDOWN_BACKOFF, cooldowns - 1) if cooldowns > 1 else 1.0
    return now + min(max(until - now, least), MAX_COOLDOWN)
