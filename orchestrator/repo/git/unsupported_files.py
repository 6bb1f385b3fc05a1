"""Recognize files that sessions could not check out faithfully: impossible names, and git LFS attributes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from orchestrator.repo.git.command import Git, split_nul

#: Maximum bytes in a file name, and in a path below a session's folder (NAME_MAX, PATH_MAX on Linux and macOS).
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 3500
#: Spellings of `.git` that git does not check out; see core.protectNTFS in git-config(1).
_RESERVED = re.compile(rb"(?:\.|\.\.|(?:\.git|git~1)[ .]*(?::.*)?)", re.IGNORECASE | re.DOTALL)
#: Options of `git grep` that list the attributes with `filter=lfs`.
_LFS: Final = ("-z", "-l", "-E", "-e", r"^[[:space:]]*[^#[:space:]].*[[:space:]]filter=lfs([[:space:]]|$)")
_BATCH: Final = 1000  # object ids in the arguments of a command


def can_be_checked_out(path: bytes) -> bool:
    """Return whether git and the file system accept every name in a path."""
    names = path.split(b"/")
    return len(path) <= _MAX_PATH_BYTES and not any(
        len(name) > _MAX_NAME_BYTES or _RESERVED.fullmatch(name) for name in names
    )


async def find_lfs_files(git: Git, commit: str) -> list[bytes]:
    """Return the .gitattributes files of a commit that use git LFS."""
    found = await git("grep", *_LFS, commit, "--", ":(top,glob)**/.gitattributes", ok=(0, 1))
    return [name.partition(b":")[2] for name in found.stdout.split(b"\0")[:-1]]


async def find_lfs_blobs(git: Git, blobs: Collection[str], env: Mapping[str, str]) -> set[str]:
    """Return the ids of .gitattributes files that use git LFS; git runs with `env`, which locates the objects."""
    ids, found = list(blobs), set[str]()
    for start in range(0, len(ids), _BATCH):
        done = await git("grep", *_LFS, *ids[start : start + _BATCH], env=env, ok=(0, 1))
        found.update(split_nul(done.stdout))
    return found
