"""Marks: small files that say who shares a lock or waits for one, for as long as whoever made them lives.

A mark proves nothing and decides nothing: it is there for people to see. Its maker holds a lock on it, so that one
that was left behind is known by its being free.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple

from orchestrator.system.file_lock import FileLock, LockHolder

MarkerKind = Literal["shares", "waits"]

#: More than it takes to make a mark, by far.
_SECONDS_TO_MAKE: Final = 60.0


class LiveMarker(NamedTuple):
    """A mark of somebody who lives."""

    kind: MarkerKind
    signature: LockHolder


class LockMarker:
    """A mark that is there until it is dropped."""

    def __init__(self, folder: Path, kind: MarkerKind, signature: LockHolder) -> None:
        """Make a mark; OSError if that can't be done."""
        self._path = folder / f"{signature.id}.{kind}"
        made = folder / f"{signature.id}.new"
        lock = FileLock(made).try_acquire()
        assert lock is not None, "nobody else knows of it"
        self._lock = lock
        with ExitStack() as stack:
            stack.callback(lock.release)
            stack.callback(made.unlink, missing_ok=True)
            lock.write_holder(signature)
            made.rename(self._path)  # from now on it can be found, and is locked already
            stack.pop_all()

    def drop(self) -> None:
        """Remove it; once."""
        self._path.unlink(missing_ok=True)
        self._lock.release()


@contextmanager
def hold_marker(folder: Path, kind: MarkerKind, signature: LockHolder) -> Iterator[None]:
    """Have a mark for the body."""
    mark = LockMarker(folder, kind, signature)
    try:
        yield
    finally:
        mark.drop()


def list_markers(folder: Path) -> Iterator[LiveMarker]:
    """Yield the marks of those who live, and remove what others left."""
    kinds: tuple[MarkerKind, MarkerKind] = ("shares", "waits")
    for kind in kinds:
        for path in sorted(folder.glob(f"*.{kind}")):
            signature = LockHolder.read(path)
            # Shared, or two that look at once would take each other for its maker.
            if (left := FileLock(path).try_acquire(shared=True)) is not None:
                path.unlink(missing_ok=True)
                left.release()
            elif signature is not None:
                yield LiveMarker(kind, signature)
    for path in folder.glob("*.new"):
        _remove_old(path)


def _remove_old(path: Path) -> None:
    """Remove what was to become a mark when its maker was killed; one that is being made is younger."""
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime > _SECONDS_TO_MAKE:
            path.unlink()
