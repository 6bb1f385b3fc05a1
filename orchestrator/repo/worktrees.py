"""A worktree for each attempt: a checkout, and a git directory that belongs to this session alone.

Not `git worktree add`: linked worktrees share configuration, hooks, refs and stash, so that one agent's
change reaches all others and us, and adding them is neither safe side by side nor when killed (an empty
`commondir` breaks the whole repository). Here nothing is shared but the hub's objects, which are borrowed;
creating one races with nothing, and a half-built one is a folder to delete.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.failpoints import failpoint
from orchestrator.repo.git import Git
from orchestrator.repo.hub import Hub, work_branch
from orchestrator.repo.removal import remove_all

#: How the folder of a check's worktree ends; no task's attempt is named so, because attempts end in a number.
_CHECK = ".check"


@dataclass(frozen=True, slots=True)
class Worktree:
    """The places of one attempt, or, with `is_check`, of the checks of what it built."""

    hub: Hub
    run: str
    task: str
    attempt: int
    is_check: bool = False

    @property
    def name(self) -> str:
        """What tells it from the others of its run."""
        return f"{self.task}.{self.attempt}{_CHECK if self.is_check else ''}"

    @property
    def root(self) -> Path:
        """The folder that holds all of the session's files."""
        return self.hub.sessions / self.run / self.name

    @property
    def tree(self) -> Path:
        """The checkout that the CLI works in."""
        return self.root / "tree"

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
    def marker(self) -> bytes:
        """What every process of the session has in its environment, unless it cleared that."""
        return b"COUNCIL_PROMPT_FILE=" + os.fsencode(self.prompt_file)

    @property
    def lock(self) -> Path:
        """Held by the session's supervisor until nothing of the session lives."""
        return self.root / "lock"

    @property
    def index(self) -> Path:
        """Our own index of the checkout, out of the agent's sight."""
        return self.hub.trusted / "indexes" / f"{self.run}-{self.name}"

    @property
    def import_folder(self) -> Path:
        """Where the agent's own commits are checked before they come in."""
        return self.index.with_name(f"{self.index.name}.import")

    @property
    def branch(self) -> str:
        """The branch that the session is on, and the one that keeps its work in the trusted repository."""
        return work_branch(self.run, self.task, "check" if self.is_check else str(self.attempt))

    @property
    def env(self) -> dict[str, str]:
        """What points a command of ours, run in the trusted repository, at this checkout."""
        return {"GIT_WORK_TREE": str(self.tree), "GIT_INDEX_FILE": str(self.index)}


CheckOut = Callable[[Git, Worktree, str], Awaitable[None]]


async def check_out(git: Git, worktree: Worktree, commit: str) -> None:
    """Write a commit's files into the worktree's folder, which is there, then our index of them."""
    await git("read-tree", "--reset", "-u", commit, env=worktree.env, cwd=worktree.tree)


async def create(git: Git, worktree: Worktree, start: str, prompt: str, check_out: CheckOut = check_out) -> None:
    """Check out `start` (a commit id) for a session; `git` runs in the trusted repository."""
    await anyio.to_thread.run_sync(_lay_out, worktree, start, prompt)
    failpoint("worktree.half_built")
    await check_out(git, worktree, start)
    await anyio.to_thread.run_sync(shutil.copyfile, worktree.index, worktree.git_dir / "index")
    failpoint("worktree.created")


def _lay_out(worktree: Worktree, start: str, prompt: str) -> None:
    worktree.root.mkdir(mode=0o700, parents=True)
    shutil.copytree(worktree.hub.seed, worktree.git_dir)
    (worktree.git_dir / "HEAD").write_text(f"ref: refs/heads/{worktree.branch}\n")
    ref = worktree.git_dir / "refs" / "heads" / worktree.branch
    ref.parent.mkdir(parents=True)
    ref.write_text(f"{start}\n")
    worktree.tree.mkdir()
    worktree.scratch.mkdir(mode=0o700)
    (worktree.tree / ".git").write_text(f"gitdir: {worktree.git_dir}\n")
    descriptor = os.open(worktree.prompt_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
        file.write(prompt)


async def remove(git: Git, worktree: Worktree) -> None:
    """Delete all of the session's files, whatever state they are in; the caller has saved what counts."""
    # Its folder goes last: as long as it is there, a recovery knows that there is something to remove.
    await anyio.to_thread.run_sync(_forget, worktree)
    await remove_all(worktree.root, git.environ, git.keep_fds)
    await anyio.to_thread.run_sync(remove_if_empty, worktree.root.parent)
    failpoint("worktree.removed")


def unlock(worktree: Worktree) -> bool:
    """Remove the index lock of a killed git command; the caller has proof that none of ours lives.

    Returns whether the checkout was ever finished: git writes the index after the files.
    """
    worktree.index.with_name(f"{worktree.index.name}.lock").unlink(missing_ok=True)
    return worktree.index.exists()


def _forget(worktree: Worktree) -> None:
    unlock(worktree)
    worktree.index.unlink(missing_ok=True)
    shutil.rmtree(worktree.import_folder, ignore_errors=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that has nothing in it; otherwise do nothing. Blocks."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
            raise


def left_over(hub: Hub, run_id: str, tasks: Collection[str] | None) -> list[Worktree]:
    """Return the worktrees that exist for a run's tasks, in whatever state; what is none of ours is passed over.

    `tasks` is None for a run of which nothing is known.
    """
    folder = hub.sessions / run_id
    is_ours = folder.is_dir() and folder.resolve().is_relative_to(hub.root.resolve())  # else a link leads elsewhere
    names = sorted(path.name for path in folder.iterdir()) if is_ours else []
    return [found for name in names if (found := _named(hub, run_id, name, tasks)) is not None]


def _named(hub: Hub, run_id: str, name: str, tasks: Collection[str] | None) -> Worktree | None:
    task, _, number = name.removesuffix(_CHECK).rpartition(".")
    if not task or (tasks is not None and task not in tasks) or not number.isdecimal():
        return None
    return Worktree(hub, run_id, task, int(number), is_check=name.endswith(_CHECK))


async def remove_stale_locks(hub: Hub, run_id: str) -> None:
    """Remove the locks that killed git commands left in the trusted repository.

    The caller holds the run's lock, which each of the run's commands holds until it has ended. Locks that belong
    to no run in particular go only while no command of any run is at work.
    """
    await anyio.to_thread.run_sync(_remove_stale_locks, hub.trusted, run_id)


def _remove_stale_locks(trusted: Path, run_id: str) -> None:
    found = lock_files(trusted)
    ours = [path for path in found if any(part.startswith(run_id) for part in path.relative_to(trusted).parts)]
    for lock in found if not git_runs_for(trusted) else ours:
        lock.unlink(missing_ok=True)


def lock_files(trusted: Path) -> list[Path]:
    """Return the lock files of git commands in the trusted repository, whether those live or not. Blocks."""
    return [path for path in trusted.rglob("*.lock") if path.is_file()]


def git_runs_for(trusted: Path) -> bool:
    """Whether a process has the trusted repository as its GIT_DIR; without /proc that can't be ruled out. Blocks."""
    wanted = f"GIT_DIR={trusted}".encode()
    processes = list(Path("/proc").glob("[0-9]*/environ"))
    for environ in processes:
        try:
            if wanted in environ.read_bytes().split(b"\0"):
                return True
        except OSError:  # it has ended, or is not ours
            continue
    return not processes
