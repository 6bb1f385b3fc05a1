"""Both stores of one machine keep the contract that every store keeps."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.clock import SystemClock
from orchestrator.protocols import Store
from orchestrator.state.file import FileStore
from orchestrator.state.memory import MemoryStore
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
