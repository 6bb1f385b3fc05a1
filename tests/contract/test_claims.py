"""Claims, orchestrators and merge leases behave equally on every store."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import pytest

from orchestrator.domain.runs.statuses import ReleaseReason
from orchestrator.domain.scheduling.claims import (
    Claim,
    ClaimVerdict,
    MergeLease,
    OrchestratorIdentity,
    OwnerStatus,
    Role,
)
from orchestrator.domain.settings.run_settings import CoordinationSettings
from orchestrator.errors import LeaseLost, OrchestratorFenced, StoreUnavailable
from orchestrator.locking.claims import Claims, PlannedClaim, claim_key
from orchestrator.locking.merge_lease import MergeLeaseQueue, merge_lease_key
from orchestrator.locking.orchestrators import RunMembership, orchestrator_key
from orchestrator.locking.takeovers import ClaimTakeovers
from orchestrator.protocols import Commit, Event, Guard, Key, Store, Write
from orchestrator.system.clock import Clock, SystemClock
from orchestrator.testing.clock import ManualClock
from tests.claim_history import read_claims

RUN = "run"
PATIENCE = 20.0
TASK = Key("task", f"{RUN}/a")


class Line:
    """The connection of one process to a store; `faults` apply to its next commits in order."""

    def __init__(self, store: Store) -> None:
        self.faults: list[str] = []
        self.get, self.list, self.position, self.watch = store.get, store.list, store.position, store.watch
        self._store = store

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`."""
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "fails":
            raise StoreUnavailable("store", "no answer", "wait")
        position = await self._store.commit(commit)
        if fault == "is not acknowledged":
            raise StoreUnavailable("store", "no answer", "wait")
        return position


@dataclass
class Process:
    """An orchestrator that joined."""

    line: Line
    others: RunMembership
    claims: Claims
    takeovers: ClaimTakeovers
    leases: MergeLeaseQueue

    @property
    def name(self) -> str:
        """Return its unique name."""
        return self.others.me.id


@dataclass
class Cluster:
    """A store, a clock, and the processes known to be dead."""

    store: Store
    clock: ManualClock
    dead: set[str] = field(default_factory=set)

    async def join(
        self,
        name: str,
        role: Role = Role.WORKER,
        *,
        host: str = "",
        run: str = RUN,
        clock: Clock | None = None,
        shares: bool = True,
    ) -> Process:
        """Join as another orchestrator, by default of another machine."""
        owner = OrchestratorIdentity(
            id=name, host=host or name, boot="1", pid=len(name), started=None, role=role, shares=shares
        )

        async def is_dead(_run: str, other: OrchestratorIdentity) -> bool:
            return other.id in self.dead

        line, clock = Line(self.store), clock or self.clock
        others = RunMembership(line, clock, run, owner, CoordinationSettings(), is_dead)  # type: ignore[arg-type]
        claims = Claims(line, clock, others)  # type: ignore[arg-type]
        leases = MergeLeaseQueue(line, clock, others, "/repository", "main")  # type: ignore[arg-type]
        takeovers = ClaimTakeovers(line, clock, others, claims)  # type: ignore[arg-type]
        await others.join()
        return Process(line, others, claims, takeovers, leases)

    async def claim(self, task: str) -> Claim:
        """Return the claim on a task."""
        return (await read_claims(self.store, RUN))[task]

    async def write(self, *guards: Guard | None) -> None:
        """Commit a document under guards."""
        await self.store.commit(Commit(events=[Event("work")], guards=[one for one in guards if one is not None]))

    async def lease(self, process: Process) -> MergeLease:
        """Return the document of the merge lease."""
        found = await self.store.get(merge_lease_key(process.leases.scope))
        assert found is not None
        return MergeLease.model_validate(found.value)


async def claim_task(process: Process, task: str, **how: bool) -> Guard:
    """Claim a task, which must succeed."""
    found = await process.claims.claim(task, **how)
    assert isinstance(found, Guard)
    return found


async def run_until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Run other tasks until the condition is true."""
    with anyio.fail_after(PATIENCE):
        while not await condition():
            await anyio.lowlevel.checkpoint()


async def watch_for(process: Process, seconds: float, clock: ManualClock) -> None:
    """Advance the time while a process watches and sends heartbeats."""
    left = seconds
    while left > 0:
        await process.others.peers.find_gone()
        clock.advance(min(60.0, left))
        left -= 60.0
        await process.others.renew()
    await process.others.peers.find_gone()


class TestClaims:
    """The guarantees for orchestrators on each kind of store."""

    @pytest.fixture
    def cluster(self, store: Store, clock: ManualClock) -> Cluster:
        """Return a shared store for orchestrators."""
        return Cluster(store, clock)

    async def test_claim_belongs_to_the_first_until_released(self, cluster: Cluster) -> None:
        """Each change raises the epoch and invalidates the former."""
        a, b = await cluster.join("a"), await cluster.join("b", Role.LEADER)
        first = await claim_task(a, "t")
        assert (list(a.claims), "t" in a.claims, a.claims.guard("t")) == (["t"], True, first)
        assert (await b.claims.claim("t"), "t" in b.claims) == (None, False)
        await cluster.write(first)
        await a.claims.release("t", ReleaseReason.ABANDONED, "later", counts=True)
        assert "t" not in a.claims
        with pytest.raises(LeaseLost):
            await cluster.write(first)
        given = await cluster.claim("t")
        assert (given.released, given.reason, given.retries, given.epoch) == (ReleaseReason.ABANDONED, "later", 1, 2)
        second = await claim_task(b, "t")
        assert second.epoch == 3
        await cluster.write(second)
        assert (await cluster.claim("t")).retries == 1
        assert (a.others.counters.claims, a.others.counters.conflicts) == (1, 0)
        counters = b.others.counters
        assert (counters.claims, counters.conflicts, counters.retries, counters.takeovers) == (1, 1, 1, 0)

    async def test_concurrent_claims_have_one_winner(self, cluster: Cluster) -> None:
        processes = [await cluster.join(f"p{number}") for number in range(8)]
        found = list[Guard | None]()

        async def claim(process: Process) -> None:
            found.append(await process.claims.claim("t"))

        async with anyio.create_task_group() as group:
            for process in processes:
                group.start_soon(claim, process)
        (guard,) = (one for one in found if isinstance(one, Guard))
        assert guard == Guard(claim_key(RUN, "t"), 1)
        assert sum(process.others.counters.conflicts for process in processes) == 7

    async def test_heartbeat_renews_all_claims_without_writing_them(self, cluster: Cluster) -> None:
        """For any duration; the counters are kept."""
        a, b = await cluster.join("a"), await cluster.join("b")
        for task in ("t", "u"):
            await claim_task(a, task)
        before = await cluster.store.list("claim")
        for _ in range(20):
            cluster.clock.advance(60.0)
            await a.others.renew()
            assert await b.takeovers.sweep() == {}
            assert await b.claims.verdict("t") is ClaimVerdict.CLAIMED
        assert list(await cluster.store.list("claim")) == list(before)
        record = (await b.others.peers.all())["a"]
        assert (record.heartbeat, record.expires) == (cluster.clock.now(), cluster.clock.now() + 300.0)
        assert (record.counters.claims, record.counters.renewals) == (2, 20)

    async def test_silent_orchestrator_loses_all_claims(self, cluster: Cluster) -> None:
        """In one commit, after being watched; its later writes are rejected with the reason."""
        a, b = await cluster.join("a"), await cluster.join("b")
        guards = [await claim_task(a, task) for task in ("t", "u")]
        await a.claims.release("u", ReleaseReason.COMPLETE)
        cluster.clock.advance(301.0)
        assert await b.takeovers.sweep() == {}  # b has not watched yet
        await watch_for(b, 90.0, cluster.clock)
        before = await cluster.store.position()
        assert await b.takeovers.sweep() == {"t": "a"}
        assert await cluster.store.position() == before + 1
        taken = await cluster.claim("t")
        assert (taken.owner, taken.epoch, taken.retries) == (b.others.me, 2, 1)
        assert (await cluster.claim("u")).owner == a.others.me
        await cluster.write(b.claims.guard("t"))
        for guard in (*guards, a.others.guard):
            with pytest.raises(LeaseLost):
                await cluster.write(guard)
        with pytest.raises(LeaseLost):
            await a.claims.claim("v")
        c = await cluster.join("c")
        await claim_task(c, "w")
        await c.others.leave()
        with pytest.raises(LeaseLost):
            await a.takeovers.sweep()
        assert (await cluster.claim("w")).owner == c.others.me
        with pytest.raises(LeaseLost):
            await a.claims.release("t", ReleaseReason.COMPLETE)
        assert "t" not in a.claims
        assert a.others.counters.refused == 1
        with pytest.raises(OrchestratorFenced, match=r"b took over: no heartbeat for 391 s"):
            await a.others.renew()
        await a.others.leave()
        assert await b.takeovers.sweep() == {"w": "c"}
        counters = b.others.counters
        assert (counters.takeovers, counters.claims, counters.retries) == (2, 2, 2)

    async def test_silent_orchestrator_on_this_machine_gets_more_time_unless_dead(self, cluster: Cluster) -> None:
        """Its process can be inspected: it may be slow, or is proven dead without a wait."""
        a, b, c = [await cluster.join(name, host="box") for name in "abc"]
        for process, task in ((a, "t"), (b, "u")):
            await claim_task(process, task)
        cluster.dead.add("a")
        assert await c.takeovers.sweep() == {"t": "a"}
        record = (await c.others.peers.all())["a"]
        assert (record.epoch, record.reason) == (2, "c took over: process exited")
        await watch_for(c, 599.0, cluster.clock)
        assert await c.takeovers.sweep() == {}
        cluster.clock.advance(2.0)
        assert await c.takeovers.sweep() == {"u": "b"}

    async def test_dead_orchestrator_is_noticed_within_a_second(self, cluster: Cluster) -> None:
        """A cached result serves thousands of claims without checking the process again."""
        a, b = [await cluster.join(name, host="box") for name in "ab"]
        await claim_task(a, "t")
        assert await b.claims.verdict("t") is ClaimVerdict.CLAIMED
        cluster.dead.add("a")
        cluster.clock.advance(0.9)
        assert await b.claims.verdict("t") is ClaimVerdict.CLAIMED
        cluster.clock.advance(0.1)
        assert await b.claims.verdict("t") is ClaimVerdict.TRY

    async def test_observer_pause_proves_nothing(self, cluster: Cluster) -> None:
        """An observer that was suspended, possibly with the whole machine, starts to watch from scratch."""
        a, b = await cluster.join("a"), await cluster.join("b")
        await claim_task(a, "t")
        assert await b.takeovers.sweep() == {}
        cluster.clock.advance(400.0)
        assert await b.takeovers.sweep() == {}
        cluster.clock.advance(80.0)
        assert await b.takeovers.sweep() == {}
        cluster.clock.advance(20.0)
        assert await b.takeovers.sweep() == {"t": "a"}

    async def test_claim_by_a_swept_orchestrator_is_swept_next(self, cluster: Cluster) -> None:
        """The claim may be committed between the listing of its claims and the commit that fences it."""
        a, b = await cluster.join("a"), await cluster.join("b")
        await claim_task(a, "t")
        cluster.dead.add("a")
        late = await a.claims.plan("late")
        assert isinstance(late, PlannedClaim)
        await cluster.store.commit(Commit([late.write], guards=[a.others.guard]))
        gone = await b.others.peers.find_gone()
        assert not gone  # it is of another machine
        document, record = await cluster.store.get(orchestrator_key(RUN, "a")), (await b.others.peers.all())["a"]
        assert document is not None
        await cluster.store.commit(Commit([b.others.fence_write(document, record, OwnerStatus.DEAD)]))
        assert await b.takeovers.sweep() == {"t": "a", "late": "a"}

    async def test_orchestrator_that_left_holds_no_claim(self, cluster: Cluster) -> None:
        """Nor does one without a record: its tasks are free, and the next claim counts as a retry."""
        a, b = await cluster.join("a"), await cluster.join("b")
        old = await claim_task(a, "t")
        await a.others.leave("it was told to")
        await a.others.leave()
        assert await b.claims.verdict("t") is ClaimVerdict.TRY
        await claim_task(b, "t")
        assert (await cluster.claim("t")).retries == 1
        assert b.others.counters.takeovers == 1
        with pytest.raises(LeaseLost):
            await cluster.write(old)
        found = await cluster.store.get(b.others.guard.key)
        assert found is not None
        await cluster.store.commit(Commit([Write(found.key, found.version, None)]))
        c = await cluster.join("c")
        assert await c.takeovers.sweep() == {"t": "b"}
        with pytest.raises(OrchestratorFenced, match="its record is missing"):
            await b.others.renew()

    async def test_leader_overrides_claims_of_non_members(self, cluster: Cluster) -> None:
        """On request; it counts as a takeover and as an attempt. A worker overrides no claim."""
        a, chief, b = await cluster.join("a"), await cluster.join("chief", Role.LEADER), await cluster.join("b")
        old = await claim_task(a, "t")
        assert await chief.claims.claim("t") is None
        assert await b.claims.claim("t", override=True) is None
        await claim_task(chief, "t", override=True)
        assert ((await cluster.claim("t")).retries, chief.others.counters.takeovers) == (1, 1)
        with pytest.raises(LeaseLost):
            await cluster.write(old)
        other = await cluster.join("other chief", Role.LEADER)
        assert await other.claims.claim("t", override=True) is None
        await chief.claims.release("t", ReleaseReason.ABANDONED)
        await claim_task(chief, "t", override=True)
        assert ((await cluster.claim("t")).retries, chief.others.counters.takeovers) == (1, 1)

    async def test_takeovers_are_counted_until_an_attempt_succeeds(self, cluster: Cluster) -> None:
        """Four, in any way they end; a person may reset the count."""
        a = await cluster.join("a")
        for number in range(4):
            assert await a.claims.verdict("t") is ClaimVerdict.TRY
            await claim_task(a, "t")
            assert (await cluster.claim("t")).retries == number
            if number % 2:
                await a.claims.release("t", ReleaseReason.FAILED, counts=True)
            else:
                b = await cluster.join(f"b{number}")
                await a.others.leave()
                a = b
                if number == 0:
                    assert await a.takeovers.sweep() == {"t": "a"}
                    await a.claims.release("t", ReleaseReason.ABANDONED)
        assert await a.claims.verdict("t") is ClaimVerdict.RETRIES_EXHAUSTED
        assert await a.claims.verdict("t", ignored_reason="not now") is ClaimVerdict.IGNORED
        afresh = await a.claims.reset_retries("t")
        await cluster.store.commit(Commit(afresh))
        assert await a.claims.verdict("t") is ClaimVerdict.TRY
        assert await a.claims.reset_retries("t") == await a.claims.reset_retries("never claimed") == []
        again = await a.claims.plan("t", retries=0)
        assert isinstance(again, PlannedClaim)
        assert again.claim.retries == 0

    async def test_sweep_for_a_person_counts_no_takeover(self, cluster: Cluster) -> None:
        """A resume by a person is not a failed attempt."""
        a, b = await cluster.join("a"), await cluster.join("b")
        await claim_task(a, "t")
        await a.others.leave()
        assert await b.takeovers.sweep(counts=False) == {"t": "a"}
        assert (await cluster.claim("t")).retries == 0

    async def test_planned_claim_is_committed_with_the_first_work(self, cluster: Cluster) -> None:
        """Of two plans of one claim only one commits."""
        a, b = await cluster.join("a"), await cluster.join("b")
        plans = [await process.claims.plan("t") for process in (a, b)]
        mine, theirs = [one for one in plans if isinstance(one, PlannedClaim)]
        await cluster.store.commit(Commit([theirs.write, Write(TASK, 0, {"by": "b"})], guards=[b.others.guard]))
        b.claims.mark_claimed("t", theirs)
        assert b.claims.guard("t") == theirs.guard
        with pytest.raises(Exception, match=r"is at version 1 .*, expected 0"):
            await cluster.store.commit(Commit([mine.write, Write(TASK, 1, {"by": "a"})], guards=[a.others.guard]))
        done = b.claims.release_write("t", ReleaseReason.COMPLETE, None)
        await cluster.store.commit(Commit([done, Write(TASK, 1, {"by": "b"})], guards=[theirs.guard]))
        b.claims.mark_released("t")
        assert ("t" in b.claims, (await cluster.claim("t")).released) == (False, ReleaseReason.COMPLETE)

    @pytest.mark.parametrize("fault", ["fails", "is not acknowledged"])
    async def test_failed_commit_loses_no_claim(self, cluster: Cluster, fault: str) -> None:
        """Whether the commit was applied or not, it is repeated, and costs neither a claim nor an attempt."""
        a, b = await cluster.join("a"), await cluster.join("b")
        a.line.faults = [fault]
        with pytest.raises(StoreUnavailable):
            await a.others.renew()
        await a.others.renew()
        a.line.faults = [fault]
        with pytest.raises(StoreUnavailable):
            await a.claims.claim("t")
        assert await a.claims.verdict("t") is ClaimVerdict.TRY
        await claim_task(a, "t")
        assert (await cluster.claim("t")).retries == 0
        a.line.faults = [fault]
        with pytest.raises(StoreUnavailable):
            await a.claims.release("t", ReleaseReason.COMPLETE, "done")
        assert "t" in a.claims
        await a.claims.release("t", ReleaseReason.COMPLETE, "done")
        assert ("t" in a.claims, (await cluster.claim("t")).reason) == (False, "done")
        await claim_task(a, "u")
        await a.others.leave()
        b.line.faults = [fault]
        with pytest.raises(StoreUnavailable):
            await b.takeovers.sweep()
        found = [await b.takeovers.sweep(), await b.takeovers.sweep()]
        assert found == ([{"u": "a"}, {}] if fault == "fails" else [{}, {"u": "b"}])
        assert ((await cluster.claim("u")).owner, (await cluster.claim("u")).retries) == (b.others.me, 1)
        await cluster.write(b.claims.guard("u"))
        b.line.faults = [fault]
        with pytest.raises(StoreUnavailable):
            await b.others.leave()
        await b.others.leave()

    async def test_claim_being_acquired_is_not_swept(self, cluster: Cluster) -> None:
        """A sweep between the commit of a claim and its acknowledgement is harmless."""
        a = await cluster.join("a")
        taking = await a.claims.plan("t")
        assert isinstance(taking, PlannedClaim)
        await cluster.store.commit(Commit([taking.write]))
        assert await a.takeovers.sweep() == {}
        a.claims.mark_claimed("t", taking)
        assert await a.takeovers.sweep() == {}
        await cluster.write(a.claims.guard("t"))

    @pytest.mark.parametrize("alone", ["first", "second"])
    async def test_exclusive_and_shared_orchestrators_see_each_other(self, cluster: Cluster, alone: str) -> None:
        """Whichever of the two is exclusive; ended ones do not count."""
        first = await cluster.join("first", shares=alone != "first")
        assert await first.others.peers.find_exclusive_peer() is None
        second = await cluster.join("second", shares=alone != "second")
        seen = [await one.others.peers.find_exclusive_peer() for one in (first, second)]
        assert [one and one.owner.id for one in seen] == [second.others.me.id, first.others.me.id]
        await first.others.leave()
        assert await second.others.peers.find_exclusive_peer() is None
        third = await cluster.join("third", shares=alone != "second")
        assert (await third.others.peers.find_exclusive_peer() is None) is (alone == "first")

    async def test_join_with_a_lost_reply_happens_once(self, cluster: Cluster) -> None:
        """The record is recognized, whether its commit was acknowledged or not."""
        a = await cluster.join("a")
        await a.others.join()
        await a.others.renew()
        await a.others.leave()
        with pytest.raises(OrchestratorFenced, match="it has ended"):
            await a.others.join()

    async def test_membership_changes_are_logged(self, cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
        """Successes as information, failures as warnings."""
        caplog.set_level(logging.INFO, "orchestrator.claims")
        a, b = await cluster.join("a"), await cluster.join("b")
        for task in ("t", "u"):
            await claim_task(a, task)
        await a.others.renew()
        await a.claims.release("t", ReleaseReason.COMPLETE)
        await claim_task(a, "t")
        await a.others.leave()
        await b.takeovers.sweep()
        with pytest.raises(LeaseLost):
            await a.claims.release("t", ReleaseReason.COMPLETE)
        a.line.faults = ["fails"]
        with pytest.raises(StoreUnavailable):
            await a.others.renew()
        reported = [(one.levelname, one.getMessage()) for one in caplog.records if " taken: " not in one.getMessage()]
        assert reported == [
            ("INFO", "claims synced: run run, a"),
            ("INFO", "claim released: run run, task t as complete"),
            ("INFO", "claims taken over: run run, 2 of a: t, u"),
            ("WARNING", "claim lost: run run, task t was taken over"),
            ("WARNING", "claim sync failed: run run, a: store: no answer: wait"),
        ]

    async def test_merge_lease_is_granted_in_request_order(self, cluster: Cluster) -> None:
        """Across orchestrators with several tasks each; each turn has its own epoch."""
        clock, turns, most = SystemClock(), list[tuple[str, int]](), 0
        processes = [await cluster.join(name, clock=clock) for name in "abcd"]
        inside = 0

        async def land(process: Process) -> None:
            nonlocal inside, most
            async with process.leases.hold() as lease:
                inside += 1
                most = max(most, inside)
                await cluster.write(lease.guard, process.others.guard)
                turns.append((process.name, lease.guard.epoch))
                inside -= 1

        async with anyio.create_task_group() as group, processes[0].leases.hold():
            for number, process in enumerate(processes[1:], 1):
                group.start_soon(land, process)
                await run_until(lambda many=number: self._are_waiting(cluster, processes[0], many))  # type: ignore[misc]
            group.start_soon(land, processes[0])
        assert [name for name, _ in turns] == ["b", "c", "d", "a"]
        assert most == 1
        epochs = [epoch for _, epoch in turns]
        assert epochs == sorted(set(epochs))
        lease = await cluster.lease(processes[0])
        assert (lease.holder, lease.waiting, lease.epoch) == (None, (), 10)

    async def _are_waiting(self, cluster: Cluster, process: Process, many: int) -> bool:
        return len((await cluster.lease(process)).waiting) == many

    async def test_merge_lease_alternates_between_landings_of_one_orchestrator(self, cluster: Cluster) -> None:
        """A lease with its own name is not a leftover while another task of it holds it."""
        a, order = await cluster.join("a"), list[str]()

        async def second() -> None:
            async with MergeLeaseQueue(cluster.store, cluster.clock, a.others, "/repository", "main").hold() as lease:
                order.append("second")
                await cluster.write(lease.guard)

        async with anyio.create_task_group() as group, a.leases.hold() as lease:
            group.start_soon(second)
            await anyio.wait_all_tasks_blocked()
            await cluster.write(lease.guard)
            order.append("first")
        assert order == ["first", "second"]

    @pytest.mark.parametrize("is_dead", [False, True])
    async def test_merge_lease_of_a_dead_holder_passes_on(self, cluster: Cluster, is_dead: bool) -> None:
        """Dead waiters are skipped; the former holder can neither land nor release it."""
        a, gone, b = [await cluster.join(name, host="box" if is_dead else "") for name in ("a", "gone", "b")]
        done = anyio.Event()

        async def take() -> None:
            async with b.leases.hold() as lease:
                await cluster.write(lease.guard)
                done.set()

        async with a.leases.hold() as lease, anyio.create_task_group() as group:
            async with anyio.create_task_group() as waits:
                waits.start_soon(self._hold, gone)
                await run_until(lambda: self._are_waiting(cluster, a, 1))
                gone.line.faults = ["fails"]
                waits.cancel_scope.cancel()
            group.start_soon(take)
            await run_until(lambda: self._are_waiting(cluster, a, 2))
            if is_dead:
                cluster.dead |= {"a", "gone"}
                cluster.clock.advance(1.0)
            else:
                for _ in range(4):
                    cluster.clock.advance(100.0)
                    await b.others.renew()
                    await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(PATIENCE):
                while not done.is_set():
                    cluster.clock.advance(1.0)
                    await anyio.lowlevel.checkpoint()
            with pytest.raises(LeaseLost):
                await cluster.write(lease.guard)
        left = await cluster.lease(b)
        assert (left.holder, left.waiting) == (None, ())

    async def _hold(self, process: Process) -> None:
        async with process.leases.hold():
            pass

    async def test_merge_lease_wait_that_is_cancelled_leaves_nothing(self, cluster: Cluster) -> None:
        """A cancelled waiter delays nobody."""
        a, b = await cluster.join("a"), await cluster.join("b")
        async with a.leases.hold():
            async with anyio.create_task_group() as group:
                group.start_soon(self._hold, b)
                await run_until(lambda: self._are_waiting(cluster, a, 1))
                group.cancel_scope.cancel()
            lease = await cluster.lease(a)
            assert lease.holder is not None
            assert (lease.holder.id, lease.waiting) == ("a", ())
        assert (await cluster.lease(a)).holder is None

    async def test_merge_lease_is_denied_to_an_ended_orchestrator(self, cluster: Cluster) -> None:
        """The error is immediate, and nothing is left behind."""
        a, b = await cluster.join("a"), await cluster.join("b")
        await a.others.leave()
        with pytest.raises(LeaseLost):
            await self._hold(a)
        async with b.leases.hold():
            with pytest.raises(LeaseLost):
                await self._hold(a)
            assert (await cluster.lease(b)).waiting == ()

    @pytest.mark.parametrize("fault", ["fails", "is not acknowledged"])
    @pytest.mark.parametrize("number", [0, 1])
    async def test_merge_lease_release_that_failed_is_repeated_by_the_heartbeat(
        self, cluster: Cluster, fault: str, number: int
    ) -> None:
        """Otherwise all others would wait as long as the process lives, after a failed release or acquisition."""
        a, b = await cluster.join("a"), await cluster.join("b")
        a.line.faults = [[fault, "fails"], ["", fault]][number]
        if number:
            await self._hold(a)
        else:
            with pytest.raises(StoreUnavailable):
                await self._hold(a)
        a.line.faults = []
        await a.others.renew()
        await self._hold(b)
        await self._hold(a)
        assert (await cluster.lease(a)).holder is None
