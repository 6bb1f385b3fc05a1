"""The cost of acquiring and releasing a slot, compared with `git worktree add`.

    python benchmarks/worktrees.py [--quick] [--repository PATH] [--folder PATH]

The baseline includes `git worktree remove --force`. A session's worktree is a prepared slot of the pool; after the base
has moved, the differing files are written. The benchmark measures the processor time of all processes. Tasks wait for
acquire and release, but not for cleaning. Each part runs in a clone of the same repository, which
`benchmarks.code_base` generates.

Folders on ext4 without a journal are rejected, because the cost of deleting and creating files would dominate. If a
file system does not update the time of a file that is written through a mapping (tmpfs), a pool uses each slot once;
this benchmark forces reuse, because the results are similar.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio

from benchmarks.measure import (
    BenchmarkRow,
    Cost,
    argument_parser,
    measure_command,
    measure_cost,
    median,
    print_table,
    scratch_folder,
)
from benchmarks.repositories import clone, file_system_kind, make_repository, run_git
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.capacity import PoolLimits
from orchestrator.repo.worktrees.checkouts import HeldSlot, SlotOptions, SlotState
from orchestrator.repo.worktrees.hub import Hub, create_hub, internal_ref_name, locate_hub
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.system.clock import SystemClock

FILES: Final = (200, 5_000, 57_000)
QUICK_FILES: Final = (50,)
ROUNDS: Final = 7
QUICK_ROUNDS: Final = 1
CHANGED_FILES: Final = 20
"""Files that differ where the base has moved."""
MIN_FILES_FOR_LIMITS: Final = 5_000
"""The minimum number of files for the limits: with fewer, the start of programs dominates."""

_ADD, _REMOVE, _STATUS = "git worktree add", "git worktree remove --force", "git status"
_ROWS: Final = (
    ("acquire", _ADD, 0.05),
    ("acquire, moved", _ADD, 0.15),
    ("release", _REMOVE, 0.02),
    ("clean, in the background", None, None),
    ("find changes", _STATUS, None),
)


@dataclass(frozen=True)
class _TestRepository:
    """A repository at two commits, its hub, and the measurements."""

    top: Path
    hub: Hub
    git: Git
    commits: tuple[str, str]
    costs: dict[str, list[Cost]] = field(default_factory=lambda: defaultdict(list))


def measure(*, quick: bool, folder: Path | None = None, repository: Path | None = None) -> list[BenchmarkRow]:
    """Return the rows. Raises RuntimeError on an unsuitable file system."""
    rows: list[BenchmarkRow] = []
    sizes = (0,) if repository else QUICK_FILES if quick else FILES
    for size in sizes:
        with scratch_folder(folder) as scratch:
            kind = file_system_kind(scratch)
            top = clone(repository or make_repository(scratch / "origin", size), scratch / "clone")
            files = len(run_git(top, "ls-files", "-z").split(b"\0")) - 1
            ground = anyio.run(_measure, top, QUICK_ROUNDS if quick else ROUNDS)
            rows.extend(_rows(ground, f"{files:,} files, on {kind}", has_limits=files >= MIN_FILES_FOR_LIMITS))
    return rows


def _rows(ground: _TestRepository, where: str, *, has_limits: bool) -> list[BenchmarkRow]:
    rows = []
    for what, baseline, limit in _ROWS:
        took = median([cost.cpu for cost in ground.costs[what]])
        name = f"worktree: {what}, {where}"
        if baseline is None:
            rows.append(BenchmarkRow(name, took * 1e3, "ms"))
            continue
        base = median([cost.cpu for cost in ground.costs[baseline]])
        ratio = median([a.cpu / b.cpu for a, b in zip(ground.costs[what], ground.costs[baseline], strict=True)])
        said = f"{baseline}: {base * 1e3:.3g} ms"
        allowed = limit if has_limits else None
        rows.append(BenchmarkRow(name, took * 1e3, "ms", said, ratio, allowed, is_ratio_limited=allowed is not None))
    return rows


async def _measure(top: Path, rounds: int) -> _TestRepository:
    ground = await _ground(top)
    async with _pool(ground) as pool:
        for number in range(rounds + 1):
            if number == 1:
                ground.costs.clear()  # once before, so that files are in memory
            old, new = ground.commits
            await _cycle(ground, pool, f"same{number}", old, "acquire")
            await _cycle(ground, pool, f"moved{number}", new, "acquire, moved")
            await _cycle(ground, pool, f"back{number}", old, None)
            _by_git(ground)
    return ground


async def _ground(top: Path) -> _TestRepository:
    hub = locate_hub(str(top), top.with_name("home"))
    git = Git(hub.trusted)
    await create_hub(hub, "sha1", git.environ)
    source = UpstreamRepository.of(str(top), is_local=True, git=git)
    branch = run_git(top, "branch", "--show-current").decode().strip()
    old = await source.fetch(branch, internal_ref_name("bench", "old"))
    names = [name for name in run_git(top, "ls-files", "-z").decode(errors="surrogateescape").split("\0") if name]
    for name in [name for name in names if (top / name).is_file()][:: max(1, len(names) // CHANGED_FILES)][
        :CHANGED_FILES
    ]:
        with (top / name).open("ab") as file:
            file.write(b"# moved\n")
    run_git(top, "commit", "--quiet", "-a", "-m", "Move")
    return _TestRepository(top, hub, git, (old, await source.fetch(branch, internal_ref_name("bench", "new"))))


@asynccontextmanager
async def _pool(ground: _TestRepository) -> AsyncIterator[SlotPool]:
    async with SlotPool.open(ground.git, ground.hub, SystemClock(), PoolLimits(slots=1), SlotOptions(), warm=0) as pool:
        pool.slots._detects_all = True
        yield pool


async def _cycle(ground: _TestRepository, pool: SlotPool, name: str, commit: str, what: str | None) -> None:
    """Run a session that writes one file and removes another."""
    worktree = Worktree(ground.hub, "bench", name, 1)
    with measure_cost() as cost:
        checkout = await pool.acquire(commit, worktree.root)
        await worktrees.create_worktree(worktree, checkout, "prompt")
    if what is not None:
        ground.costs[what].append(cost())
    next(path for path in worktree.tree.rglob("*.*") if path.is_file() and path.name != ".git").unlink()
    (worktree.tree / "result.txt").write_text("done\n", encoding="utf-8")
    costs = await _end(pool, worktree, checkout)
    if what == "acquire":
        for step, spent in costs.items():
            ground.costs[step].append(spent)


async def _end(pool: SlotPool, worktree: Worktree, checkout: HeldSlot) -> dict[str, Cost]:
    status = measure_command(["git", "status", "--porcelain"], cwd=worktree.tree)
    with measure_cost() as finding:
        found = await checkout.compare()
    with measure_cost() as giving:
        await worktrees.remove_session_folder(worktree)
        pool.release(checkout, found)
    with measure_cost() as cleaning:
        await _until_clean(pool)
    return {
        _STATUS: status,
        "find changes": finding(),
        "release": giving(),
        "clean, in the background": cleaning(),
    }


async def _until_clean(pool: SlotPool) -> None:
    slots = pool.slots
    while not slots.in_state(SlotState.IDLE) or any(slots.checkouts.hub.trash.iterdir()):  # noqa: ASYNC110  a benchmark
        await anyio.sleep(0.02)


def _by_git(ground: _TestRepository) -> None:
    path = ground.top.with_name("worktree")
    ground.costs[_ADD].append(measure_command(["git", "-C", str(ground.top), "worktree", "add", "--detach", str(path)]))
    argv = ["git", "-C", str(ground.top), "worktree", "remove", "--force", str(path)]
    ground.costs[_REMOVE].append(measure_command(argv))


if __name__ == "__main__":
    options = argument_parser(__doc__)
    options.add_argument("--repository", type=Path, help="work on a clone of this one instead of made ones")
    chosen = options.parse_args()
    try:
        measured = measure(quick=chosen.quick, folder=chosen.folder, repository=chosen.repository)
    except RuntimeError as error:
        sys.exit(str(error))
    print_table(measured)
