"""Backoff of failed tasks, and cooldown of adapters."""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite

from tenacity import DoSleep, RetryCallState, RetryError, Retrying, retry_if_result, stop_after_attempt
from tenacity.wait import wait_exponential, wait_random_exponential

from orchestrator.domain.settings.failures import FailureClass, FailurePolicy, get_failure_policy
from orchestrator.domain.settings.run_settings import Backoff


def retry_delay(backoff: Backoff, failures: int) -> float:
    """Return the delay in seconds after the `failures`-th failure (from 1).

    With `jitter`, each delay is uniformly distributed between 0 and its full length ("full jitter", Brooker, AWS
    Architecture Blog, 2015), so that tasks that failed together are not retried together.
    """
    return _make_wait(backoff)(_state_after(Retrying(), failures))


def decide_retry(
    failure: FailureClass, failures: int, attempts: int, retried: Collection[FailureClass], backoff: Backoff
) -> float | None:
    """Return the seconds from the `failures`-th failure to the next attempt, or None.

    `attempts` is the maximum number of attempts, `retried` are the failure classes to retry. The attempts may run in
    different processes, so only the decision is made here.
    """
    retrying = Retrying(
        retry=retry_if_result(lambda failed: get_failure_policy(failed, retried) is FailurePolicy.RETRY),
        stop=stop_after_attempt(attempts),
        wait=_make_wait(backoff),
    )
    retrying.begin()
    state = _state_after(retrying, failures)
    state.set_result(failure)
    try:
        action = retrying.iter(state)
    except RetryError:  # no attempts remain
        return None
    return float(action) if isinstance(action, DoSleep) else None


def _make_wait(backoff: Backoff) -> wait_exponential:
    kind = wait_random_exponential if backoff.jitter else wait_exponential
    return kind(multiplier=backoff.initial, max=backoff.max, exp_base=backoff.factor)


def _state_after(retrying: Retrying, attempts: int) -> RetryCallState:
    state = RetryCallState(retry_object=retrying, fn=None, args=(), kwargs={})
    state.attempt_number = attempts
    return state


#: The cooldown in seconds of an adapter that reports no end of its limit, or repeatedly a wrong one.
COOLDOWN_BACKOFF = Backoff(initial=30.0, factor=2.0, max=3600.0, jitter=False)
#: The longest accepted cooldown in seconds; the longest known limits are weekly.
MAX_COOLDOWN = 8 * 86400.0


def compute_cooldown_end(now: float, until: float | None, cooldowns: int) -> float:
    """Return the end of an adapter's cooldown.

    `cooldowns` is the number of consecutive cooldowns, including this one.

    `until` is the end that the adapter reported, if any. Repeated cooldowns last at least as long as the backoff, so
    that wrong times do not cause a loop of rate-limited attempts.
    """
    if until is None or not isfinite(until):
        return now + retry_delay(COOLDOWN_BACKOFF, cooldowns)
    least = retry_delay(COOLDOWN_BACKOFF, cooldowns - 1) if cooldowns > 1 else 1.0
    return now + min(max(until - now, least), MAX_COOLDOWN)
