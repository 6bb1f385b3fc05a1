"""Lease ports in a separate process: `python lease_worker.py STATE FIRST COUNT ROUNDS SLOT…`."""

import json
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import anyio
import anyio.lowlevel

from orchestrator.engine.state.port_leases import PortLeases
from orchestrator.system.clock import SystemClock
from tests.stores import open_store

SPAN = 1000  # ports


async def work(leases: PortLeases, slot: Path, turns: int) -> None:
    """Lease a block, print it and listen on each of its ports; fail if another process has one of them.

    The block is released between rounds and kept after the last one.
    """
    for turn in range(turns):
        lease = await leases.lease(slot)
        with ExitStack() as servers:
            for port in lease.ports:
                servers.enter_context(socket.create_server(("127.0.0.1", port)))
            os.write(1, f"{json.dumps([str(slot), lease.ports])}\n".encode())
            await anyio.lowlevel.checkpoint()
        if turn < turns - 1:
            await leases.release(slot)


async def main(*arguments: str) -> None:
    """Run the rounds for all slots concurrently."""
    state, first, count, turns, *slots = arguments
    async with open_store(state) as store, anyio.create_task_group() as group:
        leases = PortLeases(store, SystemClock(), int(count), ports=range(int(first), int(first) + SPAN))
        for slot in slots:
            group.start_soon(work, leases, Path(slot), int(turns))


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
