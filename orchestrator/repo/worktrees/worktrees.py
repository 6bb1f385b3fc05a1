"""The worktree of an attempt: a slot's checkout and a separate git directory.

`git worktree add` is not used: linked worktrees share configuration, hooks, refs and stash, so one agent's change would
affect all other agents and us. Adding them is neither safe concurrently nor when killed (an empty `commondir` breaks
the whole repository). Here, sessions share only the hub's objects, which they borrow. Creating a worktree races with
nothing, and a partly created one can simply be deleted. The checkout belongs to a worktree slot
(`repo.worktrees.slots`), which the link `slot` in the session's folder points to.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from orchestrator.client.session import SOCKET_FOLDER
from orchestrator.repo.git.stale_files import (
    GitTempFile,
    list_index_locks,
    list_locks,
    list_partial_objects,
    remove_unowned,
)
from orchestrator.repo.worktrees.hub import Hub, work_branch_name
from orchestrator.repo.worktrees.slots import WorktreeSlot, move_to_trash, read_session_slot, read_slot_session
from orchestrator.system import untrusted_files
from orchestrator.system.failpoints import failpoint
from orchestrator.system.files import copy_folder, find_paths

# Listing leftovers must be fast and needs no pool.
if TYPE_CHECKING:
    from orchestrator.repo.worktrees.checkouts import HeldSlot

#: Seconds to wait for other git commands that may own a lock. A command that runs longer keeps its lock.
_OWNER_TIMEOUT = 1.0
#: Suffix of a check's folder, optionally followed by `-` and a process. No attempt's folder has it.
_CHECK = ".check"
_NAME = re.compile(r"(?P<task>.+)\.(?P<attempt>[0-9]+)(?P<check>\.check(-(?P<checker>[0-9a-f]+))?)?")


@dataclass(frozen=True, slots=True)
class Worktree:
    """The paths of an attempt or, with `is_check`, of the checks of its work."""

    hub: Hub
    run: str
    task: str
    attempt: int
    is_check: bool = False
    checker: str = ""
    """The checking process, if several may check the same attempt; only for checks."""
    held_slot: WorktreeSlot | None = field(default=None, compare=False)
    """The assigned slot, if known to be still assigned."""

    @property
    def name(self) -> str:
        """The worktree's unique name within its run."""
        check = f"{_CHECK}{self.checker and f'-{self.checker}'}"
        return f"{self.task}.{self.attempt}{check if self.is_check else ''}"

    @property
    def root(self) -> Path:
        """The folder with all files of the session."""
        return self.hub.sessions / self.run / self.name

    @property
    def slot(self) -> WorktreeSlot | None:
        """The attempt's slot, unless it now belongs to another session. May read the disk."""
        if self.held_slot is not None:
            return self.held_slot
        slot = read_session_slot(self.hub, self.root)
        return slot if slot is not None and read_slot_session(slot) == self.root else None

    @property
    def tree(self) -> Path:
        """The checkout, or a missing path without a slot. May read the disk."""
        slot = self.slot
        return self.root / "tree" if slot is None else slot.tree

    @property
    def git_dir(self) -> Path:
        """The session's own git directory: the agent writes it, so never run git in it."""
        return self.root / "git"

    @property
    def scratch(self) -> Path:
        """The folder for the session's temporary files."""
        return self.root / "tmp"

    @property
    def prompt_file(self) -> Path:
        """The prompt, readable only by the owner."""
        return self.root / "prompt.md"

    @property
    def handoff_file(self) -> Path:
        """The session's handoff file, in an agent-writable folder: never follow links."""
        return self.root / "handoff" / "handoff.json"

    @property
    def marker(self) -> bytes:
        """The environment entry of all the session's processes, unless they cleared it."""
        return b"COUNCIL_PROMPT_FILE=" + os.fsencode(self.prompt_file)

    @property
    def socket_folder(self) -> Path:
        """The folder of the session socket."""
        return self.root / SOCKET_FOLDER

    @property
    def message_file(self) -> Path:
        """A file that exists if there may be messages of the user for the session."""
        return self.socket_folder / "messages"

    @property
    def lock(self) -> Path:
        """Held by the session's supervisor until every process of the session has exited."""
        return self.root / "lock"

    @property
    def index(self) -> Path:
        """Our own index of the checkout, hidden from the agent."""
        return self.index_folder / "index"

    @property
    def index_folder(self) -> Path:
        """The folder of our index, writable for git commands on the checkout."""
        return self.hub.indexes / f"{self.run}-{self.name}"

    @property
    def import_folder(self) -> Path:
        """The folder in which the agent's commits are verified before import."""
        return self.index_folder / "import"

    @property
    def branch(self) -> str:
        """The session's branch, which also preserves its work in the trusted repository."""
        return work_branch_name(self.run, self.task, "check" if self.is_check else str(self.attempt))


async def create_worktree(worktree: Worktree, held: HeldSlot, prompt: str) -> Worktree:
    """Create a session's folder for its slot; return the worktree with that slot."""
    await anyio.to_thread.run_sync(_lay_out, worktree, held, prompt)
    failpoint("worktree.created")
    return replace(worktree, held_slot=held.slot)


def _lay_out(worktree: Worktree, held: HeldSlot, prompt: str) -> None:
    slot, record = held.slot, held.contents.record
    make_root(worktree.root)
    (worktree.root / "slot").symlink_to(slot.root)
    failpoint("worktree.partly_made")
    copy_folder(worktree.hub.session_template, worktree.git_dir)
    (worktree.git_dir / "HEAD").write_text(f"ref: refs/heads/{worktree.branch}\n")
    ref = worktree.git_dir / "refs" / "heads" / worktree.branch
    ref.parent.mkdir(parents=True)
    ref.write_text(f"{record.commit}\n")
    if record.sparse:
        copy_sparse_checkout(slot, worktree.git_dir)
    worktree.scratch.mkdir(mode=0o700)
    worktree.handoff_file.parent.mkdir(mode=0o700)
    untrusted_files.write_file(slot.tree, ".git", os.fsencode(f"gitdir: {worktree.git_dir}\n"), 0o644)
    descriptor = os.open(worktree.prompt_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
        file.write(prompt)
    shutil.copyfile(slot.index, worktree.git_dir / "index")
    # Written under the name of git's lock, which is removed with any abandoned index. The index marks completion.
    worktree.index_folder.mkdir(mode=0o700, exist_ok=True)
    staged = worktree.index.with_name("index.lock")
    shutil.copyfile(slot.index, staged)
    staged.rename(worktree.index)


def make_root(root: Path) -> None:
    """Create a session's folder, whose parent may be removed at any time."""
    is_made = False
    while not is_made:
        with suppress(FileExistsError):  # even if it existed and was just removed
            root.parent.mkdir(mode=0o700, parents=True)
        with suppress(FileNotFoundError):
            root.mkdir(mode=0o700)
            is_made = True


def copy_sparse_checkout(slot: WorktreeSlot, git_dir: Path) -> None:
    """Configure a git directory for a slot's sparse checkout. Blocks."""
    info = git_dir / "info"
    info.mkdir(exist_ok=True)
    shutil.copyfile(slot.git_dir / "info" / "sparse-checkout", info / "sparse-checkout")
    with (git_dir / "config").open("a") as config:
        config.write("[core]\n\tsparseCheckout = true\n\tsparseCheckoutCone = true\n")


async def remove_session_folder(worktree: Worktree) -> None:
    """Move a session's folder to the trash after its work is saved; keep the slot."""
    await anyio.to_thread.run_sync(_trash_session, worktree)
    failpoint("worktree.removed")


def _trash_session(worktree: Worktree) -> list[Path]:
    # Remove the session's folder last: while it exists, recovery knows that there is something to remove.
    _remove_index(worktree)
    trashed = move_to_trash(worktree.hub, worktree.root)
    remove_if_empty(worktree.root.parent)
    return trashed


async def remove_worktree(worktree: Worktree) -> list[Path]:
    """Remove a session and its slot in any state; return the paths in the trash.

    The caller must have saved its work.
    """
    trashed = await anyio.to_thread.run_sync(_remove, worktree)
    failpoint("worktree.removed")
    return trashed


def _remove(worktree: Worktree) -> list[Path]:
    slot = worktree.slot
    # In this order: once the session's folder is removed, the slot may be assigned to another session.
    trashed = _trash_session(worktree)
    return [*trashed, *(move_to_trash(worktree.hub, slot.root) if slot is not None else [])]


def unlock_index(worktree: Worktree) -> bool:
    """Remove the index lock of a killed git command; return whether an index exists.

    Git writes the index after the files, so the checkout was complete if it exists. None of our commands may be
    running.
    """
    worktree.index.with_name("index.lock").unlink(missing_ok=True)
    return worktree.index.exists()


def _remove_index(worktree: Worktree) -> None:
    shutil.rmtree(worktree.index_folder, ignore_errors=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty. Blocks."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
            raise


def list_worktrees(hub: Hub, run_id: str, tasks: Collection[str] | None) -> list[Worktree]:
    """Return the worktrees of a run's tasks, in any state, by task and attempt.

    Other folders are ignored. `tasks` is None for a run without records.
    """
    folder = hub.sessions / run_id
    is_ours = folder.is_dir() and folder.resolve().is_relative_to(hub.root.resolve())  # else a link leads elsewhere
    paths = find_paths(folder, "*") if is_ours else []
    parsed = (_parse_name(hub, run_id, path.name, tasks) for path in paths)
    worktrees = [worktree for worktree in parsed if worktree is not None]
    return sorted(worktrees, key=lambda worktree: (worktree.task, worktree.attempt, worktree.is_check))


def _parse_name(hub: Hub, run_id: str, name: str, tasks: Collection[str] | None) -> Worktree | None:
    match = _NAME.fullmatch(name)
    if match is None or (tasks is not None and match["task"] not in tasks):
        return None
    is_check, checker = match["check"] is not None, match["checker"] or ""
    return Worktree(hub, run_id, match["task"], int(match["attempt"]), is_check=is_check, checker=checker)


async def remove_stale_files(hub: Hub, run_id: str, *, is_alone: bool) -> None:
    """Remove the locks and partial objects that killed git commands left.

    Looks in the trusted repository and our indexes. With `is_alone`, the caller holds the run's lock, which each of the
    run's commands also holds until it exits, and no other process has joined the run; so no lock of the run has an
    owner. Other files are removed if no running command can own them.
    """
    await anyio.to_thread.run_sync(partial(_remove_stale_files, hub, run_id, is_alone=is_alone))


def _remove_stale_files(hub: Hub, run_id: str, *, is_alone: bool) -> None:
    locks = list_lock_files(hub)
    for lock in locks if is_alone else []:
        if any(part.startswith(run_id) for part in lock.path.relative_to(hub.root).parts):
            lock.path.unlink(missing_ok=True)
    remove_unowned([*locks, *list_partial_objects(hub.trusted)], _OWNER_TIMEOUT)


def list_lock_files(hub: Hub) -> list[GitTempFile]:
    """Return git's lock files in our repository, with or without an owner. Blocks."""
    indexes = [path.with_suffix("") for path in find_paths(hub.indexes, "*/index.lock")]
    return [*list_locks(hub.trusted), *(lock for index in indexes for lock in list_index_locks(index))]
