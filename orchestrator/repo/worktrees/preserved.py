"""Make a preserved worktree safe: git must not run programs of an agent.

The session's git directory is replaced by a clean one, so that `git status` and `git diff` show the changes since the
session began. All other repositories in the worktree are disabled without deleting their files. No process of the
session may be running.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.domain.wording import join_names
from orchestrator.errors import GitError
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.worktrees.files.file_trees import is_folder, walk_folders
from orchestrator.repo.worktrees.worktrees import Worktree, copy_sparse_checkout
from orchestrator.system.files import copy_folder

_SUFFIX: Final = ".disabled-by-council"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: A marker file in the session's folder: the agent's git configuration is disabled.
_MARK: Final = "preserved"
_MAX_NAMED: Final = 3


async def preserve(git: Git, worktree: Worktree, base: str) -> str | None:
    """Make a worktree safe for git; return a note if anything was disabled.

    `git` runs in the trusted repository; `base` is the worktree's first commit. Safe to repeat. Raises OSError if
    something can't be changed.
    """
    tree = worktree.tree
    await anyio.to_thread.run_sync(_remove_pointer, worktree)
    changed = await anyio.to_thread.run_sync(disable_repositories, tree)
    if await anyio.to_thread.run_sync(is_folder, tree):
        await _add_repository(git, worktree, base)
    await anyio.to_thread.run_sync((worktree.root / _MARK).touch)
    return _describe_renames(changed)


async def try_to_preserve(git: Git, worktree: Worktree, base: str) -> tuple[str, ...]:
    """Preserve a worktree; return notes for the user, also on failure."""
    try:
        note = await preserve(git, worktree, base)
    except (GitError, OSError) as error:
        note = (
            f"do not run git in this worktree: its repositories could not be disabled ({error}), "
            "so git may execute the agent's programs"
        )
    return () if note is None else (note,)


def is_preserved(worktree: Worktree) -> bool:
    """Return whether `preserve` has completed for a worktree. Blocks."""
    return (worktree.root / _MARK).is_file()


def _remove_pointer(worktree: Worktree) -> None:
    """Remove the `.git` file of the session, unless the agent has replaced it."""
    pointer = worktree.tree / ".git"
    try:
        at = os.open(pointer, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(at, "rb") as file:
            is_ours = file.read(4096) == os.fsencode(f"gitdir: {worktree.git_dir}\n")
    except OSError:  # missing, or not a file
        return
    if is_ours:
        pointer.unlink()


def disable_repositories(tree: Path) -> list[str]:
    """Keep git from finding a repository in a folder; return renamed paths. Blocks.

    Renames files and links named `.git`, and `HEAD` in each folder that git would treat as a repository, whatever its
    name. Links are not followed. Unreadable folders are made readable.
    """
    changed: list[str] = []
    walk_folders(tree, lambda folder, names: _disable_folder(folder, names, changed))
    return changed


def _disable_folder(folder: int, above: list[str], changed: list[str]) -> list[str]:
    """Rename a folder's entries that make it a repository; return its subfolders."""
    with os.scandir(folder) as scan:
        entries = {entry.name: entry.is_dir(follow_symlinks=False) for entry in scan}
    for name in [*_find_repository_entries(entries)]:
        free = _free(name, entries)
        os.rename(name, free, src_dir_fd=folder, dst_dir_fd=folder)
        entries[free] = entries.pop(name)
        changed.append("/".join((*above[-20:], free)))
    return [name for name, is_dir in entries.items() if is_dir]


def _find_repository_entries(entries: dict[str, bool]) -> Iterator[str]:
    # Ignore case, as some file systems do.
    folded = {name.casefold() for name in entries}
    is_repository = "commondir" in folded or {"objects", "refs"} <= folded
    for name, is_dir in entries.items():
        is_pointer = name.casefold() == ".git" and not is_dir
        if is_pointer or (is_repository and name.casefold() == "head"):
            yield name


def _free(name: str, taken: Iterable[str]) -> str:
    folded = {used.casefold() for used in taken}
    names = (f"{name}{_SUFFIX}{number or ''}" for number in range(len(folded) + 1))
    return next(free for free in names if free.casefold() not in folded)


async def _add_repository(git: Git, worktree: Worktree, base: str) -> None:
    """Create a repository at `base`, with its index and the hub's objects only."""
    slot = worktree.slot
    made = worktree.root / "preserved.git"

    def lay_out() -> None:
        shutil.rmtree(made, ignore_errors=True)
        copy_folder(worktree.hub.session_template, made)
        (made / "HEAD").write_text(f"{base}\n")
        if slot is not None and slot.is_sparse:
            copy_sparse_checkout(slot, made)

    await anyio.to_thread.run_sync(lay_out)
    env = {"GIT_INDEX_FILE": str(made / "index"), "GIT_WORK_TREE": str(worktree.tree)}
    await git("read-tree", base, env=env)
    await anyio.to_thread.run_sync(_publish, made, worktree.tree)


def _publish(made: Path, tree: Path) -> None:
    """Move the repository into the worktree, whose `.git` may be a disabled folder."""
    at = os.open(tree, _DIRECTORY)
    try:
        with os.scandir(at) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if name.casefold() == ".git":
                os.rename(name, _free(name, names), src_dir_fd=at, dst_dir_fd=at)
        os.rename(made, ".git", dst_dir_fd=at)
    finally:
        os.close(at)


def _describe_renames(changed: list[str]) -> str | None:
    own = [path for path in changed if path not in {f".git{_SUFFIX}", f".git/HEAD{_SUFFIX}"}]
    if not own:
        return None
    named = join_names([printable_name(path)[-100:] for path in own], _MAX_NAMED)
    return f"git repositories inside the worktree were disabled by renaming them to {named}"
