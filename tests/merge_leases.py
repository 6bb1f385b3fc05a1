"""Merge permits for tests without a run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orchestrator.locking.merge_lease import HeldMergeLease, MergeLeaseQueue
from orchestrator.protocols import Store
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import Clock
from orchestrator.testing.clock import ManualClock
from tests.recorded_run import make_orchestrators


async def join_merge_queue(store: Store, clock: Clock, repository: str, branch: str) -> MergeLeaseQueue:
    """Return the merge turns of another orchestrator on a branch."""
    others = make_orchestrators(store, clock, "r", alone=False)
    await others.join()
    return MergeLeaseQueue(store, clock, others, repository, branch)


@asynccontextmanager
async def hold_merge_lease(source: UpstreamRepository, branch: str) -> AsyncIterator[HeldMergeLease]:
    """Hold the uncontended merge lease of a branch."""
    clock = ManualClock()
    async with (await join_merge_queue(MemoryStore(clock), clock, source.location, branch)).hold() as lease:
        yield lease
