"""Leader election by the lease of a run.

The holder of the lease leads the run under the epoch of the lease.
"""

from __future__ import annotations

from contextlib import suppress

from orchestrator.domain.events.runs import RunTakenOver
from orchestrator.domain.scheduling.claims import OrchestratorIdentity, OwnerStatus
from orchestrator.errors import VersionConflict
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.protocols import Commit, Event, Guard, Key, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint


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
