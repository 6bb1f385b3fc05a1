"""Wake watchers when a commit is announced, and at intervals.

Announcements can be lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import psycopg

from orchestrator.errors import StoreUnavailable
from orchestrator.state.stores.postgres.server import Connection, Server, fetch


class Notifications:
    """The announced commits of all processes, on one connection per store.

    One watcher waits for the connection, the others wait for this watcher. Behind a pooler, only the interval applies:
    announcements would arrive at other clients, if at all.
    """

    def __init__(self, server: Server, interval: float) -> None:
        """Wake watchers at the latest after `interval` seconds."""
        self._server, self._interval = server, interval
        self._connection: Connection | None = None
        self._is_taken = self._is_pooled = False
        self._news = anyio.Event()
        self.count = 0
        """The number of times that watchers were woken."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Notifications]:
        """Close the connection at the end of the `async with` block."""
        try:
            yield self
        finally:
            await self._close()

    async def wait(self, count: int) -> None:
        """Wait for news since `count`; may return without any."""
        if self.count != count:
            return
        if self._is_taken:
            with anyio.move_on_after(self._interval):
                await self._news.wait()
            return
        self._is_taken = True
        try:
            await self._receive()
        finally:
            self._is_taken = False
            self.count += 1
            self._news.set()
            self._news = anyio.Event()

    async def _receive(self) -> None:
        try:
            if self._is_pooled:
                await anyio.sleep(self._interval)
            elif self._connection is None:
                await self._listen()  # a commit may have been announced before
            else:
                async for _ in self._connection.notifies(timeout=self._interval, stop_after=1):
                    pass
        except (psycopg.Error, StoreUnavailable):
            await self._close()
            await anyio.sleep(self._interval)

    async def _listen(self) -> None:
        self._connection = connection = await self._server.open_connection()
        with self._server.time_limit(connection):
            ((process,),) = await fetch(connection, "SELECT pg_backend_pid()")
            self._is_pooled = process != connection.info.backend_pid
            if not self._is_pooled:
                await connection.execute(self._server.sql('LISTEN "{channel}"'))
        if self._is_pooled:
            await self._close()

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            if self._connection is not None:
                await self._connection.close()
                self._connection = None
