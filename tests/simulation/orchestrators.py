"""Orchestrators share one queue under all kinds of faults: a simulation of the guarantees of claims.

The classes under test are the real ones, over the memory store. Between any two steps a process may be stopped for
longer than its lease, or end; a commit may fail, or succeed with a lost acknowledgement; the clocks of processes
differ by up to three seconds. The faults end after a while, and then all work must finish.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from random import Random
from typing import cast

import anyio

from orchestrator.domain.runs.statuses import ReleaseReason
from orchestrator.domain.scheduling.claims import ClaimVerdict, OrchestratorIdentity, Role
from orchestrator.domain.settings.run_settings import CoordinationSettings
from orchestrator.errors import LeaseLost, StoreUnavailable, VersionConflict
from orchestrator.locking.claims import Claims
from orchestrator.locking.merge_lease import MergeLeaseQueue, merge_lease_key
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.locking.ownership import ownership_scope
from orchestrator.locking.takeovers import ClaimTakeovers
from orchestrator.protocols import Commit, CommitRecord, Document, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock
from tests.claim_history import ClaimHistory
from tests.simulation.virtual_time import run_in_virtual_time

RUN, REPOSITORY, TARGET = "r", "repository", "main"
TIMING = CoordinationSettings(
    heartbeat_interval=6.0, stale_after=30.0, owner_stale_after=60.0, stale_check_interval=9.0, max_retries=99
)
SKEW = 3.0
"""Seconds by which a clock is wrong at most."""
FAULT_PERIOD = 180.0
"""Seconds after which nothing goes wrong any more."""
SETTLE_TIMEOUT = 30 * TIMING.owner_stale_after
"""Seconds within which all has to be done from then on."""

#: Each asyncio task has its own random generator: its draws do not depend on the order of tasks.
_dice: ContextVar[Random] = ContextVar("dice")


class ProcessCrashed(BaseException):
    """The process crashed at a step."""


@dataclass(frozen=True)
class FaultRates:
    """The probabilities of faults at a step or a commit."""

    crash: float = 0.004
    stop: float = 0.008
    fail: float = 0.01
    lose: float = 0.02
    """A commit is done, and its caller gets an error."""
    give_up: float = 0.1
    """A try is in vain."""
    override: float = 0.01
    """A leader takes what another is at."""


class SkewedClock(SystemClock):
    """The clock of a machine: virtual, with an offset."""

    def __init__(self, skew: float) -> None:
        self._skew = skew

    def now(self) -> float:
        """Return seconds since the epoch."""
        return 1e9 + self.monotonic() + self._skew

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Wait for a time, the only wait of the code under test."""
        assert until is not None
        await asyncio.sleep(max(0.0, until - self.monotonic()))


@dataclass
class World:
    """The shared state of all processes: the store, the target branch, and the fault rates."""

    seed: int
    fault_rates: FaultRates
    is_fenced: bool
    store: MemoryStore = field(default_factory=lambda: MemoryStore(SkewedClock(0)))
    target: list[str] = field(default_factory=list)
    """The landed tasks, in order; the length of the list represents the commit of the branch."""
    processes: dict[str, SimulatedProcess] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    """The number of occurrences of each event."""

    def __post_init__(self) -> None:
        self.time = asyncio.get_running_loop().time

    def should_fail(self, chance: float) -> bool:
        """Return whether a fault of this probability happens now."""
        return self.time() < FAULT_PERIOD and _dice.get().random() < chance


class SimulatedProcess:
    """A process of an orchestrator: its pauses, its crashes, and its access to store and target."""

    def __init__(self, world: World, number: int, role: Role) -> None:
        dice = Random(f"{world.seed}/{number}")
        self.world, self.number = world, number
        self.host = dice.choice("ab")
        self.owner = OrchestratorIdentity(
            id=f"p{number}", host=self.host, boot="1", pid=number, started=number, role=role
        )
        self.clock = SkewedClock(dice.uniform(-SKEW, SKEW))
        self.is_finished = False
        self._stopped_until = 0.0
        world.processes[self.owner.id] = self

    async def step(self) -> None:
        """Pass a point where the process may pause or crash."""
        dice, world = _dice.get(), self.world
        chance = dice.random()
        if chance > 0.5:  # other tasks run in between
            await asyncio.sleep(0.2 * (chance - 0.5))
        elif world.time() < FAULT_PERIOD:
            if chance < world.fault_rates.crash:
                world.seen["crashed"] += 1
                self.is_finished = True
            elif chance < world.fault_rates.crash + world.fault_rates.stop:
                world.seen["stopped"] += 1
                self._stopped_until = world.time() + dice.uniform(0, 3) * TIMING.owner_stale_after
        while world.time() < self._stopped_until and not self.is_finished:
            await asyncio.sleep(self._stopped_until - world.time())
        if self.is_finished:
            raise ProcessCrashed

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`."""
        await self.step()
        if self.world.should_fail(self.world.fault_rates.fail):
            raise _unavailable()
        position = await self.world.store.commit(commit if self.world.is_fenced else replace(commit, guards=()))
        await self.step()
        if self.world.should_fail(self.world.fault_rates.lose):
            self.world.seen["lost acknowledgement"] += 1
            raise _unavailable()
        return position

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        await self.step()
        return await self.world.store.get(key)

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`."""
        await self.step()
        return await self.world.store.list(kind, prefix)

    async def fetch(self) -> Sequence[str]:
        """Return the content of the target."""
        await self.step()
        return tuple(self.world.target)

    async def push(self, old: int, task: str) -> bool:
        """Move the target from `old` by a task; return False if it has moved."""
        await self.step()
        if len(self.world.target) != old:
            return False
        self.world.target.append(task)
        await self.step()
        return True

    async def is_dead(self, _run: str, owner: OrchestratorIdentity) -> bool:
        """Return whether a process of this machine is known to be dead."""
        other = self.world.processes[owner.id]
        return other.host == self.host and other.is_finished


def _unavailable() -> StoreUnavailable:
    return StoreUnavailable("the store", "no answer", "wait")


def work_key(task: str) -> Key:
    """Return the key of a task's recorded work."""
    return Key("work", f"{RUN}/{task}")


class SimulatedOrchestrator:
    """A minimal engine: claims tasks, works on each in steps, lands it and releases the claim."""

    def __init__(self, process: SimulatedProcess) -> None:
        self.process = process
        self.store = cast("Store", process)
        self.others = RunMembership(self.store, process.clock, RUN, process.owner, TIMING, process.is_dead)
        self.claims = Claims(self.store, process.clock, self.others)
        self.takeovers = ClaimTakeovers(self.store, process.clock, self.others, self.claims)
        self.leases = MergeLeaseQueue(self.store, process.clock, self.others, REPOSITORY, TARGET)
        self._busy: set[str] = set()

    async def live(self) -> None:
        """Work until no task is left. Raises LeaseLost after a takeover and ProcessCrashed after a crash."""
        try:
            await self._until_it_works(self.others.join)
            async with anyio.create_task_group() as group:
                for number, job in enumerate((self._beat, self._sweep)):
                    group.start_soon(self._with_dice, number, job)
                async with anyio.create_task_group() as slots:
                    for number in (2, 3):
                        slots.start_soon(self._with_dice, number, self._work)
                group.cancel_scope.cancel()
            await self._until_it_works(self.others.leave)
        except BaseExceptionGroup as errors:
            rest = errors.split((ProcessCrashed, LeaseLost))[1]
            if rest is not None:
                raise
            raise (
                ProcessCrashed() if errors.subgroup(ProcessCrashed) else LeaseLost(self.others.me.id, 1, None)
            ) from None
        finally:
            self.process.is_finished = True

    async def _with_dice(self, number: int, job: Callable[[], object]) -> None:
        _dice.set(Random(f"{self.process.world.seed}/{self.process.number}/{number}"))
        await job()  # type: ignore[misc]

    async def _until_it_works(self, do: Callable[[], object]) -> None:
        while True:
            try:
                await do()  # type: ignore[misc]
            except StoreUnavailable:
                await self._pause(0.5)
            else:
                return

    async def _pause(self, seconds: float) -> None:
        await self.process.clock.wait(anyio.Event(), self.process.clock.monotonic() + seconds)

    async def _beat(self) -> None:
        while True:
            await self._until_it_works(self.others.renew)
            await self._pause(TIMING.heartbeat_interval)

    async def _sweep(self) -> None:
        while True:
            await self._until_it_works(self.takeovers.sweep)
            await self._pause(TIMING.stale_check_interval)

    async def _work(self) -> None:
        while True:
            try:
                documents = await self.store.list("work", f"{RUN}/")
                left = [one.key.id.partition("/")[2] for one in documents if one.value["state"] != "landed"]
                left = [*left, *(task for task in self.claims if task not in left)]
                if not left:
                    return
                _dice.get().shuffle(left)
                for task in left:
                    if task not in self._busy:
                        self._busy.add(task)
                        try:
                            await self._try(task)
                        finally:
                            self._busy.discard(task)
            except StoreUnavailable:
                pass
            await self._pause(_dice.get().uniform(1, 6))

    async def _try(self, task: str) -> None:
        override = self.process.world.should_fail(self.process.world.fault_rates.override)
        if task not in self.claims:
            verdict = await self.claims.verdict(task)
            if verdict is not ClaimVerdict.TRY and not override:
                return
            if await self.claims.claim(task, override=override) is None:
                return
        guard = self.claims.guard(task)
        assert guard is not None
        try:
            await self._do(task, guard)
        except (LeaseLost, VersionConflict):
            claim = await self.claims.read(task)
            if claim is None or claim.epoch != guard.epoch:
                self.claims.mark_lost(task)
            error = await self.others.find_fencing_error()
            if error is not None:
                raise error from None

    async def _do(self, task: str, guard: Guard) -> None:
        if await self._adopts(task, guard):
            return
        await self._write(task, [guard], {"state": "running"})
        for _ in range(_dice.get().randint(1, 3)):
            await self._pause(_dice.get().uniform(1, 8))
            await self._write(task, [guard], {})
        if self.process.world.should_fail(self.process.world.fault_rates.give_up):
            await self.claims.release(task, ReleaseReason.ABANDONED, "it failed", counts=True)
            return
        async with self.leases.hold() as lease:
            while not await self._adopts(task, guard):
                there = await self.process.fetch()
                if task in there:
                    continue
                await self._write(task, [guard, lease.guard], {"state": "landing", "lease": lease.guard.epoch})
                if await self.process.push(len(there), task):
                    await self._land(task, guard)
                    return

    async def _adopts(self, task: str, guard: Guard) -> bool:
        """Return whether the task is already on the target, by anyone's work."""
        found = await self.store.get(work_key(task))
        assert found is not None
        if found.value["state"] == "landed":
            await self.claims.release(task, ReleaseReason.COMPLETE)
            return True
        if task not in await self.process.fetch():
            return False
        self.process.world.seen["adopted"] += 1
        await self._land(task, guard)
        return True

    async def _land(self, task: str, guard: Guard) -> None:
        await self._write(
            task, [guard], {"state": "landed"}, self.claims.release_write(task, ReleaseReason.COMPLETE, None)
        )
        self.claims.mark_released(task)

    async def _write(self, task: str, guards: Sequence[Guard], changes: JsonObject, *more: Write) -> None:
        found = await self.store.get(work_key(task))
        assert found is not None
        value = {**found.value, **changes, "by": self.others.me.id, "epoch": guards[0].epoch}
        writes = [Write(found.key, found.version, value), *more]
        await self.store.commit(Commit(writes, [Event("work", {"by": self.others.me.id})], guards))


@dataclass(frozen=True)
class SimulationResult:
    """The outcome of a simulation."""

    violations: Sequence[str]
    records: Sequence[CommitRecord]
    seen: Counter[str]
    """The number of occurrences of each fault and event."""
    takeovers: int


def simulate(
    seed: int, *, processes: int = 3, tasks: int = 5, fault_rates: FaultRates = FaultRates(), is_fenced: bool = True
) -> SimulationResult:
    """Run a simulation; the same seed gives the same result."""
    return run_in_virtual_time(_simulate(seed, processes, tasks, fault_rates, is_fenced))


async def _simulate(
    seed: int, processes: int, tasks: int, fault_rates: FaultRates, is_fenced: bool
) -> SimulationResult:
    world = World(seed, fault_rates, is_fenced)
    _dice.set(Random(f"{world.seed}"))
    blank = {"state": "pending", "by": None, "epoch": None, "lease": None}
    await world.store.commit(Commit([Write(work_key(f"t{number}"), 0, blank) for number in range(tasks)]))
    is_stuck = True
    with anyio.move_on_after(FAULT_PERIOD + SETTLE_TIMEOUT):
        async with anyio.create_task_group() as group:
            for number in range(processes):
                group.start_soon(_lives, world, number, processes)
        is_stuck = False
    records = [record async for record in read_range(world.store, 0, await world.store.position())]
    violations, takeovers = check_history(records)
    violations += [f"{task} landed twice" for task, times in Counter(world.target).items() if times > 1]
    left = [one.key.id for one in await world.store.list("work") if one.value["state"] != "landed"]
    if left or is_stuck:
        violations.append(f"not done in the end: {left}, {world.seen}")
    return SimulationResult(violations, records, world.seen, takeovers)


async def _lives(world: World, number: int, processes: int) -> None:
    """Restart a process after each crash, for a number of crashes."""
    dice = Random(f"{world.seed}/{number}/lives")
    _dice.set(dice)
    role = Role.LEADER if number == 0 else Role.WORKER
    while True:
        try:
            await SimulatedOrchestrator(SimulatedProcess(world, number, role)).live()
        except (ProcessCrashed, LeaseLost) as error:
            world.seen[type(error).__name__] += 1
            if number % processes and dice.random() < 0.3:
                return
        else:
            return
        await asyncio.sleep(dice.uniform(0, TIMING.owner_stale_after))
        number += processes


def check_history(records: Sequence[CommitRecord]) -> tuple[list[str], int]:
    """Return the violations in the history of a store, and the number of takeovers."""
    history, leases, found = ClaimHistory(_authorship), dict[Key, int](), list[str]()
    lease = merge_lease_key(ownership_scope(REPOSITORY, TARGET))
    for record in records:
        history.add(record)
        for key, (_, value) in record.documents.items():
            if key == lease and value is not None:
                leases[key] = value["epoch"]
            if key.kind == "work" and value and value["state"] == "landing" and value["lease"] != leases.get(lease):
                found.append(f"at {record.position}: {value['by']} intended to land under the lease {value['lease']}")
    return [*history.violations, *found], history.takeovers


def _authorship(key: Key, value: JsonObject) -> tuple[str, int, str] | None:
    return (key.id, value["epoch"], value["by"]) if key.kind == "work" and value["by"] is not None else None
