"""File locks of sessions: which session works at which file now, between the processes of one machine.

For correctness: the kernel frees them when the process that took them dies, whatever its CLIs do then. Each file has a
permanent lock file (`locking.lock_names`), which whoever holds it alone has signed, and a gate, a second lock: who takes the
lock passes the gate first, and who has to wait does so in the gate. So nobody who comes later overtakes, and those who
share a lock do not keep out for ever who wants it alone. Within one process the order is that of asking.

Several are taken in the order of their names or not at all, so that the calls of one moment make no circle. What their
sessions hold from before can: who waits looks at once, and then time and again, whether it is part of a circle of
waiting sessions (`domain.scheduling.deadlocks`), and the one that began to wait last gives up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import anyio.to_thread

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.deadlocks import LockWait, find_deadlock, merge_waits
from orchestrator.errors import CouncilError, FileLocked, LockUnavailable, RefusedError
from orchestrator.locking.lock_markers import LockMarker, hold_marker, list_markers
from orchestrator.locking.lock_names import canonical_path, folds_case, lock_name
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock, FileLockMode, HeldLock, LockHolder
from orchestrator.system.resources import read_resources

#: Seconds that a file is waited for.
FILE_LOCK_TIMEOUT: Final = 5.0

#: Seconds between two looks for a circle: of two that begin to wait at once, neither may have seen the other.
_LOOK: Final = 0.25

_LOCK, _GATE = ".lock", ".gate"
#: Of how many files at most it is kept what their locks are called.
_MAX_CACHED: Final = 10_000


@dataclass(frozen=True, slots=True)
class FileLockRecord:
    """One lock of a session's on one file, held or waited for."""

    id: str
    path: str
    """Relative to the top of the repository, in the one spelling that the lock is known by."""
    mode: FileLockMode
    owner: str
    """The session, as `<run>/<task>.<attempt>`."""
    since: float
    """Wall-clock seconds."""
    pid: int
    """Of the process that takes it for the session."""
    state: Literal["held", "waiting"] = "held"

    def to_json(self) -> dict[str, Any]:
        """Return the object that programs get."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _HeldFileLock:
    record: FileLockRecord
    lock: HeldLock
    mark: LockMarker | None
    """Of one that is shared: its lock file has no room for all that share it."""

    def release(self) -> None:
        if self.mark is None:
            self.lock.write_holder(None)
        self.lock.release()
        if self.mark is not None:
            self.mark.drop()


#: Descriptors that are left for everything else: each lock holds one.
_RESERVE: Final = 512


def _check_descriptors(count: int) -> None:
    """Refuse so many locks where this process would have too few descriptors left. Blocks."""
    facts = read_resources()
    if count and facts.descriptor_limit is not None:
        left = facts.descriptor_limit - facts.descriptors_open
        if left < count + min(_RESERVE, facts.descriptor_limit // 2):
            what = f"there is no room for {count} more locks: of {facts.descriptor_limit} open files {left} are left"
            raise RefusedError(what, "unlock files, lock the folder that they are in, or raise `ulimit -n`")


class FileLocks:
    """The file locks that one process takes for its sessions; `folder` is the same for all processes of a project."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder, self._clock = folder, clock
        self._held: dict[SessionName, dict[str, _HeldFileLock]] = {}
        self._asked: set[tuple[SessionName, str]] = set()
        self._known: dict[str, tuple[FileLock, FileLock]] = {}

    async def acquire(
        self,
        session: SessionName,
        paths: Sequence[str],
        *,
        shared: bool = False,
        timeout: float = FILE_LOCK_TIMEOUT,
        top: Path | None = None,
        also: Callable[[], Awaitable[Mapping[str, LockWait]]] | None = None,
    ) -> Sequence[FileLockRecord]:
        """Lock files for a session, all or none, and return the records; `timeout` is in seconds, 0 only tries.

        `top` is the worktree in which the paths are looked up; without it no link is followed. Raises FileHeld, which
        names who was in the way, and RefusedError at once for a path outside of the repository and for one that the
        session has locked, or is waiting for, already. LockRefused is raised at once where sessions wait for each other
        in a circle, of which this one began to wait last; `also` returns what they wait for besides files. A cancelled
        call has locked nothing.
        """
        await anyio.to_thread.run_sync(_check_descriptors, len(paths))
        wanted = self._wanted(session, paths, top)
        self._asked |= {(session, path) for path in wanted}
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
            self._asked -= {(session, path) for path in wanted}

    async def release(self, session: SessionName, paths: Sequence[str], *, top: Path | None = None) -> int:
        """Give locks of a session's back; return how many of the paths it had locked."""
        held = self._held.get(session, {})
        given = {self._canonical(path, top) for path in paths} & held.keys()
        return self._give_back(session, given)

    async def release_all(self, session: SessionName) -> int:
        """Give back all that a session has locked; return how much that was."""
        return self._give_back(session, list(self._held.get(session, {})))

    def held(self, session: SessionName | None = None) -> Sequence[FileLockRecord]:
        """Return what this process holds, for one session or for all."""
        chosen = self._held if session is None else {session: self._held.get(session, {})}
        return [one.record for held in chosen.values() for one in held.values()]

    @cached_property
    def _folds_case(self) -> bool:
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # a folder made as another's parent is open
        self._folder.mkdir(mode=0o700, exist_ok=True)
        return folds_case(self._folder)

    def _canonical(self, path: str, top: Path | None) -> str:
        return canonical_path(path, top, folds_case=self._folds_case)

    def _wanted(self, session: SessionName, paths: Sequence[str], top: Path | None) -> list[str]:
        wanted = sorted({self._canonical(path, top) for path in paths})
        for path in wanted:
            if path in self._held.get(session, {}):
                raise RefusedError(f"{session} has locked {path} already", "go on with it, or unlock it first")
            if (session, path) in self._asked:
                raise RefusedError(f"{session} is waiting for {path} already", "wait for that, or cancel it first")
        return wanted

    def _try_acquire(self, session: SessionName, path: str, *, shared: bool) -> _HeldFileLock | None:
        """Take a lock that nobody holds or waits for; None if somebody does."""
        # On the loop: what has not to wait costs less than handing it to a thread.
        gate, lock = self._locks_of(path)
        passing = gate.try_acquire()
        if passing is None:
            return None
        try:
            taken = lock.try_acquire(shared=shared)
        finally:
            passing.release()
        return None if taken is None else self._signed(taken, session, path, shared=shared)

    async def waits(self) -> dict[str, LockWait]:
        """Return which sessions wait for files, of this and of other processes, and for whom."""
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
        """Return the lock once it is had; None where the time is over. LockRefused where it would never be."""
        held: _HeldFileLock | None = None
        circle: str | None = None
        failure: CouncilError | OSError | None = None

        async def look(scope: anyio.CancelScope) -> None:
            nonlocal circle
            while True:
                circle = find_deadlock(
                    str(session), merge_waits(await self.waits(), {} if also is None else await also())
                )
                if circle is not None:
                    scope.cancel()
                    return
                await anyio.sleep(_LOOK)

        try:
            with anyio.CancelScope(deadline=until) as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(look, scope)
                    try:
                        held = await self._wait(session, path, shared=shared)
                    except (CouncilError, OSError) as error:
                        failure = error
                    group.cancel_scope.cancel()
        except BaseException:
            if held is not None:
                held.release()
            raise
        if failure is not None:
            raise failure
        if held is None and circle is not None:
            raise LockUnavailable(path, f"waiting for it would never end: {circle}", "unlock something, and ask again")
        return held

    async def _wait(self, session: SessionName, path: str, *, shared: bool) -> _HeldFileLock:
        gate, lock = self._locks_of(path)
        with hold_marker(self._folder, "waits", self._signature(session, path, shared=shared)):
            passing = await gate.take()
            try:
                taken = await lock.take(shared=shared)
            finally:
                passing.release()
        return self._signed(taken, session, path, shared=shared)

    def _signed(self, lock: HeldLock, session: SessionName, path: str, *, shared: bool) -> _HeldFileLock:
        signature = self._signature(session, path, shared=shared)
        if not shared:
            lock.write_holder(signature)
            return _HeldFileLock(_record(signature), lock, None)
        try:
            return _HeldFileLock(_record(signature), lock, LockMarker(self._folder, "shares", signature))
        except BaseException:
            lock.release()
            raise

    def _locks_of(self, path: str) -> tuple[FileLock, FileLock]:
        """Return the gate and the lock of a file."""
        if (known := self._known.get(path)) is None:
            if len(self._known) >= _MAX_CACHED:
                self._known.clear()
            name = lock_name(path)
            known = FileLock(self._folder / f"{name}{_GATE}"), FileLock(self._folder / f"{name}{_LOCK}")
            self._known[path] = known
        return known

    def _signature(self, session: SessionName, path: str, *, shared: bool) -> LockHolder:
        return LockHolder.now(self._clock.now(), "shared" if shared else "exclusive", str(session), path)

    def _refusal(self, path: str) -> FileLocked:
        for one in list_file_locks(self._folder, lock_name(path)):
            if one.path == path and one.state == "held":
                return FileLocked(path, f"{one.owner} (process {one.pid})", one.since)
        return FileLocked(path, "somebody who has not signed it", None)

    def _give_back(self, session: SessionName, paths: Iterable[str]) -> int:
        held = self._held.get(session, {})
        given = [held.pop(path) for path in paths]
        if not held:
            self._held.pop(session, None)
        for one in given:
            one.release()
        return len(given)


def find_waits(found: Sequence[FileLockRecord]) -> dict[str, LockWait]:
    """Return who waits for whom: for holders, and for waiters that came before, unless both share the lock."""
    waits: dict[str, LockWait] = {}
    for one in found:
        if one.state == "waiting":
            before = (other for other in found if other.path == one.path and other.owner != one.owner)
            blockers = {
                other.owner
                for other in before
                if "exclusive" in (one.mode, other.mode)
                and (other.state == "held" or (other.since, other.id) < (one.since, one.id))
            }
            waits = merge_waits(waits, {one.owner: LockWait(one.since, one.path, blockers)})
    return waits


def list_file_locks(folder: Path, name: str = "*") -> list[FileLockRecord]:
    """Return all file locks of a folder, held and waited for, the oldest first; of one lock by its `lock_name`.

    Any process can look. Whoever only tries to take a lock at that moment may find it held.
    """
    found = [_record(one.signature, "held" if one.kind == "shares" else "waiting") for one in list_markers(folder)]
    for path in folder.glob(f"{name}{_LOCK}"):
        signature = LockHolder.read(path)
        if signature is None:  # nobody has it alone
            continue
        if (free := FileLock(path).try_acquire(shared=True)) is not None:
            free.release()  # its process died with it
        else:
            found.append(_record(signature))
    return sorted(found, key=lambda one: (one.since, one.path, one.owner))


def _record(signature: LockHolder, state: Literal["held", "waiting"] = "held") -> FileLockRecord:
    return FileLockRecord(
        signature.id, signature.subject, signature.mode, signature.owner, signature.since, signature.pid, state
    )
