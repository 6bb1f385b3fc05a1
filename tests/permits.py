"""Permits to land, for tests that have no run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orchestrator.locking.merge_permit import MergePermit, MergePermits
from orchestrator.repo.source import Source
from orchestrator.state.memory import MemoryStore
from orchestrator.testing.clock import ManualClock
from tests.recorded import orchestrators


@asynccontextmanager
async def permit_for(source: Source, branch: str) -> AsyncIterator[MergePermit]:
    """Have the right to land on a branch, which nobody else asks for."""
    clock = ManualClock()
    store = MemoryStore(clock)
    others = orchestrators(store, clock, "r")
    await others.join()
    async with MergePermits(store, clock, others, source.location, branch).hold() as permit:
        yield permit
