"""What an agent left in its worktree becomes one commit in the trusted repository.

The files in the checkout are what counts. They are staged by us, in our repository and with our index, so
that no filter or hook of the agent's runs. Commits that the agent made on its own branch are kept as history
if they descend from where it started, and enter as objects that were read, hashed and checked anew.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import GitError
from orchestrator.failpoints import failpoint
from orchestrator.repo.git import Git, read_ref
from orchestrator.repo.worktrees import Worktree

_GITLINK = "160000"


@dataclass(frozen=True, slots=True)
class Collected:
    """`commit`: what differs from the base, None if nothing does. `refused`: why it can't be landed, or None."""

    commit: str | None
    refused: str | None = None


async def collect(git: Git, worktree: Worktree, base: str, message: str) -> Collected:
    """Commit what the worktree holds beyond `base` to the attempt's branch; `git` runs in the trusted repository.

    Safe to repeat: a second call finds the same content and makes the same commit content again.
    """
    tip = await _import_commits(git, worktree, base) or base
    tip_tree, base_tree = (await git.line("rev-parse", f"{tip}^{{tree}}", f"{base}^{{tree}}")).split()
    refused = None
    try:
        tree = await _stage(git, worktree)
    except GitError as error:
        tree, refused = base_tree, f"its files can't be staged: {error.stderr}"
    # Nothing beyond the base in the checkout: commits on the branch are work all the same.
    if tree not in {base_tree, tip_tree}:
        tip = await git.line("commit-tree", tree, "-p", tip, input_=message.encode())
    elif tip_tree == base_tree:
        return Collected(None, refused)
    await git("update-ref", f"refs/heads/{worktree.branch}", tip)
    failpoint("work.committed")
    return Collected(tip, refused or await _nested_repository(git, base, tip))


async def _stage(git: Git, worktree: Worktree) -> str:
    """Stage all of the checkout and return its tree; without its folder there is nothing in it."""
    if await anyio.to_thread.run_sync(_is_folder, worktree.tree):
        await git("add", "--all", env=worktree.env, cwd=worktree.tree)
    failpoint("work.staged")
    return await git.line("write-tree", env=worktree.env)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


async def _nested_repository(git: Git, base: str, commit: str) -> str | None:
    raw = (await git("diff-tree", "-r", "--raw", "-z", "--no-renames", base, commit)).stdout
    fields = raw.decode(errors="surrogateescape").split("\0")
    for meta, path in zip(fields[::2], fields[1::2], strict=False):
        if meta.split()[1] == _GITLINK:
            return f"{path!r} is a git repository of its own: its `.git` must go before it can land"
    return None


async def _import_commits(git: Git, worktree: Worktree, base: str) -> str | None:
    """Bring the agent's own commits in; return the tip if they are sound and descend from the base."""
    tip = await read_ref(worktree.git_dir, f"refs/heads/{worktree.branch}")
    if tip is None or tip == base:
        return None
    scratch = worktree.import_folder
    await anyio.to_thread.run_sync(_empty, scratch)
    try:
        packed = await git.line(
            "pack-objects", "--quiet", "--revs", str(scratch / "pack"),
            env={"GIT_ALTERNATE_OBJECT_DIRECTORIES": str(worktree.git_dir / "objects")},
            input_=f"{tip}\n^{base}\n".encode(),
        )  # fmt: skip
        pack = scratch / f"pack-{packed}.pack"
        # Hashes everything anew and follows every link, without the agent's objects in reach.
        await git("index-pack", "--strict", str(pack))
        await anyio.to_thread.run_sync(_adopt, pack, worktree.hub.objects / "pack")
        await git("merge-base", "--is-ancestor", base, tip)
    except GitError:
        return None
    return tip


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)


def _adopt(pack: Path, packs: Path) -> None:
    # git looks for the .idx: the pack must be there first.
    packs.mkdir(exist_ok=True)
    for suffix in (".pack", ".rev", ".idx"):
        part = pack.with_suffix(suffix)
        if part.exists():
            part.rename(packs / part.name)
