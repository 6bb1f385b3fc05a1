"""Over random histories the store on a Redis server behaves like a dict with history, despite kills of the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase
from hypothesis.stateful import initialize

from orchestrator.state.stores.redis.store import RedisStore
from tests.property.test_store_property import StoreMachine, run
from tests.redis_server import RedisServer, started_server


class RedisStoreMachine(StoreMachine):
    """Two stores on one server, and the model of their contents."""

    server: RedisServer
    kill_within_a_write = lose_power = None  # type: ignore[assignment]  # of files

    @initialize()
    def open(self) -> None:
        """Open both stores."""
        if not self.places:
            self.places, self.url = 1, self.server.url()
            self.place.mkdir()
            (self.place / "lock").touch()  # the model of the file store reads it
        for _ in range(2):
            closer = self.portal.wrap_async_context_manager(RedisStore.open(self.url, clock=self.clock))
            self.stores.append(closer.__enter__())  # type: ignore[arg-type]
            self.closers.append(closer)  # type: ignore[arg-type]

    def synced(self) -> None:
        """Record what is durable: all, because `appendfsync` is `always`."""
        self.durable = len(self.log)

    def move(self, change: Callable[[Path], object]) -> None:
        """Kill the server and restart it."""
        self.close()
        self.server.kill()
        self.server.start()
        self.open()


def run_on_a_server(examples: int, steps: int, phases: Sequence[Phase] = tuple(Phase)) -> None:
    """Run that many histories of that many steps on a server of their own."""
    with started_server() as server:
        machine: Any = type("Machine", (RedisStoreMachine,), {"server": server})
        run(examples, steps, phases, machine)


def test_store_on_a_server_behaves_like_a_dict_with_history() -> None:
    """A few short histories, without shrinking, which would exceed the time of a test."""
    run_on_a_server(8, 25, (Phase.reuse, Phase.generate))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_store_on_a_server_behaves_like_a_dict_with_history_for_long() -> None:
    """Many long ones."""
    run_on_a_server(300, 60)
