"""What the lock of a file is called: one name for one file, however its path is spelled.

The canonical path is relative to the top of the repository, without `..` and symbolic links. Letters that the file
system takes for the same are the same here, and so are the composed and the decomposed form of a character,
everywhere: half of the world's file systems can't hold two files whose names differ in nothing else, and a lock too
many does less harm than one too few.
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

#: Characters of the readable part: the whole name has to fit into the 255 bytes of a file's name.
_READABLE: Final = 80
_ODD: Final = re.compile(r"[^A-Za-z0-9._-]")


def canonical_path(path: str, top: Path | None = None, *, folds_case: bool = False) -> str:
    """Return the one path of a file, relative to the top of the repository; RefusedError for one outside of it.

    `path` is relative to `top`, or absolute within it. Without `top` there are no links to follow: `..` takes a segment
    away. The file need not exist. `folds_case`: whether letters count alike, small or capital.
    """
    if not path or "\0" in path:
        raise RefusedError(f"{path!r} is no path", "name a file of the repository")
    if top is None:
        found = os.path.normpath(path)
        if found in {".", ".."} or found.startswith(("/", "../")):
            raise _outside(path)
        return _folded(found, folds_case=folds_case)
    inside = _folded(os.path.realpath(top), folds_case=folds_case).rstrip("/") + "/"
    found = _folded(os.path.realpath(Path(top, path)), folds_case=folds_case)
    if not found.startswith(inside):
        raise _outside(path)
    return found.removeprefix(inside)


def lock_name(path: str) -> str:
    """Return the name of a lock by its canonical path, as a file's name without an extension; no other path has it."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    readable = _ODD.sub("_", path)[-_READABLE:].lstrip(".")
    return f"{readable or '_'}.{digest}"


def folds_case(folder: Path) -> bool:
    """Whether the file system of a folder takes small and capital letters for the same, by trying it."""
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
    return RefusedError(f"{path!r} is no file below the top of the repository", "name one that is")
