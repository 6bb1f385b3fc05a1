"""The slots whose locks this process holds: lock, select, adopt and discard them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from itertools import count
from pathlib import Path

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from orchestrator.domain.runs.leftovers import LeftoverStatus
from orchestrator.errors import GitError, LockHeld
from orchestrator.repo.worktrees.checkouts import Checkouts, HeldSlot, SlotState
from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.reset import SlotContents
from orchestrator.repo.worktrees.slots import (
    SlotRecord,
    WorktreeSlot,
    assess_slot,
    list_slots,
    read_record,
    write_record,
)


class HeldSlots:
    """The slots of one pool whose locks this process holds, and the demand for them."""

    def __init__(self, checkouts: Checkouts, group: TaskGroup, pools: list[HeldSlots], *, detects_all: bool) -> None:
        """Join `pools`, which share a hub's limits; `detects_all` is that of `HeldSlot`."""
        self.checkouts, self._group, self._pools, self._detects_all = checkouts, group, pools, detects_all
        pools.append(self)
        self.by_number: dict[int, HeldSlot] = {}
        self.waiting = 0
        """The number of sessions or checks that wait for a slot."""
        self.wanted = 0
        """The number of slots to keep ready."""
        self.setup: tuple[str, ...] | None = None
        """The setup keys required of a check's slot; None for sessions, which accept any slot."""
        self.changed = anyio.Event()
        """Set, and replaced, at the next change of any pool."""
        self.selection_lock = anyio.Lock()

    def in_state(self, *states: SlotState) -> list[HeldSlot]:
        """Return the slots in one of these states."""
        return [held for held in self.by_number.values() if held.state in states]

    def is_set_up(self, held: HeldSlot) -> bool:
        """Return whether a slot has the required setup."""
        return self.setup is None or held.contents.record.setup == self.setup

    def usable(self) -> list[HeldSlot]:
        """Return the idle slots that can be assigned."""
        return [held for held in self.in_state(SlotState.IDLE) if self.is_set_up(held)]

    def is_short(self) -> bool:
        """Return whether more slots are needed, in addition to those in preparation."""
        ready = len(self.usable()) + len(self.in_state(SlotState.NEW, SlotState.CLEANING))
        return self.waiting > ready or len(self.by_number) < self.wanted

    def notify_changed(self) -> None:
        """Wake the waiters of all pools."""
        for pool in self._pools:
            pool.changed.set()
            pool.changed = anyio.Event()

    async def take(self, commit: str, tree: Path | None, *, is_growing: bool) -> HeldSlot | None:
        """Return the idle slot with that tree or nearest to the commit, or None.

        While the pool `is_growing`, the only slot to copy stays idle.
        """
        async with self.selection_lock:
            if tree is not None and any(held.slot.tree == tree for held in self.in_state(SlotState.CLEANING)):
                return None
            usable, sources = self.usable(), self._copies_of(commit)
            # The source of a copy will become idle again.
            is_short = is_growing and not self.in_state(SlotState.SOURCE) and self.waiting > len(usable)
            usable.sort(key=lambda held: (held.slot.tree != tree, _distance(held.contents.record, commit)))
            return await self._take_verified([held for held in usable if not is_short or sources != [held]])

    async def take_source(self, commit: str) -> HeldSlot | None:
        """Return an idle slot with exactly the files of a commit, for copying."""
        async with self.selection_lock:
            source = await self._take_verified(self._copies_of(commit))
            if source is not None:
                source.state = SlotState.SOURCE
            return source

    def _copies_of(self, commit: str) -> list[HeldSlot]:
        return [held for held in self.in_state(SlotState.IDLE) if _is_unmodified(held.contents.record, commit)]

    async def _take_verified(self, candidates: Iterable[HeldSlot]) -> HeldSlot | None:
        """Take the first slot that matches its record; discard the slots before it."""
        for held in candidates:
            if held.is_verified or await self.checkouts.verify(held):
                held.state = SlotState.TAKEN
                return held
            await self.discard(held)
        return None

    async def reserve_new(self, commit: str) -> HeldSlot:
        """Reserve the first unused slot number.

        Without a snapshot of its files, the slot can be used only once.
        """
        for number in count(1):
            if number not in self.by_number and (held := await self.reserve(number, commit)) is not None:
                return held
        raise AssertionError("the loop over numbers returns")

    async def reserve(self, number: int, commit: str) -> HeldSlot | None:
        """Reserve an unused slot number; return None if it is used."""
        options = self.checkouts.options
        slot = WorktreeSlot(self.checkouts.hub, number)
        if await anyio.Path(slot.root).exists():
            return None
        async with AsyncExitStack() as stack:
            with suppress(LockHeld):
                lock = await stack.enter_async_context(slot.lock.hold(0))
                if not await anyio.Path(slot.root).exists():
                    await anyio.Path(slot.root).mkdir(mode=0o700)
                    record = SlotRecord(commit, sparse=options.sparse, is_check=options.is_check)
                    return self._hold(slot, record, lock.fd, stack.pop_all(), SlotState.NEW)
        return None

    async def adopt(self, tree: Path) -> HeldSlot | None:
        """Return the slot with this tree; None if it is missing, or another process or session uses it."""
        slots = await anyio.to_thread.run_sync(list_slots, self.checkouts.hub)
        slot = next((slot for slot in slots if slot.tree == tree), None)
        if slot is not None and slot.number not in self.by_number:
            await self._try_adopt(slot, is_needed=True)
        return None if slot is None else self.by_number.get(slot.number)

    async def yield_to_others(self, tree: Path) -> None:
        """Release the lock of the slot with this tree, if it is held, as soon as no session uses it."""
        while True:
            changed = self.changed
            async with self.selection_lock:
                held = next((held for held in self.by_number.values() if held.slot.tree == tree), None)
                if held is None:
                    return
                if held.state is SlotState.IDLE:
                    held.state = SlotState.TAKEN
                    break
            await changed.wait()
        if held.is_verified:
            await anyio.to_thread.run_sync(write_record, held.slot, held.contents.record, held.contents.snapshot)
        await self.detach(held)

    async def adopt_others(self) -> None:
        """Adopt clean slots of other processes that are needed; remove abandoned ones."""
        for slot in await anyio.to_thread.run_sync(_slots_by_last_use, self.checkouts.hub):
            if slot.number not in self.by_number:
                await self._try_adopt(slot)
        self._group.start_soon(self.checkouts.empty_trash)

    async def _try_adopt(self, slot: WorktreeSlot, *, is_needed: bool = False) -> None:
        async with AsyncExitStack() as stack:
            try:
                lock = await stack.enter_async_context(slot.lock.hold(0))
            except LockHeld:
                return
            if await _is_abandoned(slot):
                await self.checkouts.remove(slot)
                return
            record, options = await anyio.to_thread.run_sync(read_record, slot), self.checkouts.options
            if record is None or (record.sparse, record.is_check) != (options.sparse, options.is_check):
                return
            if is_needed or len(self.by_number) < self.wanted:
                self._hold(slot, record, lock.fd, stack.pop_all(), SlotState.IDLE)

    def _hold(
        self, slot: WorktreeSlot, record: SlotRecord, fd: int, lock_stack: AsyncExitStack, state: SlotState
    ) -> HeldSlot:
        """Register a slot whose lock we hold and whose files are still unknown."""
        contents, is_verified = SlotContents(record, TreeSnapshot.unknown(slot.tree)), state is SlotState.NEW
        held = self.by_number[slot.number] = HeldSlot(
            slot, contents, fd, self.checkouts.scanner, self._detects_all, state, is_verified, lock_stack
        )
        return held

    async def discard(self, held: HeldSlot) -> None:
        """Remove a slot, even if cancelled."""
        with anyio.CancelScope(shield=True):
            try:
                await self.checkouts.remove(held.slot)
            finally:
                await self.detach(held)
        self._group.start_soon(self.checkouts.empty_trash)

    async def detach(self, held: HeldSlot) -> None:
        """Remove a slot from the pool, because its session's folder is preserved."""
        self.by_number.pop(held.slot.number, None)
        await held.unlock()
        self.notify_changed()

    async def close(self) -> None:
        """Record the clean slots, remove abandoned ones, and release all locks."""
        with anyio.CancelScope(shield=True):
            is_removed = False
            for held in self.by_number.values():
                with suppress(OSError, GitError):  # without a record the next pool removes the slot
                    if held.state is SlotState.IDLE and held.is_verified:
                        contents = held.contents
                        await anyio.to_thread.run_sync(write_record, held.slot, contents.record, contents.snapshot)
                    elif await _is_abandoned(held.slot):
                        await self.checkouts.remove(held.slot)
                        is_removed = True
                await held.unlock()
            if is_removed:
                await self.checkouts.empty_trash()


async def _is_abandoned(slot: WorktreeSlot) -> bool:
    """Return whether a slot is not clean and its session's folder was removed."""
    assessment = await anyio.to_thread.run_sync(assess_slot, slot)
    return assessment is not None and assessment[0] is LeftoverStatus.LEFT_OVER


def _slots_by_last_use(hub: Hub) -> list[WorktreeSlot]:
    """Return all slots of a hub, most recently cleaned first. Blocks."""
    records = {slot: read_record(slot) for slot in list_slots(hub)}
    return sorted(records, key=lambda slot: 0.0 if (record := records[slot]) is None else -record.used)


def _is_unmodified(record: SlotRecord, commit: str) -> bool:
    """Return whether a slot has exactly the files of a commit."""
    return record.commit == commit and not record.extras and not record.kept


def _distance(record: SlotRecord, commit: str) -> tuple[bool, float]:
    """Return the sort key for slots: first those at the commit, then by last use."""
    return record.commit != commit, -record.used
