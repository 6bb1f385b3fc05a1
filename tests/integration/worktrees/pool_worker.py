"""Run a pool in a process that tests may kill: acquire and release worktree slots as sessions do.

    python pool_worker.py TOP HOME COUNT TAKERS SEED SLOTS

An internal error ends it with a traceback. Finally it prints the number of acquisitions and the growth of its memory.
"""

from __future__ import annotations

import os
import random
import resource
import sys
from pathlib import Path

import anyio

from orchestrator.repo.worktrees.pool import SlotPool
from tests.hub_fixture import HubFixture


async def _session(hub_fixture: HubFixture, pool: SlotPool, commit: str, name: str, chance: random.Random) -> None:
    worktree, checkout = await hub_fixture.begin(pool, name, commit)
    tree = worktree.tree
    assert (tree / "README.md").read_text() == "# Project\n", name
    assert sorted(path.name for path in tree.iterdir()) == [".git", "README.md", "src"], name
    (tree / "README.md").write_text(name)
    (tree / "made").mkdir()
    (tree / "made" / "x").write_text(name)
    if chance.random() < 0.3:
        (tree / "src").rename(tree / "source")
    await anyio.sleep(chance.random() * 0.01)
    assert (tree / "README.md").read_text() == name
    if chance.random() < 0.1:
        await pool.slots.discard(checkout)
    else:
        await hub_fixture.end(pool, worktree, checkout)


async def main(*arguments: str) -> None:
    """Acquire and release slots, then print the totals."""
    top, home, count, takers, seed, slots = arguments
    hub_fixture = await HubFixture.of(Path(top), Path(home), os.environ)
    commits = [await hub_fixture.fetch(branch) for branch in ("main", "other")]
    names = iter(f"{seed}-{os.getpid()}-{number}" for number in range(int(count)))
    memory = []

    async def taker(pool: SlotPool, number: int) -> None:
        chance = random.Random(f"{seed}{number}")
        for name in names:
            await _session(hub_fixture, pool, chance.choice(commits), name, chance)
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    async with hub_fixture.open(slots=int(slots), warm=int(slots) // 2) as pool, anyio.create_task_group() as group:
        for number in range(int(takers)):
            group.start_soon(taker, pool, number)
    sys.stdout.write(f"{len(memory)} {memory[len(memory) // 2]} {memory[-1]}\n")


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
