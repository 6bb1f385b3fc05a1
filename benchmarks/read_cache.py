"""The possible savings of a cache in front of a store, as shown in docs/internals.md.

    python -m benchmarks.read_cache [--quick]

For each store: the time of a read, compared with a dictionary in memory (level 1) and with a file of this machine
(level 2); the time until the documents of 10,000 tasks are read, as by `council status`; and how long the tasks of a
run wait for reads. The agent writes one file and ends: with a real agent, the share of reads is smaller.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
from anyio import to_thread

from benchmarks.measure import BenchmarkRow, argument_parser, median, print_table, scratch_folder, user_environment
from benchmarks.repositories import make_repository, run_git
from benchmarks.state import make_document
from orchestrator import Council
from orchestrator.protocols import DumpedCommit, DumpedDocument, Key, Store
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.state.stores.plugin import open_memory_store
from orchestrator.state.stores.postgres.store import PostgresStore
from orchestrator.state.stores.redis.store import RedisStore
from orchestrator.system.clock import SystemClock
from orchestrator.testing.store_contract.suite import make_dump
from tests import postgres_server, redis_server
from tests.stores import open_store

DOCUMENTS: Final = 10_000
READS: Final = 1_000
OPENINGS: Final = 5
TASKS: Final = 64
CAPACITY: Final = 8
_AGENT: Final = ("sh", "-c", 'read -r name < "$0" && echo done > "$name"')
_KEY: Final = Key("task", "run/00042")


class RunReads(NamedTuple):
    """The reads of a run: their number, the seconds spent waiting for them, and the seconds of the run."""

    reads: int
    waited: float
    took: float


def measure(*, quick: bool, folder: Path | None = None) -> list[BenchmarkRow]:
    """Return the rows of all stores."""
    documents, reads, tasks = (100, 20, 4) if quick else (DOCUMENTS, READS, TASKS)
    rows = []
    with scratch_folder(folder) as scratch:
        urls = {
            "memory": "memory:",
            "file": str(scratch / "file"),
            "redis": redis_server.empty_store_url(),
            "postgresql": postgres_server.empty_store_url(),
        }
        for name, url in urls.items():
            rows += anyio.run(_measure_reads, name, url, scratch, documents, reads)
        runs = {"file": "", "redis": redis_server.empty_store_url(), "postgresql": postgres_server.empty_store_url()}
        for name, url in runs.items():
            rows.append(_measure_run(name, url, scratch / f"{name}-run", tasks))
    return rows


async def _measure_reads(name: str, url: str, scratch: Path, documents: int, reads: int) -> list[BenchmarkRow]:
    opened = partial(open_memory_store, url, SystemClock()) if name == "memory" else partial(open_store, url)
    async with opened() as store:
        await store.load(make_dump([_make_commit(number) for number in range(1, documents + 1)], documents))
        document = await store.get(_KEY)
        known, file = {_KEY: document}, scratch / "document.json"
        file.write_bytes(document.encoded if document else b"")
        read = await _time(lambda: store.get(_KEY), reads)
        check = await _time(store.position, reads)
        memory = await _time(lambda: _look_up(known), reads)
        disk = await _time(lambda: to_thread.run_sync(file.read_bytes), reads)
        rows = [
            BenchmarkRow(f"{name}: read", read * 1e6, "µs", f"a dictionary: {memory * 1e6:.3g} µs", read / memory),
            BenchmarkRow(
                f"{name}: read of the position", check * 1e6, "µs", f"a file: {disk * 1e6:.3g} µs", check / disk
            ),
        ]
    if name == "memory":
        return rows

    async def open_and_list() -> None:
        async with opened() as store:
            assert len(await store.list("task", "run/")) == documents  # noqa: S101  of the benchmark itself

    took = await _time(open_and_list, OPENINGS)
    return [*rows, BenchmarkRow(f"{name}: open, and read {documents:,} tasks", took * 1e3, "ms")]


def _make_commit(number: int) -> DumpedCommit:
    value = json.dumps(make_document(number)).encode()
    document = DumpedDocument(Key("task", f"run/{number:05}"), 1, value)
    return DumpedCommit(number, 1.7e9 + number, "ada@box:1", (document,))


async def _look_up(known: dict[Key, Any]) -> Any:
    return known[_KEY]


async def _time(call: Callable[[], Awaitable[object]], times: int) -> float:
    """Return the median duration of a call."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        await call()
        took.append(time.perf_counter() - began)
    return median(took)


def _measure_run(name: str, url: str, scratch: Path, tasks: int) -> BenchmarkRow:
    top = make_repository(scratch / "repository", 50)
    config = {
        "version": 1,
        "repo": str(top),
        "base": run_git(top, "branch", "--show-current").decode().strip(),
        "target": "integration",
        "capacity": CAPACITY,
        "sandbox": "off",
        "adapters": {"agent": {"use": "command", "argv": [*_AGENT, "{prompt_file}"]}},
        "defaults": {"adapter": "agent"},
        "tasks": [{"id": f"task-{number}", "prompt": f"result-{number}.txt\n"} for number in range(tasks)],
    }
    file = scratch / "council.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    env = user_environment(COUNCIL_HOME=str(scratch / "home"))
    argv = [sys.executable, "-m", "benchmarks.read_cache", "run", str(file), url]
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, check=True)
    found = RunReads(*json.loads(done.stdout))
    each, busy = found.waited / tasks, found.took * CAPACITY / tasks
    base = f"{found.reads / tasks:.1f} reads, of {busy * 1e3:.3g} ms per task"
    return BenchmarkRow(f"{name}: waiting for reads in a run of {tasks} tasks", each * 1e3, "ms", base, each / busy)


async def _run(file: str, url: str) -> RunReads:
    """Run a file, and count the reads of its store."""
    count, waited = 0, 0.0

    def counted(read: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def reading(*arguments: Any) -> Any:
            nonlocal count, waited
            began = time.perf_counter()
            try:
                return await read(*arguments)
            finally:
                count, waited = count + 1, waited + time.perf_counter() - began

        return reading

    kinds: tuple[type[Store], ...] = (MemoryStore, FileStore, RedisStore, PostgresStore)
    for kind in kinds:
        for name in ("get", "list", "position"):
            setattr(kind, name, counted(getattr(kind, name)))
    async with Council.open(file, state=url or None) as council:
        count, waited, began = 0, 0.0, time.perf_counter()
        report = await council.runs.run()
        took = time.perf_counter() - began
    assert all(task.landed for task in report.tasks)  # noqa: S101  of the benchmark itself
    return RunReads(count, waited, took)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        sys.stdout.write(json.dumps(anyio.run(_run, sys.argv[2], sys.argv[3])))
    else:
        options = argument_parser(__doc__).parse_args()
        print_table(measure(quick=options.quick, folder=options.folder))
