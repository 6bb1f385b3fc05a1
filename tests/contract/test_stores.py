"""Both stores of one machine keep the contract that every store keeps, also behind what survives their absence."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from orchestrator.domain.events.base import TypedEvent
from orchestrator.protocols import Store
from orchestrator.state.offline.fork import survive_outages
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock
from orchestrator.testing.store_contract import StoreContract


class TestMemoryStore(StoreContract):
    """The contract in memory."""

    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[Store]:
        """Make an empty store."""
        yield MemoryStore(SystemClock())


class TestFileStore(StoreContract):
    """The contract on disk."""

    segment_bytes = 16 << 20

    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[Store]:
        """Open a store in a directory of its own."""
        with TemporaryDirectory() as directory:
            place = Path(directory) / "state"
            async with FileStore.open(place, SystemClock(), segment_bytes=self.segment_bytes) as store:
                yield store


class TestFileStoreOfTinySegments(TestFileStore):
    """The contract on disk where nearly each commit begins a new segment."""

    segment_bytes = 100


async def _tell(event: TypedEvent) -> None:
    raise AssertionError(event)


class TestPausing(StoreContract):
    """The contract of a store that is waited for where it can't be reached."""

    mode: Literal["pause", "continue"] = "pause"

    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[Store]:
        """Wrap an empty store."""
        with TemporaryDirectory() as directory:
            folder, clock = Path(directory), SystemClock()
            async with (
                FileStore.open(folder / "state", clock) as store,
                survive_outages(store, self.mode, clock, folder / "outage", _tell) as survivor,
            ):
                yield survivor


class TestContinuing(TestPausing):
    """The contract of one that is gone on without."""

    mode = "continue"
