"""Resolve paths in the worktree, the only folder that a bridge may access."""

from __future__ import annotations

import os
from pathlib import Path


class OutsideWorktreeError(Exception):
    """A path from an agent is outside the worktree or belongs to git."""


class ConfinedWorktree:
    """A worktree, given its root. Symlinks are resolved before a path is checked."""

    def __init__(self, top: Path) -> None:
        self.top = Path(os.path.realpath(top))

    def locate(self, name: str) -> Path:
        """Return the absolute path of `name`, with symlinks resolved.

        `name` is absolute, or relative to the root. Raises OutsideWorktreeError if the path is outside the worktree, is
        the worktree itself, or belongs to git.
        """
        path = self.resolve(name)
        if path == self.top:
            raise OutsideWorktreeError(f"{name!r} is outside of the worktree")
        return path

    def resolve(self, name: str) -> Path:
        """Return the absolute path of a working folder, which may be the worktree itself."""
        if not name or "\0" in name:
            raise OutsideWorktreeError(f"{name!r} is not a path")
        path = Path(os.path.realpath(self.top / name))
        if not path.is_relative_to(self.top):
            raise OutsideWorktreeError(f"{name!r} is outside of the worktree")
        if any(part.lower() == ".git" for part in path.relative_to(self.top).parts):
            raise OutsideWorktreeError(f"{name!r} belongs to git")
        return path

    def relative(self, name: str) -> Path:
        """Return the absolute path of a file that a response names by a relative path.

        The path must not contain `..` or symlinked folders, so that exactly the named file is written.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise OutsideWorktreeError(f"{name!r} is outside of the worktree")
        path = self.locate(name)
        if path != self.top / Path(name):
            raise OutsideWorktreeError(f"{name!r} contains a symlink")
        return path
