"""Markers: small files that identify the sharers and waiters of a lock.

Markers are informational: no decision depends on them. The creator holds a lock on its marker, so an unlocked marker is
stale.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple

from orchestrator.system.file_lock import FileLock, LockHolder

MarkerKind = Literal["shares", "waits"]

#: Seconds after which an incomplete marker is stale. Creating one takes far less.
_MAX_CREATION_SECONDS: Final = 60.0


class LiveMarker(NamedTuple):
    """A marker whose creator is alive."""

    kind: MarkerKind
    holder: LockHolder


class LockMarker:
    """A marker that exists until dropped."""

    def __init__(self, folder: Path, kind: MarkerKind, holder: LockHolder) -> None:
        """Create a marker. Raises OSError if that fails."""
        self._path = folder / f"{holder.id}.{kind}"
        made = folder / f"{holder.id}.new"
        lock = FileLock(made).try_acquire()
        assert lock is not None, "the name is unique"  # noqa: S101  (for the type checker)
        self._lock = lock
        with ExitStack() as stack:
            stack.callback(lock.release)
            stack.callback(made.unlink, missing_ok=True)
            lock.write_holder(holder)
            made.rename(self._path)  # it becomes visible only once locked
            stack.pop_all()

    def drop(self) -> None:
        """Remove the marker. Call once."""
        self._path.unlink(missing_ok=True)
        self._lock.release()


@contextmanager
def hold_marker(folder: Path, kind: MarkerKind, holder: LockHolder) -> Iterator[None]:
    """Keep a marker for the duration of the block."""
    marker = LockMarker(folder, kind, holder)
    try:
        yield
    finally:
        marker.drop()


def list_markers(folder: Path) -> Iterator[LiveMarker]:
    """Yield the live markers and remove stale ones."""
    kinds: tuple[MarkerKind, MarkerKind] = ("shares", "waits")
    for kind in kinds:
        for path in sorted(folder.glob(f"*.{kind}")):
            holder = LockHolder.read(path)
            # Shared, so that concurrent scans don't mistake each other for the creator.
            if (stale := FileLock(path).try_acquire(shared=True)) is not None:
                path.unlink(missing_ok=True)
                stale.release()
            elif holder is not None:
                yield LiveMarker(kind, holder)
    for path in folder.glob("*.new"):
        _remove_old(path)


def _remove_old(path: Path) -> None:
    """Remove an incomplete marker of a killed process, recognized by its age."""
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime > _MAX_CREATION_SECONDS:
            path.unlink()
