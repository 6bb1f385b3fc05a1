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
    staged = await _stage(git, worktree, base)
    if isinstance(staged, str):
        return Collected(await _keep(git, worktree, tip, base), staged)
    failpoint("work.staged")
    if not staged.paths:
        # Nothing beyond the base in the checkout; commits on the branch are work all the same.
        return Collected(await _keep(git, worktree, tip, base))
    tree = await git.line("write-tree", env=worktree.env)
    if tree != await git.line("rev-parse", f"{tip}^{{tree}}"):
        tip = await git.line("commit-tree", tree, "-p", tip, input_=message.encode())
    commit = await _keep(git, worktree, tip, base)
    nested = [path for mode, path in staged.paths if mode == _GITLINK]
    if nested:
        return Collected(commit, f"{nested[0]!r} is a git repository of its own: its `.git` must go before it can land")
    return Collected(commit)


async def _keep(git: Git, worktree: Worktree, tip: str, base: str) -> str | None:
    if await git.line("rev-parse", f"{tip}^{{tree}}") == await git.line("rev-parse", f"{base}^{{tree}}"):
        return None
    await git("update-ref", f"refs/heads/{worktree.branch}", tip)
    failpoint("work.committed")
    return tip


@dataclass(frozen=True, slots=True)
class _Staged:
    paths: list[tuple[str, str]]  # (new mode, path)


async def _stage(git: Git, worktree: Worktree, base: str) -> _Staged | str:
    """Stage all of the checkout; a sentence where that can't be done."""
    if worktree.tree.is_symlink() or not worktree.tree.is_dir():
        return "the worktree's folder is gone"
    try:
        await git("add", "--all", env=worktree.env, cwd=worktree.tree)
    except GitError as error:
        return f"its files can't be staged: {error.stderr.strip()}"
    raw = (await git("diff-index", "--cached", "--raw", "-z", "--no-renames", base, env=worktree.env)).stdout
    fields = raw.decode(errors="surrogateescape").split("\0")
    return _Staged([(meta.split()[1], path) for meta, path in zip(fields[::2], fields[1::2], strict=False)])


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
