"""Assign worktree slots to sessions and checks.

Slots are created and cleaned in the background (`repo.worktrees.preparation`). Other processes may have pools for the
same hub: a pool holds the lock of each of its slots (`repo.worktrees.held_slots`) and leaves the slots clean.

Checks have separate worktree slots, in which no session ever runs: the pool `checks` of a session pool. Files that a
check wrote never stay there: a slot with changed setup files is discarded, not cleaned.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.errors import GitError, RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.capacity import HubCapacity, PoolLimits
from orchestrator.repo.worktrees.checkouts import Checkouts, HeldSlot, SetupError, SlotOptions, SlotState
from orchestrator.repo.worktrees.files.change_detection import TreeDiff, detects_mmap_writes
from orchestrator.repo.worktrees.files.scan_process import FileScanner
from orchestrator.repo.worktrees.held_slots import HeldSlots
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.preparation import SlotPreparation
from orchestrator.repo.worktrees.reset import KeepRules
from orchestrator.repo.worktrees.slots import SlotRecord
from orchestrator.system.clock import Clock

#: Seconds between checks of slots held by other processes.
_POLL_INTERVAL = 0.5
#: Seconds to wait for the slot of an earlier session, and between two attempts to get it.
_ADOPTION_TIMEOUT = 60.0
_ADOPTION_POLL_INTERVAL = 0.1


class _Pool:
    """Slots of a hub, for one run."""

    def __init__(self, slots: HeldSlots, preparation: SlotPreparation) -> None:
        self.slots, self.preparation = slots, preparation

    def release(self, held: HeldSlot, diff: TreeDiff | None) -> None:
        """Take back a slot of a removed session; clean it in the background.

        If `diff` is None, discards the slot.
        """
        self.preparation.clean(held, diff)

    async def _wait_for_slot(self, commit: str, tree: Path | None = None) -> HeldSlot:
        slots, preparation = self.slots, self.preparation
        slots.waiting += 1
        try:
            while True:
                changed = slots.changed
                if (held := await slots.take(commit, tree, is_growing=preparation.is_making)) is not None:
                    return held
                if preparation.failures:
                    raise preparation.failures.pop()
                preparation.make_needed()
                with anyio.move_on_after(_POLL_INTERVAL):
                    await changed.wait()
        finally:
            slots.waiting -= 1
            if not slots.waiting:
                preparation.failures.clear()  # these slots no longer have waiters
            slots.notify_changed()


class SlotPool(_Pool):
    """The worktree slots of a hub for the sessions of one run; created by `open`."""

    def __init__(self, slots: HeldSlots, preparation: SlotPreparation, checks: CheckPool) -> None:
        super().__init__(slots, preparation)
        self.checks = checks

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        git: Git,
        hub: Hub,
        clock: Clock,
        limits: PoolLimits,
        options: SlotOptions,
        *,
        warm: int,
        warm_checks: int = 0,
    ) -> AsyncIterator[SlotPool]:
        """Open a hub's slots for the `with` block, and leave them clean for later runs.

        `warm` and `warm_checks` are the numbers of slots to keep ready for sessions and checks; they are created once a
        commit is known. Slots left in an unknown state by a killed process are removed. `git` runs in the trusted
        repository.
        """
        await anyio.to_thread.run_sync(lambda: hub.slots.mkdir(mode=0o700, exist_ok=True))
        detects_all = await anyio.to_thread.run_sync(detects_mmap_writes, hub.slots)
        slots_by_pool: list[HeldSlots] = []
        capacity = HubCapacity(hub, limits, slots_by_pool)
        async with AsyncExitStack() as stack:
            scanner, group = await stack.enter_async_context(FileScanner.open()), anyio.create_task_group()

            def create(options: SlotOptions) -> tuple[HeldSlots, SlotPreparation]:
                checkouts = Checkouts(git, hub, options, scanner, has_size_limit=limits.bytes is not None)
                slots = HeldSlots(checkouts, group, slots_by_pool, detects_all=detects_all)
                stack.push_async_callback(slots.close)  # after the task group: no task still uses the slots
                return slots, SlotPreparation(slots, capacity, clock, group)

            checks = CheckPool(*create(replace(options, keep=KeepRules(), is_check=True)), git)
            pool = cls(*create(options), checks)
            await stack.enter_async_context(group)
            try:
                for each, wanted in ((checks, warm_checks), (pool, warm)):
                    each.slots.wanted = wanted
                    await each.slots.adopt_others()
                yield pool
            finally:
                checks.preparation.stop()
                pool.preparation.stop()

    def prewarm_checks(self, base: str) -> None:
        """Create check slots to keep ready at this commit after the next session's slot."""
        if not self.checks.slots.waiting:
            self.checks.preparation.commit = base

    async def adopt(self, tree: Path, commit: str, *, is_required: bool) -> None:
        """Hold the slot with this tree if no other process uses it.

        If it `is_required`, wait for it, and create it at `commit` if it is missing; raises RefusedError if another
        process or session still uses it after a while.
        """
        if not is_required:
            await self.slots.adopt(tree)
            return
        if tree.parent.parent != self.slots.checkouts.hub.slots:
            raise RefusedError(f"{tree} is not on this machine", "attach on the machine where the session ran")
        held, number = None, int(tree.parent.name)
        with anyio.move_on_after(_ADOPTION_TIMEOUT):
            while (held := await self.slots.adopt(tree) or await self.slots.reserve(number, commit)) is None:  # noqa: ASYNC110  another process
                await anyio.sleep(_ADOPTION_POLL_INTERVAL)
        if held is None:
            raise RefusedError(f"the worktree {tree} of the conversation is in use", "retry when its session has ended")
        if held.state is SlotState.NEW:
            await self.preparation.make(held)

    async def yield_slot(self, tree: Path) -> None:
        """Release the slot with this tree to another process as soon as no session uses it."""
        await self.slots.yield_to_others(tree)

    async def acquire(self, commit: str, session: Path, adapter: str = "", tree: Path | None = None) -> HeldSlot:
        """Assign a slot at a commit to the session with that folder; wait for one.

        Prefers the slot with that `tree`, even while it is being cleaned. Raises GitError, OSError or RefusedError
        if no slot can be created, SetupError if none can be set up.
        """
        while True:
            self.preparation.commit = commit
            held = await self._wait_for_slot(commit, tree)
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self.slots.discard, held)  # retry with another slot, or a new one
                with suppress(GitError, OSError):
                    if await self.slots.checkouts.prepare(held, commit, session, adapter):
                        stack.pop_all()
                        self.checks.preparation.make_needed()
                        return held


class CheckPool(_Pool):
    """The worktree slots of a hub for checks."""

    def __init__(self, slots: HeldSlots, preparation: SlotPreparation, git: Git) -> None:
        super().__init__(slots, preparation)
        self._git = git
        self._lock = anyio.Lock()
        """Held while a check waits for a slot, so that only one check at a time decides how the next slot is set up."""

    async def acquire(self, commit: str, base: str, session: Path) -> HeldSlot:
        """Assign a slot to check a commit that builds on `base`, a target commit.

        No session ever ran in the slot. It has the commit's files and the setup files. Setup ran on the files of the
        commit or of a commit that `base` contains, so that unlanded code never creates files for the check of another
        commit. Raises the errors of `SlotPool.acquire`.
        """
        async with self._lock:
            keys = self.slots.checkouts.options.keys
            self.slots.setup = () if keys is None else await keys(commit)
            # Steps may read files that are not listed as inputs: prefer slots with landed files.
            start = base if keys is not None and self.slots.setup and await keys(base) == self.slots.setup else commit
            await self._discard_stale()
            while True:
                self.preparation.commit = start
                try:
                    held = await self._wait_for_slot(commit)
                except SetupError:
                    if start == commit:
                        raise
                    start = commit  # the commit may fix a setup that is broken on the target
                    continue
                async with AsyncExitStack() as stack:
                    stack.push_async_callback(self.slots.discard, held)
                    with suppress(GitError, OSError):
                        if not await self._is_usable(held.contents.record, commit, base):
                            continue
                        start = commit  # for the next slot, if setup files of this one obstruct the commit's files
                        if await self.slots.checkouts.prepare(held, commit, session, ""):
                            stack.pop_all()
                            return held

    async def _is_usable(self, record: SlotRecord, commit: str, base: str) -> bool:
        """Return whether a slot's setup files may be used to check a commit."""
        if not record.setup or record.setup_at == commit:
            return True
        return await self._git.is_ancestor(record.setup_at, base)

    async def _discard_stale(self) -> None:
        """Discard idle slots with another setup, except the last used one.

        It may be needed again.
        """
        slots = self.slots
        async with slots.selection_lock:
            stale = [held for held in slots.in_state(SlotState.IDLE) if not slots.is_set_up(held)]
            stale.sort(key=lambda held: held.contents.record.used)
            for held in stale[:-1]:
                held.state = SlotState.TAKEN
        for held in stale[:-1]:
            await slots.discard(held)
