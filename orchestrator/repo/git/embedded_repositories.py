"""Find folders in a tree that git would treat as repositories and obey."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

from orchestrator.repo.git.command import Git, split_nul

#: The entries that make a folder a repository (`is_git_directory` in git's setup.c). Some file systems ignore case.
_PARTS: Final = ("**/HEAD", "**/commondir", "**/config", "**/objects", "**/objects/**", "**/refs", "**/refs/**")


async def find_embedded_repository(git: Git, base: str, tree: str) -> str | None:
    """Return a repository folder of `tree` that changed since `base`, or None.

    The top folder does not count: there, git finds the repository of the checkout first.
    """
    patterns = [f":(top,glob,icase){part}" for part in _PARTS]
    command = ("diff-tree", "-r", "-t", "-z", "--name-only", "--no-renames", "--diff-filter=d")
    changed = split_nul((await git(*command, base, tree, "--", *patterns)).stdout)
    folders = {str(folder) for path in changed for folder in _candidates(path)}
    for folder in sorted(folders - {"."}):
        listed = await git("ls-tree", "-z", "--name-only", f"{tree}:{folder}", ok=(0, 128))
        names = {name.casefold() for name in split_nul(listed.stdout)}
        if "head" in names and ("commondir" in names or {"objects", "refs"} <= names):
            return folder
    return None


def _candidates(path: str) -> list[PurePosixPath]:
    """Return the folders that a path may turn into a repository."""
    at = PurePosixPath(path)
    inner = [folder.parent for folder in at.parents if folder.name.casefold() in {"objects", "refs"}]
    return [at.parent, *inner]
