"""Failure classes of attempts, and the policy for each class, as tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum


class FailureClass(StrEnum):
    """The reason for an attempt that did not land."""

    TRANSIENT = "transient"  #: a temporary failure outside the program
    OVERLOADED = "overloaded"  #: the service behind the program is overloaded
    RATE_LIMITED = "rate_limited"  #: the account is rate-limited until some time
    AUTH = "auth"  #: the program is not logged in, or its key was rejected
    MISSING = "missing"  #: the program is no longer installed
    INVALID = "invalid"  #: the program can't run with its configuration
    REFUSED = "refused"  #: the program, or a check of its work, refused
    LIMIT = "limit"  #: the program's own limit on turns or money
    BUDGET = "budget"  #: the budget of the session, the task or the run is used up
    SETUP_FAILED = "setup_failed"  #: the setup of its worktree failed
    CRASHED = "crashed"  #: the program failed
    NO_CHANGE = "no_change"  #: the program succeeded and changed nothing
    CONFLICT = "conflict"  #: its work has merge conflicts
    CHECKS_FAILED = "checks_failed"  #: its work merges, but checks fail on the merged tree
    OUT_OF_SCOPE = "out_of_scope"  #: its work changes paths that the task does not own
    INVALID_HANDOFF = "invalid_handoff"  #: the handoff of its phase is missing or invalid, also after a repair
    REJECTED = "rejected"  #: a review or a user rejected its work too often
    TIMEOUT = "timeout"  #: it exceeded its time limit
    IDLE_TIMEOUT = "idle_timeout"  #: it had no output and no file changes for too long


class FailurePolicy(StrEnum):
    """The action after a failure."""

    RETRY = "retry"  #: another attempt after a backoff, if attempts are left
    COOLDOWN = "cooldown"  #: the adapter is in cooldown; the attempt does not count
    DISABLE = "disable"  #: the adapter is disabled until a user enables it; the attempt does not count
    FAIL = "fail"  #: the task fails


#: The default of `retry_on`.
RETRIED_BY_DEFAULT = frozenset(
    {
        FailureClass.TRANSIENT,
        FailureClass.OVERLOADED,
        FailureClass.CRASHED,
        FailureClass.TIMEOUT,
        FailureClass.IDLE_TIMEOUT,
    }
)

_FIXED: Mapping[FailureClass, FailurePolicy] = {
    FailureClass.RATE_LIMITED: FailurePolicy.COOLDOWN,
    FailureClass.AUTH: FailurePolicy.DISABLE,
    FailureClass.MISSING: FailurePolicy.DISABLE,
}

#: The classes that `retry_on` may name: those without a fixed policy or a setting of their own.
RETRYABLE = (
    frozenset(FailureClass)
    - _FIXED.keys()
    - {
        FailureClass.CONFLICT,
        FailureClass.CHECKS_FAILED,
        FailureClass.OUT_OF_SCOPE,
        FailureClass.REJECTED,
    }
)


def get_failure_policy(failure: FailureClass, retried: Collection[FailureClass]) -> FailurePolicy:
    """Return the policy for a failure; `retried` are the classes to retry."""
    return _FIXED.get(failure) or (FailurePolicy.RETRY if failure in retried else FailurePolicy.FAIL)
