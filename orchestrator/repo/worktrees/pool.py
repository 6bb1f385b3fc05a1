"""Hands places out and takes them back: how many there are, which one fits, when one is made, cleaned or thrown away.

Making and cleaning go on in the background. One place is made at a time, as a copy of an idle one where that holds the
same files, which takes a third of the time that git needs to unpack them; while more copies are wanted, that one is not
handed out. Other processes may have pools of the same hub: what a pool has it holds the lock of, and leaves clean.

Checks have worktree slots of their own, in which no session ever runs: the pool `checks` of a pool of sessions. Nothing
that a check wrote stays there: a slot whose setup's files differ from what setup made is discarded, not cleaned.
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
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.removal import disk_usage
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
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds between two looks at the places that other processes have.
_PAUSE = 0.5
_UNTOUCHED = TreeDiff(touched_folders=["/"])


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How many places a hub may have and how many bytes they may take; what stays with its session is not counted."""

    places: int = 16
    bytes: int | None = None


class SetupError(Exception):
    """A place can't be set up as it is wanted, and neither can another one; says why, and what to do."""


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """What is done to places beside git's part; `furnish` and `strip` get a place that nobody else has."""

    sparse: tuple[str, ...] = ()
    """The folders that are checked out; all if empty."""
    keep: KeepRules = field(default_factory=KeepRules)
    """What stays for the next session."""
    set_up: Callable[[HeldSlot, str], Awaitable[tuple[str, ...]]] | None = None
    """Sets a place up for a commit as far as its record does not say that it is; returns what the record is to say."""
    strip: Callable[[WorktreeSlot], Awaitable[None]] | None = None
    """Is called before a place is thrown away."""
    keys: Callable[[str], Awaitable[tuple[str, ...]]] | None = None
    """Returns what a place's record says once it is set up for a commit."""
    is_check: bool = False
    """Whether checks run in the places, and no session ever."""


@dataclass(slots=True)
class HeldSlot:
    """A place in somebody's hands, with what it held when it was handed out."""

    place: WorktreeSlot
    contents: SlotContents
    fd: int
    """The lock on the place: what writes to it is to hold that until it has ended."""
    scanner: FileScanner
    reader: Git | None
    """What reads the files where the file system does not tell of every change."""
    _held: AsyncExitStack

    async def compare(self) -> TreeDiff | None:
        """Return what differs by now, None if that can't be told; nobody may write to it any more."""
        found = await _compare(self.scanner, self.contents.snapshot)
        if found is None or self.reader is None:
            return found
        with suppress(GitError, OSError):
            return await reset.add_content_changes(self.reader, self.place, found)
        return None

    async def release(self) -> None:
        """Give its lock back."""
        await self._held.aclose()


class SlotPool:
    """The places of a hub, for one run; opened by `open`."""

    def __init__(
        self,
        git: Git,
        hub: Hub,
        clock: Clock,
        limits: PoolLimits,
        care: SlotOptions,
        group: TaskGroup,
        walker: FileScanner,
    ) -> None:
        self._git, self._hub, self._clock, self._limits, self._care = git, hub, clock, limits, care
        self._group, self._walker = group, walker
        self._held_slots: dict[int, HeldSlot] = {}
        """Every place that we hold the lock of."""
        self._idle: set[int] = set()
        """Those that are clean and nobody's."""
        self._cleaning: set[int] = set()
        """Those that were given back and are going to be idle."""
        self._unseen: set[int] = set()
        """Idle ones that another process left, of which it is not known whether they still are what it left."""
        self._waiting = self._wanted = 0
        self._in_preparation = 0
        """Places that are being set up or cleaned, and will be idle soon."""
        self._newest = ""
        self._is_making = self._is_copying = False
        self._detects_all_changes = True
        """Whether the file system tells of every change: else git reads all files, and what setup made is used once."""
        self._setups: set[anyio.CancelScope] = set()
        """Of places that are being set up for whoever comes: of no use to anybody when the pool is closed."""
        self._failures: list[Exception] = []
        self._changed = anyio.Event()
        self._choosing, self._sweeping = anyio.Lock(), anyio.Lock()
        self._checking = anyio.Lock()
        """Held while a check waits for a place: only one says at a time how the next one is to be set up."""
        self._setup: tuple[str, ...] | None = None
        """The setup that a place for a check must have; None for sessions: any is good enough to begin with."""
        self._pools: tuple[SlotPool, ...] = (self,)
        """This one and those that share its limits."""
        self.checks: SlotPool = self
        """The places for checks."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls, git: Git, hub: Hub, clock: Clock, limits: PoolLimits, care: SlotOptions, *, warm: int, warm_checks: int = 0
    ) -> AsyncIterator[SlotPool]:
        """Open the places of a hub for the body; at its end they are left clean for whoever comes next.

        `warm` is how many of them are to be there all the time, `warm_checks` how many of those for checks; they are
        made once it is known of which commit. Those of unknown state, which a killed process left, are thrown away.
        `git` runs in the trusted repository.
        """
        await anyio.to_thread.run_sync(lambda: hub.places.mkdir(mode=0o700, exist_ok=True))
        can_tell = await anyio.to_thread.run_sync(detects_mmap_writes, hub.places)
        async with AsyncExitStack() as stack:
            walker = await stack.enter_async_context(FileScanner.open())
            group, cares = anyio.create_task_group(), (replace(care, keep=KeepRules(), is_check=True), care)
            pools = tuple(cls(git, hub, clock, limits, one, group, walker) for one in cares)
            for pool in pools:
                pool._pools, pool._detects_all_changes, pool.checks = pools, can_tell, pools[0]
                stack.push_async_callback(pool._close)  # when nothing is at work in them any more, whatever ended that
            await stack.enter_async_context(group)
            try:
                for pool, wanted in zip(pools, (warm_checks, warm), strict=True):
                    await pool._begin(wanted)
                yield pools[1]
            finally:
                for pool in pools:
                    pool._wanted = 0
                    for setup in pool._setups:
                        setup.cancel()

    async def clear(self) -> None:
        """Throw away what is of unknown state by now, which another process left that was killed."""
        for place in await anyio.to_thread.run_sync(list_slots, self._hub):
            if place.number not in self._held_slots:
                await self._adopt(place)
        self._group.start_soon(self._sweep)

    def warm(self, commit: str) -> None:
        """Begin to make what is to be there all the time; does not wait for it."""
        self._newest = commit
        self._make_more()

    def prewarm_checks(self, base: str) -> None:
        """Have the places for checks made that are to be there all the time, once the next session has its own."""
        if not self.checks._waiting:
            self.checks._newest = base

    async def take(self, commit: str, session: Path, adapter: str = "", tree: Path | None = None) -> HeldSlot:
        """Hand out a place that holds a commit, to the session with that folder; waits until there is one.

        It is the one with that `tree` if that is free, or was given back and soon will be. Raises GitError, OSError or
        RefusedError where none can be made, SetupError where none can be set up.
        """
        while True:
            self._newest = commit
            checkout = await self._next(commit, tree)
            try:
                with suppress(GitError, OSError):
                    if await self._fit(checkout, commit, session, adapter):
                        self.checks._make_more()
                        return checkout
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self.discard(checkout)
                raise
            await self.discard(checkout)  # another one may fit, or else a new one

    async def acquire_for_check(self, commit: str, base: str, session: Path) -> HeldSlot:
        """Hand out a place for a check of a commit; `base` is what it builds on, which the target holds.

        No session ever ran there. It holds the commit's files, and what setup made. That setup ran on the files of the
        commit, or of a commit that `base` contains: code that has not landed makes nothing for the check of another
        commit. Raises what `take` raises.
        """
        async with self._checking:
            keys = self._care.keys
            self._setup = () if keys is None else await keys(commit)
            # Files that the steps read without naming them are to be those that landed.
            start = base if keys is not None and self._setup and await keys(base) == self._setup else commit
            await self._discard_stale()
            while True:
                self._newest = start
                try:
                    checkout = await self._next(commit, None)
                except SetupError:
                    if start == commit:
                        raise
                    start = commit  # what is broken on the target may be what the commit repairs
                    continue
                is_usable = False
                try:
                    with suppress(GitError, OSError):
                        is_usable = await self._is_usable(checkout.contents.record, commit, base)
                        if is_usable and await self._fit(checkout, commit, session, ""):
                            return checkout
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await self.discard(checkout)
                    raise
                await self.discard(checkout)
                if is_usable:
                    start = commit  # what setup made is in the way of the commit's own files

    async def _is_usable(self, record: SlotRecord, commit: str, base: str) -> bool:
        """Whether what setup made in a place may be used to check a commit."""
        if not record.setup or record.setup_at == commit:
            return True
        return await self._git.is_ancestor(record.setup_at, base)

    async def _discard_stale(self) -> None:
        """Discard idle places with another setup than is wanted; the last one is kept, as it may be wanted again."""
        async with self._choosing:
            idle = [self._held_slots[number] for number in self._idle if not self._is_set_up(number)]
            idle.sort(key=lambda one: one.contents.record.used)
            for checkout in idle[:-1]:
                self._idle.discard(checkout.place.number)
        for checkout in idle[:-1]:
            await self.discard(checkout)

    def _is_set_up(self, number: int) -> bool:
        """Whether an idle place has the setup that is wanted."""
        return self._setup is None or self._held_slots[number].contents.record.setup == self._setup

    def _ready(self) -> list[HeldSlot]:
        """Return the idle places that can be handed out."""
        return [self._held_slots[number] for number in self._idle if self._is_set_up(number)]

    def give_back(self, checkout: HeldSlot, found: TreeDiff | None) -> None:
        """Take a place back whose session's folder is gone; what differs is removed in the background."""
        self._cleaning.add(checkout.place.number)
        self._group.start_soon(self._clean, checkout, found)

    async def discard(self, checkout: HeldSlot) -> None:
        """Take a place back that is not to be used again."""
        try:
            await self._throw_away(checkout.place)
        finally:
            await self.lose(checkout)
        self._group.start_soon(self._sweep)

    async def lose(self, checkout: HeldSlot) -> None:
        """Leave a place to its session, whose folder stays."""
        number = checkout.place.number
        self._held_slots.pop(number, None)
        self._idle.discard(number)
        self._cleaning.discard(number)
        self._unseen.discard(number)
        await checkout.release()
        self._announce()

    # Opening and closing.

    async def _begin(self, wanted: int) -> None:
        """Take over what another process left, as far as it is wanted."""
        self._wanted = wanted
        for place in await anyio.to_thread.run_sync(_slots_by_last_use, self._hub):
            await self._adopt(place)
        self._group.start_soon(self._sweep)

    async def _adopt(self, place: WorktreeSlot) -> None:
        """Take a clean place of another process if one more is of use; throw one away that is lost."""
        async with AsyncExitStack() as stack:
            try:
                lock = await stack.enter_async_context(place.lock.hold(0))
            except LockHeld:
                return
            judged = await anyio.to_thread.run_sync(assess_slot, place)
            if judged is not None and judged[0] is LeftoverStatus.LEFT_OVER:
                await self._throw_away(place)
                return
            record = await anyio.to_thread.run_sync(read_record, place)
            is_fit = record is not None and (record.sparse, record.is_check) == (self._care.sparse, self._care.is_check)
            if record is not None and is_fit and len(self._held_slots) < self._wanted:
                self._own(place, record, lock.fd, stack.pop_all())
                self._idle.add(place.number)
                self._unseen.add(place.number)

    def _own(self, place: WorktreeSlot, record: SlotRecord, fd: int, held: AsyncExitStack) -> HeldSlot:
        """Take a place whose lock we hold, and of whose files nothing is known yet."""
        contents = SlotContents(record, TreeSnapshot.unknown(place.tree))
        reader = None if self._detects_all_changes else reset.slot_git(self._git, place, self._care.sparse)
        checkout = self._held_slots[place.number] = HeldSlot(place, contents, fd, self._walker, reader, held)
        return checkout

    async def _close(self) -> None:
        """Write down what is clean, throw away what is nobody's, and give all locks back."""
        with anyio.CancelScope(shield=True):
            is_thrown = False
            for number, checkout in self._held_slots.items():
                with suppress(OSError, GitError):  # nobody will know of it, and the next one throws it away
                    if number in self._idle and number not in self._unseen:
                        contents = checkout.contents
                        await anyio.to_thread.run_sync(write_record, checkout.place, contents.record, contents.snapshot)
                    elif await self._is_abandoned(checkout.place):
                        await self._throw_away(checkout.place)
                        is_thrown = True
                await checkout.release()
            if is_thrown:
                await self._sweep()

    async def _is_abandoned(self, place: WorktreeSlot) -> bool:
        """Whether a place is of a session whose folder is gone: another process may have seen to that."""
        judged = await anyio.to_thread.run_sync(assess_slot, place)
        return judged is not None and judged[0] is LeftoverStatus.LEFT_OVER

    # Handing out.

    async def _next(self, commit: str, tree: Path | None) -> HeldSlot:
        self._waiting += 1
        try:
            while True:
                changed = self._changed
                if (checkout := await self._take_idle(commit, tree)) is not None:
                    return checkout
                if self._failures:
                    raise self._failures.pop()
                self._make_more()
                with anyio.move_on_after(_PAUSE):
                    await changed.wait()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._failures.clear()  # of what nobody wants any more
            self._announce()

    async def _take_idle(self, commit: str, tree: Path | None) -> HeldSlot | None:
        """Return the clean place with that tree, or else the one nearest to a commit, if there is one that can go."""
        async with self._choosing:
            if tree is not None and any(self._held_slots[number].place.tree == tree for number in self._cleaning):
                return None
            idle = self._ready()
            sources = self._plain(commit)
            # What is being copied is going to be idle again.
            is_short = self._is_making and not self._is_copying and self._waiting > len(idle)
            idle.sort(key=lambda one: (one.place.tree != tree, _distance(one.contents.record, commit)))
            for checkout in idle:
                if not (is_short and sources == [checkout]) and await self._verify_idle(checkout):
                    self._idle.discard(checkout.place.number)
                    return checkout
            return None

    async def _verify_idle(self, checkout: HeldSlot) -> bool:
        """Whether an idle place is what it is said to be; otherwise it is thrown away."""
        number, place = checkout.place.number, checkout.place
        if number not in self._unseen:
            return True
        stamps = await anyio.to_thread.run_sync(read_snapshot, place)
        if stamps is not None and await _compare(self._walker, stamps) == _UNTOUCHED:
            checkout.contents = replace(checkout.contents, snapshot=stamps)
            self._unseen.discard(number)
            return True
        with anyio.CancelScope(shield=True):
            await self.discard(checkout)
        return False

    async def _fit(self, checkout: HeldSlot, commit: str, session: Path, adapter: str) -> bool:
        """Make a place that of a session, and bring it to a commit; False if it can't be had there."""
        place, git = checkout.place, self._admin(checkout)
        await anyio.to_thread.run_sync(assign_slot, place, session, checkout.contents.record)
        contents = await reset.remove_kept_of_others(place, checkout.contents, adapter)
        contents = contents and await reset.move_slot(git, place, contents, commit)
        if contents is None:
            return False
        checkout.contents = contents
        before = checkout.contents.record
        await self._furnish(checkout, commit)
        if checkout.contents.record != before:
            await anyio.to_thread.run_sync(assign_slot, place, session, checkout.contents.record)
        return True

    async def _furnish(self, checkout: HeldSlot, commit: str) -> None:
        """Set a place up."""
        if self._care.set_up is None:
            return
        place, before, git = checkout.place, checkout.contents.record, self._admin(checkout)
        setup = await self._care.set_up(checkout, commit)
        if setup == before.setup:
            return
        await reset.restore_files(git, place)
        files, top, unignored = await reset.list_untracked(git, place)
        wanted = [path for path in top if self._care.keep.adapter_of(path) is not None]
        # What setup makes is for all, whoever keeps it.
        kept = dict.fromkeys(await reset.list_ignored(git, place, wanted), "")
        stamps = await anyio.to_thread.run_sync(TreeSnapshot.take, place.tree, kept) or TreeSnapshot.unknown(place.tree)
        extras = tuple(path for path in files if stamps.has(path))
        record = replace(before, setup=setup, setup_at=commit, extras=extras, unignored=tuple(unignored), kept=kept)
        checkout.contents = SlotContents(record, stamps)

    # Making.

    def _make_more(self) -> None:
        if not self._is_making:
            self._is_making = True
            self._group.start_soon(self._make)

    async def _make(self) -> None:
        try:
            while (checkout := await self._claim()) is not None:
                is_copy = await self._make_one(checkout)
                self._in_preparation += 1
                self._group.start_soon(self._finish, checkout, is_copy)
        except (GitError, OSError, RefusedError) as error:
            self._fail(error)
        finally:
            self._is_making = False

    async def _claim(self) -> HeldSlot | None:
        """Return a place that is yet to be made, if one more is wanted; no other process counts them meanwhile."""
        async with self._hub.lock("places").hold():
            return await self._new_slot(self._newest) if await self._is_more_wanted() else None

    async def _is_more_wanted(self) -> bool:
        is_short = self._waiting > len(self._ready()) + self._in_preparation or len(self._held_slots) < self._wanted
        return is_short and self._newest != "" and await self._has_room()

    async def _has_room(self) -> bool:
        """Whether one more place may be made; what is idle elsewhere makes room for it.

        RefusedError where not even one fits.
        """
        if self._limits.bytes is not None and any(pool._in_preparation for pool in self._pools):
            return False  # nobody knows yet how large that will be
        counted = await self._counted()
        for place in [place for place in counted if not any(place.number in pool._held_slots for pool in self._pools)]:
            if self._fits_in(counted):
                break
            if await self._make_room(place):
                del counted[place]
        while self._waiting and not self._fits_in(counted) and (spare := await self._give_up()) is not None:
            counted.pop(spare, None)
        if not counted and not self._fits_in(counted):
            what = f"no worktree fits into {self._limits.bytes} bytes"
            raise RefusedError(what, "raise `worktrees.max_size`, or see `council clean --kept`")
        # A session may wait for a check with its own place in use: without one for checks it would wait for ever.
        is_first_check = self._care.is_check and self._waiting > 0 and not self._held_slots
        return is_first_check or self._fits_in(counted)

    async def _give_up(self) -> WorktreeSlot | None:
        """Discard the idle place that was not used for the longest time, of those that nobody waits for; return it."""
        for pool in sorted(self._pools, key=lambda one: one is not self):
            async with pool._choosing:
                is_spare = pool is not self and len(pool._ready()) > pool._waiting
                spare = [pool._held_slots[number] for number in pool._idle if is_spare or not pool._is_set_up(number)]
                if not spare:
                    continue
                found = min(spare, key=lambda one: one.contents.record.used)
                pool._idle.discard(found.place.number)
            await pool.discard(found)
            return found.place
        return None

    async def _make_room(self, place: WorktreeSlot) -> bool:
        """Throw away a place of another process if that has no use for it; whether it does not count any more."""
        with suppress(LockHeld):
            async with place.lock.hold(0):
                # It may be that of a session that stays by now.
                if await anyio.to_thread.run_sync(assess_slot, place) is not None:
                    await self._throw_away(place)
            return True
        return False

    async def _counted(self) -> dict[WorktreeSlot, int]:
        """Return what each place takes on disk, but for those that stay with a session whose run is not at work."""
        counted: dict[WorktreeSlot, int] = {}
        for place in await anyio.to_thread.run_sync(list_slots, self._hub):
            ours = [pool._held_slots[place.number] for pool in self._pools if place.number in pool._held_slots]
            if ours:
                counted[place] = ours[0].contents.record.bytes
                continue
            if await anyio.to_thread.run_sync(assess_slot, place) or await place.lock.is_held():
                record = await anyio.to_thread.run_sync(read_record, place)
                counted[place] = 0 if record is None else record.bytes
        return counted

    def _fits_in(self, counted: Mapping[WorktreeSlot, int]) -> bool:
        """Whether one more fits, which is expected to be as large as the largest."""
        sizes = counted.values()
        fits = self._limits.bytes is None or sum(sizes) + max(sizes, default=0) <= self._limits.bytes
        return fits and len(counted) < self._limits.places

    async def _make_one(self, checkout: HeldSlot) -> bool:
        """Make a place, by copying if that can be; return whether it is a copy, which is yet to be looked over.

        Another one is looked over here: until then there is nothing to be copied.
        """
        commit = checkout.contents.record.commit
        async with self._choosing:
            source = await self._find_verified(self._plain(commit))
            if source is not None:
                self._idle.discard(source.place.number)
                self._is_copying = True
        try:
            git, place = self._admin(checkout), checkout.place
            if source is None:
                await reset.check_out_slot(git, place, commit, self._care.sparse)
                await self._index_new_slot(checkout)
            else:
                await reset.copy_slot(git, source.place, place, self._care.sparse)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.discard(checkout)
            raise
        finally:
            self._is_copying = False
            if source is not None:
                self._idle.add(source.place.number)
        return source is not None

    async def _index_new_slot(self, checkout: HeldSlot) -> None:
        stamps = await reset.index_slot(self._admin(checkout), checkout.place, self._walker)
        record = replace(checkout.contents.record, bytes=await self._size_of(checkout))
        checkout.contents = SlotContents(record, stamps or checkout.contents.snapshot)

    async def _find_verified(self, checkouts: Sequence[HeldSlot]) -> HeldSlot | None:
        for checkout in checkouts:
            if await self._verify_idle(checkout):
                return checkout
        return None

    def _plain(self, commit: str) -> list[HeldSlot]:
        """Return the idle places that hold the files of a commit and nothing else."""
        return [self._held_slots[one] for one in self._idle if _is_plain(self._held_slots[one].contents.record, commit)]

    async def _new_slot(self, commit: str) -> HeldSlot:
        """Return a place that is not there yet; as long as nothing is known of its files, it can be used once."""
        for number in count(1):
            place = WorktreeSlot(self._hub, number)
            if number in self._held_slots or await anyio.Path(place.root).exists():
                continue
            async with AsyncExitStack() as stack:
                with suppress(LockHeld):
                    lock = await stack.enter_async_context(place.lock.hold(0))
                    if not await anyio.Path(place.root).exists():
                        await anyio.Path(place.root).mkdir(mode=0o700)
                        record = SlotRecord(commit, sparse=self._care.sparse, is_check=self._care.is_check)
                        return self._own(place, record, lock.fd, stack.pop_all())
        raise AssertionError("numbers do not end")

    async def _finish(self, checkout: HeldSlot, is_copy: bool) -> None:
        """Set a new place up, and have it be anybody's; it goes if the pool is closed meanwhile."""
        is_ready, commit = False, checkout.contents.record.commit
        with anyio.CancelScope() as setup:
            self._setups.add(setup)
            try:
                if is_copy:
                    await self._index_new_slot(checkout)
                await self._furnish(checkout, commit)
                is_ready = True
            except (GitError, OSError, SetupError) as error:
                # A check must not fail for what was wrong with the commit of another.
                if not self._care.is_check or commit == self._newest:
                    self._fail(error)
        self._setups.discard(setup)
        self._in_preparation -= 1
        await (self._mark_idle(checkout) if is_ready else self.discard(checkout))

    # Cleaning.

    async def _clean(self, checkout: HeldSlot, found: TreeDiff | None) -> None:
        contents = None
        self._in_preparation += 1
        try:
            with suppress(GitError, OSError):
                if found is not None and (self._detects_all_changes or not checkout.contents.record.extras):
                    git = self._admin(checkout)
                    contents = await reset.clean_slot(git, checkout.place, checkout.contents, found, self._care.keep)
            if contents is not None:
                checkout.contents = contents
                await self._mark_idle(checkout)
        finally:
            self._in_preparation -= 1
        if contents is None:
            await self.discard(checkout)
            self._make_more()
            return
        await self._sweep()

    async def _mark_idle(self, checkout: HeldSlot) -> None:
        """Have a clean place be the next one's, unless the caches in it have made all of them together too large."""
        size = await self._size_of(checkout)
        record = replace(checkout.contents.record, bytes=size, used=self._clock.now())
        checkout.contents = replace(checkout.contents, record=record)
        failpoint("slot.clean")
        sizes = [one.contents.record.bytes for pool in self._pools for one in pool._held_slots.values()]
        if record.kept and self._limits.bytes is not None and sum(sizes) > self._limits.bytes:
            await self.discard(checkout)
            self._make_more()
            return
        self._cleaning.discard(checkout.place.number)
        self._idle.add(checkout.place.number)
        self._announce()

    async def _size_of(self, checkout: HeldSlot) -> int:
        """Return the bytes that a place takes on disk, if anybody wants to know."""
        if self._limits.bytes is None:
            return 0
        return await anyio.to_thread.run_sync(disk_usage, checkout.place.root)

    async def _throw_away(self, place: WorktreeSlot) -> None:
        if self._care.strip is not None:
            await self._care.strip(place)
        await anyio.to_thread.run_sync(move_to_trash, self._hub, place.root)

    async def _sweep(self) -> None:
        async with self._sweeping:
            with suppress(GitError):  # what can't be deleted is found by `council clean`
                await empty_trash(self._hub, self._git.environ, self._git.keep_fds)

    def _admin(self, checkout: HeldSlot) -> Git:
        git = replace(self._git, keep_fds=(*self._git.keep_fds, checkout.fd))
        return reset.slot_git(git, checkout.place, self._care.sparse)

    def _fail(self, error: Exception) -> None:
        """Have one of those that wait hear of it."""
        if self._waiting:
            self._failures.append(error)

    def _announce(self) -> None:
        for pool in self._pools:
            pool._changed.set()
            pool._changed = anyio.Event()


async def _compare(walker: FileScanner, stamps: TreeSnapshot) -> TreeDiff | None:
    return await walker.run(stamps.compare, stamps.count_files())


def _slots_by_last_use(hub: Hub) -> list[WorktreeSlot]:
    """Return all places of a hub, those first that were cleaned last. Blocks."""
    records = {place: read_record(place) for place in list_slots(hub)}
    return sorted(records, key=lambda place: 0.0 if (one := records[place]) is None else -one.used)


def _is_plain(record: SlotRecord, commit: str) -> bool:
    """Whether a place holds the files of a commit and nothing else."""
    return record.commit == commit and not record.extras and not record.kept


def _distance(record: SlotRecord, commit: str) -> tuple[bool, float]:
    """Return by what places are ordered: first those that need not move, and of them what was used last."""
    return record.commit != commit, -record.used
