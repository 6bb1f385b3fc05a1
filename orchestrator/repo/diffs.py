"""What work changes: between two commits, and in a session that is still under way."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import RefusedError
from orchestrator.repo.git import Git, shown
from orchestrator.repo.inspection import Admission
from orchestrator.repo.quarantine import Quarantine
from orchestrator.repo.staging import Staging, blocking, stage
from orchestrator.repo.worktrees import Worktree

# No program that a configuration names may run, and what is shown depends on nobody's settings.
_PLAIN = ("--no-ext-diff", "--no-textconv", "--find-renames", "--submodule=short")


async def diff(git: Git, base: str, commit: str, *, color: bool = False, stat: bool = False) -> bytes:
    """Return the difference of two commits as git shows it; file names are quoted, contents are as they are."""
    return (await git("diff-tree", "-r", *_options(color=color, stat=stat), base, commit)).stdout


async def live_diff(
    git: Git, worktree: Worktree, base: str, *, admit: Admission, color: bool = False, stat: bool = False
) -> bytes:
    """Return what a session's files differ from its base by now, while it may be at work.

    Neither its index nor ours is touched, and no object is kept. Secrets and huge files are left out and named in
    lines that begin with `#`, before the difference. RefusedError where there is nothing to look at.
    """
    folder = await anyio.to_thread.run_sync(_prepare, worktree)
    try:
        staging = Staging(worktree.tree, folder / "index", Quarantine(folder / "objects", worktree.hub.objects))
        staged = await stage(git, staging, base, admit)
        options = _options(color=color, stat=stat)
        done = await git("diff-index", "--cached", *options, base, env=staging.env)
    finally:
        await anyio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))
    lines = [f"# left out: {shown(path)!r}: {why}\n" for path, why in sorted(staged.refused.items())]
    if staged.problem is not None:
        lines.append(f"# not all of its files can be read: {staged.problem}\n")
    return "".join(lines).encode(errors="replace") + done.stdout


def _options(*, color: bool, stat: bool) -> list[str]:
    return [*_PLAIN, f"--color={'always' if color else 'never'}", "--stat=100" if stat else "--patch"]


def _prepare(worktree: Worktree) -> Path:
    """Copy our index of the checkout, in which git finds what it need not read again."""
    name = f"{worktree.task}.{worktree.attempt}"
    remedy = "look at it when the session is at work or has ended"
    if not worktree.index.exists() or not worktree.tree.is_dir() or worktree.tree.is_symlink():
        raise RefusedError(f"attempt {name} has no checkout", remedy)
    if pipe := next(blocking(worktree.tree), None):
        raise RefusedError(f"{shown(str(pipe))!r} is no file that git can read", remedy)
    folder = Path(tempfile.mkdtemp(prefix=f"{worktree.index.name}.live-", dir=worktree.index.parent))
    try:
        shutil.copyfile(worktree.index, folder / "index")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
