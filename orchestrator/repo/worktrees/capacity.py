"""The limits on a hub's worktree slots, and room for one more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio.to_thread

from orchestrator.errors import LockHeld, RefusedError
from orchestrator.repo.worktrees.checkouts import HeldSlot, SlotState
from orchestrator.repo.worktrees.held_slots import HeldSlots
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.slots import WorktreeSlot, assess_slot, list_slots, read_record


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """The maximum number of slots per hub and their bytes on disk.

    Slots preserved for a session do not count.
    """

    slots: int = 16
    bytes: int | None = None


class HubCapacity:
    """Makes room for slots within a hub's limits, which all pools and processes share."""

    def __init__(self, hub: Hub, limits: PoolLimits, pools: Sequence[HeldSlots]) -> None:
        self._hub, self._limits, self._pools = hub, limits, pools

    def is_exceeded(self) -> bool:
        """Return whether the slots that this process holds are larger than the limit."""
        sizes = [held.contents.record.bytes for held in self._held_slots().values()]
        return self._limits.bytes is not None and sum(sizes) > self._limits.bytes

    async def has_room(self, pool: HeldSlots) -> bool:
        """Return whether a pool may create a slot, possibly in place of an idle one.

        Raises RefusedError if not even one fits. The caller must hold the hub's lock of slots.
        """
        in_preparation = [slot for each in self._pools for slot in each.in_state(SlotState.NEW, SlotState.CLEANING)]
        if self._limits.bytes is not None and in_preparation:
            return False  # its size is not known yet
        counted, held_slots = await self._measure_counted(), self._held_slots()
        for slot in [slot for slot in counted if slot.number not in held_slots]:
            if self._fits_in(counted):
                break
            if await self._make_room(slot, pool):
                del counted[slot]
        while pool.waiting and not self._fits_in(counted) and (spare := await self._discard_spare(pool)) is not None:
            counted.pop(spare, None)
        if not counted and not self._fits_in(counted):
            message = f"a worktree needs more than {self._limits.bytes} bytes"
            raise RefusedError(message, "raise `worktrees.max_size`, or free space with `council clean --preserved`")
        # A session may hold its slot while it waits for a check. Without a slot for that check it would wait forever.
        is_first_check = pool.checkouts.options.is_check and pool.waiting > 0 and not pool.by_number
        return is_first_check or self._fits_in(counted)

    def _held_slots(self) -> dict[int, HeldSlot]:
        return {number: held for pool in self._pools for number, held in pool.by_number.items()}

    async def _discard_spare(self, pool: HeldSlots) -> WorktreeSlot | None:
        """Discard the least recently used idle slot that has no waiters, and return it."""
        for each in sorted(self._pools, key=lambda each: each is not pool):
            async with each.selection_lock:
                is_spare = each is not pool and len(each.usable()) > each.waiting
                spare = [held for held in each.in_state(SlotState.IDLE) if is_spare or not each.is_set_up(held)]
                if not spare:
                    continue
                oldest = min(spare, key=lambda held: held.contents.record.used)
                oldest.state = SlotState.TAKEN
            await each.discard(oldest)
            return oldest.slot
        return None

    async def _make_room(self, slot: WorktreeSlot, pool: HeldSlots) -> bool:
        """Remove an idle slot of another process; return whether it no longer counts."""
        with suppress(LockHeld):
            async with slot.lock.hold(0):
                # It may have been preserved for a session since.
                if await anyio.to_thread.run_sync(assess_slot, slot) is not None:
                    await pool.checkouts.remove(slot)
            return True
        return False

    async def _measure_counted(self) -> dict[WorktreeSlot, int]:
        """Return each slot's bytes on disk, except preserved slots of inactive runs."""
        counted: dict[WorktreeSlot, int] = {}
        for slot in await anyio.to_thread.run_sync(list_slots, self._hub):
            if (ours := self._held_slots().get(slot.number)) is not None:
                counted[slot] = ours.contents.record.bytes
            elif await anyio.to_thread.run_sync(assess_slot, slot) or await slot.lock.is_held():
                record = await anyio.to_thread.run_sync(read_record, slot)
                counted[slot] = 0 if record is None else record.bytes
        return counted

    def _fits_in(self, counted: Mapping[WorktreeSlot, int]) -> bool:
        """Return whether one more slot fits, assuming the size of the largest one."""
        sizes = counted.values()
        fits = self._limits.bytes is None or sum(sizes) + max(sizes, default=0) <= self._limits.bytes
        return fits and len(counted) < self._limits.slots
