"""The file store compared with SQLite (WAL).

    python benchmarks/state.py [--quick] [--folder PATH]

The benchmark measures commits, the opening of a long log, compression, and many processes. Documents are 1.8 kB of
JSON, like those of tasks; 40 tasks commit at once, as in a run. Durable commits are comparable only on a device with
a real fsync: others are rejected.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import anyio

from benchmarks import shared_store, watching
from benchmarks.measure import BenchmarkRow, Cost, argument_parser, measure_cost, median, print_table, scratch_folder
from orchestrator.config.store import folder_url
from orchestrator.protocols import Commit, Event, JsonObject, Key, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock

WRITERS: Final = 40
VERSIONS: Final = 25
TASKS: Final = 10_000
QUICK_TASKS: Final = 100
ROUNDS: Final = 5
FULL_LIMIT: Final = 0.2  # times SQLite's duration with synchronous=FULL
NORMAL_LIMIT: Final = 1.0
CPU_LIMIT: Final = 60.0  # µs per commit
OPEN_LIMIT: Final = 0.25  # seconds
#: The minimum seconds of an fsync on a real device.
_REAL_FSYNC: Final = 20e-6
_SCHEMA: Final = "CREATE TABLE documents (id TEXT PRIMARY KEY, version INTEGER NOT NULL, value TEXT NOT NULL)"


def measure(*, quick: bool, folder: Path | None = None) -> list[BenchmarkRow]:
    """Return the rows of this benchmark. Raises RuntimeError without a real fsync."""
    tasks, rounds = (QUICK_TASKS, 1) if quick else (TASKS, ROUNDS)
    # Shared memory, used by other benchmarks, has no device.
    with scratch_folder(folder or Path("/var/tmp")) as scratch:  # noqa: S108  a folder of our own is made there
        if not quick:
            _check_fsync(scratch)
        rows = []
        for durable, level, limit in ((True, "FULL", FULL_LIMIT), (False, "NORMAL", NORMAL_LIMIT)):
            pairs = [
                (
                    _by_store(scratch / f"{level}{number}", durable=durable),
                    _by_sqlite(scratch / f"{level}{number}.db", level),
                )
                for number in range(rounds)
            ]
            rows += _rows(f"{'durable ' if durable else ''}commits, {WRITERS} at once", pairs, level, limit)
        rows += _opening(scratch / "long", tasks, rounds)
        rows += shared_store.measure_claims(scratch, quick=quick)
        return [
            *rows,
            *watching.measure_watching(folder_url(scratch / "watched"), "file", quick=quick),
            *shared_store.measure_many_processes(scratch / "crowd", quick=quick),
        ]


def _rows(what: str, pairs: list[tuple[Cost, Cost]], level: str, limit: float) -> list[BenchmarkRow]:
    count = WRITERS * VERSIONS
    ours, theirs = (median([pair[side].wall for pair in pairs]) / count * 1e6 for side in (0, 1))
    ratio = median([ours.wall / other.wall for ours, other in pairs])
    cpu = median([ours.cpu for ours, _ in pairs]) / count * 1e6
    base = f"SQLite WAL, {level}, one transaction each: {theirs:.3g} µs"
    return [
        BenchmarkRow(what, ours, "µs", base, ratio, limit, is_ratio_limited=True),
        BenchmarkRow(f"{what}: processor", cpu, "µs", limit=CPU_LIMIT),
    ]


def _opening(scratch: Path, tasks: int, rounds: int) -> list[BenchmarkRow]:
    anyio.run(_fill, scratch, tasks)
    raw = sum(path.stat().st_size for path in scratch.glob("*.jsonl"))
    took = [anyio.run(_open, scratch) for _ in range(rounds)]
    packed = anyio.run(_pack, scratch)
    what = f"opening {tasks:,} tasks, {tasks * 10:,} commits"
    return [
        BenchmarkRow(what, median(took), "s", limit=OPEN_LIMIT),
        BenchmarkRow(
            f"{what}, packed", median([anyio.run(_open, scratch) for _ in range(rounds)]), "s", limit=OPEN_LIMIT
        ),
        BenchmarkRow("packed closed segments", packed / 1e6, "MB", f"as they were: {raw / 1e6:.3g} MB", packed / raw),
    ]


def _check_fsync(scratch: Path) -> None:
    descriptor = os.open(scratch / "probe", os.O_WRONLY | os.O_CREAT, 0o600)
    begin = time.perf_counter()
    for offset in range(20):
        os.pwrite(descriptor, b"x" * 512, offset * 512)
        os.fdatasync(descriptor)
    took = (time.perf_counter() - begin) / 20
    os.close(descriptor)
    if took < _REAL_FSYNC:
        raise RuntimeError(
            f"an fsync in {scratch} takes {took * 1e6:.0f} µs: it is not on a disk; choose another --folder"
        )


def make_document(number: int) -> JsonObject:
    """Return a unique value of about 1.8 kB that resembles a task document."""
    chance = random.Random(number)  # noqa: S311  the same each time
    attempts = [
        {
            "number": attempt,
            "adapter": "claude-code",
            "base": f"{chance.getrandbits(160):040x}",
            "started": 1.7e9 + chance.random(),
            "ended": 1.7e9 + chance.random(),
            "outcome": "transient",
            "reason": f"it ended with exit code {attempt}",
            "branch": f"council/20261122-000000-abcd/task-{number}/{attempt}",
            "input_tokens": chance.randrange(10**6),
            "output_tokens": chance.randrange(10**5),
            "cost": chance.random(),
        }
        for attempt in range(5)
    ]
    words = " ".join(f"{chance.getrandbits(24):x}" for _ in range(50))
    return {"status": "running", "attempts": attempts, "commit": f"{chance.getrandbits(160):040x}", "feedback": words}


def _by_store(scratch: Path, *, durable: bool) -> Cost:
    return anyio.run(_commit_all, scratch, durable)


async def _commit_all(scratch: Path, durable: bool) -> Cost:
    async with FileStore.open(scratch, SystemClock()) as store:

        async def write(number: int) -> None:
            key, value = Key("task", f"run/{number}"), make_document(number)
            for version in range(VERSIONS):
                event = Event("task.started", {"task": str(number)})
                await store.commit(Commit([Write(key, version, value)], [event], durable=durable))

        with measure_cost() as cost:
            async with anyio.create_task_group() as group:
                for number in range(WRITERS):
                    group.start_soon(write, number)
        return cost()


def _by_sqlite(path: Path, level: str) -> Cost:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA synchronous={level}")
        database.execute(_SCHEMA)
        values = [make_document(number) for number in range(WRITERS)]
        with measure_cost() as cost:
            for version in range(VERSIONS):
                for number, value in enumerate(values):
                    database.execute("BEGIN IMMEDIATE")
                    row = (f"run/{number}", version + 1, json.dumps(value))
                    database.execute("REPLACE INTO documents VALUES (?, ?, ?)", row)
                    database.execute("COMMIT")
        return cost()


async def _fill(scratch: Path, tasks: int) -> None:
    async with FileStore.open(scratch, SystemClock()) as store:

        async def write(first: int) -> None:
            for version in range(10):
                for number in range(first, tasks, WRITERS):
                    write = Write(Key("task", f"run/{number}"), version, make_document(number))
                    await store.commit(Commit([write], durable=False))

        async with anyio.create_task_group() as group:
            for first in range(WRITERS):
                group.start_soon(write, first)


async def _open(scratch: Path) -> float:
    begin = time.perf_counter()
    async with FileStore.open(scratch, SystemClock()):
        return time.perf_counter() - begin


async def _pack(scratch: Path) -> int:
    async with FileStore.open(scratch, SystemClock()) as store:
        return (await store.compact(0.0, 1 << 60)).after


if __name__ == "__main__":
    chosen = argument_parser(__doc__).parse_args()
    try:
        print_table(measure(quick=chosen.quick, folder=chosen.folder))
    except RuntimeError as error:
        sys.exit(str(error))
