"""Assign worktree slots to sessions and checks: create, set up, verify, clean and discard them.

Creation and cleaning run in the background. The pool creates one slot at a time. If an idle slot has the same files,
the pool copies that slot, which takes a third of the time of unpacking with git; while more copies are needed, the
source is not assigned. Other processes may have pools for the same hub: a pool holds the lock of each of its slots and
leaves the slots clean.

Checks have separate worktree slots, in which no session ever runs: the pool `checks` of a session pool. Files that a
check wrote never stay there: a slot with changed setup files is discarded, not cleaned.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from orchestrator.domain.runs.leftovers import LeftoverStatus
from orchestrator.errors import GitError, LockHeld, RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees import reset
from orchestrator.repo.worktrees.change_detection import TreeDiff, TreeSnapshot, detects_mmap_writes
from orchestrator.repo.worktrees.file_trees import disk_usage
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.reset import KeepRules, SlotContents
from orchestrator.repo.worktrees.scan_process import FileScanner
from orchestrator.repo.worktrees.slots import (
    SlotRecord,
    WorktreeSlot,
    assess_slot,
    assign_slot,
    empty_trash,
    list_slots,
    move_to_trash,
    read_record,
    read_snapshot,
    write_record,
)
from orchestrator.repo.worktrees.write_watch import WriteWatch
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds between checks of slots held by other processes.
_POLL_INTERVAL = 0.5
_UNTOUCHED = TreeDiff(touched_folders=["/"])


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """The maximum number of slots per hub and their bytes on disk, not counting slots preserved for a session."""

    slots: int = 16
    bytes: int | None = None


class SetupError(Exception):
    """No slot can be set up as configured. The message has the reason and a remedy."""


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """How slots are checked out, set up and torn down. `set_up` and `tear_down` get a slot that nobody else uses."""

    sparse: tuple[str, ...] = ()
    """The folders to check out; all if empty."""
    keep: KeepRules = field(default_factory=KeepRules)
    """The ignored files to preserve for the next session."""
    set_up: Callable[[HeldSlot, str], Awaitable[tuple[str, ...]]] | None = None
    """Run the setup steps that are missing from a slot's record; return the setup keys to record."""
    tear_down: Callable[[WorktreeSlot], Awaitable[None]] | None = None
    """Tear down a slot before it is removed."""
    keys: Callable[[str], Awaitable[tuple[str, ...]]] | None = None
    """Return the setup keys of a commit, as recorded for a slot after setup."""
    is_check: bool = False
    """Whether the slots are for checks and never used by sessions."""


@dataclass(slots=True)
class HeldSlot:
    """A slot whose lock this process holds, with its contents at assignment."""

    slot: WorktreeSlot
    contents: SlotContents
    fd: int
    """The slot's lock, held by every process that writes to the slot until that process exits."""
    scanner: FileScanner
    detects_all: bool
    """Whether file times reveal every change; if not, a watch reports the rest."""
    _lock_stack: AsyncExitStack
    _watch: WriteWatch | None = None

    def watch(self) -> None:
        """Start watching the files. If no watch is free, the changes are unknown. Blocks."""
        with suppress(OSError):
            self._watch = WriteWatch(self.slot.tree, self.contents.snapshot.folders)

    def end_watch(self) -> None:
        """Stop watching the files."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    async def compare(self) -> TreeDiff | None:
        """Return the changes since assignment, or None if unknown. No process may be writing to the slot."""
        snapshot = self.contents.snapshot
        diff = await _compare(self.scanner, snapshot)
        if diff is None or self.detects_all:
            return diff
        written = None if self._watch is None else self._watch.read_written()
        if written is None:
            return None
        unreported = written.difference(diff.changed, diff.removed)
        return replace(diff, changed=[*diff.changed, *filter(snapshot.has, sorted(unreported))])

    async def release(self) -> None:
        """Release the slot's lock."""
        self.end_watch()
        await self._lock_stack.aclose()


class SlotPool:
    """The worktree slots of a hub, for one run; created by `open`."""

    def __init__(
        self,
        git: Git,
        hub: Hub,
        clock: Clock,
        limits: PoolLimits,
        options: SlotOptions,
        group: TaskGroup,
        scanner: FileScanner,
    ) -> None:
        self._git, self._hub, self._clock, self._limits, self._options = git, hub, clock, limits, options
        self._group, self._scanner = group, scanner
        self._held_slots: dict[int, HeldSlot] = {}
        """Every slot whose lock we hold, keyed by number."""
        self._idle: set[int] = set()
        """Slots that are clean and unassigned."""
        self._cleaning: set[int] = set()
        """Released slots that become idle once they are clean."""
        self._unverified: set[int] = set()
        """Idle slots from another process, not yet compared with their snapshot."""
        self._waiting = self._wanted = 0
        self._in_preparation = 0
        """The number of slots being set up or cleaned, which will be idle soon."""
        self._newest = ""
        self._is_making = self._is_copying = False
        self._detects_all_changes = True
        """Whether file times reveal every change."""
        self._setup_scopes: set[anyio.CancelScope] = set()
        """Cancel scopes of setups that no session waits for, cancelled when the pool closes."""
        self._failures: list[Exception] = []
        self._change = anyio.Event()
        self._selection_lock, self._trash_lock = anyio.Lock(), anyio.Lock()
        self._check_lock = anyio.Lock()
        """Held while a check waits for a slot, so that only one check at a time decides how the next slot is set up."""
        self._setup: tuple[str, ...] | None = None
        """The setup keys required of a check's slot; None for sessions, which accept any slot."""
        self._pools: tuple[SlotPool, ...] = (self,)
        """This pool and the pools that share its limits."""
        self.checks: SlotPool = self
        """The pool of slots for checks."""

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
        async with AsyncExitStack() as stack:
            scanner = await stack.enter_async_context(FileScanner.open())
            group, options_by_pool = (
                anyio.create_task_group(),
                (replace(options, keep=KeepRules(), is_check=True), options),
            )
            pools = tuple(cls(git, hub, clock, limits, each, group, scanner) for each in options_by_pool)
            for pool in pools:
                pool._pools, pool._detects_all_changes, pool.checks = pools, detects_all, pools[0]
                stack.push_async_callback(pool._close)  # after the task group: no task uses the slots any more
            await stack.enter_async_context(group)
            try:
                for pool, wanted in zip(pools, (warm_checks, warm), strict=True):
                    await pool._adopt_existing(wanted)
                yield pools[1]
            finally:
                for pool in pools:
                    pool._wanted = 0
                    for setup in pool._setup_scopes:
                        setup.cancel()

    async def discard_abandoned(self) -> None:
        """Remove slots that a killed process left in an unknown state."""
        for slot in await anyio.to_thread.run_sync(list_slots, self._hub):
            if slot.number not in self._held_slots:
                await self._try_adopt(slot)
        self._group.start_soon(self._empty_trash)

    def warm(self, commit: str) -> None:
        """Start creating the slots to keep ready at this commit. Returns immediately."""
        self._newest = commit
        self._make_more()

    def prewarm_checks(self, base: str) -> None:
        """Create the check slots to keep ready at this commit once the next session has its slot."""
        if not self.checks._waiting:
            self.checks._newest = base

    async def acquire(self, commit: str, session: Path, adapter: str = "", tree: Path | None = None) -> HeldSlot:
        """Assign a slot at a commit to the session with that folder; wait until one is available.

        Prefers the slot with that `tree`, even while it is being cleaned. Raises GitError, OSError or RefusedError
        if no slot can be created, SetupError if none can be set up.
        """
        while True:
            self._newest = commit
            held = await self._wait_for_slot(commit, tree)
            try:
                with suppress(GitError, OSError):
                    if await self._prepare(held, commit, session, adapter):
                        self.checks._make_more()
                        return held
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self.discard(held)
                raise
            await self.discard(held)  # retry with another slot, or a new one

    async def acquire_for_check(self, commit: str, base: str, session: Path) -> HeldSlot:
        """Assign a slot for checking a commit that builds on `base`, a commit of the target.

        No session ever ran in the slot. It has the commit's files and the setup files. Setup ran on the files of the
        commit or of a commit that `base` contains, so that unlanded code never creates files for the check of another
        commit. Raises the errors of `acquire`.
        """
        async with self._check_lock:
            keys = self._options.keys
            self._setup = () if keys is None else await keys(commit)
            # Steps may read files that are not listed as inputs: prefer slots with landed files.
            start = base if keys is not None and self._setup and await keys(base) == self._setup else commit
            await self._discard_stale()
            while True:
                self._newest = start
                try:
                    held = await self._wait_for_slot(commit, None)
                except SetupError:
                    if start == commit:
                        raise
                    start = commit  # the commit may fix a setup that is broken on the target
                    continue
                is_usable = False
                try:
                    with suppress(GitError, OSError):
                        is_usable = await self._is_usable(held.contents.record, commit, base)
                        if is_usable and await self._prepare(held, commit, session, ""):
                            return held
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await self.discard(held)
                    raise
                await self.discard(held)
                if is_usable:
                    start = commit  # setup files obstruct the commit's files

    async def _is_usable(self, record: SlotRecord, commit: str, base: str) -> bool:
        """Return whether a slot's setup files may be used to check a commit."""
        if not record.setup or record.setup_at == commit:
            return True
        return await self._git.is_ancestor(record.setup_at, base)

    async def _discard_stale(self) -> None:
        """Discard idle slots with another setup, except the last used one, which may be needed again."""
        async with self._selection_lock:
            idle = [self._held_slots[number] for number in self._idle if not self._is_set_up(number)]
            idle.sort(key=lambda held: held.contents.record.used)
            for held in idle[:-1]:
                self._idle.discard(held.slot.number)
        for held in idle[:-1]:
            await self.discard(held)

    def _is_set_up(self, number: int) -> bool:
        """Return whether an idle slot has the required setup."""
        return self._setup is None or self._held_slots[number].contents.record.setup == self._setup

    def _usable_idle(self) -> list[HeldSlot]:
        """Return the idle slots that can be assigned."""
        return [self._held_slots[number] for number in self._idle if self._is_set_up(number)]

    def release(self, held: HeldSlot, diff: TreeDiff | None) -> None:
        """Reclaim a slot after its session's folder is removed; clean it in the background.

        If `diff` is None, discards the slot.
        """
        self._cleaning.add(held.slot.number)
        self._group.start_soon(self._clean, held, diff)

    async def discard(self, held: HeldSlot) -> None:
        """Reclaim a slot and remove it."""
        try:
            await self._remove_slot(held.slot)
        finally:
            await self.detach(held)
        self._group.start_soon(self._empty_trash)

    async def detach(self, held: HeldSlot) -> None:
        """Leave a slot to its session, whose folder is preserved."""
        number = held.slot.number
        self._held_slots.pop(number, None)
        self._idle.discard(number)
        self._cleaning.discard(number)
        self._unverified.discard(number)
        await held.release()
        self._notify_changed()

    # Open and close.

    async def _adopt_existing(self, wanted: int) -> None:
        """Adopt idle slots of earlier processes, up to the number to keep ready."""
        self._wanted = wanted
        for slot in await anyio.to_thread.run_sync(_slots_by_last_use, self._hub):
            await self._try_adopt(slot)
        self._group.start_soon(self._empty_trash)

    async def _try_adopt(self, slot: WorktreeSlot) -> None:
        """Adopt a clean slot of another process if one more is needed, or remove an abandoned one."""
        async with AsyncExitStack() as stack:
            try:
                lock = await stack.enter_async_context(slot.lock.hold(0))
            except LockHeld:
                return
            assessment = await anyio.to_thread.run_sync(assess_slot, slot)
            if assessment is not None and assessment[0] is LeftoverStatus.LEFT_OVER:
                await self._remove_slot(slot)
                return
            record = await anyio.to_thread.run_sync(read_record, slot)
            is_fit = record is not None and (record.sparse, record.is_check) == (
                self._options.sparse,
                self._options.is_check,
            )
            if record is not None and is_fit and len(self._held_slots) < self._wanted:
                self._hold(slot, record, lock.fd, stack.pop_all())
                self._idle.add(slot.number)
                self._unverified.add(slot.number)

    def _hold(self, slot: WorktreeSlot, record: SlotRecord, fd: int, lock_stack: AsyncExitStack) -> HeldSlot:
        """Register a slot whose lock we hold and whose files are still unknown."""
        contents, detects_all = SlotContents(record, TreeSnapshot.unknown(slot.tree)), self._detects_all_changes
        held = self._held_slots[slot.number] = HeldSlot(slot, contents, fd, self._scanner, detects_all, lock_stack)
        return held

    async def _close(self) -> None:
        """Record the clean slots, remove abandoned ones, and release all locks."""
        with anyio.CancelScope(shield=True):
            is_removed = False
            for number, held in self._held_slots.items():
                with suppress(OSError, GitError):  # without a record the next pool removes the slot
                    if number in self._idle and number not in self._unverified:
                        contents = held.contents
                        await anyio.to_thread.run_sync(write_record, held.slot, contents.record, contents.snapshot)
                    elif await self._is_abandoned(held.slot):
                        await self._remove_slot(held.slot)
                        is_removed = True
                await held.release()
            if is_removed:
                await self._empty_trash()

    async def _is_abandoned(self, slot: WorktreeSlot) -> bool:
        """Return whether a slot's session folder was removed, possibly by another process."""
        assessment = await anyio.to_thread.run_sync(assess_slot, slot)
        return assessment is not None and assessment[0] is LeftoverStatus.LEFT_OVER

    # Assign.

    async def _wait_for_slot(self, commit: str, tree: Path | None) -> HeldSlot:
        self._waiting += 1
        try:
            while True:
                changed = self._change
                if (held := await self._take_idle(commit, tree)) is not None:
                    return held
                if self._failures:
                    raise self._failures.pop()
                self._make_more()
                with anyio.move_on_after(_POLL_INTERVAL):
                    await changed.wait()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._failures.clear()  # nobody is waiting for these slots anymore
            self._notify_changed()

    async def _take_idle(self, commit: str, tree: Path | None) -> HeldSlot | None:
        """Return the idle slot with that tree or nearest to the commit, or None if none can be assigned."""
        async with self._selection_lock:
            if tree is not None and any(self._held_slots[number].slot.tree == tree for number in self._cleaning):
                return None
            idle = self._usable_idle()
            sources = self._idle_copies_of(commit)
            # The source of a copy will become idle again.
            is_short = self._is_making and not self._is_copying and self._waiting > len(idle)
            idle.sort(key=lambda held: (held.slot.tree != tree, _distance(held.contents.record, commit)))
            for held in idle:
                if not (is_short and sources == [held]) and await self._verify_idle(held):
                    self._idle.discard(held.slot.number)
                    return held
            return None

    async def _verify_idle(self, held: HeldSlot) -> bool:
        """Return whether an idle slot still matches its snapshot; if not, discard it."""
        number, slot = held.slot.number, held.slot
        if number not in self._unverified:
            return True
        snapshot = await anyio.to_thread.run_sync(read_snapshot, slot)
        if snapshot is not None and await _compare(self._scanner, snapshot) == _UNTOUCHED:
            held.contents = replace(held.contents, snapshot=snapshot)
            self._unverified.discard(number)
            return True
        with anyio.CancelScope(shield=True):
            await self.discard(held)
        return False

    async def _prepare(self, held: HeldSlot, commit: str, session: Path, adapter: str) -> bool:
        """Assign a slot to a session and move it to a commit; return False if that is not possible."""
        slot, git = held.slot, self._slot_git(held)
        await anyio.to_thread.run_sync(assign_slot, slot, session, held.contents.record)
        contents = await reset.remove_kept_of_others(slot, held.contents, adapter)
        contents = contents and await reset.move_slot(git, slot, contents, commit)
        if contents is None:
            return False
        held.contents = contents
        before = held.contents.record
        await self._set_up(held, commit)
        if held.contents.record != before:
            await anyio.to_thread.run_sync(assign_slot, slot, session, held.contents.record)
        if not held.detects_all:
            await anyio.to_thread.run_sync(held.watch)
        return True

    async def _set_up(self, held: HeldSlot, commit: str) -> None:
        """Run setup in a slot, and record the files that it created."""
        if self._options.set_up is None:
            return
        slot, before, git = held.slot, held.contents.record, self._slot_git(held)
        setup = await self._options.set_up(held, commit)
        if setup == before.setup:
            return
        await reset.restore_files(git, slot)
        files, top, unignored = await reset.list_untracked(git, slot)
        wanted = [path for path in top if self._options.keep.adapter_of(path) is not None]
        # Setup files are for sessions of all adapters.
        kept = dict.fromkeys(await reset.list_ignored(git, slot, wanted), "")
        snapshot = await anyio.to_thread.run_sync(TreeSnapshot.capture, slot.tree, kept) or TreeSnapshot.unknown(
            slot.tree
        )
        extras = tuple(path for path in files if snapshot.has(path))
        record = replace(before, setup=setup, setup_at=commit, extras=extras, unignored=tuple(unignored), kept=kept)
        held.contents = SlotContents(record, snapshot)

    # Create.

    def _make_more(self) -> None:
        if not self._is_making:
            self._is_making = True
            self._group.start_soon(self._make_slots)

    async def _make_slots(self) -> None:
        try:
            while (held := await self._claim_new_slot()) is not None:
                is_copy = await self._fill_slot(held)
                self._in_preparation += 1
                self._group.start_soon(self._finish, held, is_copy)
        except (GitError, OSError, RefusedError) as error:
            self._report_failure(error)
        finally:
            self._is_making = False

    async def _claim_new_slot(self) -> HeldSlot | None:
        """Reserve a new slot if one more is needed.

        Holds the hub's lock, so that no other process counts slots meanwhile.
        """
        async with self._hub.lock("slots").hold():
            return await self._new_slot(self._newest) if await self._is_more_wanted() else None

    async def _is_more_wanted(self) -> bool:
        is_short = (
            self._waiting > len(self._usable_idle()) + self._in_preparation or len(self._held_slots) < self._wanted
        )
        return is_short and self._newest != "" and await self._has_room()

    async def _has_room(self) -> bool:
        """Return whether one more slot may be created, replacing an idle one if necessary.

        Raises RefusedError if not even one fits.
        """
        if self._limits.bytes is not None and any(pool._in_preparation for pool in self._pools):
            return False  # its size is not known yet
        counted = await self._measure_counted()
        for slot in [slot for slot in counted if not any(slot.number in pool._held_slots for pool in self._pools)]:
            if self._fits_in(counted):
                break
            if await self._make_room(slot):
                del counted[slot]
        while self._waiting and not self._fits_in(counted) and (spare := await self._discard_spare()) is not None:
            counted.pop(spare, None)
        if not counted and not self._fits_in(counted):
            message = f"a worktree needs more than {self._limits.bytes} bytes"
            raise RefusedError(message, "raise `worktrees.max_size`, or free space with `council clean --preserved`")
        # A session may hold its slot while it waits for a check. Without a slot for that check it would wait forever.
        is_first_check = self._options.is_check and self._waiting > 0 and not self._held_slots
        return is_first_check or self._fits_in(counted)

    async def _discard_spare(self) -> WorktreeSlot | None:
        """Discard the least recently used idle slot that nobody waits for, and return it."""
        for pool in sorted(self._pools, key=lambda pool: pool is not self):
            async with pool._selection_lock:
                is_spare = pool is not self and len(pool._usable_idle()) > pool._waiting
                spare = [pool._held_slots[number] for number in pool._idle if is_spare or not pool._is_set_up(number)]
                if not spare:
                    continue
                oldest = min(spare, key=lambda held: held.contents.record.used)
                pool._idle.discard(oldest.slot.number)
            await pool.discard(oldest)
            return oldest.slot
        return None

    async def _make_room(self, slot: WorktreeSlot) -> bool:
        """Remove an idle slot of another process; return whether it no longer counts."""
        with suppress(LockHeld):
            async with slot.lock.hold(0):
                # It may have been preserved for a session meanwhile.
                if await anyio.to_thread.run_sync(assess_slot, slot) is not None:
                    await self._remove_slot(slot)
            return True
        return False

    async def _measure_counted(self) -> dict[WorktreeSlot, int]:
        """Return each slot's bytes on disk, except slots preserved for a session of an inactive run."""
        counted: dict[WorktreeSlot, int] = {}
        for slot in await anyio.to_thread.run_sync(list_slots, self._hub):
            ours = [pool._held_slots[slot.number] for pool in self._pools if slot.number in pool._held_slots]
            if ours:
                counted[slot] = ours[0].contents.record.bytes
                continue
            if await anyio.to_thread.run_sync(assess_slot, slot) or await slot.lock.is_held():
                record = await anyio.to_thread.run_sync(read_record, slot)
                counted[slot] = 0 if record is None else record.bytes
        return counted

    def _fits_in(self, counted: Mapping[WorktreeSlot, int]) -> bool:
        """Return whether one more slot fits, assuming the size of the largest one."""
        sizes = counted.values()
        fits = self._limits.bytes is None or sum(sizes) + max(sizes, default=0) <= self._limits.bytes
        return fits and len(counted) < self._limits.slots

    async def _fill_slot(self, held: HeldSlot) -> bool:
        """Fill a new slot, by copying if possible; return whether it is a copy, which is not indexed yet.

        A checkout is indexed here, because it can't be copied before.
        """
        commit = held.contents.record.commit
        async with self._selection_lock:
            source = await self._find_verified(self._idle_copies_of(commit))
            if source is not None:
                self._idle.discard(source.slot.number)
                self._is_copying = True
        try:
            git, slot = self._slot_git(held), held.slot
            if source is None:
                await reset.check_out_slot(git, slot, commit, self._options.sparse)
                await self._index_new_slot(held)
            else:
                await reset.copy_slot(git, source.slot, slot, self._options.sparse)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.discard(held)
            raise
        finally:
            self._is_copying = False
            if source is not None:
                self._idle.add(source.slot.number)
        return source is not None

    async def _index_new_slot(self, held: HeldSlot) -> None:
        snapshot = await reset.index_slot(self._slot_git(held), held.slot, self._scanner)
        record = replace(held.contents.record, bytes=await self._size_of(held))
        held.contents = SlotContents(record, snapshot or held.contents.snapshot)

    async def _find_verified(self, checkouts: Sequence[HeldSlot]) -> HeldSlot | None:
        for held in checkouts:
            if await self._verify_idle(held):
                return held
        return None

    def _idle_copies_of(self, commit: str) -> list[HeldSlot]:
        """Return the idle slots with exactly the files of a commit."""
        idle = (self._held_slots[number] for number in self._idle)
        return [held for held in idle if _is_unmodified(held.contents.record, commit)]

    async def _new_slot(self, commit: str) -> HeldSlot:
        """Reserve the first unused slot number. Without a snapshot of its files a slot can be used only once."""
        for number in count(1):
            slot = WorktreeSlot(self._hub, number)
            if number in self._held_slots or await anyio.Path(slot.root).exists():
                continue
            async with AsyncExitStack() as stack:
                with suppress(LockHeld):
                    lock = await stack.enter_async_context(slot.lock.hold(0))
                    if not await anyio.Path(slot.root).exists():
                        await anyio.Path(slot.root).mkdir(mode=0o700)
                        record = SlotRecord(commit, sparse=self._options.sparse, is_check=self._options.is_check)
                        return self._hold(slot, record, lock.fd, stack.pop_all())
        raise AssertionError("the loop over numbers returns")

    async def _finish(self, held: HeldSlot, is_copy: bool) -> None:
        """Set up a new slot and mark it idle; discard it if that fails or the pool closes."""
        is_ready, commit = False, held.contents.record.commit
        with anyio.CancelScope() as setup:
            self._setup_scopes.add(setup)
            try:
                if is_copy:
                    await self._index_new_slot(held)
                await self._set_up(held, commit)
                is_ready = True
            except (GitError, OSError, SetupError) as error:
                # A check must not fail because setup failed on another commit.
                if not self._options.is_check or commit == self._newest:
                    self._report_failure(error)
        self._setup_scopes.discard(setup)
        self._in_preparation -= 1
        await (self._mark_idle(held) if is_ready else self.discard(held))

    # Clean.

    async def _clean(self, held: HeldSlot, diff: TreeDiff | None) -> None:
        contents = None
        self._in_preparation += 1
        held.end_watch()
        try:
            with suppress(GitError, OSError):
                if diff is not None:
                    git = self._slot_git(held)
                    contents = await reset.clean_slot(git, held.slot, held.contents, diff, self._options.keep)
            if contents is not None:
                held.contents = contents
                await self._mark_idle(held)
        finally:
            self._in_preparation -= 1
        if contents is None:
            await self.discard(held)
            self._make_more()
            return
        await self._empty_trash()

    async def _mark_idle(self, held: HeldSlot) -> None:
        """Mark a clean slot idle, or discard it if its caches push the total over the size limit."""
        size = await self._size_of(held)
        record = replace(held.contents.record, bytes=size, used=self._clock.now())
        held.contents = replace(held.contents, record=record)
        failpoint("slot.clean")
        sizes = [other.contents.record.bytes for pool in self._pools for other in pool._held_slots.values()]
        if record.kept and self._limits.bytes is not None and sum(sizes) > self._limits.bytes:
            await self.discard(held)
            self._make_more()
            return
        self._cleaning.discard(held.slot.number)
        self._idle.add(held.slot.number)
        self._notify_changed()

    async def _size_of(self, held: HeldSlot) -> int:
        """Return a slot's bytes on disk; 0 without a size limit."""
        if self._limits.bytes is None:
            return 0
        return await anyio.to_thread.run_sync(disk_usage, held.slot.root)

    async def _remove_slot(self, slot: WorktreeSlot) -> None:
        if self._options.tear_down is not None:
            await self._options.tear_down(slot)
        await anyio.to_thread.run_sync(move_to_trash, self._hub, slot.root)

    async def _empty_trash(self) -> None:
        async with self._trash_lock:
            with suppress(GitError):  # `council clean` removes the rest
                await empty_trash(self._hub, self._git.environ, self._git.keep_fds)

    def _slot_git(self, held: HeldSlot) -> Git:
        git = replace(self._git, keep_fds=(*self._git.keep_fds, held.fd))
        return reset.slot_git(git, held.slot, self._options.sparse)

    def _report_failure(self, error: Exception) -> None:
        """Pass an error to one of the waiters."""
        if self._waiting:
            self._failures.append(error)

    def _notify_changed(self) -> None:
        for pool in self._pools:
            pool._change.set()
            pool._change = anyio.Event()


async def _compare(scanner: FileScanner, snapshot: TreeSnapshot) -> TreeDiff | None:
    return await scanner.run(snapshot.compare, snapshot.count_files())


def _slots_by_last_use(hub: Hub) -> list[WorktreeSlot]:
    """Return all slots of a hub, most recently cleaned first. Blocks."""
    records = {slot: read_record(slot) for slot in list_slots(hub)}
    return sorted(records, key=lambda slot: 0.0 if (record := records[slot]) is None else -record.used)


def _is_unmodified(record: SlotRecord, commit: str) -> bool:
    """Return whether a slot has exactly the files of a commit."""
    return record.commit == commit and not record.extras and not record.kept


def _distance(record: SlotRecord, commit: str) -> tuple[bool, float]:
    """Return the sort key of slots for a commit: slots at the commit first, then by last use."""
    return record.commit != commit, -record.used
