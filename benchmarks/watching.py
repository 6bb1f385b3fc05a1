"""The delay until another process sees a commit, for each kind of store.

Usage: `python -m benchmarks.watching URL COUNT`, as the process that watches.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import AbstractAsyncContextManager
from typing import Final

import anyio

from benchmarks.measure import BenchmarkRow, percentile, print_json
from orchestrator.config.store import store_folder
from orchestrator.plugins import load_plugins
from orchestrator.protocols import Commit, Event, Store
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock

SEEN_LIMIT: Final = 20.0  # ms, of half of the changes
SLOWEST_LIMIT: Final = 250.0  # ms, of 99 of 100
IDLE_LIMIT: Final = 1.0  # % of a processor


def measure_watching(url: str, kind: str, *, quick: bool) -> list[BenchmarkRow]:
    """Return the cost of waiting for a change, and its delay to another process."""
    changes, idle = (3, 0.2) if quick else (60, 5.0)
    argv = [sys.executable, "-m", "benchmarks.watching", url, str(changes)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdin  # noqa: S101  as asked for
        assert watcher.stdout  # noqa: S101  as asked for
        watcher.stdout.readline()
        anyio.run(_change, url, changes, idle)
        reported = json.loads(watcher.stdout.readline())
    seen = [delay * 1e3 for delay in reported["seen"]]
    what = f"{kind}: a change seen by another process"
    return [
        BenchmarkRow(f"{what}, half within", percentile(seen, 0.5), "ms", limit=SEEN_LIMIT),
        BenchmarkRow(f"{what}, 99 of 100 within", percentile(seen, 0.99), "ms", limit=SLOWEST_LIMIT),
        BenchmarkRow(f"{kind}: a watcher at rest: processor", max(reported["idle"], 1e-3), "%", limit=IDLE_LIMIT),
    ]


def _open(url: str) -> AbstractAsyncContextManager[Store]:
    folder = store_folder(url)  # opened without a record of it in the user's folder
    return load_plugins().open_store(url, SystemClock()) if folder is None else FileStore.open(folder, SystemClock())


async def _change(url: str, changes: int, idle: float) -> None:
    async with _open(url) as store:
        await store.commit(Commit(events=[Event("begin")]))
        await anyio.sleep(idle)
        for _ in range(changes):
            # Long enough for watchers to reach their lowest polling rate.
            await anyio.sleep(random.uniform(0.0, 0.5))  # noqa: S311  no secret
            await store.commit(Commit(events=[Event("sent", {"at": time.monotonic()})]))


async def _watch(url: str, changes: int) -> None:
    async with _open(url) as store:
        print_json({"ready": True})
        seen, idle, since, spent = list[float](), 0.0, 0.0, 0.0
        async for record in store.watch():
            (event,) = record.events
            if event.type == "begin":
                since, spent = time.monotonic(), time.process_time()
                continue
            now = time.monotonic()
            idle = idle or (time.process_time() - spent) / (now - since) * 100
            seen.append(now - event.data["at"])
            if len(seen) == changes:
                break
    print_json({"seen": seen, "idle": idle})


if __name__ == "__main__":
    anyio.run(_watch, sys.argv[1], int(sys.argv[2]))
