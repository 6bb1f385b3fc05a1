"""Path ownership on each store: owners, request order, and leftovers."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict
from orchestrator.errors import LeaseLost, LockUnavailable, RefusedError, VersionConflict
from orchestrator.locking.ownership import OwnershipRegistry, claim_key, ownership_scope
from orchestrator.protocols import Commit, Guard, Store, Write
from orchestrator.system.clock import SystemClock

SCOPE = ownership_scope("/repo", "main")
ADA, BOB, EVE = (SessionName("r", task, 1) for task in ("ada", "bob", "eve"))


async def claimed(store: Store, session: SessionName) -> Guard:
    """Claim a session's task again, under the next epoch."""
    key = claim_key(session)
    found = await store.get(key)
    version = found.version if found else 0
    await store.commit(Commit([Write(key, version, {"epoch": version + 1, "released": None})]))
    return Guard(key, version + 1)


async def end(store: Store, claim: Guard, how: str) -> None:
    """Release a claim."""
    found = await store.get(claim.key)
    assert found is not None
    await store.commit(Commit([Write(claim.key, found.version, {**found.value, "released": how})]))


class Owners:
    """Sessions of one registry, each with its own claim."""

    def __init__(self, store: Store, scope: str = SCOPE) -> None:
        self.alive = set[SessionName]()
        self.store, self.registry = store, OwnershipRegistry(store, SystemClock(), scope, self.is_alive)
        self.claims: dict[SessionName, Guard] = {}

    async def is_alive(self, session: SessionName) -> bool:
        return session in self.alive

    async def take(self, session: SessionName, *patterns: str, wait: float = 0.0) -> OwnershipConflict | None:
        if session not in self.claims:
            self.claims[session] = await claimed(self.store, session)
        return await self.registry.acquire(session, patterns, orchestrator="o1", claim=self.claims[session], wait=wait)

    async def owned(self) -> dict[str, Sequence[str]]:
        return {one.session.task: one.patterns for one in await self.registry.holdings() if one.patterns}

    async def events(self, *types: str) -> list[str]:
        found = []
        until, records = await self.store.position(), self.store.watch()
        async for record in records:
            found += [f"{event.type} {event.data['task']}" for event in record.events if event.type in types]
            if record.position == until:
                break
        await records.aclose()
        return found


@pytest.fixture
def owners(store: Store) -> Owners:
    """Return sessions of a registry on each kind of store."""
    return Owners(store)


async def test_owned_path_is_rejected_with_its_owner(owners: Owners) -> None:
    """The error has the owner, the pattern and the time; other paths are free."""
    assert await owners.take(ADA, "src/models/**", "docs/a.md") is None
    held = await owners.take(BOB, "tests/**", "src/models/user.py")
    assert held is not None
    assert (held.holder, held.pattern, held.wanted) == (ADA, "src/models/**", "src/models/user.py")
    (holding,) = await owners.registry.holdings()
    assert held.since == holding.since
    assert await owners.take(BOB, "tests/**") is None
    assert await owners.owned() == {"ada": ("src/models/**", "docs/a.md"), "bob": ("tests/**",)}
    assert await owners.events("ownership.taken", "ownership.refused") == [
        "ownership.taken ada",
        "ownership.refused bob",
        "ownership.taken bob",
    ]


async def test_session_extends_and_releases_its_paths(owners: Owners) -> None:
    """A path acquired twice is owned once; a released one is free."""
    await owners.take(ADA, "a", "b")
    await owners.take(ADA, "b", "c")
    assert await owners.owned() == {"ada": ("a", "b", "c")}
    assert await owners.registry.release_patterns(ADA, ["a", "zzz"], owners.claims[ADA]) == ["a"]
    assert await owners.registry.release_patterns(ADA, ["a"], owners.claims[ADA]) == []
    assert await owners.take(BOB, "a") is None
    assert await owners.owned() == {"ada": ("b", "c"), "bob": ("a",)}
    assert await owners.events("ownership.released") == ["ownership.released ada"]


async def test_deadlocked_sessions_are_reported_immediately(owners: Owners) -> None:
    """The last waiter gets an error with the cycle and keeps its paths; the other continues."""
    await owners.take(ADA, "a")
    await owners.take(BOB, "b")
    registry, had = owners.registry, list[OwnershipConflict | None]()

    async def wait() -> None:
        claim = owners.claims[ADA]
        had.append(await registry.acquire(ADA, ["b"], orchestrator="o1", claim=claim, wait=60.0))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            while not await registry.list_waits():
                await anyio.sleep(0.01)
            claim = owners.claims[BOB]
            with pytest.raises(LockUnavailable, match=r"would deadlock: r/bob.1 waits for a, r/ada.1 waits for b"):
                await registry.acquire(BOB, ["a"], orchestrator="o1", claim=claim, wait=60.0)
            assert await owners.owned() == {"ada": ("a",), "bob": ("b",)}
            await registry.release_patterns(BOB, ["b"], claim)
    assert had == [None]


async def test_concurrent_plans_of_a_path_have_one_winner(owners: Owners) -> None:
    """Of two commits planned on the same state the second is rejected, for any patterns."""
    plans = []
    for session in (ADA, BOB):
        claim = await claimed(owners.store, session)
        plan = await owners.registry.plan(session, ["a"], orchestrator="o1", claim=claim)
        assert not isinstance(plan, OwnershipConflict)
        plans.append(plan)
    await owners.store.commit(Commit(plans[0]))
    with pytest.raises(VersionConflict):
        await owners.store.commit(Commit(plans[1]))
    assert await owners.owned() == {"ada": ("a",)}


async def test_plan_and_claim_are_one_commit(owners: Owners) -> None:
    """The claim may be written by the acquiring commit; before it the paths are not owned."""
    claim = Guard(claim_key(ADA), 1)
    plan = await owners.registry.plan(ADA, ["a"], orchestrator="o1", claim=claim)
    assert not isinstance(plan, OwnershipConflict)
    assert await owners.registry.holdings() == []
    write = Write(claim.key, 0, {"epoch": 1, "released": None})
    await owners.store.commit(Commit([write, *plan]))
    assert await owners.owned() == {"ada": ("a",)}


@pytest.mark.parametrize("how", ["complete", "abandoned", "failed"])
async def test_ownership_of_an_ended_claim_is_ignored(owners: Owners, how: str) -> None:
    """The next owner gets the path, and the leftover document is deleted."""
    await owners.take(ADA, "a")
    await end(owners.store, owners.claims[ADA], how)
    assert await owners.owned() == {}
    assert await owners.take(BOB, "a") is None
    assert await owners.store.get(owners.registry.key(ADA)) is None


async def test_fenced_session_can_neither_own_nor_release(owners: Owners) -> None:
    """A new epoch of the claim invalidates the paths and the writes of the old owner."""
    await owners.take(ADA, "a")
    old = owners.claims.pop(ADA)
    again = ADA._replace(attempt=2)
    owners.claims[again] = await claimed(owners.store, ADA)
    assert await owners.owned() == {}
    with pytest.raises(LeaseLost):
        await owners.registry.acquire(ADA, ["b"], orchestrator="o1", claim=old)
    with pytest.raises(LeaseLost):
        await owners.registry.release_patterns(ADA, ["a"], old)
    assert await owners.take(again, "a") is None
    assert [one.session for one in await owners.registry.holdings()] == [again]


async def test_next_attempt_inherits_the_paths_of_the_session(store: Store) -> None:
    """With its locks, unless another session was faster."""
    owners = Owners(store)
    await owners.take(ADA, "a", "gone")
    await owners.registry.acquire(ADA, ["a"], orchestrator="o1", claim=owners.claims[ADA], is_lock=True)
    await owners.registry.release_patterns(ADA, ["gone"], owners.claims[ADA])
    later = await claimed(store, ADA)
    assert await owners.owned() == {}
    await store.commit(Commit(await owners.registry.sweep()))
    await owners.registry.inherit(ADA, orchestrator="o2", claim=later)
    assert await owners.owned() == {"ada": ("a",)}
    assert [one.locked for one in await owners.registry.locked_by_others(BOB)] == [("a",)]
    latest = await claimed(store, ADA)
    await owners.take(BOB, "a")
    await owners.registry.inherit(ADA, orchestrator="o3", claim=latest)
    assert await owners.owned() == {"bob": ("a",)}


async def test_session_keeps_its_paths_during_a_takeover(owners: Owners) -> None:
    """Nobody else gets them: neither before the takeover, nor by an older plan, nor before the session is dead."""
    await owners.take(ADA, "a")
    before = await owners.store.get(claim_key(ADA))
    assert before is not None
    later = Guard(before.key, before.version + 1)
    kept = await owners.registry.plan_transfer([later], "o2")
    claim = Write(before.key, before.version, {"epoch": later.epoch, "released": None})
    await owners.store.commit(Commit([claim, *kept]))
    assert await owners.owned() == {"ada": ("a",)}
    held = await owners.take(BOB, "a")
    assert held is not None
    assert (held.holder, held.orchestrator) == (ADA, "o2")
    await end(owners.store, later, "abandoned")
    assert await owners.take(BOB, "a") is None


async def test_session_that_outlives_its_claim_keeps_its_paths(owners: Owners) -> None:
    """After a cancellation elsewhere its paths are free only once it is dead."""
    await owners.take(ADA, "a")
    owners.alive.add(ADA)
    await end(owners.store, owners.claims[ADA], "failed")
    held = await owners.take(BOB, "a")
    assert held is not None
    assert held.holder == ADA
    assert not await owners.registry.sweep()
    owners.alive.clear()
    assert await owners.take(BOB, "a") is None
    assert await owners.owned() == {"bob": ("a",)}


async def test_attempts_of_one_task_do_not_conflict(owners: Owners) -> None:
    """Under one claim the next attempt inherits them."""
    await owners.take(ADA, "a", "b")
    again = ADA._replace(attempt=2)
    owners.claims[again] = owners.claims[ADA]
    assert await owners.take(again, "a") is None
    assert [(one.session, one.patterns) for one in await owners.registry.holdings()] == [(again, ("a",))]


async def test_waiter_is_recorded_and_gets_the_path_when_free(owners: Owners) -> None:
    """A wait is listed as long as it lasts."""
    await owners.take(ADA, "a")
    got: list[OwnershipConflict | None] = []

    async def wait() -> None:
        got.append(await owners.take(BOB, "a", wait=60))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        while not (waiting := [one for one in await owners.registry.holdings() if one.waiting]):
            await anyio.sleep(0)
        assert waiting[0].session == BOB
        assert waiting[0].waiting is not None
        assert waiting[0].waiting.patterns == ("a",)
        await owners.registry.release_patterns(ADA, ["a"], owners.claims[ADA])
    assert got == [None]
    assert [one.waiting for one in await owners.registry.holdings()] == [None]
    assert (await owners.owned())["bob"] == ("a",)


async def test_failed_or_cancelled_wait_leaves_nothing(owners: Owners) -> None:
    """Neither ownership nor a waiter remains."""
    await owners.take(ADA, "a")
    held = await owners.take(BOB, "a", wait=0.05)
    assert held is not None
    assert held.holder == ADA
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: owners.take(EVE, "a", wait=60))
        while len(await owners.registry.holdings()) < 2:
            await anyio.sleep(0)
        group.cancel_scope.cancel()
    assert [one.session for one in await owners.registry.holdings()] == [ADA]
    assert await owners.store.get(owners.registry.key(BOB)) is None


async def test_scopes_are_independent(owners: Owners) -> None:
    """The same path on another target or in another repository is a different one."""
    other = Owners(owners.store, ownership_scope("/repo", "next"))
    await owners.take(ADA, "a")
    assert await other.take(BOB, "a") is None
    assert await owners.owned() == {"ada": ("a",)}
    assert await other.owned() == {"bob": ("a",)}


async def test_concurrent_owners_never_share_a_path(owners: Owners) -> None:
    """Twelve tasks with overlapping paths get them one at a time, without a conflict."""
    sessions = [SessionName("r", f"t{number}", 1) for number in range(12)]
    for session in sessions:
        owners.claims[session] = await claimed(owners.store, session)
    async with anyio.create_task_group() as group:
        for number, session in enumerate(sessions):
            group.start_soon(owners.take, session, f"{number % 3}/**")
    owned = await owners.owned()
    assert sorted(patterns[0] for patterns in owned.values()) == ["0/**", "1/**", "2/**"]


async def test_invalid_path_is_rejected(owners: Owners) -> None:
    """The error names it, and nothing is acquired."""
    with pytest.raises(RefusedError, match=r"invalid path pattern '\.\./a'"):
        await owners.take(ADA, "a", "../a")
    assert await owners.owned() == {}
