"""The processor time of predicting conflicts between sessions, as a share of one core.

    python benchmarks/conflict_prediction.py [--quick] [--folder PATH] [--files N] [--sessions N] [--seconds N]

All sessions edit the same repository, each in its own checkout (hard links to one, so that many fit on the disk). Every
ten seconds each session rewrites one file of a pool that all sessions share, so that many of them overlap and some
conflict. The share excludes the start: the watches, and one comparison of each checkout. The delay is the time from a
write to the prediction of its conflict, including the pause between two looks.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import anyio
import anyio.to_thread

from benchmarks.measure import BenchmarkRow, argument_parser, measure_cost, percentile, print_table, scratch_folder
from benchmarks.repositories import make_repository, run_git
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.landing.live_conflicts import LiveConflicts, SessionPair
from orchestrator.repo.landing.trial_merges import TrialMerges
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.worktrees.checkouts import HeldSlot, SlotState
from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.files.scan_process import FileScanner
from orchestrator.repo.worktrees.hub import create_hub, internal_ref_name, locate_hub
from orchestrator.repo.worktrees.reset import SlotContents
from orchestrator.repo.worktrees.slots import SlotRecord, WorktreeSlot


class Workload(NamedTuple):
    """The sessions of a measurement."""

    files: int = 57_000
    sessions: int = 30
    seconds: float = 60.0
    edit_interval: float = 10.0
    """Seconds between two edits of one session."""
    shared_files: int = 60
    """The files that the sessions edit."""


QUICK: Final = Workload(50, 3, 4.0, 0.5, 2)
_COPIES: Final = 4
"""Checkouts that are created, or deleted, at the same time."""
INTERVAL: Final = 2.0
"""Seconds between two looks, as in `engine.landing.conflict_prediction`."""
SHARE_LIMIT: Final = 2.0  # % of one core
DELAY_LIMIT: Final = 5.0  # seconds


@dataclass
class _Team:
    """The sessions, and the time of the last write of each that is not yet predicted."""

    live: LiveConflicts
    trees: dict[SessionName, Path]
    pool: list[str]
    chance: random.Random = field(default_factory=lambda: random.Random(7))  # noqa: S311  nothing secret
    written: dict[SessionName, float] = field(default_factory=dict)
    delays: list[float] = field(default_factory=list)

    def edit(self, name: SessionName) -> None:
        """Replace a file, as editors do. Blocks."""
        path = self.trees[name] / self.chance.choice(self.pool)
        lines = path.read_text().splitlines()
        lines[self.chance.randrange(min(len(lines), 5))] = f"# edited by {name.task} at {time.monotonic()}"
        new = path.with_name(f".{path.name}.new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(path)
        self.written[name] = time.monotonic()

    async def look(self) -> None:
        """Look once, and record the delays of new predictions."""
        news = await self.live.look()
        now = time.monotonic()
        last = [max(self.written.get(name, 0.0) for name in pair) for pair, paths in news.items() if paths]
        self.delays += [now - written for written in last if written]


def measure(*, quick: bool, folder: Path | None = None, workload: Workload | None = None) -> list[BenchmarkRow]:
    """Return the rows of this benchmark."""
    # Not in shared memory, which does not report writes through mappings by the time of a file.
    with scratch_folder(folder or Path("/var/tmp")) as scratch:  # noqa: S108  a folder of our own is made there
        return anyio.run(_measure, scratch, QUICK if quick else workload or Workload())


async def _measure(scratch: Path, workload: Workload) -> list[BenchmarkRow]:
    files, sessions, seconds, *_ = workload
    top = await anyio.to_thread.run_sync(make_repository, scratch / "repository", files)
    hub = locate_hub(str(top), scratch / "home")
    await create_hub(hub, "sha1", os.environ)
    git = Git(hub.trusted)
    source = UpstreamRepository.of(str(top), is_local=True, git=git)
    commit = await source.fetch("main", internal_ref_name("run1", "base"))
    async with AsyncExitStack() as stack:
        scanner = await stack.enter_async_context(FileScanner.open())
        trials = await stack.enter_async_context(TrialMerges.open(git, hub, "run1"))
        conflicts: dict[SessionPair, frozenset[str]] = {}
        live = LiveConflicts(git, trials, conflicts)
        stack.callback(live.close)
        slots = [WorktreeSlot(hub, number + 1) for number in range(sessions)]
        await _call_each(partial(_link_files, top), slots)
        held = [await anyio.to_thread.run_sync(_hold, slot, commit, scanner) for slot in slots]
        names = [SessionName("run1", f"task{number:02}", 1) for number in range(sessions)]
        for name, one in zip(names, held, strict=True):
            await live.follow(name, one, IntakeRules.of(os.environ), commit)
        tracked = run_git(top, "ls-files", "-z").decode().split("\0")[:-1]
        trees = {name: one.slot.tree for name, one in zip(names, held, strict=True)}
        team = _Team(live, trees, random.Random(8).sample(tracked, workload.shared_files))  # noqa: S311  nothing secret
        with measure_cost() as start:
            await live.look()
        with measure_cost() as cost:
            await _work(team, seconds, workload.edit_interval)
        what = f"{sessions} sessions on {files:,} files"
        start_row = BenchmarkRow(f"{what}: start of one session", start().cpu / sessions * 1e3, "ms")
        share_row = BenchmarkRow(what, 100 * cost().cpu / cost().wall, "% of one core", limit=SHARE_LIMIT)
        rows = [start_row, share_row]
        if team.delays:
            longest = percentile(team.delays, 0.95)
            delay = f"{what}: delay of 95% of {len(team.delays)} predictions"
            rows.append(BenchmarkRow(delay, longest, "s", limit=DELAY_LIMIT))
        await _call_each(_delete, slots)
        return rows


async def _call_each(call: Callable[[WorktreeSlot], None], slots: Iterable[WorktreeSlot]) -> None:
    limiter = anyio.CapacityLimiter(_COPIES)
    async with anyio.create_task_group() as tasks:
        for slot in slots:
            tasks.start_soon(partial(anyio.to_thread.run_sync, call, slot, limiter=limiter))


def _delete(slot: WorktreeSlot) -> None:
    subprocess.run(["rm", "-rf", str(slot.root)], check=True)  # noqa: S607


def _link_files(top: Path, slot: WorktreeSlot) -> None:
    slot.root.mkdir(mode=0o700)
    subprocess.run(["cp", "-al", str(top), str(slot.tree)], check=True)  # noqa: S607
    shutil.rmtree(slot.tree / ".git")


def _hold(slot: WorktreeSlot, commit: str, scanner: FileScanner) -> HeldSlot:
    """Return a slot as a session gets it. Call it after all links are made: each changes the ctime of its file."""
    snapshot = TreeSnapshot.capture(slot.tree)
    if snapshot is None:
        raise RuntimeError("this file system does not report when files change")
    contents = SlotContents(SlotRecord(commit), snapshot)
    return HeldSlot(slot, contents, -1, scanner, True, SlotState.TAKEN, True, AsyncExitStack())


async def _work(team: _Team, seconds: float, edit_interval: float) -> None:
    """Edit and look as in a run."""
    end, turn = time.monotonic() + seconds, 0
    next_look, names = time.monotonic() + INTERVAL, list(team.trees)
    pause = edit_interval / len(names)
    while time.monotonic() < end:
        await anyio.sleep(pause)
        team.edit(names[turn % len(names)])
        turn += 1
        if time.monotonic() >= next_look:
            await team.look()
            next_look = time.monotonic() + INTERVAL


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--files", type=int, default=Workload().files)
    parser.add_argument("--sessions", type=int, default=Workload().sessions)
    parser.add_argument("--seconds", type=float, default=Workload().seconds)
    options = parser.parse_args()
    wanted = Workload(options.files, options.sessions, options.seconds)
    print_table(measure(quick=options.quick, folder=options.folder, workload=wanted))
