"""Recognize files that sessions could not check out or edit: impossible names, git LFS, and encodings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Final

from orchestrator.repo.git.command import Git

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
