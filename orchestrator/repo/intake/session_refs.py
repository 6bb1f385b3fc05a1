"""Read the refs of a session's git directory, whose contents are untrusted.

Git is never used here, only `orchestrator.system.untrusted_files`: reading a pipe would block, and a link could lead to
files outside the session.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.repo.git.command import is_object_id
from orchestrator.system import untrusted_files

_LARGEST_FILE = 16 << 20  # bytes
_MAX_REFS = 2000


@dataclass(frozen=True, slots=True)
class SessionRefs:
    """The content of HEAD (None if unreadable), and the object id of each ref.

    `complete`: whether all refs were read. Older stashes are named `stash@{N}`.
    """

    head: str | None
    refs: dict[str, str]
    complete: bool = True


def read_session_refs(git_dir: Path) -> SessionRefs:
    """Return the refs of a session's git directory. Blocks."""
    refs: dict[str, str] = {}
    packed = (_read(git_dir, "packed-refs") or "").split("\n")
    for line in packed[:_MAX_REFS]:
        name, _, ref = line.partition(" ")
        if is_object_id(name) and ref.startswith("refs/"):
            refs[ref] = name
    loose = list(_loose(git_dir))
    for ref in loose:
        value = (_read(git_dir, ref) or "").strip()
        if is_object_id(value):
            refs[ref] = value
    logged = (_read(git_dir, "logs/refs/stash") or "").split("\n")
    stashes = [line.split(" ", 2)[1:2] for line in logged[-_MAX_REFS:]]
    for number, entry in enumerate(reversed([entry[0] for entry in stashes if entry and is_object_id(entry[0])])):
        if number:
            refs[f"refs/stash@{{{number}}}"] = entry
    head = _read(git_dir, "HEAD")
    complete = max(len(packed), len(loose), len(logged)) < _MAX_REFS
    return SessionRefs(head if head is None else head.rstrip("\n"), refs, complete)


def _loose(git_dir: Path) -> Iterator[str]:
    waiting, seen = ["refs"], 0
    while waiting and seen < _MAX_REFS:
        folder = waiting.pop()
        for name, is_folder in _entries(git_dir, folder):
            seen += 1
            if is_folder:
                waiting.append(f"{folder}/{name}")
            else:
                yield f"{folder}/{name}"


def _entries(git_dir: Path, folder: str) -> list[tuple[str, bool]]:
    with (
        suppress(OSError),
        untrusted_files.open_folder(git_dir, folder) as descriptor,
        os.scandir(descriptor) as entries,
    ):
        names = [
            (entry.name, entry.is_dir(follow_symlinks=False))
            for entry, _ in zip(entries, range(_MAX_REFS), strict=False)
        ]
        return sorted(names, reverse=True)
    return []


def _read(git_dir: Path, path: str) -> str | None:
    with suppress(OSError):
        return untrusted_files.read_file(git_dir, path, _LARGEST_FILE).decode(errors="surrogateescape")
    return None
