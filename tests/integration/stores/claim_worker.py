"""Run worker processes that share a task queue: `python claim_worker.py STATE LOCKS PATIENCE FAULT…`.

One process per fault. After a process has claimed its N-th task, and before it runs the task, it kills or stops itself:
`none`, `kill@N` or `stop@N`; for `group@N`, it claims many tasks at once, and kills itself when it has claimed N. With
`seed COUNT` instead of a patience, the program creates the queue.
"""

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio

from orchestrator.domain.runs.statuses import ReleaseReason
from orchestrator.domain.scheduling.claims import Role
from orchestrator.domain.settings.run_settings import CoordinationSettings
from orchestrator.errors import LeaseLost
from orchestrator.locking.claims import Claims
from orchestrator.locking.orchestrators import RunMembership, create_owner
from orchestrator.locking.takeovers import ClaimTakeovers
from orchestrator.protocols import Commit, Guard, Key, Store, Write
from orchestrator.repo.worktrees.hub import LivenessLocks
from orchestrator.system.clock import SystemClock
from tests.stores import open_store

RUN = "run"
QUEUE = Key("queue", RUN)
_GROUP = 20


def say(*words: object) -> None:
    """Print a line with one write: several processes share this output."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def work_key(task: str) -> Key:
    """Return the key of a task's result document."""
    return Key("work", f"{RUN}/{task}")


class InjectedFaults:
    """The fault of each process, and a file with one byte per fault that has occurred."""

    def __init__(self, happened: Path, of_processes: Sequence[str]) -> None:
        self.happened, self.of_processes = happened, of_processes
        self.count = sum(fault != "none" for fault in of_processes)

    def add(self) -> None:
        """Record that the fault of this process happens now."""
        with self.happened.open("ab", buffering=0) as file:
            file.write(b".")

    def all_occurred(self) -> bool:
        """Return True if all faults have occurred."""
        return self.count == 0 or (self.happened.exists() and self.happened.stat().st_size >= self.count)


class Worker:
    """One process that claims and runs tasks."""

    def __init__(
        self, store: Store, locks: LivenessLocks, patience: float, number: int, faults: InjectedFaults
    ) -> None:
        self.store, self.locks, self.number, self.faults = store, locks, number, faults
        self.fault = faults.of_processes[number]
        self.timing = CoordinationSettings(
            heartbeat_interval=0.25,
            stale_after=patience,
            owner_stale_after=patience,
            stale_check_interval=0.25,
            max_retries=99,
        )
        self.clock = SystemClock()
        self.claimed = self.done = 0

    async def work(self) -> None:
        """Run tasks until all are done; report and rejoin after being taken for dead."""
        while not await self._joins():
            pass
        say(self.number, "done", self.done)

    async def _joins(self) -> bool:
        me = create_owner(Role.WORKER)
        others = RunMembership(self.store, self.clock, RUN, me, self.timing, self.locks.is_dead)
        claims = Claims(self.store, self.clock, others)
        takeovers = ClaimTakeovers(self.store, self.clock, others, claims)
        async with self.locks.of(RUN, me.id).hold(0):
            await others.join()
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._again_and_again, others.renew, self.timing.heartbeat_interval)
                    group.start_soon(self._again_and_again, takeovers.sweep, self.timing.stale_check_interval)
                    if self.fault.startswith("group"):
                        await self._claim_group(claims)
                    await self._empty(claims, others)
                    group.cancel_scope.cancel()
            except BaseExceptionGroup as errors:
                if errors.split(LeaseLost)[1] is not None:
                    raise
                say(self.number, "fenced", await others.find_fencing_error())
                return False
            await others.leave()
            return True

    async def _again_and_again(self, do: Callable[[], Awaitable[object]], seconds: float) -> None:
        while True:
            await do()
            await anyio.sleep(seconds)

    async def _empty(self, claims: Claims, others: RunMembership) -> None:
        queue = await self.store.get(QUEUE)
        assert queue is not None
        left: list[str] = queue.value["tasks"]
        share = len(left) // len(self.faults.of_processes)
        while left:
            begin, rest = self.done, list[str]()
            for task in left:
                # A fast process leaves tasks to the ones that are killed or stopped at a later claim.
                if self.done >= share and not self._awaits_fault() and not self.faults.all_occurred():
                    rest.append(task)
                    continue
                claim = await claims.read(task)
                if claim is not None and claim.released is ReleaseReason.COMPLETE:
                    continue
                if task not in claims:
                    is_held = claim is not None and claim.released is None  # the reaper notices the end of its owner
                    if is_held or await claims.claim(task) is None:
                        rest.append(task)
                        continue
                if await self.store.get(work_key(task)) is not None:  # done between the read and the claim
                    await claims.release(task, ReleaseReason.COMPLETE)
                    continue
                guard = claims.guard(task)
                assert guard is not None
                self._meet_fate(task)
                if not await self._finishes(task, guard, claims, others):
                    rest.append(task)
            left = rest
            if begin == self.done:
                await anyio.sleep(0.02)

    async def _claim_group(self, claims: Claims) -> None:
        async def claim(task: str) -> None:
            if await claims.claim(task) is not None:
                self._meet_fate(task)

        queue = await self.store.get(QUEUE)
        assert queue is not None
        async with anyio.create_task_group() as group:
            for task in queue.value["tasks"][-_GROUP:]:  # a fast process begins with the first ones
                group.start_soon(claim, task)

    def _awaits_fault(self) -> bool:
        _, _, at = self.fault.partition("@")
        return bool(at) and self.claimed < int(at)

    def _meet_fate(self, task: str) -> None:
        self.claimed += 1
        kind, _, at = self.fault.partition("@")
        if at and self.claimed == int(at):
            self.faults.add()
            say(self.number, kind, task, os.getpid())
            os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)

    async def _finishes(self, task: str, guard: Guard, claims: Claims, others: RunMembership) -> bool:
        work = Write(work_key(task), 0, {"by": others.me.id, "epoch": guard.epoch})
        try:
            await self.store.commit(
                Commit([work, claims.release_write(task, ReleaseReason.COMPLETE, None)], guards=[guard])
            )
        except LeaseLost:
            say(self.number, "refused", task)
            claims.mark_lost(task)
            if (error := await others.find_fencing_error()) is not None:
                raise error from None
            return False
        claims.mark_released(task)
        self.done += 1
        return True


async def seed(state: str, count: str) -> None:
    """Create the queue."""
    async with open_store(state) as store:
        await store.commit(Commit([Write(QUEUE, 0, {"tasks": [f"t{number:04}" for number in range(int(count))]})]))


async def main(state: str, locks: str, patience: str, number: int, faults: Sequence[str]) -> None:
    """Run one worker."""
    happened = Path(locks).with_name("happened")
    async with open_store(state) as store:
        await Worker(
            store, LivenessLocks(Path(locks)), float(patience), number, InjectedFaults(happened, faults)
        ).work()


def fork_all(state: str, locks: str, patience: str, *faults: str) -> None:
    """Fork one process per fault after the imports, which take most of the time."""
    for number in range(len(faults)):
        if os.fork() == 0:
            anyio.run(main, state, locks, patience, number, faults)
            os._exit(0)
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in faults]
    sys.exit(sum(code not in {0, -signal.SIGKILL} for code in codes))


if __name__ == "__main__":
    if sys.argv[2] == "seed":
        anyio.run(seed, sys.argv[1], sys.argv[3])
    else:
        fork_all(*sys.argv[1:])
