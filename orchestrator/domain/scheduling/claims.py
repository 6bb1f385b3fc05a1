"""Claims: which of several orchestrators may work on a task, and from when on another may take it over.

A claim is a lease on a task of a run. It names the orchestrator that has it and carries an epoch, which rises with each
change of hands: whatever an earlier holder still wants to write is refused by it (a fencing token; see Kleppmann, "How
to do distributed locking", 2016). An orchestrator gives signs of life for all of its claims at once, by its own record.
When a claim may be taken over is a matter of efficiency; that only one holder's writes count is a matter of its epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.domain.documents.times import Instant


class Role(StrEnum):
    """What an orchestrator may do about the claims of others."""

    LEADER = "leader"  #: override those of orchestrators that are none
    WORKER = "worker"  #: wait for them


class ReleaseReason(StrEnum):
    """Why a claim was given back."""

    COMPLETE = "complete"  #: the task has landed, or nothing was to be done
    ABANDONED = "abandoned"  #: another attempt may follow, by whoever claims the task
    FAILED = "failed"  #: the task is over without having landed


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class OrchestratorIdentity(_Document):
    """An orchestrator: a process at work in a run, and by what it is told from any other."""

    id: str
    """Its name among those of the run."""
    host: str
    boot: str
    """Which start of the machine it is of."""
    pid: int
    started: int | None
    """When the process started, in the kernel's ticks since the machine did; None where that is not known."""
    role: Role = Role.WORKER
    shares: bool = True
    """Whether it claims what it works at; beside one that does not, nobody else can be at work in the run."""


class ClaimCounters(_Document):
    """What became of an orchestrator's claims."""

    # Not by docstrings: to find them takes longer than all else that this module does when it is imported.
    claims: int = Field(default=0, description="Tasks that it took.")
    conflicts: int = Field(default=0, description="Those that another was quicker to take, or had already.")
    renewals: int = Field(default=0, description="Signs of life.")
    takeovers: int = Field(
        default=0, description="Tasks that it took from an orchestrator that was gone, or that it overrode."
    )
    retries: int = Field(default=0, description="Of its claims, those that were not the first of their task.")
    sweeps: int = Field(default=0, description="Looks for orchestrators that were gone.")
    refused: int = Field(
        default=0, description="Its own writes that were refused because somebody else had taken over."
    )

    def plus(self, **more: int) -> ClaimCounters:
        """Return them with more of some."""
        return self.model_copy(update={name: getattr(self, name) + count for name, count in more.items()})


def sum_counters(counters: Iterable[ClaimCounters]) -> ClaimCounters:
    """Return what became of the claims of several orchestrators."""
    return reduce(lambda one, more: one.plus(**more.model_dump()), counters, ClaimCounters())


class OrchestratorLease(_Document):
    """The record of one: the lease that all of its claims hang on. Times are wall-clock seconds."""

    owner: OrchestratorIdentity
    epoch: int
    since: Instant
    heartbeat: Instant
    """Its last sign of life."""
    expires: Instant
    """From when on others may take over, unless it gives another."""
    ended: Instant | None = None
    reason: str | None = None
    """Why it ended, where that was not of its own doing."""
    counters: ClaimCounters = Field(default_factory=ClaimCounters)


class Claim(_Document):
    """The claim on one task. Times are wall-clock seconds."""

    owner: OrchestratorIdentity
    epoch: int
    since: Instant
    retries: int = 0
    """How many tries of the task had been in vain when it was written, since a person last had it tried again."""
    released: ReleaseReason | None = None
    reason: str | None = None
    """Why it was released or taken over."""


class MergeParticipant(_Document):
    """An orchestrator that has the permit or waits for it, since when (wall-clock seconds)."""

    id: str
    host: str
    pid: int
    run: str
    since: Instant


class MergeLease(_Document):
    """Who may land, and who is next."""

    epoch: int = 0
    holder: MergeParticipant | None = None
    waiting: tuple[MergeParticipant, ...] = ()
    """In the order of their turns."""
    repository: str
    target: str


@dataclass(frozen=True, slots=True)
class ClaimTiming:
    """When signs of life are given and missed, in seconds."""

    heartbeat_interval: float = 60.0
    stale_after: float = 300.0
    """Without a sign of life, an orchestrator of another machine is gone."""
    owner_stale_after: float = 600.0
    """The same for one of this machine, of which it can't be proven that it is dead."""
    sweep_interval: float = 90.0
    """From one look for such to the next."""
    max_retries: int = 3
    """How often a task is tried again."""


class OwnerStatus(StrEnum):
    """How an orchestrator stands in the eyes of another."""

    ENDED = "ended"  #: it said so, or was told to have
    ALIVE = "alive"
    STALE = "stale"  #: it has given no sign of life for too long
    DEAD = "dead"  #: its process is known to have ended


#: How many heartbeats long a missing sign of life must have been watched for: a machine that slept has not looked.
MIN_WATCHED_HEARTBEATS = 1.5


def judge_owner_status(
    one: OrchestratorLease, now: float, watched: float, timing: ClaimTiming, *, is_here: bool, is_dead: bool
) -> OwnerStatus:
    """Return how an orchestrator stands at `now` (wall-clock seconds).

    `watched` is for how many seconds of its own uninterrupted time whoever asks has seen no other sign of life: long
    enough, and no clock of anybody's is asked. `is_here` says that it is of this machine, `is_dead` that its process is
    proven to have ended.
    """
    if one.ended is not None:
        return OwnerStatus.ENDED
    if is_dead:
        return OwnerStatus.DEAD
    silence = now - one.heartbeat
    limit = timing.owner_stale_after if is_here else timing.stale_after
    if watched > limit or (
        silence > limit and watched >= min(MIN_WATCHED_HEARTBEATS * timing.heartbeat_interval, limit)
    ):
        return OwnerStatus.STALE
    return OwnerStatus.ALIVE


def can_claim(
    claim: Claim | None,
    me: OrchestratorIdentity,
    holder: OwnerStatus | None,
    *,
    override: bool = False,
    is_asked: bool = False,
) -> bool:
    """Whether an orchestrator may take a task; `holder` is how the claim's owner stands, None where that is not known.

    First come, first served among equals. With `override` a leader takes it from one that is none. Where a person
    wants that (`is_asked`), anybody takes it from whoever has it.
    """
    if claim is None or claim.released is not None or is_asked:
        return True
    if holder not in {OwnerStatus.ALIVE, None}:
        return True
    return override and me.role is Role.LEADER and claim.owner.role is not Role.LEADER


def count_earlier_tries(claim: Claim | None) -> int:
    """Return how many tries of a task will have been in vain for who claims it next: to be taken over is one."""
    return 0 if claim is None else claim.retries + int(claim.released is None)


class ClaimVerdict(StrEnum):
    """Whether a task should be tried now."""

    TRY = "try"
    IGNORED = "ignored"  #: a person said so
    TRIED_OUT = "tried_out"  #: it was tried as often as it may be
    CLAIMED = "claimed"  #: somebody who lives is at it


def should_try(
    claim: Claim | None, holder: OwnerStatus | None, timing: ClaimTiming, *, ignored: str | None
) -> ClaimVerdict:
    """Return whether a task should be tried, in the order in which that is asked."""
    if ignored is not None:
        return ClaimVerdict.IGNORED
    if claim is not None and claim.released is None and holder in {OwnerStatus.ALIVE, None}:
        return ClaimVerdict.CLAIMED
    return ClaimVerdict.TRIED_OUT if count_earlier_tries(claim) > timing.max_retries else ClaimVerdict.TRY
