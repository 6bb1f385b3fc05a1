"""Recognize files that sessions could not check out or edit: impossible names, git LFS, and encodings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Final

from orchestrator.repo.git.command import Git, split_nul

#: Maximum bytes in a file name, and in a path below a session's folder (NAME_MAX, PATH_MAX on Linux and macOS).
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 3500
#: Spellings of `.git` that git does not check out; see core.protectNTFS in git-config(1).
_RESERVED = re.compile(rb"(?:\.|\.\.|(?:\.git|git~1)[ .]*(?::.*)?)", re.IGNORECASE | re.DOTALL)
_ATTRIBUTE: Final = "^[[:space:]]*[^#[:space:]].*[[:space:]]"
#: Options of `git grep` that find lines with `filter=lfs` in .gitattributes files.
_LFS: Final = ("-E", "-e", f"{_ATTRIBUTE}filter=lfs([[:space:]]|$)")
#: The same with `working-tree-encoding`: git stages no file in another encoding, and rejects it without a value.
_ENCODING: Final = ("-e", f"{_ATTRIBUTE}-?working-tree-encoding(=|[[:space:]]|$)")
_BATCH: Final = 1000  # object ids in the arguments of a command


def can_be_checked_out(path: bytes) -> bool:
    """Return whether git and the file system accept every name in a path."""
    names = path.split(b"/")
    return len(path) <= _MAX_PATH_BYTES and not any(
        len(name) > _MAX_NAME_BYTES or _RESERVED.fullmatch(name) for name in names
    )


async def find_lfs_files(git: Git, commit: str) -> list[bytes]:
    """Return the .gitattributes files of a commit that use git LFS."""
    found = await git("grep", "-z", "-l", *_LFS, commit, "--", ":(top,glob)**/.gitattributes", ok=(0, 1))
    return [name.partition(b":")[2] for name in found.stdout.split(b"\0")[:-1]]


async def find_unsupported_attributes(git: Git, blobs: Collection[str], env: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the lines with git LFS or an encoding, keyed by .gitattributes file (object id).

    Git runs with `env`, which locates the objects.
    """
    ids, found = list(blobs), defaultdict[str, set[str]](set)
    for start in range(0, len(ids), _BATCH):
        done = await git("grep", "-z", "--text", *_LFS, *_ENCODING, *ids[start : start + _BATCH], env=env, ok=(0, 1))
        for row in done.stdout.decode(errors="surrogateescape").split("\n"):
            blob, separator, line = row.partition("\0")
            if separator:
                found[blob].add(line)
    return found


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
