"""Create, set up and clean the worktree slots of a pool in the background.

One slot is created at a time. If an idle slot has the same files, it is copied, which takes a third of the time of
unpacking with git; while more copies are needed, the source is not assigned.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

import anyio
from anyio.abc import TaskGroup

from orchestrator.errors import GitError, RefusedError
from orchestrator.repo.worktrees.capacity import HubCapacity
from orchestrator.repo.worktrees.checkouts import HeldSlot, SetupError, SlotState
from orchestrator.repo.worktrees.files.change_detection import TreeDiff
from orchestrator.repo.worktrees.held_slots import HeldSlots
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint


class SlotPreparation:
    """Makes slots of a pool idle: new ones while more are needed, and released ones."""

    def __init__(self, slots: HeldSlots, capacity: HubCapacity, clock: Clock, group: TaskGroup) -> None:
        self._slots, self._checkouts, self._capacity = slots, slots.checkouts, capacity
        self._clock, self._group = clock, group
        self.commit = ""
        """The commit of the next new slot; none is created before it is known."""
        self.failures: list[Exception] = []
        """Errors to raise from the waiters, one each."""
        self.is_making = False
        self._setup_scopes: set[anyio.CancelScope] = set()
        """Cancel scopes of setups that no session waits for, cancelled when the pool closes."""

    def make_needed(self) -> None:
        """Start creating slots while more are needed. Returns immediately."""
        if not self.is_making:
            self.is_making = True
            self._group.start_soon(self._make_slots)

    def stop(self) -> None:
        """Keep no more slots ready, and cancel setups that no session waits for."""
        self._slots.wanted = 0
        for setup in self._setup_scopes:
            setup.cancel()

    async def _make_slots(self) -> None:
        try:
            while (held := await self._claim_new_slot()) is not None:
                is_copy = await self._fill_slot(held)
                self._group.start_soon(self._finish, held, is_copy)
        except (GitError, OSError, RefusedError) as error:
            self._report_failure(error)
        finally:
            self.is_making = False

    async def make(self, held: HeldSlot) -> None:
        """Create a reserved slot."""
        is_copy = await self._fill_slot(held)
        await self._finish(held, is_copy)

    async def _claim_new_slot(self) -> HeldSlot | None:
        """Reserve a new slot if one more is needed.

        Holds the hub's lock, so that no other process counts slots at the same time.
        """
        async with self._checkouts.hub.lock("slots").hold():
            if self._slots.is_short() and self.commit and await self._capacity.has_room(self._slots):
                return await self._slots.reserve_new(self.commit)
        return None

    async def _fill_slot(self, held: HeldSlot) -> bool:
        """Fill a new slot; return whether it is a copy, which is not indexed yet.

        A checkout is indexed here, because it can't be copied before.
        """
        source = await self._slots.take_source(held.contents.record.commit)
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._slots.discard, held)
                await self._checkouts.fill(held, None if source is None else source.slot)
                if source is None:
                    await self._checkouts.index(held)
                stack.pop_all()
        finally:
            if source is not None:
                source.state = SlotState.IDLE
        return source is not None

    async def _finish(self, held: HeldSlot, is_copy: bool) -> None:
        """Set up a new slot and mark it idle; discard it if that fails or the pool closes."""
        is_ready, commit = False, held.contents.record.commit
        with anyio.CancelScope() as setup:
            self._setup_scopes.add(setup)
            try:
                if is_copy:
                    await self._checkouts.index(held)
                await self._checkouts.set_up(held, commit)
                is_ready = True
            except (GitError, OSError, SetupError) as error:
                # A check must not fail because setup failed on another commit.
                if not self._checkouts.options.is_check or commit == self.commit:
                    self._report_failure(error)
        self._setup_scopes.discard(setup)
        await (self._mark_idle(held) if is_ready else self._slots.discard(held))

    def _report_failure(self, error: Exception) -> None:
        """Pass an error to one of the waiters."""
        if self._slots.waiting:
            self.failures.append(error)

    def clean(self, held: HeldSlot, diff: TreeDiff | None) -> None:
        """Start cleaning a released slot; discard it if that fails or `diff` is None."""
        held.state = SlotState.CLEANING
        self._group.start_soon(self._clean, held, diff)

    async def _clean(self, held: HeldSlot, diff: TreeDiff | None) -> None:
        if await self._checkouts.clean(held, diff):
            await self._mark_idle(held)
            await self._checkouts.empty_trash()
        else:
            await self._replace(held)

    async def _mark_idle(self, held: HeldSlot) -> None:
        """Mark a clean slot idle, or discard it if it exceeds the size limit."""
        record = replace(held.contents.record, bytes=await self._checkouts.measure(held), used=self._clock.now())
        held.contents = replace(held.contents, record=record)
        failpoint("slot.clean")
        if record.kept and self._capacity.is_exceeded():
            await self._replace(held)
            return
        held.state = SlotState.IDLE
        self._slots.notify_changed()

    async def _replace(self, held: HeldSlot) -> None:
        """Discard a slot, and create another one if it is needed."""
        await self._slots.discard(held)
        self.make_needed()
