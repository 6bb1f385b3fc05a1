"""Change the files of held slots: check out, set up, clean, compare and remove."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.errors import GitError
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees import reset
from orchestrator.repo.worktrees.files.change_detection import TreeDiff, TreeSnapshot
from orchestrator.repo.worktrees.files.file_trees import disk_usage
from orchestrator.repo.worktrees.files.scan_process import FileScanner
from orchestrator.repo.worktrees.files.write_watch import WriteWatch
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.reset import KeepRules, SlotContents
from orchestrator.repo.worktrees.slots import WorktreeSlot, assign_slot, empty_trash, move_to_trash, read_snapshot

_UNTOUCHED = TreeDiff(touched_folders=["/"])


class SetupError(Exception):
    """No slot can be set up as configured. The message has the reason and a remedy."""


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """How unused slots are checked out, set up and torn down."""

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


class SlotState(Enum):
    """The current use of a held slot."""

    NEW = auto()
    """Being created and set up."""
    IDLE = auto()
    """Clean and unassigned."""
    SOURCE = auto()
    """Being copied; idle again afterwards."""
    TAKEN = auto()
    """Assigned, or about to be removed."""
    CLEANING = auto()
    """Released; idle once it is clean."""


@dataclass(slots=True)
class HeldSlot:
    """A slot whose lock this process holds, with its contents at assignment."""

    slot: WorktreeSlot
    contents: SlotContents
    fd: int
    """The slot's lock, held by every process that writes to the slot until that process exits."""
    scanner: FileScanner
    detects_all: bool
    """Whether timestamps reveal every change; if not, a watch reports the rest."""
    state: SlotState
    is_verified: bool
    """Whether the contents are known. If not, the slot comes from another process and must match its snapshot."""
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
        """Return the changes since assignment, or None if unknown; no process may write."""
        snapshot = self.contents.snapshot
        diff = await _compare(self.scanner, snapshot)
        if diff is None or self.detects_all:
            return diff
        written = None if self._watch is None else self._watch.read_written()
        if written is None:
            return None
        unreported = written.difference(diff.changed, diff.removed)
        return replace(diff, changed=[*diff.changed, *filter(snapshot.has, sorted(unreported))])

    async def unlock(self) -> None:
        """Release the slot's lock."""
        self.end_watch()
        await self._lock_stack.aclose()


class Checkouts:
    """Changes the files of a pool's slots, which the caller must hold.

    `git` is the trusted repository's.
    """

    def __init__(self, git: Git, hub: Hub, options: SlotOptions, scanner: FileScanner, *, has_size_limit: bool) -> None:
        self.hub, self.options, self.scanner = hub, options, scanner
        self._git, self._has_size_limit = git, has_size_limit
        self._trash_lock = anyio.Lock()

    def git(self, held: HeldSlot) -> Git:
        """Return git for a slot's checkout."""
        git = replace(self._git, keep_fds=(*self._git.keep_fds, held.fd))
        return reset.slot_git(git, held.slot, self.options.sparse)

    async def fill(self, held: HeldSlot, source: WorktreeSlot | None) -> None:
        """Write a new slot's files, or copy them from `source`. Call `index` afterwards."""
        git, slot, sparse = self.git(held), held.slot, self.options.sparse
        if source is None:
            await reset.check_out_slot(git, slot, held.contents.record.commit, sparse)
        else:
            await reset.copy_slot(git, source, slot, sparse)

    async def index(self, held: HeldSlot) -> None:
        """Refresh the index of a filled slot, and record its size and files."""
        snapshot = await reset.index_slot(self.git(held), held.slot, self.scanner)
        record = replace(held.contents.record, bytes=await self.measure(held))
        held.contents = SlotContents(record, snapshot or held.contents.snapshot)

    async def verify(self, held: HeldSlot) -> bool:
        """Return whether a slot matches the snapshot of the process that used it before."""
        snapshot = await anyio.to_thread.run_sync(read_snapshot, held.slot)
        if snapshot is None or await _compare(self.scanner, snapshot) != _UNTOUCHED:
            return False
        held.contents, held.is_verified = replace(held.contents, snapshot=snapshot), True
        return True

    async def prepare(self, held: HeldSlot, commit: str, session: Path, adapter: str) -> bool:
        """Assign a slot to a session and move it to a commit; return False if impossible."""
        slot = held.slot
        await anyio.to_thread.run_sync(assign_slot, slot, session, held.contents.record)
        contents = await reset.remove_kept_of_others(slot, held.contents, adapter)
        contents = contents and await reset.move_slot(self.git(held), slot, contents, commit)
        if contents is None:
            return False
        held.contents = contents
        await self.set_up(held, commit)
        if held.contents.record != contents.record:
            await anyio.to_thread.run_sync(assign_slot, slot, session, held.contents.record)
        if not held.detects_all:
            await anyio.to_thread.run_sync(held.watch)
        return True

    async def set_up(self, held: HeldSlot, commit: str) -> None:
        """Run setup in a slot, and record the files that it created."""
        if self.options.set_up is None:
            return
        slot, before, git = held.slot, held.contents.record, self.git(held)
        setup = await self.options.set_up(held, commit)
        if setup == before.setup:
            return
        await reset.restore_files(git, slot)
        files, top, unignored = await reset.list_untracked(git, slot)
        wanted = [path for path in top if self.options.keep.adapter_of(path) is not None]
        # Setup files are for sessions of all adapters.
        kept = dict.fromkeys(await reset.list_ignored(git, slot, wanted), "")
        snapshot = await anyio.to_thread.run_sync(TreeSnapshot.capture, slot.tree, kept) or TreeSnapshot.unknown(
            slot.tree
        )
        extras = tuple(path for path in files if snapshot.has(path))
        record = replace(before, setup=setup, setup_at=commit, extras=extras, unignored=tuple(unignored), kept=kept)
        held.contents = SlotContents(record, snapshot)

    async def clean(self, held: HeldSlot, diff: TreeDiff | None) -> bool:
        """Undo a session's changes in its slot; return False if impossible or unknown."""
        held.end_watch()
        contents = None
        if diff is not None:
            with suppress(GitError, OSError):
                contents = await reset.clean_slot(self.git(held), held.slot, held.contents, diff, self.options.keep)
        held.contents = contents or held.contents
        return contents is not None

    async def measure(self, held: HeldSlot) -> int:
        """Return a slot's bytes on disk; 0 without a size limit."""
        return await anyio.to_thread.run_sync(disk_usage, held.slot.root) if self._has_size_limit else 0

    async def remove(self, slot: WorktreeSlot) -> None:
        """Tear down a slot and move it to the trash."""
        if self.options.tear_down is not None:
            await self.options.tear_down(slot)
        await anyio.to_thread.run_sync(move_to_trash, self.hub, slot.root)

    async def empty_trash(self) -> None:
        """Delete the removed slots."""
        async with self._trash_lock:
            with suppress(GitError):  # `council clean` removes the rest
                await empty_trash(self.hub, self._git.environ, self._git.keep_fds)


async def _compare(scanner: FileScanner, snapshot: TreeSnapshot) -> TreeDiff | None:
    return await scanner.run(snapshot.compare, snapshot.count_files())
