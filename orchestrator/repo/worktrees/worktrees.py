"""A worktree for each attempt: a checkout that it has for a time, and a git directory that belongs to it alone.

Not `git worktree add`: linked worktrees share configuration, hooks, refs and stash, so that one agent's
change reaches all others and us, and adding them is neither safe side by side nor when killed (an empty
`commondir` breaks the whole repository). Here nothing is shared but the hub's objects, which are borrowed;
creating one races with nothing, and a half-built one is a folder to delete. The checkout is that of a place
(`repo.worktrees.slots`), which the link `place` in the session's folder names.
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

# Looking at what runs left must be quick, and needs no pool.
if TYPE_CHECKING:
    from orchestrator.repo.worktrees.pool import HeldSlot

#: Seconds to wait for git commands of others that may own a lock; those that take longer keep it.
_OTHERS_LIMIT = 1.0
#: How the folder of a check's worktree ends, perhaps with `-` and a process; no task's attempt is named so.
_CHECK = ".check"
_NAME = re.compile(r"(?P<task>.+)\.(?P<attempt>[0-9]+)(?P<check>\.check(-(?P<by>[0-9a-f]+))?)?")


@dataclass(frozen=True, slots=True)
class Worktree:
    """The places of one attempt, or, with `is_check`, of the checks of what it built."""

    hub: Hub
    run: str
    task: str
    attempt: int
    is_check: bool = False
    by: str = ""
    """The process, where several may check the same at a time; only for checks."""
    held: WorktreeSlot | None = field(default=None, compare=False)
    """The place that it was handed, where it is known to have that still."""

    @property
    def name(self) -> str:
        """What tells it from the others of its run."""
        check = f"{_CHECK}{self.by and f'-{self.by}'}"
        return f"{self.task}.{self.attempt}{check if self.is_check else ''}"

    @property
    def root(self) -> Path:
        """The folder that holds all of the session's files."""
        return self.hub.sessions / self.run / self.name

    @property
    def place(self) -> WorktreeSlot | None:
        """The place that it has; None before and after that, also where another has it. May look at the disk."""
        if self.held is not None:
            return self.held
        place = read_session_slot(self.hub, self.root)
        return place if place is not None and read_slot_session(place) == self.root else None

    @property
    def tree(self) -> Path:
        """The checkout that the CLI works in; one that is not there, without a place. May look at the disk."""
        place = self.place
        return self.root / "tree" if place is None else place.tree

    @property
    def git_dir(self) -> Path:
        """The session's own git directory. The agent writes it: never run git in it."""
        return self.root / "git"

    @property
    def scratch(self) -> Path:
        """A place for temporary files of the session's own."""
        return self.root / "tmp"

    @property
    def prompt_file(self) -> Path:
        """The prompt, readable by the owner alone."""
        return self.root / "prompt.md"

    @property
    def handoff_file(self) -> Path:
        """Where the session may write what it hands over, in a folder that it writes: never follow a link there."""
        return self.root / "handoff" / "handoff.json"

    @property
    def marker(self) -> bytes:
        """What every process of the session has in its environment, unless it cleared that."""
        return b"COUNCIL_PROMPT_FILE=" + os.fsencode(self.prompt_file)

    @property
    def socket_folder(self) -> Path:
        """The folder with the socket by which the session asks its orchestrator."""
        return self.root / SOCKET_FOLDER

    @property
    def lock(self) -> Path:
        """Held by the session's supervisor until nothing of the session lives."""
        return self.root / "lock"

    @property
    def index(self) -> Path:
        """Our own index of the checkout, out of the agent's sight."""
        return self.index_folder / "index"

    @property
    def index_folder(self) -> Path:
        """The folder of our index, all of which a git command on the checkout may write."""
        return self.hub.indexes / f"{self.run}-{self.name}"

    @property
    def import_folder(self) -> Path:
        """Where the agent's own commits are checked before they come in."""
        return self.index_folder / "import"

    @property
    def branch(self) -> str:
        """The branch that the session is on, and the one that keeps its work in the trusted repository."""
        return work_branch_name(self.run, self.task, "check" if self.is_check else str(self.attempt))

    @property
    def env(self) -> dict[str, str]:
        """What points a command of ours, run in the trusted repository, at this checkout."""
        return {"GIT_WORK_TREE": str(self.tree), "GIT_INDEX_FILE": str(self.index)}


async def create_worktree(worktree: Worktree, checkout: HeldSlot, prompt: str) -> Worktree:
    """Make a session's folder around the place that it was handed; return the worktree with that."""
    await anyio.to_thread.run_sync(_lay_out, worktree, checkout, prompt)
    failpoint("worktree.created")
    return replace(worktree, held=checkout.place)


def _lay_out(worktree: Worktree, checkout: HeldSlot, prompt: str) -> None:
    place, record = checkout.place, checkout.contents.record
    make_root(worktree.root)
    (worktree.root / "place").symlink_to(place.root)
    failpoint("worktree.partly_made")
    shutil.copytree(worktree.hub.seed, worktree.git_dir)
    (worktree.git_dir / "HEAD").write_text(f"ref: refs/heads/{worktree.branch}\n")
    ref = worktree.git_dir / "refs" / "heads" / worktree.branch
    ref.parent.mkdir(parents=True)
    ref.write_text(f"{record.commit}\n")
    if record.sparse:
        _make_sparse(worktree, place)
    worktree.scratch.mkdir(mode=0o700)
    worktree.handoff_file.parent.mkdir(mode=0o700)
    untrusted_files.write_file(place.tree, ".git", os.fsencode(f"gitdir: {worktree.git_dir}\n"), 0o644)
    descriptor = os.open(worktree.prompt_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
        file.write(prompt)
    shutil.copyfile(place.index, worktree.git_dir / "index")
    # Under the name of git's own lock, which is removed wherever an index is given up: where it is, all is there.
    worktree.index_folder.mkdir(mode=0o700, exist_ok=True)
    staged = worktree.index.with_name("index.lock")
    shutil.copyfile(place.index, staged)
    staged.rename(worktree.index)


def make_root(root: Path) -> None:
    """Make a session's folder. The one that it is in goes with the last session in it, at any moment."""
    is_made = False
    while not is_made:
        with suppress(FileExistsError):  # also where it was there, and has gone since
            root.parent.mkdir(mode=0o700, parents=True)
        with suppress(FileNotFoundError):
            root.mkdir(mode=0o700)
            is_made = True


def _make_sparse(worktree: Worktree, place: WorktreeSlot) -> None:
    """Have the session's git know what of the commit is not checked out."""
    info = worktree.git_dir / "info"
    info.mkdir(exist_ok=True)
    shutil.copyfile(place.git_dir / "info" / "sparse-checkout", info / "sparse-checkout")
    with (worktree.git_dir / "config").open("a") as config:
        config.write("[core]\n\tsparseCheckout = true\n\tsparseCheckoutCone = true\n")


async def remove_session_folder(worktree: Worktree) -> None:
    """Take a session's folder away whose work is saved; its place is the caller's, the folder waits for deletion."""
    await anyio.to_thread.run_sync(_leave, worktree)
    failpoint("worktree.removed")


def _leave(worktree: Worktree) -> list[Path]:
    # Its folder goes last: as long as it is there, a recovery knows that there is something to remove.
    _remove_index(worktree)
    thrown = move_to_trash(worktree.hub, worktree.root)
    remove_if_empty(worktree.root.parent)
    return thrown


async def remove_worktree(worktree: Worktree) -> list[Path]:
    """Take a session away with its place, whatever state they are in; the caller has saved what counts.

    Return what waits for its deletion now.
    """
    thrown = await anyio.to_thread.run_sync(_remove, worktree)
    failpoint("worktree.removed")
    return thrown


def _remove(worktree: Worktree) -> list[Path]:
    place = worktree.place
    # In this order: its place may be another's as soon as it is gone.
    thrown = _leave(worktree)
    return [*thrown, *(move_to_trash(worktree.hub, place.root) if place is not None else [])]


def unlock_index(worktree: Worktree) -> bool:
    """Remove the index lock of a killed git command; the caller has proof that none of ours lives.

    Returns whether the checkout was ever finished: git writes the index after the files.
    """
    worktree.index.with_name("index.lock").unlink(missing_ok=True)
    return worktree.index.exists()


def _remove_index(worktree: Worktree) -> None:
    shutil.rmtree(worktree.index_folder, ignore_errors=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that has nothing in it; otherwise do nothing. Blocks."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
            raise


def list_worktrees(hub: Hub, run_id: str, tasks: Collection[str] | None) -> list[Worktree]:
    """Return the worktrees that exist for a run's tasks, in whatever state, those of a task in order of its attempts.

    What is none of ours is passed over.

    `tasks` is None for a run of which nothing is known.
    """
    folder = hub.sessions / run_id
    is_ours = folder.is_dir() and folder.resolve().is_relative_to(hub.root.resolve())  # else a link leads elsewhere
    names = _names_in(folder) if is_ours else []
    found = [one for name in names if (one := _parse_name(hub, run_id, name, tasks)) is not None]
    return sorted(found, key=lambda one: (one.task, one.attempt, one.is_check))


def _names_in(folder: Path) -> list[str]:
    """Return the names in a folder; none where another process has just removed it, as its last session left."""
    with suppress(FileNotFoundError):
        return [path.name for path in folder.iterdir()]
    return []


def _parse_name(hub: Hub, run_id: str, name: str, tasks: Collection[str] | None) -> Worktree | None:
    found = _NAME.fullmatch(name)
    if found is None or (tasks is not None and found["task"] not in tasks):
        return None
    is_check, by = found["check"] is not None, found["by"] or ""
    return Worktree(hub, run_id, found["task"], int(found["attempt"]), is_check=is_check, by=by)


async def remove_stale_files(hub: Hub, run_id: str, *, is_alone: bool) -> None:
    """Remove locks and half-written objects that killed git commands left in the trusted repository and our indexes.

    With `is_alone` the caller holds the run's lock, which each of the run's commands holds until it has ended, and
    nobody else works in the run: then locks of the run are nobody's. Others go if no living command can own them.
    """
    await anyio.to_thread.run_sync(partial(_remove_stale_files, hub, run_id, is_alone=is_alone))


def _remove_stale_files(hub: Hub, run_id: str, *, is_alone: bool) -> None:
    found = list_lock_files(hub)
    for lock in found if is_alone else []:
        if any(part.startswith(run_id) for part in lock.path.relative_to(hub.root).parts):
            lock.path.unlink(missing_ok=True)
    remove_unowned([*found, *list_partial_objects(hub.trusted)], _OTHERS_LIMIT)


def list_lock_files(hub: Hub) -> list[GitTempFile]:
    """Return the lock files of git commands in our own repository, whether those live or not. Blocks."""
    indexes = [path.with_suffix("") for path in hub.indexes.glob("*/index.lock")]
    return [*list_locks(hub.trusted), *(lock for index in indexes for lock in list_index_locks(index))]
