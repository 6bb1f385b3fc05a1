"""Commits of one orchestrator to its run, fenced by epochs and without secrets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from orchestrator.domain.documents.stored import CheckpointOrigin
from orchestrator.domain.events.base import RunEvent
from orchestrator.domain.events.runs import RunLeaderElected, RunTakenOver
from orchestrator.domain.scheduling.claims import OrchestratorIdentity, OwnerStatus
from orchestrator.engine.state.records import read_run
from orchestrator.engine.state.transitions import record_event, sanitize
from orchestrator.errors import LeaseLost, RunActive, VersionConflict
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.protocols import Commit, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

if TYPE_CHECKING:
    from orchestrator.domain.security.secrets import Redactor


def _lease_key(run: str) -> Key:
    return Key("lease", f"run/{run}")


async def find_other_leader(store: Store, orchestrators: RunMembership) -> OrchestratorIdentity | None:
    """Return the live leader of the run if it is another orchestrator; None otherwise."""
    lease = await store.get(_lease_key(orchestrators.run))
    leader = None if lease is None or lease.damaged else lease.value.get("orchestrator")
    if leader in {None, orchestrators.me.id}:
        return None
    holder = await orchestrators.peers.find(leader)
    if holder is None or await orchestrators.peers.assess(holder) is not OwnerStatus.ALIVE:
        return None
    return holder.owner


async def prepare_lease(store: Store, clock: Clock, run: str, owner: OrchestratorIdentity) -> tuple[Write, Guard]:
    """Return the write that takes the lease of a run, and the guard of its epoch.

    The write fails if the lease changes after this call, so call this before looking for a live leader.
    """
    key = _lease_key(run)
    lease = await store.get(key)
    version = lease.version if lease else 0
    # Each leader writes the lease once: its version is the epoch, known even if its bytes are damaged.
    value = {"orchestrator": owner.id, "host": owner.host, "pid": owner.pid, "since": clock.now(), "epoch": version + 1}
    return Write(key, version, value), Guard(key, version + 1)


async def take_leadership(store: Store, clock: Clock, run: str, owner: OrchestratorIdentity) -> Guard:
    """Take the lease of a run under the next epoch, without working in the run.

    Later writes by orchestrators of the run are rejected.
    """
    while True:
        write, guard = await prepare_lease(store, clock, run, owner)
        ended = {"ended": clock.now(), "reason": "a checkpoint of the run was restored"}
        fences = [
            Write(record.key, record.version, {**record.value, **ended, "epoch": record.value["epoch"] + 1})
            for record in await store.list("orchestrator", f"{run}/")
            if record.value["ended"] is None
        ]
        taken_over = Event.of(RunTakenOver(run=run, epoch=guard.epoch, pid=owner.pid))
        with suppress(VersionConflict):  # an orchestrator has just renewed its record
            await store.commit(Commit([write, *fences], [taken_over]))
            failpoint("run.taken_over")
            return guard


#: The number of periodic checkpoints to keep.
MAX_CLOCK_CHECKPOINTS = 12


class RunWriter:
    """Writes to a run as one orchestrator; commits fail after a takeover.

    The leader holds the lease of the run, and does all work that must be done only once.
    """

    def __init__(self, store: Store, clock: Clock, redactor: Redactor, orchestrators: RunMembership) -> None:
        """Create a writer; `redactor` removes secrets from its writes."""
        self.store, self.clock, self.redactor, self.orchestrators = store, clock, redactor, orchestrators
        self.run = orchestrators.run
        """The id of the run."""
        self.became_leader = anyio.Event()
        """Set once this orchestrator leads the run."""
        self._guards: tuple[Guard, ...] = (orchestrators.guard,)
        self._noted: set[tuple[str, ...]] = set()
        self._slowest = 0.0

    async def lead(self, sandbox: str, writes: Sequence[Write] = ()) -> None:
        """Join the run as its leader in the next epoch, in one commit with other writes.

        Raises RunActive if another live orchestrator leads the run, VersionConflict if another was first.
        """
        lease = await prepare_lease(self.store, self.clock, self.run, self.orchestrators.me)
        if (holder := await find_other_leader(self.store, self.orchestrators)) is not None:
            raise RunActive(self.run, holder.pid, holder.host)
        await self._lead(lease, [self.orchestrators.join_write(), *writes], sandbox)
        self.orchestrators.mark_joined()

    async def try_to_lead(self) -> bool:
        """Become the leader if no live orchestrator leads and the run has not ended.

        Return True if successful. A worker does nothing while a live process exists that was started as a leader.
        """
        if self.became_leader.is_set():
            return False
        lease = await prepare_lease(self.store, self.clock, self.run, self.orchestrators.me)
        if await find_other_leader(self.store, self.orchestrators) is not None:
            return False
        if await self.orchestrators.is_outranked():
            return False
        if (await read_run(self.store, self.run)).ended is not None:  # the previous leader has finished the run
            return False
        with suppress(VersionConflict):  # another orchestrator was first
            await self._lead(lease, [], "")
            self.orchestrators.promote()
        return self.became_leader.is_set()

    async def _lead(self, lease: tuple[Write, Guard], writes: Sequence[Write], sandbox: str) -> None:
        write, guard = lease
        elected = RunLeaderElected(epoch=guard.epoch, pid=self.orchestrators.me.pid, sandbox=sandbox)
        await self.store.commit(Commit([write, *writes], [self.event(elected)]))
        self._guards = (self.orchestrators.guard, guard)
        self.became_leader.set()
        failpoint("run.leader_elected")

    async def commit(self, commit: Commit) -> None:
        """Commit in the current epochs; raise OrchestratorFenced after a takeover."""
        began = self.clock.monotonic()
        try:
            await self.store.commit(replace(commit, guards=[*self._guards, *commit.guards]))
        except LeaseLost:
            if (error := await self.orchestrators.find_fencing_error()) is not None:
                self.orchestrators.count(refused=1)
                raise error from None
            raise
        self._slowest = max(self._slowest, self.clock.monotonic() - began)

    def slowest_commit(self) -> float:
        """Return the duration in seconds of the slowest commit since the last call."""
        slowest, self._slowest = self._slowest, 0.0
        return slowest

    def event(self, event: RunEvent) -> Event:
        """Return the record of an event of the run."""
        return record_event(event, self.run, self.redactor)

    def sanitize(self, value: JsonObject) -> JsonObject:
        """Return a value without secrets in program output."""
        return sanitize(value, self.redactor)

    async def note(self, event: RunEvent) -> None:
        """Record an event without changing a document."""
        await self.commit(Commit([], [self.event(event)]))

    async def note_once(self, event: RunEvent, *key: str) -> None:
        """Record an event unless one of the same type and key is already recorded."""
        if (event.type, *key) not in self._noted:
            self._noted.add((event.type, *key))
            await self.note(event)

    def forget(self, event: type[RunEvent], *key: str) -> None:
        """Allow `note_once` to record an event with a key again."""
        self._noted.discard((event.type, *key))

    async def checkpoint(self) -> None:
        """Create the periodic checkpoint that is due, and prune older ones."""
        # Imported late: read-only commands create no checkpoint.
        from orchestrator.state.documents.checkpoints import create_checkpoint, prune_checkpoints  # noqa: PLC0415  see above

        await create_checkpoint(
            self.store, self.run, "active run", created_by=CheckpointOrigin.TIMER, guards=self._guards
        )
        await prune_checkpoints(self.store, self.run, MAX_CLOCK_CHECKPOINTS, self._guards)
