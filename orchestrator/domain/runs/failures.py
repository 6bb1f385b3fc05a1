"""The ways in which an attempt fails, and what each of them leads to. Policy is data: one table, no branches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum


class FailureClass(StrEnum):
    """Why an attempt did not bring its work onto the target."""

    TRANSIENT = "transient"  #: something around the program failed that may work the next time
    OVERLOADED = "overloaded"  #: the service behind the program is too busy
    RATE_LIMITED = "rate_limited"  #: the account may not be used before some instant
    AUTH = "auth"  #: the program is not logged in, or its key is not accepted
    MISSING = "missing"  #: the program is not on the machine any more
    INVALID = "invalid"  #: the program can't be run as it is configured
    REFUSED = "refused"  #: the program, or what checks its work, declines it
    LIMIT = "limit"  #: the program's own limit on turns or money
    BUDGET = "budget"  #: it used up what its session, its task or the run may
    SETUP_FAILED = "setup_failed"  #: what was to make its worktree ready for work did not
    CRASHED = "crashed"  #: it ended with an error
    NO_CHANGE = "no_change"  #: it ended well and changed nothing
    CONFLICT = "conflict"  #: its work does not merge
    CHECKS_FAILED = "checks_failed"  #: its work merges, but the merged tree does not pass
    OUT_OF_SCOPE = "out_of_scope"  #: its work merges, but changes what the task does not own
    INVALID_HANDOFF = "invalid_handoff"  #: what its phase is to hand over is missing or wrong, also after a repair
    REJECTED = "rejected"  #: a review, or a person, sent its work back more often than is allowed
    TIMEOUT = "timeout"  #: it ran for longer than its limit
    IDLE_TIMEOUT = "idle_timeout"  #: for longer than its limit it neither said nor changed anything


class FailurePolicy(StrEnum):
    """What a failure leads to."""

    RETRY = "retry"  #: another attempt after a backoff, as long as there are attempts left
    PARK = "park"  #: nothing of this adapter starts for a while; the attempt is not counted
    CLOSE = "close"  #: nothing of this adapter starts until a person has seen to it; the attempt is not counted
    FAIL = "fail"  #: the task is over


#: The classes that are retried unless a task says otherwise (`retry_on`).
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
    FailureClass.RATE_LIMITED: FailurePolicy.PARK,
    FailureClass.AUTH: FailurePolicy.CLOSE,
    FailureClass.MISSING: FailurePolicy.CLOSE,
}

#: What a task may name under `retry_on`: whatever is not decided otherwise.
RETRYABLE = (
    frozenset(FailureClass)
    - _FIXED.keys()
    - {
        FailureClass.CHECKS_FAILED,
        FailureClass.OUT_OF_SCOPE,
        FailureClass.REJECTED,
    }
)


def get_failure_policy(failure: FailureClass, retried: Collection[FailureClass]) -> FailurePolicy:
    """Return what a failure leads to where the classes in `retried` are worth another attempt."""
    return _FIXED.get(failure) or (FailurePolicy.RETRY if failure in retried else FailurePolicy.FAIL)
