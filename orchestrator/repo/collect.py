"""What an agent left in its worktree becomes one commit in the trusted repository.

The files in the checkout are what counts. They are staged by us, in our repository and with our index, so
that no filter or hook of the agent's runs. Commits that the agent made on its own branch are kept as history
if they descend from where it started, and enter as objects that were read, hashed and checked anew.
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import GitError
from orchestrator.failpoints import failpoint
from orchestrator.repo.git import Git, is_object_id
from orchestrator.repo.worktrees import Worktree

_GITLINK = "160000"
_LARGEST_REF_FILE = 16 << 20  # bytes


#: Seconds for git to read an agent's tree: it waits for ever where a file to be read is a pipe.
STAGING_LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class Collected:
    """What a worktree held.

    `commit`: what differs from the base, None if nothing does. `refused`: why it can't be landed, or None.
    `complete`: whether the commit has all of the files; if not, the worktree is all there is of the rest.
    """

    commit: str | None
    refused: str | None = None
    complete: bool = True


async def collect(git: Git, worktree: Worktree, base: str, message: str) -> Collected:
    """Commit what the worktree holds beyond `base` to the attempt's branch; `git` runs in the trusted repository.

    Safe to repeat: a second call finds the same content and makes the same commit content again.
    """
    head, tip = await anyio.to_thread.run_sync(_read_heads, worktree)
    tip = await _import_commits(git, worktree, base, tip) or base
    tip_tree, base_tree = (await git.line("rev-parse", f"{tip}^{{tree}}", f"{base}^{{tree}}")).split()
    refused = await _stage(git, worktree)
    tree = await git.line("write-tree", env=worktree.env)
    if tree == base_tree and head != f"ref: refs/heads/{worktree.branch}":
        # It went back to where it began, or elsewhere: what it left on its branch is its work.
        tree = tip_tree
    if tree != tip_tree:
        tip = await git.line("commit-tree", tree, "-p", tip, input_=message.encode())
    if tree == base_tree and not (refused and tip != base):
        return Collected(None, refused, complete=refused is None)
    await git("update-ref", f"refs/heads/{worktree.branch}", tip)
    failpoint("work.committed")
    return Collected(tip, refused or await _nested_repository(git, base, tip), complete=refused is None)


async def _stage(git: Git, worktree: Worktree) -> str | None:
    """Stage all of the checkout that can be staged; return why some of it can't."""
    if not await anyio.to_thread.run_sync(_is_folder, worktree.tree):
        return "its worktree was removed or replaced by something else"
    add = ("add", "--all", "--ignore-errors")
    try:
        await git(*add, env=worktree.env, cwd=worktree.tree, limit=STAGING_LIMIT)
    except GitError as error:
        return f"not all of its files can be staged ({error.stderr}): what can't is in {worktree.tree}"
    failpoint("work.staged")
    return None


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _read_heads(worktree: Worktree) -> tuple[str | None, str | None]:
    """Return what the session's HEAD holds, and the commit that its own branch is at."""
    ref = f"refs/heads/{worktree.branch}"
    tip = _read_line(worktree.git_dir / ref)
    if tip is None:
        packed = _read_text(worktree.git_dir / "packed-refs") or ""
        tip = next((line.split(" ")[0] for line in packed.split("\n") if line.endswith(f" {ref}")), None)
    return _read_line(worktree.git_dir / "HEAD"), tip if tip and is_object_id(tip) else None


def _read_line(path: Path) -> str | None:
    text = _read_text(path)
    return text if text is None else text.rstrip("\n")


def _read_text(path: Path) -> str | None:
    """Return a file's text without trusting it to be one: a pipe would be waited for, a link followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        return file.read(_LARGEST_REF_FILE).decode(errors="replace")


async def _nested_repository(git: Git, base: str, commit: str) -> str | None:
    for change in await git.changes(base, commit):
        if change.new_mode == _GITLINK:
            return f"{change.path!r} is a git repository of its own: its `.git` must go before it can land"
    return None


async def _import_commits(git: Git, worktree: Worktree, base: str, tip: str | None) -> str | None:
    """Bring the agent's own commits in; return the tip if they are sound and descend from the base."""
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
