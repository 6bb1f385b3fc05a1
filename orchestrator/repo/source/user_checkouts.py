"""Find the user's checkouts of a branch, and what the user is doing in them."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.domain.wording import join_names
from orchestrator.errors import GitError, RefusedError, to_unusable_error
from orchestrator.project import Project
from orchestrator.repo.git.command import (
    Git,
    is_object_id,
    printable_name,
    split_nul,
)
from orchestrator.system.process_table import process_ids

#: The timestamp (seconds) in a reflog line.
_TIME_OF_MOVE: Final = re.compile(rb"> (\d+) [+-]\d{4}\t")
#: Longer than the content of our locks.
_MARK_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class LocalRepository:
    """A local repository: shared git directory and root of its checkout, if not bare."""

    git_dir: Path
    top: Path | None
    object_format: str

    @property
    def folder(self) -> Path:
        """The folder to run commands in, which `safe.directory` may have to list."""
        return self.top or self.git_dir

    @property
    def empty_tree(self) -> str:
        """The object ID of a tree without files, which git knows without storing it."""
        return hashlib.new(self.object_format, b"tree 0\0", usedforsecurity=False).hexdigest()


async def find_repository(path: Path, git: Git) -> LocalRepository:
    """Find the repository at or above a path. Raises RefusedError if git accepts none."""
    remedy = "set `repo` to the path or URL of a git repository that git accepts"

    async def ask(*options: str) -> list[str]:
        """Return the output lines of `git rev-parse`; the last may contain newlines."""
        done = await git("rev-parse", *options, cwd=path)
        printed = done.stdout.decode(errors="surrogateescape").rstrip("\n").split("\n", len(options) - 1)
        if len(printed) < len(options):
            raise GitError(["rev-parse", *options], 0, f"it printed {printed}")
        return printed

    try:
        bare, object_format, common = await ask("--is-bare-repository", "--show-object-format", "--git-common-dir")
        top = None if bare == "true" else Path(*await ask("--show-toplevel"))
    except GitError as error:
        raise to_unusable_error(error, str(path), remedy) from None
    if top is not None and not await anyio.Path(top, ".git").exists():
        raise RefusedError(f"`core.worktree` of {path} points to {top}, which has no .git", remedy)
    return LocalRepository(await anyio.to_thread.run_sync((path / common).resolve), top, object_format)


async def read_current_branch(folder: Path, git: Git) -> str | None:
    """Return the branch that is checked out in a folder, or None."""
    ref = await git("symbolic-ref", "--quiet", "--short", "HEAD", cwd=folder, ok=(0, 1, 128))
    return ref.stdout.decode(errors="surrogateescape").rstrip("\n") or None


async def find_checkout(repository: LocalRepository, branch: str, git: Git) -> Path | None:
    """Return the user's worktree that has a branch checked out, or None.

    It may be the main or a linked worktree. Raises RefusedError if a push can't update the checkout: the branch is
    checked out twice (`git worktree add --force`) and git would update only one, or the git directory is outside the
    checkout.
    """
    if not await anyio.to_thread.run_sync(_may_be_checked_out, repository.git_dir, branch):
        return None
    listed = await git("worktree", "list", "--porcelain", "-z", cwd=repository.folder)
    checkouts = []
    for entry in listed.stdout.decode(errors="surrogateescape").split("\0\0"):
        attributes = dict(line.partition(" ")[::2] for line in entry.split("\0"))
        if attributes.get("branch") == f"refs/heads/{branch}" and "bare" not in attributes:
            checkouts.append(Path(attributes["worktree"]))
    for checkout in checkouts[:1]:
        if not await anyio.Path(checkout).is_dir():
            message = f"{branch!r} is checked out in {checkout}, which does not exist"
            raise RefusedError(message, "run `git worktree prune` in the repository")
        if not await anyio.Path(checkout, ".git").exists():  # git lists the git directory instead of the checkout
            message = f"{branch!r} is checked out, but a push can't update the checkout of {checkout}"
            reason = "its git directory is outside the checkout, because of a submodule or `--separate-git-dir`"
            raise RefusedError(f"{message}: {reason}", "set `target` to a branch that is not checked out")
    for another in checkouts[1:]:
        if await anyio.Path(another).is_dir():
            message = f"{branch!r} is checked out in {checkouts[0]} and in {another}, and a landing can update only one"
            raise RefusedError(message, f"run `git -C {shlex.quote(str(another))} switch --detach`")
    return checkouts[0] if checkouts else None


def list_checkout_git_dirs(folder: Path) -> list[str]:
    """Return the git directory of each checkout, relative to the shared one."""
    linked: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        linked = sorted(path.name for path in (folder / "worktrees").iterdir())
    return [".", *(f"worktrees/{name}" for name in linked)]


def list_checkouts(repository: LocalRepository) -> list[Path]:
    """Return the resolved top folders of a repository's local checkouts. Blocks."""
    folder = repository.git_dir
    tops = [] if repository.top is None else [repository.top]
    tops += [folder.parent] if folder.name == ".git" else []
    for name in list_checkout_git_dirs(folder)[1:]:
        with suppress(OSError):
            written = os.fsdecode((folder / name / "gitdir").read_bytes()).rstrip("\n")
            tops.append((folder / name / written).parent)
    return list(dict.fromkeys(top.resolve() for top in tops))


def read_heads(folder: Path) -> dict[str, str]:
    """Return each HEAD's content, keyed as in `list_checkout_git_dirs`. Blocks."""
    heads = {}
    for name in list_checkout_git_dirs(folder):
        try:
            heads[name] = (folder / name / "HEAD").read_text(errors="surrogateescape").strip()
        except (FileNotFoundError, NotADirectoryError):  # not a checkout, or being created or removed
            continue
    return heads


def _may_be_checked_out(folder: Path, branch: str) -> bool:
    """Return whether a HEAD may resolve to a branch, without running git."""
    return any(_may_resolve_to(folder, name, head, branch) for name, head in read_heads(folder).items())


def _may_resolve_to(folder: Path, name: str, head: str, branch: str) -> bool:
    if (folder / name / "HEAD").is_symlink():
        return True
    if is_object_id(head):
        return False
    ref = head.removeprefix("ref: ")
    # Anything but a branch may indicate another ref format; a branch may be a symbolic ref.
    if ref in {f"refs/heads/{branch}", "refs/heads/.invalid"} or not head.startswith("ref: refs/heads/"):
        return True
    try:
        return (folder / ref).read_bytes().startswith(b"ref:")
    except OSError:
        return False


async def list_uncommitted_changes(checkout: Path, git: Git) -> list[str]:
    """Return the tracked paths with changes, staged or not. Read-only."""
    listed = await git(
        "status", "--porcelain", "-z", "--untracked-files=no", "--ignore-submodules=all", "--no-renames", cwd=checkout
    )
    return [printable_name(entry[3:]) for entry in split_nul(listed.stdout)]


async def list_left_out(checkout: Path, git: Git) -> set[str]:
    """Return the tracked paths that a sparse checkout leaves out."""
    configured = await git("config", "--type=bool", "core.sparseCheckout", cwd=checkout, ok=(0, 1))
    if configured.stdout.strip() != b"true":
        return set()
    listed = await git("ls-files", "-v", "-z", cwd=checkout)
    return {entry[2:] for entry in split_nul(listed.stdout) if entry[0] in "Ss"}  # skip-worktree: git-ls-files(1)


def lock_marker(branch: str) -> str:
    """Return the content of the index lock of our push to a branch.

    Only one such push runs at a time: a process that holds the permission to land and runs no push may remove locks
    left by another process.
    """
    return f"council-{hashlib.sha256(branch.encode()).hexdigest()[:16]}"


def find_locked_checkouts(repository: LocalRepository, branch: str) -> list[Path]:
    """Return the checkouts whose index our push to a branch left locked. Blocks."""
    return [top for top in list_checkouts(repository) if has_lock_marker(find_git_dir(top) / "index.lock", branch)]


def describe_interrupted_landing(repository: LocalRepository, branch: str) -> str | None:
    """Return the remedy if our push left a checkout locked, or None. Blocks."""
    locked = find_locked_checkouts(repository, branch)
    if not locked:
        return None
    return f"an interrupted landing left {locked[0]} locked: repair it with `council resume` of its run"


#: Operations during which HEAD is not on a branch, with the command to finish them, keyed by the file that stores the
# branch.
_OPERATIONS = {
    "rebase-merge/head-name": ("rebase", "`git rebase --continue` or `--abort`"),
    "rebase-apply/head-name": ("rebase", "`git rebase --continue` or `--abort`"),
    "BISECT_START": ("bisect", "`git bisect reset`"),
}


def describe_unfinished_operation(repository: LocalRepository, branch: str) -> str | None:
    """Return the remedy if the user is rebasing or bisecting a branch, or None.

    Blocks. HEAD is then not on the branch, but git refuses pushes to it, and finishing the operation would discard
    landed work.
    """
    for top in list_checkouts(repository):
        for state, (operation, remedy) in _OPERATIONS.items():
            with suppress(OSError):
                name = (find_git_dir(top) / state).read_text(errors="surrogateescape").strip()
                if name.removeprefix("refs/heads/") == branch:
                    return f"a {operation} of {branch!r} is in progress in {top}: finish it with {remedy}"
    return None


def find_switched_checkouts(repository: LocalRepository, branch: str, since: float) -> list[Path]:
    """Return the checkouts that were switched away from a branch after `since`.

    `since` is in wall-clock seconds. Blocks. If the user has removed the lock, a switch carries along changes that a
    push had staged.
    """
    markers = (f"\tcheckout: moving from {branch} to ".encode(), f"\tBranch: renamed refs/heads/{branch} to ".encode())
    switched = []
    for top in list_checkouts(repository):
        with suppress(OSError):
            lines = (find_git_dir(top) / "logs" / "HEAD").read_bytes().splitlines()
            moves = [_TIME_OF_MOVE.search(line) for line in lines if any(marker in line for marker in markers)]
            if any(move is not None and int(move[1]) >= int(since) for move in moves):
                switched.append(top)
    return switched


def find_git_dir(top: Path) -> Path:
    """Return the git directory of a checkout (gitrepository-layout(5)). Blocks."""
    pointer = top / ".git"
    if pointer.is_file():
        return top / pointer.read_text(errors="surrogateescape").removeprefix("gitdir: ").rstrip("\n")
    return pointer


def has_lock_marker(lock: Path, branch: str) -> bool:
    """Return whether a lock is that of our push to a branch. Blocks."""
    try:
        return lock.read_bytes()[:_MARK_BYTES].strip() == lock_marker(branch).encode()
    except OSError:
        return False


def read_head_stats(repository: LocalRepository) -> dict[Path, tuple[int, int]]:
    """Return the inode and mtime of each HEAD, keyed by git directory. Blocks.

    Both change on every branch switch.
    """
    stats = {}
    for name in list_checkout_git_dirs(repository.git_dir):
        with suppress(OSError):
            git_dir = (repository.git_dir / name).resolve()
            stat = (git_dir / "HEAD").lstat()
            stats[git_dir] = stat.st_ino, stat.st_mtime_ns
    return stats


def list_git_processes(folders: Sequence[Path]) -> list[int]:
    """Return the git commands running in these folders; none without /proc. Blocks."""
    return [pid for pid in process_ids() if _is_git_in(pid, folders)]


def _is_git_in(pid: int, folders: Sequence[Path]) -> bool:
    try:
        # Runs for every process before and after each session: pathlib would be slower.
        with open(f"/proc/{pid}/comm", "rb", 0) as file:  # noqa: PTH123
            if file.read(3) != b"git":
                return False
        where = Path("/proc", str(pid), "cwd").readlink()
    except OSError:  # it has exited, or belongs to another user
        return False
    return any(where.is_relative_to(folder) for folder in folders)


async def refuse_tracked_project_folder(project: Project, environ: Mapping[str, str]) -> None:
    """Raise RefusedError if git tracks `.council`, whose files we trust."""
    git = Git(None, as_user=True, environ=environ)
    name = project.folder.name
    # On some file systems, names that differ only in case are the same folder.
    listed = await git("ls-files", "-z", "--", f":(icase){name}", cwd=project.top, ok=(0, 128))
    if tracked := split_nul(listed.stdout):
        raise RefusedError(
            f"git tracks files in {name}: {join_names(list(map(printable_name, tracked)), 3)}",
            f"untrack them with `git rm -r --cached {name}` and commit (no file is deleted)",
        )
