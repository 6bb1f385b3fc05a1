"""Processes that share one store, for `benchmarks/state.py`.

Usage: `python -m benchmarks.shared_store JOB FOLDER COUNT PROCESSES`.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from benchmarks.measure import BenchmarkRow, median, percentile, print_json
from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, Document, Key, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock

CLAIMERS: Final = 8
SLOTS: Final = (1, 4)
"""How many tasks a process claims at once: as many as it has free sessions."""
READERS: Final = 50
PRIORITIES: Final = 20
RATE_LIMIT: Final = 1.5  # times SQLite's duration
CLAIM_LIMIT: Final = 50.0  # ms, of the slowest in a hundred


def measure_claims(scratch: Path, *, quick: bool) -> list[BenchmarkRow]:
    """Return the rates at which eight processes claim tasks by priority, one or several at once.

    Raises RuntimeError if a task is not claimed once.
    """
    tasks, rounds = (100, 1) if quick else (2_000, 3)
    kinds = [f"claim-{slots}" for slots in SLOTS]
    runs: dict[str, list[tuple[float, list[float]]]] = {kind: [] for kind in (*kinds, "claim-sqlite")}
    for number in range(rounds):
        for kind in kinds:
            anyio.run(_fill, scratch / f"{kind}-{number}", tasks)
        _fill_sqlite(scratch / f"claim-sqlite-{number}", tasks)
        for kind, measured in runs.items():
            measured.append(_run_processes(kind, scratch / f"{kind}-{number}", CLAIMERS, tasks))
    theirs = [took for took, _ in runs["claim-sqlite"]]
    base = f"SQLite WAL, NORMAL, one transaction each: {median(theirs) / tasks * 1e6:.3g} µs"
    rows = []
    for slots, kind in zip(SLOTS, kinds, strict=True):
        took = median([seconds for seconds, _ in runs[kind]]) / tasks * 1e6
        ratio = median([ours / other for (ours, _), other in zip(runs[kind], theirs, strict=True)])
        slowest = median([percentile(claims, 0.99) for _, claims in runs[kind]]) * 1e3
        what = f"claims by priority, {CLAIMERS} processes, {slots} at once in each"
        rows += [
            BenchmarkRow(what, took, "µs", base, ratio, RATE_LIMIT, is_ratio_limited=True),
            BenchmarkRow(f"{what}: 99 of 100 within", slowest, "ms", limit=CLAIM_LIMIT),
        ]
    return rows


def measure_many_processes(scratch: Path, *, quick: bool) -> list[BenchmarkRow]:
    """Return the time until fifty readers have seen a durable commit of a writer.

    Eight writers commit concurrently.
    """
    each = 5 if quick else 100
    readers = _start("follow", scratch, READERS, each * CLAIMERS)
    writers = _start("commit", scratch, CLAIMERS, each)
    begin = _begin(readers, writers)
    for process in (writers, readers):
        process.communicate()
    took = (time.perf_counter() - begin) / (each * CLAIMERS) * 1e6
    return [BenchmarkRow(f"durable commits of {CLAIMERS} processes, followed by {READERS}", took, "µs")]


def _start(job: str, scratch: Path, processes: int, number: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "benchmarks.shared_store", job, str(scratch), str(number), str(processes)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _begin(*jobs: subprocess.Popen[str]) -> float:
    """Start all jobs once they are ready; return the time."""
    for job in jobs:
        assert job.stdout  # noqa: S101  as asked for
        job.stdout.readline()
    for job in jobs:
        assert job.stdin  # noqa: S101  as asked for
        job.stdin.close()
        job.stdin = None
    return time.perf_counter()


def _run_processes(job: str, scratch: Path, processes: int, tasks: int) -> tuple[float, list[float]]:
    started = _start(job, scratch, processes, tasks)
    begin = _begin(started)
    started.communicate()
    took = time.perf_counter() - begin
    lines = [json.loads(path.read_bytes()) for path in scratch.parent.glob(f"{scratch.name}-*.json")]
    claimed = [task for line in lines for task in line["claimed"]]
    if sorted(claimed) != list(range(tasks)):
        raise RuntimeError(f"{len(claimed)} claims of {tasks} tasks, {len(set(claimed))} of them different")
    return took, [seconds for line in lines for seconds in line["took"]]


async def _fill(scratch: Path, tasks: int) -> None:
    async with FileStore.open(scratch, SystemClock()) as store:
        for task in range(tasks):
            key = Key("queue", f"{task % PRIORITIES:02d}/{task}")
            await store.commit(Commit([Write(key, 0, {"task": task})], durable=False))


def _fill_sqlite(scratch: Path, tasks: int) -> None:
    scratch.mkdir()
    with closing(sqlite3.connect(scratch / "db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, priority INTEGER, owner INTEGER)")
        database.execute("CREATE INDEX by_priority ON tasks (owner, priority)")
        rows = [(task, task % PRIORITIES) for task in range(tasks)]
        database.executemany("INSERT INTO tasks (id, priority) VALUES (?, ?)", rows)


# The jobs of the processes. Each gets the function that waits for the start.


async def _claim(slots: int, scratch: Path, _tasks: int, me: int, begin: Callable[[], None]) -> None:
    """Claim tasks of the highest priority by concurrent commits that remove them from the queue."""
    dice, claimed, took = random.Random(me), list[int](), list[float]()  # noqa: S311  no secret

    async def claim(task: Document, start: float) -> None:
        writes = [Write(task.key, task.version, None), Write(Key("claim", task.key.id), 0, {"by": me})]
        with suppress(VersionConflict):
            await store.commit(Commit(writes, durable=False))
            claimed.append(task.value["task"])
            took.append(time.perf_counter() - start)

    async with FileStore.open(scratch, SystemClock()) as store:
        begin()
        for priority in range(PRIORITIES):
            start = time.perf_counter()
            while ready := await store.list("queue", f"{priority:02d}/"):
                before = len(claimed)
                async with anyio.create_task_group() as group:
                    for task in dice.sample(ready, min(slots, len(ready))):
                        group.start_soon(claim, task, start)
                start = start if len(claimed) == before else time.perf_counter()
    scratch.with_name(f"{scratch.name}-{me}.json").write_text(json.dumps({"claimed": claimed, "took": took}))


async def _claim_sqlite(scratch: Path, _tasks: int, me: int, begin: Callable[[], None]) -> None:
    claimed, took = list[int](), list[float]()
    with closing(sqlite3.connect(scratch / "db", isolation_level=None, timeout=60)) as database:
        database.execute("PRAGMA synchronous=NORMAL")
        begin()
        while True:
            start = time.perf_counter()
            database.execute("BEGIN IMMEDIATE")
            found = database.execute("SELECT id FROM tasks WHERE owner IS NULL ORDER BY priority LIMIT 1").fetchone()
            if found is not None:
                database.execute("UPDATE tasks SET owner = ? WHERE id = ?", (me, found[0]))
            database.execute("COMMIT")
            if found is None:
                break
            claimed.append(found[0])
            took.append(time.perf_counter() - start)
    scratch.with_name(f"{scratch.name}-{me}.json").write_text(json.dumps({"claimed": claimed, "took": took}))


async def _commit(scratch: Path, each: int, me: int, begin: Callable[[], None]) -> None:
    async with FileStore.open(scratch, SystemClock()) as store:
        begin()
        for version in range(each):
            await store.commit(Commit([Write(Key("task", str(me)), version, {"n": version})]))


async def _follow(scratch: Path, until: int, _me: int, begin: Callable[[], None]) -> None:
    async with FileStore.open(scratch, SystemClock()) as store:
        begin()
        async for record in store.watch():
            if record.position == until:
                return


def _fork(job: Callable[..., Any], scratch: Path, number: int, processes: int) -> int:
    """Run a job in many processes, which start together once stdin ends."""
    ready, tell = os.pipe()

    def begin() -> None:
        os.write(tell, b".")
        sys.stdin.read()

    children = []
    for me in range(processes):
        child = os.fork()
        if child == 0:
            anyio.run(job, scratch, number, me, begin)
            os._exit(0)
        children.append(child)
    for _ in children:
        os.read(ready, 1)
    print_json({"ready": True})
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


_JOBS: Final[dict[str, Callable[..., Any]]] = {
    **{f"claim-{slots}": partial(_claim, slots) for slots in SLOTS},
    "claim-sqlite": _claim_sqlite,
    "commit": _commit,
    "follow": _follow,
}

if __name__ == "__main__":
    name, folder, amount, processes = sys.argv[1:]
    sys.exit(_fork(_JOBS[name], Path(folder), int(amount), int(processes)))
