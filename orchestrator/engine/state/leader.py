"""Who coordinates a run: the holder of its lease, under the lease's epoch."""

from __future__ import annotations

from contextlib import suppress

from orchestrator.domain.scheduling.claims import OrchestratorIdentity, OwnerStatus
from orchestrator.errors import VersionConflict
from orchestrator.locking.orchestrators import RunMembership
from orchestrator.protocols import Commit, Event, Guard, Key, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint


def _lease_key(run: str) -> Key:
    return Key("lease", f"run/{run}")


async def find_other_leader(store: Store, orchestrators: RunMembership) -> OrchestratorIdentity | None:
    """Return who coordinates the run of these orchestrators, if somebody else than this one does who lives."""
    lease = await store.get(_lease_key(orchestrators.run))
    found = None if lease is None or lease.damaged else lease.value.get("orchestrator")
    if found in {None, orchestrators.me.id}:
        return None
    holder = await orchestrators.find(found)
    if holder is None or await orchestrators.standing(holder) is not OwnerStatus.ALIVE:
        return None
    return holder.owner


async def prepare_lease(store: Store, clock: Clock, run: str, owner: OrchestratorIdentity) -> tuple[Write, Guard]:
    """Return the write that makes an orchestrator a run's leader, and the guard under which it is one then.

    The write fails if somebody has become it since this was asked: so ask before looking whether anybody is.
    """
    key = _lease_key(run)
    lease = await store.get(key)
    version = lease.version if lease else 0
    # Each owner writes the lease once: its version is the epoch, and known even where its bytes are damaged.
    value = {"orchestrator": owner.id, "host": owner.host, "pid": owner.pid, "since": clock.now(), "epoch": version + 1}
    return Write(key, version, value), Guard(key, version + 1)


async def take_leadership(store: Store, clock: Clock, run: str, owner: OrchestratorIdentity) -> Guard:
    """Become a run's owner under the next epoch without working in it; whoever was can write nothing any more."""
    while True:
        write, guard = await prepare_lease(store, clock, run, owner)
        ended = {"ended": clock.now(), "reason": "a checkpoint of the run was restored"}
        fences = [
            Write(one.key, one.version, {**one.value, **ended, "epoch": one.value["epoch"] + 1})
            for one in await store.list("orchestrator", f"{run}/")
            if one.value["ended"] is None
        ]
        seized = Event("run.taken_over", {"run": run, "epoch": guard.epoch, "pid": owner.pid})
        with suppress(VersionConflict):  # one of them has just renewed its record
            await store.commit(Commit([write, *fences], [seized]))
            failpoint("run.taken_over")
            return guard
