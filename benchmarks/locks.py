"""The cost of a free file lock, compared with `flock`, portalocker and filelock.

    python benchmarks/locks.py [--quick] [--folder PATH]

Our lock records its holder, is queued within the process, is visible to all processes, and is found by any spelling of
the file's path; the baselines lock a file with a known name. Ownership adds two commits of the file store, one to
acquire and one to release, and a comparison with the paths of twenty other owners.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import filelock
import portalocker

from benchmarks.measure import (
    BenchmarkRow,
    Cost,
    argument_parser,
    measure_cost,
    measure_pairs,
    median,
    print_table,
    scratch_folder,
)
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.locking.file_locks import FileLocks
from orchestrator.locking.ownership import OwnershipRegistry, claim_key
from orchestrator.protocols import Commit, Guard, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock

TIMES: Final = 2_000
QUICK_TIMES: Final = 50
ROUNDS: Final = 9
QUICK_ROUNDS: Final = 1
OTHERS: Final = 20
TOGETHER_LIMIT: Final = 1_000.0  # µs
_ME: Final = SessionName("run", "task", 1)
_PATH: Final = "src/models/user.py"


def measure(*, quick: bool, folder: Path | None = None) -> list[BenchmarkRow]:
    """Return the rows of this benchmark."""
    times, rounds = (QUICK_TIMES, QUICK_ROUNDS) if quick else (TIMES, ROUNDS)
    # Not in shared memory: real locks are on the project's disk.
    with scratch_folder(folder or Path("/var/tmp")) as scratch:  # noqa: S108  a folder of our own is made there
        baselines: dict[str, tuple[Callable[[Path, int], Cost], float | None]] = {
            "filelock": (partial(_by_entering, filelock.FileLock), 1.0),
            "portalocker": (partial(_by_entering, portalocker.Lock), None),
            "raw flock": (_by_flock, None),
        }
        rows = [_row(name, scratch, by, limit, times, rounds) for name, (by, limit) in baselines.items()]
        took = [anyio.run(_together, scratch / f"state{number}", times // 10) for number in range(rounds)]
        together = median([cost.wall for cost in took]) / (times // 10) * 1e6
        return [*rows, BenchmarkRow("own a path, lock its file, give both back", together, "µs", limit=TOGETHER_LIMIT)]


def _row(
    name: str, scratch: Path, by: Callable[[Path, int], Cost], limit: float | None, times: int, rounds: int
) -> BenchmarkRow:
    pairs = measure_pairs(
        lambda: anyio.run(_by_ours, scratch / "ours", times), lambda: by(scratch / name, times), rounds
    )
    ours, theirs = (median([pair[side].wall for pair in pairs]) / times * 1e6 for side in (0, 1))
    ratio = median([ours.wall / other.wall for ours, other in pairs])
    what = f"lock a file and unlock it, compared with {name}"
    return BenchmarkRow(what, ours, "µs", f"{name}: {theirs:.3g} µs", ratio, limit, is_ratio_limited=True)


async def _by_ours(folder: Path, times: int) -> Cost:
    locks = FileLocks(folder, SystemClock())
    with measure_cost() as cost:
        for _ in range(times):
            await locks.acquire(_ME, [_PATH])
            await locks.release(_ME, [_PATH])
    return cost()


def _by_entering(lock_of: Callable[[Path], AbstractContextManager[object]], path: Path, times: int) -> Cost:
    lock = lock_of(path)
    with measure_cost() as cost:
        for _ in range(times):
            with lock:
                pass
    return cost()


def _by_flock(path: Path, times: int) -> Cost:
    with measure_cost() as cost:
        for _ in range(times):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
    return cost()


async def _together(scratch: Path, times: int) -> Cost:
    async with FileStore.open(scratch / "store", SystemClock()) as store:
        registry, files = OwnershipRegistry(store, SystemClock(), "scope"), FileLocks(scratch / "locks", SystemClock())
        for number in range(OTHERS):
            other = SessionName("run", f"other-{number}", 1)
            key = claim_key(other)
            await store.commit(Commit([Write(key, 0, {"epoch": 1, "released": None})]))
            await registry.acquire(
                other, [f"lib/{number}/**", f"docs/{number}.md"], orchestrator="o", claim=Guard(key, 1)
            )
        claim = Guard(claim_key(_ME), 1)
        await store.commit(Commit([Write(claim.key, 0, {"epoch": 1, "released": None})]))
        with measure_cost() as cost:
            for _ in range(times):
                assert await registry.acquire(_ME, [_PATH], orchestrator="o", claim=claim) is None  # noqa: S101
                await files.acquire(_ME, [_PATH])
                await files.release(_ME, [_PATH])
                await registry.release_patterns(_ME, [_PATH], claim)
        return cost()


if __name__ == "__main__":
    chosen = argument_parser(__doc__).parse_args()
    print_table(measure(quick=chosen.quick, folder=chosen.folder))
