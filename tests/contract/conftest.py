"""Stores for the contracts: each kind that needs no server, on a clock driven by tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from orchestrator.protocols import Store
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.testing.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    """Return each kind of store."""
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            yield MemoryStore(clock)
        else:
            yield await stack.enter_async_context(FileStore.open(tmp_path / "state", clock))
