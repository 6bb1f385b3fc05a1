"""Permits to land, for tests that have no run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orchestrator.locking.merge_permit import MergePermit, MergePermits
from orchestrator.protocols import Store
from orchestrator.repo.source.source import Source
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import Clock
from orchestrator.testing.clock import ManualClock
from tests.recorded import orchestrators


async def permits(store: Store, clock: Clock, repository: str, branch: str) -> MergePermits:
    """Return the turns of one more orchestrator to land on a branch."""
    others = orchestrators(store, clock, "r", alone=False)
    await others.join()
    return MergePermits(store, clock, others, repository, branch)


@asynccontextmanager
async def permit_for(source: Source, branch: str) -> AsyncIterator[MergePermit]:
    """Have the right to land on a branch, which nobody else asks for."""
    clock = ManualClock()
    async with (await permits(MemoryStore(clock), clock, source.location, branch)).hold() as permit:
        yield permit
