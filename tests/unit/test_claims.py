"""Claims: owner liveness, the claim decision, and attempt limits."""

from __future__ import annotations

import pytest

from orchestrator.domain.runs.statuses import ReleaseReason
from orchestrator.domain.scheduling.claims import (
    Claim,
    ClaimCounters,
    ClaimVerdict,
    OrchestratorIdentity,
    OrchestratorLease,
    OwnerStatus,
    Role,
    can_claim,
    count_earlier_attempts,
    determine_owner_status,
    should_try,
)
from orchestrator.domain.settings.run_settings import CoordinationSettings

TIMING = CoordinationSettings()
BEAT = 1_000_000.0


def owner(name: str, role: Role = Role.WORKER) -> OrchestratorIdentity:
    """Return an orchestrator with this name."""
    return OrchestratorIdentity(id=name, host="box", boot="1", pid=1, started=1, role=role)


def claim(released: ReleaseReason | None = None, *, retries: int = 0, role: Role = Role.WORKER) -> Claim:
    """Return a claim of another owner."""
    return Claim(owner=owner("other", role), epoch=1, since=BEAT, retries=retries, released=released)


@pytest.mark.parametrize(
    ("silence", "watched", "is_here", "expected"),
    [
        (0, 0, False, OwnerStatus.ALIVE),
        (300, 300, False, OwnerStatus.ALIVE),
        (301, 90, False, OwnerStatus.STALE),
        (301, 89, False, OwnerStatus.ALIVE),  # a machine that slept was not watching
        (10**6, 0, False, OwnerStatus.ALIVE),  # nor was one whose clock jumped
        (301, 300, True, OwnerStatus.ALIVE),
        (600, 600, True, OwnerStatus.ALIVE),
        (601, 90, True, OwnerStatus.STALE),
        (-3600, 301, False, OwnerStatus.STALE),  # its clock is one hour ahead
        (-3600, 300, False, OwnerStatus.ALIVE),
        (-3600, 301, True, OwnerStatus.ALIVE),
        (0, 601, True, OwnerStatus.STALE),
    ],
)
def test_silent_owner_is_stale_after_being_watched(
    silence: float, watched: float, is_here: bool, expected: OwnerStatus
) -> None:
    """By the clocks of both and a short watch, or by a long watch alone; later for an owner on this machine."""
    one = OrchestratorLease(owner=owner("other"), epoch=1, since=BEAT, heartbeat=BEAT, expires=BEAT + 300)
    assert determine_owner_status(one, BEAT + silence, watched, TIMING, is_here=is_here, is_dead=False) is expected


def test_short_lease_is_watched_for_its_duration() -> None:
    """The lease decides where heartbeats are rarer than leases are long."""
    one = OrchestratorLease(owner=owner("other"), epoch=1, since=BEAT, heartbeat=BEAT, expires=BEAT + 5)
    timing = CoordinationSettings(heartbeat_interval=60, stale_after=5)
    assert determine_owner_status(one, BEAT + 6, 5, timing, is_here=False, is_dead=False) is OwnerStatus.STALE
    assert determine_owner_status(one, BEAT + 6, 4, timing, is_here=False, is_dead=False) is OwnerStatus.ALIVE


@pytest.mark.parametrize("is_dead", [False, True])
def test_proven_death_needs_no_time(is_dead: bool) -> None:
    """A reported end or a dead process is proof despite a recent heartbeat."""
    one = OrchestratorLease(owner=owner("other"), epoch=1, since=BEAT, heartbeat=BEAT, expires=BEAT + 300)
    expected = OwnerStatus.DEAD if is_dead else OwnerStatus.ALIVE
    assert determine_owner_status(one, BEAT, 0, TIMING, is_here=True, is_dead=is_dead) is expected
    ended = one.model_copy(update={"ended": BEAT})
    assert determine_owner_status(ended, BEAT, 0, TIMING, is_here=True, is_dead=is_dead) is OwnerStatus.ENDED


@pytest.mark.parametrize("me", list(Role))
@pytest.mark.parametrize("override", [False, True])
def test_claim_without_a_live_owner_is_free(me: Role, override: bool) -> None:
    """Never claimed, released in any way, or owned by a dead process."""
    taker = owner("me", me)
    assert can_claim(None, taker, None, override=override)
    for how in ReleaseReason:
        assert can_claim(claim(how), taker, None, override=override)
        assert can_claim(claim(how, role=Role.LEADER), taker, OwnerStatus.ALIVE, override=override)
    for gone in (OwnerStatus.ENDED, OwnerStatus.STALE, OwnerStatus.DEAD):
        assert can_claim(claim(), taker, gone, override=override)


@pytest.mark.parametrize(
    ("me", "other", "override", "expected"),
    [
        (Role.WORKER, Role.WORKER, False, False),
        (Role.WORKER, Role.WORKER, True, False),
        (Role.WORKER, Role.LEADER, True, False),
        (Role.LEADER, Role.WORKER, False, False),
        (Role.LEADER, Role.WORKER, True, True),
        (Role.LEADER, Role.LEADER, True, False),
    ],
)
@pytest.mark.parametrize("holder", [OwnerStatus.ALIVE, None])
def test_only_a_leader_takes_claims_of_live_owners(
    me: Role, other: Role, override: bool, expected: bool, holder: OwnerStatus | None
) -> None:
    """Only where the claim says so, and not from another leader."""
    assert can_claim(claim(role=other), owner("me", me), holder, override=override) is expected


@pytest.mark.parametrize("me", list(Role))
@pytest.mark.parametrize("other", list(Role))
def test_request_of_a_person_reaches_any_owner(me: Role, other: Role) -> None:
    """The leader role exists between processes only."""
    assert can_claim(claim(role=other), owner("me", me), OwnerStatus.ALIVE, is_requested=True)


@pytest.mark.parametrize(
    ("found", "holder", "expected"),
    [
        (None, None, ClaimVerdict.TRY),
        (claim(), OwnerStatus.ALIVE, ClaimVerdict.CLAIMED),
        (claim(), None, ClaimVerdict.CLAIMED),
        (claim(retries=9), OwnerStatus.ALIVE, ClaimVerdict.CLAIMED),
        (claim(), OwnerStatus.STALE, ClaimVerdict.TRY),
        (claim(), OwnerStatus.ENDED, ClaimVerdict.TRY),
        (claim(retries=2), OwnerStatus.DEAD, ClaimVerdict.TRY),
        (claim(retries=3), OwnerStatus.DEAD, ClaimVerdict.RETRIES_EXHAUSTED),  # a takeover counts as an attempt
        (claim(ReleaseReason.ABANDONED, retries=3), None, ClaimVerdict.TRY),
        (claim(ReleaseReason.ABANDONED, retries=4), None, ClaimVerdict.RETRIES_EXHAUSTED),
        (claim(ReleaseReason.FAILED, retries=4), None, ClaimVerdict.RETRIES_EXHAUSTED),
    ],
)
def test_task_is_tried_unless_claimed_or_exhausted(
    found: Claim | None, holder: OwnerStatus | None, expected: ClaimVerdict
) -> None:
    """Three retries are four attempts; attempts that a person reset do not count."""
    assert should_try(found, holder, TIMING, ignored_reason=None) is expected
    assert should_try(found, holder, TIMING, ignored_reason="not now") is ClaimVerdict.IGNORED


def test_fifth_takeover_is_not_attempted() -> None:
    """Every failed takeover counts."""
    for is_taken_over in (False, True):
        found, tries = None, 0
        while should_try(found, OwnerStatus.STALE, TIMING, ignored_reason=None) is ClaimVerdict.TRY:
            tries += 1
            made = claim(retries=count_earlier_attempts(found))
            found = made if is_taken_over else claim(ReleaseReason.ABANDONED, retries=made.retries + 1)
        assert tries == 4


def test_counters_are_summed() -> None:
    assert ClaimCounters(claims=1, sweeps=2).plus(claims=2, refused=1) == ClaimCounters(claims=3, sweeps=2, refused=1)
