"""File locks of sessions, shared between the processes of one machine.

These locks are for correctness: the kernel releases them when the process that took them dies, whatever its CLIs do.
Each file has a permanent lock file (`locking.lock_names`), which names its exclusive holder, and a second lock, the
gate. A request takes the gate first and keeps it while it waits for the lock. So later requests can't overtake, and
sharers can't starve an exclusive request. Within a process, requests are served in order.

Multiple locks are taken in name order, all or none, so concurrent calls can't deadlock. Locks that sessions already
hold can deadlock: a waiter checks immediately and then regularly whether it is part of a cycle of waiting sessions
(`domain.scheduling.deadlocks`), and the session in the cycle that began to wait last gives up.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, NamedTuple

import anyio
import anyio.to_thread

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.deadlocks import LockWait, find_deadlock, merge_waits
from orchestrator.errors import CouncilError, FileLocked, LockUnavailable, RefusedError
from orchestrator.locking.lock_names import canonical_path, folds_case, lock_name
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock, FileLockMode, HeldLock, LockHolder
from orchestrator.system.resources import read_resources

#: Seconds to wait for a file.
FILE_LOCK_TIMEOUT: Final = 5.0

#: Seconds between deadlock checks: sessions that begin to wait simultaneously may not see each other at first.
_DEADLOCK_INTERVAL: Final = 0.25

_LOCK, _GATE = ".lock", ".gate"
#: The number of files whose lock names are cached.
_MAX_CACHED: Final = 10_000


@dataclass(frozen=True, slots=True)
class FileLockRecord:
    """A session's held or requested lock on a file."""

    id: str
    path: str
    """The canonical path, relative to the root of the repository."""
    mode: FileLockMode
    owner: str
    """The session, as `<run>/<task>.<attempt>`."""
    since: float
    """Wall-clock seconds."""
    pid: int
    """The process that takes the lock for the session."""
    state: Literal["held", "waiting"] = "held"


@dataclass(frozen=True, slots=True)
class _HeldFileLock:
    record: FileLockRecord
    lock: HeldLock
    marker: LockMarker | None
    """For shared locks, because the lock file has room for only one holder."""

    def release(self) -> None:
        if self.marker is None:
            self.lock.write_holder(None)
        self.lock.release()
        if self.marker is not None:
            self.marker.drop()


#: File descriptors reserved for other purposes. Each lock takes one.
_RESERVE: Final = 512


def _check_descriptors(count: int) -> None:
    """Raise RefusedError if `count` locks need too many file descriptors. Blocks."""
    resources = read_resources()
    if count and resources.descriptor_limit is not None:
        left = resources.descriptor_limit - resources.descriptors_open
        if left < count + min(_RESERVE, resources.descriptor_limit // 2):
            message = (
                f"can't take {count} more locks: only {left} of {resources.descriptor_limit} file descriptors are free"
            )
            raise RefusedError(message, "unlock files, lock a folder instead, or raise `ulimit -n`")


MarkerKind = Literal["shares", "waits"]

#: Seconds after which an incomplete marker is stale. Creating one takes far less.
_MAX_CREATION_SECONDS: Final = 60.0


class LiveMarker(NamedTuple):
    """A marker whose creator is alive."""

    kind: MarkerKind
    holder: LockHolder


class LockMarker:
    """A small file that identifies a sharer or waiter of a lock, until dropped.

    Markers are informational: no decision depends on them. The creator holds a lock on its marker, so an unlocked
    marker is stale.
    """

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


class FileLocks:
    """The file locks of this process's sessions, in the project's folder."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder, self._clock = folder, clock
        self._held: dict[SessionName, dict[str, _HeldFileLock]] = {}
        self._requested: set[tuple[SessionName, str]] = set()
        self._known: dict[str, tuple[FileLock, FileLock]] = {}

    async def acquire(
        self,
        session: SessionName,
        paths: Sequence[str],
        *,
        shared: bool = False,
        timeout: float = FILE_LOCK_TIMEOUT,  # noqa: ASYNC109  (raises FileLocked)
        also: Callable[[], Awaitable[Mapping[str, LockWait]]] | None = None,
    ) -> Sequence[FileLockRecord]:
        """Lock files for a session, all or none; return the records.

        The paths are relative to the root of the repository; symlinks are not followed. `timeout` is in seconds (0:
        don't wait). `also` returns sessions' waits for resources other than files. A cancelled call locks nothing.
        Raises FileLocked, which names the holder; RefusedError for a path that is outside the repository, or that the
        session has already locked or is waiting for; and, immediately, LockUnavailable if sessions wait for each other
        in a cycle and this one began to wait last.
        """
        await anyio.to_thread.run_sync(_check_descriptors, len(paths))
        wanted = self._wanted(session, paths)
        self._requested |= {(session, path) for path in wanted}
        try:
            with ExitStack() as releases:
                taken: dict[str, _HeldFileLock] = {}
                until = anyio.current_time() + timeout
                for path in wanted:
                    held = self._try_acquire(session, path, shared=shared)
                    if held is None and timeout > 0:
                        held = await self._wait_until(until, session, path, shared=shared, also=also)
                    if held is None:
                        raise self._refusal(path)
                    taken[path] = held
                    releases.callback(held.release)
                self._held.setdefault(session, {}).update(taken)
                releases.pop_all()
                return [held.record for held in taken.values()]
        finally:
            self._requested -= {(session, path) for path in wanted}

    async def release(self, session: SessionName, paths: Sequence[str]) -> int:
        """Release the given locks of a session; return the number of locked paths."""
        held = self._held.get(session, {})
        return self._release(session, {self._canonical(path) for path in paths} & held.keys())

    async def release_all(self, session: SessionName) -> int:
        """Release all locks of a session; return their number."""
        return self._release(session, list(self._held.get(session, {})))

    def held(self, session: SessionName | None = None) -> Sequence[FileLockRecord]:
        """Return the locks of this process, of one session or of all."""
        chosen = self._held if session is None else {session: self._held.get(session, {})}
        return [lock.record for locks in chosen.values() for lock in locks.values()]

    @cached_property
    def _folds_case(self) -> bool:
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # mkdir ignores `mode` for parents
        self._folder.mkdir(mode=0o700, exist_ok=True)
        return folds_case(self._folder)

    def _canonical(self, path: str) -> str:
        return canonical_path(path, folds_case=self._folds_case)

    def _wanted(self, session: SessionName, paths: Sequence[str]) -> list[str]:
        wanted = sorted({self._canonical(path) for path in paths})
        for path in wanted:
            if path in self._held.get(session, {}):
                raise RefusedError(f"{session} has already locked {path}", "continue, or unlock it first")
            if (session, path) in self._requested:
                raise RefusedError(f"{session} is already waiting for {path}", "wait for that request, or cancel it")
        return wanted

    def _try_acquire(self, session: SessionName, path: str, *, shared: bool) -> _HeldFileLock | None:
        """Take a lock that has no holders or waiters; otherwise return None."""
        # On the event loop: taking an uncontended lock is faster than a thread hop.
        gate, lock = self._locks_of(path)
        held_gate = gate.try_acquire()
        if held_gate is None:
            return None
        try:
            held = lock.try_acquire(shared=shared)
        finally:
            held_gate.release()
        return None if held is None else self._record_holder(held, session, path, shared=shared)

    async def list_waits(self) -> dict[str, LockWait]:
        """Return the sessions of all processes that wait for files, with their blockers."""
        return find_waits(await anyio.to_thread.run_sync(list_file_locks, self._folder))

    async def _wait_until(
        self,
        until: float,
        session: SessionName,
        path: str,
        *,
        shared: bool,
        also: Callable[[], Awaitable[Mapping[str, LockWait]]] | None,
    ) -> _HeldFileLock | None:
        """Wait for a lock; return None at the deadline. Raises LockUnavailable on a cycle."""
        held: _HeldFileLock | None = None
        cycle: str | None = None
        failure: CouncilError | OSError | None = None

        async def watch_for_deadlock(scope: anyio.CancelScope) -> None:
            nonlocal cycle
            while True:
                cycle = find_deadlock(
                    str(session), merge_waits(await self.list_waits(), {} if also is None else await also())
                )
                if cycle is not None:
                    scope.cancel()
                    return
                await anyio.sleep(_DEADLOCK_INTERVAL)

        with ExitStack() as undo:
            with anyio.CancelScope(deadline=until) as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(watch_for_deadlock, scope)
                    try:
                        held = await self._wait(session, path, shared=shared)
                        undo.callback(held.release)
                    except (CouncilError, OSError) as error:
                        failure = error
                    group.cancel_scope.cancel()
            undo.pop_all()
        if failure is not None:
            raise failure
        if held is None and cycle is not None:
            raise LockUnavailable(path, f"waiting would deadlock: {cycle}", "unlock files, then retry")
        return held

    async def _wait(self, session: SessionName, path: str, *, shared: bool) -> _HeldFileLock:
        gate, lock = self._locks_of(path)
        with ExitStack() as undo:
            undo.callback(LockMarker(self._folder, "waits", self._holder(session, path, shared=shared)).drop)
            undo.callback((await gate.acquire()).release)
            held = await lock.acquire(shared=shared)
        return self._record_holder(held, session, path, shared=shared)

    def _record_holder(self, lock: HeldLock, session: SessionName, path: str, *, shared: bool) -> _HeldFileLock:
        holder = self._holder(session, path, shared=shared)
        if not shared:
            lock.write_holder(holder)
            return _HeldFileLock(_record(holder), lock, None)
        with ExitStack() as undo:
            undo.callback(lock.release)
            marker = LockMarker(self._folder, "shares", holder)
            undo.pop_all()
        return _HeldFileLock(_record(holder), lock, marker)

    def _locks_of(self, path: str) -> tuple[FileLock, FileLock]:
        """Return the gate and the lock of a path."""
        if (known := self._known.get(path)) is None:
            if len(self._known) >= _MAX_CACHED:
                self._known.clear()
            name = lock_name(path)
            known = FileLock(self._folder / f"{name}{_GATE}"), FileLock(self._folder / f"{name}{_LOCK}")
            self._known[path] = known
        return known

    def _holder(self, session: SessionName, path: str, *, shared: bool) -> LockHolder:
        return LockHolder.now(self._clock.now(), "shared" if shared else "exclusive", str(session), path)

    def _refusal(self, path: str) -> FileLocked:
        for record in list_file_locks(self._folder, lock_name(path)):
            if record.path == path and record.state == "held":
                return FileLocked(path, f"{record.owner} (process {record.pid})", record.since)
        return FileLocked(path, "an unknown holder", None)

    def _release(self, session: SessionName, paths: Iterable[str]) -> int:
        held = self._held.get(session, {})
        released = [held.pop(path) for path in paths]
        if not held:
            self._held.pop(session, None)
        for lock in released:
            lock.release()
        return len(released)


def find_waits(records: Sequence[FileLockRecord]) -> dict[str, LockWait]:
    """Return the waiters, each with the holders and earlier waiters that block it."""
    waits: dict[str, LockWait] = {}
    for record in records:
        if record.state == "waiting":
            rivals = (other for other in records if other.path == record.path and other.owner != record.owner)
            blockers = {
                other.owner
                for other in rivals
                if "exclusive" in (record.mode, other.mode)
                and (other.state == "held" or (other.since, other.id) < (record.since, record.id))
            }
            waits = merge_waits(waits, {record.owner: LockWait(record.since, record.path, blockers)})
    return waits


def list_file_locks(folder: Path, name: str = "*") -> list[FileLockRecord]:
    """Return the held and requested file locks of a folder, oldest first.

    `name` selects one by its `lock_name`. Any process may call this. A concurrent attempt to take a lock may briefly
    find it held.
    """
    records = [
        _record(marker.holder, "held" if marker.kind == "shares" else "waiting") for marker in list_markers(folder)
    ]
    for path in folder.glob(f"{name}{_LOCK}"):
        holder = LockHolder.read(path)
        if holder is None:  # no exclusive holder
            continue
        if (free := FileLock(path).try_acquire(shared=True)) is not None:
            free.release()  # the holder's process has died
        else:
            records.append(_record(holder))
    return sorted(records, key=lambda record: (record.since, record.path, record.owner))


def _record(holder: LockHolder, state: Literal["held", "waiting"] = "held") -> FileLockRecord:
    return FileLockRecord(holder.id, holder.subject, holder.mode, holder.owner, holder.since, holder.pid, state)
