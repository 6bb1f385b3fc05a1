"""Claims: which orchestrator may work on a task, and when another takes over.

A claim is a lease on a task of a run. It names its owner and carries an epoch, which increases with each change of
owner, so that writes of earlier owners are rejected (a fencing token; see Kleppmann, "How to do distributed locking",
2016). An orchestrator sends one heartbeat for all of its claims, in its own record. The time of a takeover only affects
efficiency; the epoch guarantees that only the writes of one owner are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import reduce

from pydantic import Field

from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.statuses import ReleaseReason
from orchestrator.domain.settings.run_settings import CoordinationSettings


class Role(StrEnum):
    """Whether an orchestrator may override the claims of other orchestrators."""

    LEADER = "leader"  #: overrides claims of workers
    WORKER = "worker"  #: waits for other claims


class OrchestratorIdentity(StoredDocument):
    """The identity of an orchestrator: a process that is active in a run."""

    id: str
    """Its name, unique in the run."""
    host: str
    boot: str
    """The boot id of the machine."""
    pid: int
    started: int | None
    """The start time of the process in kernel ticks since boot; None if unknown."""
    role: Role = Role.WORKER
    shares: bool = True
    """Whether it claims its tasks; if not, no other orchestrator can work on the run."""
    labels: tuple[str, ...] = ()
    """The labels of its machine."""


class ClaimCounters(StoredDocument):
    """Counters of an orchestrator's claims."""

    # Descriptions instead of docstrings: extracting docstrings would dominate the import time of this module.
    claims: int = Field(default=0, description="Tasks claimed.")
    conflicts: int = Field(default=0, description="Claims lost to another owner.")
    renewals: int = Field(default=0, description="Heartbeats.")
    takeovers: int = Field(default=0, description="Tasks taken over from a dead orchestrator, or by override.")
    retries: int = Field(default=0, description="Claims that were not the first of their task.")
    sweeps: int = Field(default=0, description="Searches for dead orchestrators.")
    refused: int = Field(default=0, description="Writes of this process that were rejected after a takeover.")

    def plus(self, **more: int) -> ClaimCounters:
        """Return the counters plus `more`, by name."""
        return self.model_copy(update={name: getattr(self, name) + count for name, count in more.items()})


def sum_counters(counters: Iterable[ClaimCounters]) -> ClaimCounters:
    """Return the sum of the counters of several orchestrators."""
    return reduce(lambda total, more: total.plus(**more.model_dump()), counters, ClaimCounters())


class OrchestratorLease(StoredDocument):
    """An orchestrator's lease, on which its claims depend (wall-clock seconds)."""

    owner: OrchestratorIdentity
    epoch: int
    since: Instant
    heartbeat: Instant
    """Its last heartbeat."""
    expires: Instant
    """When other orchestrators may take over, unless it sends another heartbeat."""
    ended: Instant | None = None
    reason: str | None = None
    """The reason if another orchestrator recorded its end."""
    counters: ClaimCounters = Field(default_factory=ClaimCounters)


class Claim(StoredDocument):
    """The claim on one task. Times are wall-clock seconds."""

    owner: OrchestratorIdentity
    epoch: int
    since: Instant
    retries: int = 0
    """Failed claims of the task before this one, since the last retry by a user."""
    released: ReleaseReason | None = None
    reason: str | None = None
    """The reason for its release or takeover."""


class LeaseParticipant(StoredDocument):
    """An orchestrator that holds the merge lease or waits for it, or that runs a check.

    `since` is in wall-clock seconds.
    """

    id: str
    host: str
    pid: int
    run: str
    since: Instant


class MergeLease(StoredDocument):
    """The lease to land on a target: its holder, and the queue of waiters."""

    epoch: int = 0
    holder: LeaseParticipant | None = None
    waiting: tuple[LeaseParticipant, ...] = ()
    """In queue order."""
    repository: str
    target: str


class OwnerStatus(StrEnum):
    """The status of an orchestrator, as seen by another one."""

    ENDED = "ended"  #: it ended itself, or another orchestrator recorded its end
    ALIVE = "alive"
    STALE = "stale"  #: its heartbeat expired
    DEAD = "dead"  #: its process is known to have ended


#: The number of heartbeat intervals without a heartbeat that must be observed: a suspended machine observes nothing.
MIN_WATCHED_HEARTBEATS = 1.5


def determine_owner_status(
    lease: OrchestratorLease, now: float, watched: float, timing: CoordinationSettings, *, is_here: bool, is_dead: bool
) -> OwnerStatus:
    """Return the status of an orchestrator at `now` (wall-clock seconds).

    `watched` is the time in seconds for which the caller has observed no new heartbeat, without interruption; if it is
    long enough, wall clocks do not matter. `is_here` means that the orchestrator is on this machine,
    `is_dead` that its process is proven to have ended.
    """
    if lease.ended is not None:
        return OwnerStatus.ENDED
    if is_dead:
        return OwnerStatus.DEAD
    age = now - lease.heartbeat
    limit = timing.owner_stale_after if is_here else timing.stale_after
    if watched > limit or (age > limit and watched >= min(MIN_WATCHED_HEARTBEATS * timing.heartbeat_interval, limit)):
        return OwnerStatus.STALE
    return OwnerStatus.ALIVE


def describe_loss(lease: OrchestratorLease, status: OwnerStatus, now: float) -> str:
    """Return the reason to consider an orchestrator dead at `now`, in seconds."""
    return "process exited" if status is OwnerStatus.DEAD else f"no heartbeat for {now - lease.heartbeat:.0f} s"


def can_claim(
    claim: Claim | None,
    me: OrchestratorIdentity,
    holder: OwnerStatus | None,
    *,
    override: bool = False,
    is_requested: bool = False,
) -> bool:
    """Return whether an orchestrator may claim a task.

    `holder` is the status of the claim's owner, None if unknown. Among equals, the first claim wins. With `override`, a
    leader may take a task from a worker. On a user's request (`is_requested`), any orchestrator may take it from any
    owner.
    """
    if claim is None or claim.released is not None or is_requested:
        return True
    if holder not in {OwnerStatus.ALIVE, None}:
        return True
    return override and me.role is Role.LEADER and claim.owner.role is not Role.LEADER


def count_earlier_attempts(claim: Claim | None) -> int:
    """Return a task's failed claims before the next one, including takeovers."""
    return 0 if claim is None else claim.retries + int(claim.released is None)


class ClaimVerdict(StrEnum):
    """Whether to try a task now."""

    TRY = "try"
    IGNORED = "ignored"  #: a user excluded it
    RETRIES_EXHAUSTED = "retries_exhausted"  #: all retries are used up
    CLAIMED = "claimed"  #: a live orchestrator works on it


def should_try(
    claim: Claim | None, holder: OwnerStatus | None, timing: CoordinationSettings, *, ignored_reason: str | None
) -> ClaimVerdict:
    """Return whether to try a task now, unless a user excluded it (`ignored_reason`)."""
    if ignored_reason is not None:
        return ClaimVerdict.IGNORED
    if claim is not None and claim.released is None and holder in {OwnerStatus.ALIVE, None}:
        return ClaimVerdict.CLAIMED
    return ClaimVerdict.RETRIES_EXHAUSTED if count_earlier_attempts(claim) > timing.max_retries else ClaimVerdict.TRY
