"""A repository hub and a worktree pool for tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.repo.git.command import Git
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.capacity import PoolLimits
from orchestrator.repo.worktrees.checkouts import HeldSlot, SlotOptions
from orchestrator.repo.worktrees.hub import Hub, create_hub, internal_ref_name, locate_hub
from orchestrator.repo.worktrees.pool import CheckPool, SlotPool
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.system.clock import SystemClock


@dataclass(frozen=True)
class HubFixture:
    """The hub of a repository during one run."""

    top: Path
    hub: Hub
    git: Git

    @classmethod
    async def of(cls, top: Path, home: Path, environ: Mapping[str, str]) -> HubFixture:
        """Create the hub unless it exists."""
        hub = locate_hub(str(top), home)
        await create_hub(hub, "sha1", environ)
        return cls(top, hub, Git(hub.trusted, environ=environ))

    async def fetch(self, branch: str = "main") -> str:
        """Fetch a branch into the hub, return its commit."""
        source = UpstreamRepository.of(str(self.top), is_local=True, git=self.git)
        return await source.fetch(branch, internal_ref_name("run1", f"base-{os.getpid()}"))

    @asynccontextmanager
    async def open(
        self,
        care: SlotOptions | None = None,
        *,
        slots: int = 16,
        size: int | None = None,
        warm: int = 0,
        warm_checks: int = 0,
    ) -> AsyncIterator[SlotPool]:
        """Open a pool for the body."""
        limits, clock = PoolLimits(slots, size), SystemClock()
        opened = SlotPool.open(
            self.git, self.hub, clock, limits, care or SlotOptions(), warm=warm, warm_checks=warm_checks
        )
        async with opened as pool:
            yield pool

    def worktree(self, task: str, attempt: int = 1) -> Worktree:
        """Return the name of a session's worktree."""
        return Worktree(self.hub, "run1", task, attempt)

    async def begin(self, pool: SlotPool, task: str, commit: str, adapter: str = "") -> tuple[Worktree, HeldSlot]:
        """Acquire a slot for a session and create its worktree."""
        worktree = self.worktree(task)
        checkout = await pool.acquire(commit, worktree.root, adapter)
        await worktrees.create_worktree(worktree, checkout, "prompt")
        return worktree, checkout

    async def end(self, pool: SlotPool | CheckPool, worktree: Worktree, checkout: HeldSlot) -> None:
        """Release the slot of a session whose work is saved."""
        found = await checkout.compare()
        await worktrees.remove_session_folder(worktree)
        pool.release(checkout, found)
