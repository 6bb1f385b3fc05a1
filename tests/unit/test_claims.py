"""Who may take a task: how orchestrators stand, what a claim allows, and how often a task is tried."""

from __future__ import annotations

import pytest

from orchestrator.domain.scheduling.claims import (
    Claim,
    Counters,
    Orchestrator,
    Owner,
    Release,
    Role,
    Standing,
    Timing,
    Verdict,
    may_take,
    should_try,
    standing,
    tries_before,
)

TIMING = Timing()
BEAT = 1_000_000.0


def owner(name: str, role: Role = Role.WORKER) -> Owner:
    """Return an orchestrator of that name."""
    return Owner(id=name, host="box", boot="1", pid=1, started=1, role=role)


def claim(released: Release | None = None, *, retries: int = 0, role: Role = Role.WORKER) -> Claim:
    """Return a claim of another."""
    return Claim(owner=owner("other", role), epoch=1, since=BEAT, retries=retries, released=released)


@pytest.mark.parametrize(
    ("silence", "watched", "is_here", "expected"),
    [
        (0, 0, False, Standing.ALIVE),
        (300, 300, False, Standing.ALIVE),
        (301, 90, False, Standing.STALE),
        (301, 89, False, Standing.ALIVE),  # a machine that slept has not looked
        (10**6, 0, False, Standing.ALIVE),  # nor has one whose clock has jumped
        (301, 300, True, Standing.ALIVE),
        (600, 600, True, Standing.ALIVE),
        (601, 90, True, Standing.STALE),
        (-3600, 301, False, Standing.STALE),  # its clock is an hour ahead
        (-3600, 300, False, Standing.ALIVE),
        (-3600, 301, True, Standing.ALIVE),
        (0, 601, True, Standing.STALE),
    ],
)
def test_silence_makes_stale_once_it_was_watched(
    silence: float, watched: float, is_here: bool, expected: Standing
) -> None:
    """Later for one of this machine; by the clocks of both and a short look, or by a long look alone."""
    one = Orchestrator(owner=owner("other"), epoch=1, since=BEAT, heartbeat=BEAT, expires=BEAT + 300)
    assert standing(one, BEAT + silence, watched, TIMING, is_here=is_here, is_dead=False) is expected


def test_a_short_lease_is_watched_no_longer_than_it_lasts() -> None:
    """Where heartbeats are rarer than leases are long, the lease decides."""
    one = Orchestrator(owner=owner("other"), epoch=1, since=BEAT, heartbeat=BEAT, expires=BEAT + 5)
    timing = Timing(heartbeat=60, stale=5)
    assert standing(one, BEAT + 6, 5, timing, is_here=False, is_dead=False) is Standing.STALE
    assert standing(one, BEAT + 6, 4, timing, is_here=False, is_dead=False) is Standing.ALIVE


@pytest.mark.parametrize("is_dead", [False, True])
def test_what_is_proven_needs_no_time(is_dead: bool) -> None:
    """Whoever said that it ended has; a process that is dead is, although it gave a sign of life just now."""
    one = Orchestrator(owner=owner("other"), epoch=1, since=BEAT, heartbeat=BEAT, expires=BEAT + 300)
    expected = Standing.DEAD if is_dead else Standing.ALIVE
    assert standing(one, BEAT, 0, TIMING, is_here=True, is_dead=is_dead) is expected
    ended = one.model_copy(update={"ended": BEAT})
    assert standing(ended, BEAT, 0, TIMING, is_here=True, is_dead=is_dead) is Standing.ENDED


@pytest.mark.parametrize("me", list(Role))
@pytest.mark.parametrize("override", [False, True])
def test_what_nobody_alive_has_is_free(me: Role, override: bool) -> None:
    """Never claimed, released in any way, or of one that is gone: whoever asks may take it."""
    taker = owner("me", me)
    assert may_take(None, taker, None, override=override)
    for how in Release:
        assert may_take(claim(how), taker, None, override=override)
        assert may_take(claim(how, role=Role.COORDINATOR), taker, Standing.ALIVE, override=override)
    for gone in (Standing.ENDED, Standing.STALE, Standing.DEAD):
        assert may_take(claim(), taker, gone, override=override)


@pytest.mark.parametrize(
    ("me", "other", "override", "expected"),
    [
        (Role.WORKER, Role.WORKER, False, False),
        (Role.WORKER, Role.WORKER, True, False),
        (Role.WORKER, Role.COORDINATOR, True, False),
        (Role.COORDINATOR, Role.WORKER, False, False),
        (Role.COORDINATOR, Role.WORKER, True, True),
        (Role.COORDINATOR, Role.COORDINATOR, True, False),
    ],
)
@pytest.mark.parametrize("holder", [Standing.ALIVE, None])
def test_only_a_coordinator_takes_from_the_living(
    me: Role, other: Role, override: bool, expected: bool, holder: Standing | None
) -> None:
    """And only where it says so, and only from one that is none."""
    assert may_take(claim(role=other), owner("me", me), holder, override=override) is expected


@pytest.mark.parametrize("me", list(Role))
@pytest.mark.parametrize("other", list(Role))
def test_what_a_person_asks_for_reaches_whoever_has_it(me: Role, other: Role) -> None:
    """A role is between processes."""
    assert may_take(claim(role=other), owner("me", me), Standing.ALIVE, is_asked=True)


@pytest.mark.parametrize(
    ("found", "holder", "expected"),
    [
        (None, None, Verdict.TRY),
        (claim(), Standing.ALIVE, Verdict.CLAIMED),
        (claim(), None, Verdict.CLAIMED),
        (claim(retries=9), Standing.ALIVE, Verdict.CLAIMED),
        (claim(), Standing.STALE, Verdict.TRY),
        (claim(), Standing.ENDED, Verdict.TRY),
        (claim(retries=2), Standing.DEAD, Verdict.TRY),
        (claim(retries=3), Standing.DEAD, Verdict.TRIED_OUT),  # a takeover counts as a try
        (claim(Release.ABANDONED, retries=3), None, Verdict.TRY),
        (claim(Release.ABANDONED, retries=4), None, Verdict.TRIED_OUT),
        (claim(Release.FAILED, retries=4), None, Verdict.TRIED_OUT),
    ],
)
def test_a_task_is_tried_unless_someone_is_at_it_or_it_was_tried_out(
    found: Claim | None, holder: Standing | None, expected: Verdict
) -> None:
    """Three retries are four tries; what a person has said to ignore is not looked at."""
    assert should_try(found, holder, TIMING, ignored=None) is expected
    assert should_try(found, holder, TIMING, ignored="not now") is Verdict.IGNORED


def test_four_tries_and_no_fifth() -> None:
    """Each that was in vain counts, in whichever way it ended."""
    for is_taken_over in (False, True):
        found, tries = None, 0
        while should_try(found, Standing.STALE, TIMING, ignored=None) is Verdict.TRY:
            tries += 1
            made = claim(retries=tries_before(found))
            found = made if is_taken_over else claim(Release.ABANDONED, retries=made.retries + 1)
        assert tries == 4


def test_counters_add_up() -> None:
    """What is not named stays."""
    assert Counters(claims=1, sweeps=2).plus(claims=2, refused=1) == Counters(claims=3, sweeps=2, refused=1)
