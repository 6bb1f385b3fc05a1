"""Derive lock names: one name per file, however its path is spelled.

The canonical path is relative to the root of the repository, without `..` and symlinks. Case is ignored if the file
system ignores it. Composed and decomposed characters are always equal: many file systems can't store names that differ
only in this, and locking too much does less harm than locking too little.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import unicodedata
from pathlib import Path
from typing import Final

from orchestrator.errors import RefusedError

#: Characters of the readable part: the whole name must fit into a file name of 255 bytes.
_READABLE: Final = 80
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")


def canonical_path(path: str, top: Path | None = None, *, folds_case: bool = False) -> str:
    """Return the canonical path of a file, relative to the root of the repository.

    `path` is relative to `top`, or absolute within it. Without `top`, symlinks are not followed, and `..` removes a
    segment. The file need not exist. `folds_case` ignores the case of letters. Raises RefusedError for a path outside
    the repository.
    """
    if not path or "\0" in path:
        raise RefusedError(f"invalid path: {path!r}", "use a path in the repository")
    if top is None:
        normal = os.path.normpath(path)
        if normal in {".", ".."} or normal.startswith(("/", "../")):
            raise _outside(path)
        return _folded(normal, folds_case=folds_case)
    prefix = _folded(os.path.realpath(top), folds_case=folds_case).rstrip("/") + "/"
    absolute = _folded(os.path.realpath(Path(top, path)), folds_case=folds_case)
    if not absolute.startswith(prefix):
        raise _outside(path)
    return absolute.removeprefix(prefix)


def lock_name(path: str) -> str:
    """Return the lock name of a canonical path: a file name without an extension."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    readable = _UNSAFE.sub("_", path)[-_READABLE:].lstrip(".")
    return f"{readable or '_'}.{digest}"


def folds_case(folder: Path) -> bool:
    """Return whether a folder's file system ignores case, by creating a probe file."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    probe.touch(0o600)
    try:
        return probe.with_name(probe.name.upper()).exists()
    finally:
        probe.unlink()


def _folded(path: str, *, folds_case: bool) -> str:
    if folds_case:
        path = unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
    return unicodedata.normalize("NFC", path)


def _outside(path: str) -> RefusedError:
    return RefusedError(f"{path!r} is outside the repository", "use a path in the repository")
