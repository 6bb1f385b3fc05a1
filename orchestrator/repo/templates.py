"""Checkouts that others are copied from, which takes a third of the time that git needs to unpack the files.

A template is made once a commit is asked for again, so that a run of few tasks pays nothing for it. It is kept as the
worktree of checks that never run: whoever finds one that was left over knows that it holds nothing.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.errors import GitError
from orchestrator.process import run
from orchestrator.repo.git import Git
from orchestrator.repo.worktrees import Worktree, check_out, remove


class Templates:
    """What the worktrees of one run are copied from. The process owns the run; its tasks may call side by side."""

    def __init__(self) -> None:
        self.place: Worktree | None = None
        """Where the template is, or what is left of one."""
        self._commit: str | None = None
        self._asked: str | None = None
        self._copying = 0
        self._making = anyio.Lock()

    async def check_out(self, git: Git, worktree: Worktree, commit: str) -> None:
        """Do what `worktrees.check_out` does, by copying where the commit was asked for before."""
        is_repeated, self._asked = commit == self._asked, commit
        template = await self._borrow(git, worktree, commit) if is_repeated else None
        if template is None:
            await check_out(git, worktree, commit)
            return
        try:
            await _copy(git, template, worktree)
        finally:
            self._copying -= 1

    async def _borrow(self, git: Git, worktree: Worktree, commit: str) -> Worktree | None:
        """Return the template of a commit; None while that of another one is in use."""
        async with self._making:
            if self._commit != commit:
                if self._copying:
                    return None
                await self._make(git, replace(worktree, attempt=0, is_check=True), commit)
            self._copying += 1
            return self.place

    async def _make(self, git: Git, place: Worktree, commit: str) -> None:
        self._commit = None
        if self.place is not None:
            await remove(git, self.place)
        self.place = place
        await anyio.to_thread.run_sync(lambda: place.tree.mkdir(mode=0o700, parents=True))
        await check_out(git, place, commit)
        self._commit = commit


async def _copy(git: Git, template: Worktree, worktree: Worktree) -> None:
    """Copy the files of a checkout, then its index: where that is, the files are whole."""
    argv = ["cp", "-RP", "--", f"{template.tree}/.", str(worktree.tree)]
    env = {"PATH": git.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    done = await run(argv, env=env, keep_fds=git.keep_fds)
    if done.returncode:
        raise GitError(argv, done.returncode, done.stderr.decode(errors="replace"))
    await anyio.to_thread.run_sync(_copy_index, template.index, worktree.index)


def _copy_index(source: Path, target: Path) -> None:
    # Under the name of git's own lock, which is removed wherever an index is given up.
    staged = target.with_name(f"{target.name}.lock")
    shutil.copyfile(source, staged)
    staged.rename(target)
