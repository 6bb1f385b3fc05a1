"""Fingerprints of the parts of the user's repository that a run must not change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.project import COUNCIL_FOLDER


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of a checked-out repository outside of its objects and reflogs, by path."""

    git: dict[str, str]
    files: dict[str, str]

    @classmethod
    def of(cls, top: Path) -> Fingerprint:
        """Read a repository whose git directory is `.git` in its checkout."""
        skipped = {Path(".git", name) for name in ("objects", "logs", "info")} | {Path(".git", "ORIG_HEAD")}
        digests = {str(path): _digest(top / path) for path in _walk(top, Path(), skipped | {Path(COUNCIL_FOLDER)})}
        return cls(
            {path: digest for path, digest in digests.items() if path.startswith(".git/")},
            {path: digest for path, digest in digests.items() if not path.startswith(".git/")},
        )

    def changes(self, after: Fingerprint, *, target: str, checked_out: bool) -> list[str]:
        """Return the differences in `after`, except the target's ref and, if checked out, its index and files."""
        allowed = {f".git/refs/heads/{target}"} | ({".git/index"} if checked_out else set())
        pairs = [(self.git, after.git)] if checked_out else [(self.git, after.git), (self.files, after.files)]
        return sorted(
            path
            for one, other in pairs
            for path in one.keys() | other.keys()
            if one.get(path) != other.get(path) and path not in allowed
        )


def _walk(top: Path, folder: Path, skipped: set[Path]) -> Iterator[Path]:
    for entry in os.scandir(top / folder):
        path = folder / entry.name
        if path in skipped:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(top, path, skipped)
        else:
            yield path


def _digest(file: Path) -> str:
    if file.is_symlink():
        return f"-> {file.readlink()}"
    return f"{file.stat().st_mode:o} {hashlib.sha256(file.read_bytes()).hexdigest()}"
