"""Named read/write locks for programs, with an owner, an expiry and a timeout.

A lock is a document in the store, so it is valid for all processes and machines that use the store. A holder is valid
until it releases the lock, the lock expires, or its process is known to have died on this machine. Waiters are served
in order. Like all locks with an expiry, these are advisory: a holder whose lock has expired is not prevented from
writing.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, get_args

import anyio

from orchestrator.domain.documents.stored import LockInfo, LockMode, NamedLock
from orchestrator.domain.scheduling.deadlocks import LockWait, find_deadlock, merge_waits
from orchestrator.errors import LockUnavailable, RefusedError, UnreadableDocument, VersionConflict
from orchestrator.protocols import Commit, Document, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import wait_for_commit
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.state.documents.validation import LOCK_KIND, filter_readable, find_document_error
from orchestrator.state.log.codec import MAX_TTL
from orchestrator.system.clock import Clock
from orchestrator.system.process_table import boot_id, start_ticks

#: Default seconds until a lock expires, and default seconds to wait for it.
DEFAULT_EXPIRY: Final = 30.0
DEFAULT_TIMEOUT: Final = 5.0
#: Maximum seconds between checks of an awaited lock, whose holder may have died.
_MAX_CHECK_INTERVAL: Final = 0.5
_TRIES: Final = 50


def is_process_dead(lock: LockInfo) -> bool:
    """Return whether the owner is a process of this machine that has exited."""
    if lock.host != socket.gethostname():
        return False
    return lock.boot != boot_id() or (lock.started is not None and start_ticks(lock.pid) != lock.started)


def _is_valid(lock: LockInfo, now: float) -> bool:
    """Return whether the lock has not expired and its process may be alive."""
    return now < lock.expires_at and not is_process_dead(lock)


@dataclass(frozen=True, slots=True)
class _LockState:
    version: int = 0
    holders: tuple[LockInfo, ...] = ()
    waiters: tuple[LockInfo, ...] = ()

    @classmethod
    def of(cls, document: Document | None, now: float) -> _LockState:
        """Return the valid holders and waiters in a lock's document."""
        if document is None:
            return cls()
        if (flaw := find_document_error(document)) is not None:
            raise UnreadableDocument(str(document.key), flaw)
        lock = NamedLock.model_validate_json(document.encoded)
        holders, waiters = (
            tuple(info for info in part if _is_valid(info, now)) for part in (lock.holders, lock.waiters)
        )
        return cls(document.version, holders, waiters)

    def to_json(self) -> JsonObject:
        """Return the JSON value of the document."""
        return {"holders": [*map(asdict, self.holders)], "waiters": [*map(asdict, self.waiters)]}

    def blockers(self, wanted: LockInfo) -> list[LockInfo]:
        """Return the holders and earlier waiters that a request must wait for."""
        ids = [waiter.id for waiter in self.waiters]
        earlier = self.waiters[: ids.index(wanted.id)] if wanted.id in ids else self.waiters
        return [lock for lock in (*self.holders, *earlier) if "write" in (lock.mode, wanted.mode)]


class NamedLocks:
    """The named locks of one store."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def acquire(
        self,
        name: str,
        *,
        mode: LockMode = "write",
        owner: str | None = None,
        expiry: float = DEFAULT_EXPIRY,
        timeout: float = DEFAULT_TIMEOUT,  # noqa: ASYNC109  (raises LockUnavailable)
    ) -> LockInfo:
        """Acquire a lock; pass the returned value to `release`.

        Mode `read` is shared, mode `write` is exclusive. `owner` defaults to this process. The lock expires after
        `expiry` seconds. Waits up to `timeout` seconds (0: does not wait). A cancelled call acquires nothing. Raises
        LockUnavailable with the holder on timeout, or immediately with the cycle if owners wait for each other. Raises
        RefusedError if the owner already has the lock, for an unknown mode, and for times over 1e9 seconds.
        """
        _check(name, mode, owner, expiry, timeout)
        key = Key(LOCK_KIND, name)
        since, deadline = self._clock.now(), self._clock.monotonic() + timeout
        pid, host = os.getpid(), socket.gethostname()
        owner = owner or f"{host}:{pid}"
        expires, lock_id = since + timeout + _MAX_CHECK_INTERVAL, secrets.token_hex(8)
        wanted = LockInfo(lock_id, name, mode, owner, since, expires, host, boot_id(), pid, start_ticks(pid))
        is_held = False
        try:
            while True:
                position = await self._store.position()
                state = await retry_on_conflict(lambda: self._try(wanted, expiry, waits=timeout > 0), _TRIES)
                held = next((lock for lock in state.holders if lock.id == wanted.id), None)
                if held is not None:
                    is_held = True
                    return held
                blockers = state.blockers(wanted)
                cycle = find_deadlock(owner, await self._waits())
                if cycle is not None:
                    raise LockUnavailable(name, f"waiting would deadlock: {cycle}", "release a lock, then retry")
                now = self._clock.monotonic()
                if now >= deadline:
                    raise _timed_out(name, blockers, timeout)
                until_expiry = min((lock.expires_at for lock in blockers), default=0.0) - self._clock.now()
                seconds = min(deadline - now, _MAX_CHECK_INTERVAL, max(until_expiry, 0.0))
                await wait_for_commit(
                    self._store, self._clock, position, lambda record: key in record.documents, now + seconds
                )
        finally:
            if not is_held and timeout > 0:
                with anyio.CancelScope(shield=True):
                    await retry_on_conflict(lambda: self._drop(wanted), _TRIES)

    async def release(self, lock: LockInfo) -> bool:
        """Release a lock; return whether it was still held."""
        return await retry_on_conflict(lambda: self._drop(lock), _TRIES)

    async def held(self) -> list[LockInfo]:
        """Return the held locks, oldest first."""
        documents = filter_readable(await self._store.list(LOCK_KIND))
        states = [_LockState.of(document, self._clock.now()) for document in documents]
        return sorted(
            (lock for state in states for lock in state.holders), key=lambda lock: (lock.acquired_at, lock.id)
        )

    async def cleanup_expired(self) -> list[str]:
        """Remove expired locks and those of dead owners; return the names of the locks."""
        freed = []
        for document in filter_readable(await self._store.list(LOCK_KIND)):
            state = _LockState.of(document, self._clock.now())
            if len(state.holders) < len(document.value["holders"]) or not (state.holders or state.waiters):
                try:
                    await self._write(document.key, state)
                    freed.append(document.key.id)
                except VersionConflict:  # another owner has just acquired it
                    continue
        return freed

    async def _try(self, wanted: LockInfo, expiry: float, *, waits: bool) -> _LockState:
        """Acquire a lock if it is free, else enter the queue; return the new state."""
        key, now = Key(LOCK_KIND, wanted.name), self._clock.now()
        state = _LockState.of(await self._store.get(key), now)
        if any(holder.owner == wanted.owner for holder in state.holders):
            remedy = "release it first; a held read lock can't become a write lock"
            raise RefusedError(f"{wanted.owner} already holds {wanted.name}", remedy)
        others = tuple(waiter for waiter in state.waiters if waiter.id != wanted.id)
        if not state.blockers(wanted):
            held = replace(wanted, acquired_at=now, expires_at=now + expiry)
            after = replace(state, holders=(*state.holders, held), waiters=others)
        elif waits and len(others) == len(state.waiters):
            after = replace(state, waiters=(*state.waiters, wanted))
        else:
            return state
        await self._write(key, after)
        return after

    async def _drop(self, lock: LockInfo) -> bool:
        key = Key(LOCK_KIND, lock.name)
        state = _LockState.of(await self._store.get(key), self._clock.now())
        holders = tuple(holder for holder in state.holders if holder.id != lock.id)
        waiters = tuple(waiter for waiter in state.waiters if waiter.id != lock.id)
        was_held = len(holders) < len(state.holders)
        if was_held or len(waiters) < len(state.waiters):
            await self._write(key, replace(state, holders=holders, waiters=waiters))
        return was_held

    async def _write(self, key: Key, state: _LockState) -> None:
        value = state.to_json() if state.holders or state.waiters else None
        await self._store.commit(Commit([Write(key, state.version, value)], durable=False))

    async def _waits(self) -> dict[str, LockWait]:
        """Return the waiting owners of all locks, with their blockers."""
        waits: dict[str, LockWait] = {}
        for document in filter_readable(await self._store.list(LOCK_KIND)):
            state = _LockState.of(document, self._clock.now())
            for waiter in state.waiters:
                blockers = {blocker.owner for blocker in state.blockers(waiter)}
                waits = merge_waits(waits, {waiter.owner: LockWait(waiter.acquired_at, waiter.name, blockers)})
        return waits


def _check(name: object, mode: object, owner: object, expiry: float, timeout: float) -> None:
    """Reject arguments that could not be read back, including those of a wrong type."""
    if not isinstance(name, str) or not (owner is None or isinstance(owner, str)):
        raise RefusedError(f"invalid lock name or owner: {name!r}, {owner!r}", "use strings for both")
    if mode not in get_args(LockMode):
        raise RefusedError(f"lock {name!r} has no mode {mode!r}", f"choose one of {', '.join(get_args(LockMode))}")
    if not name or not 0 < expiry <= MAX_TTL or not 0 <= timeout <= MAX_TTL:
        message = f"invalid lock request: name {name!r}, expiry {expiry:g} s, timeout {timeout:g} s"
        remedy = f"give it a name, an expiry above 0 and a timeout of at least 0, both at most {MAX_TTL:g} s"
        raise RefusedError(message, remedy)


def _timed_out(name: str, blockers: Sequence[LockInfo], timeout: float) -> LockUnavailable:
    if not blockers:
        return LockUnavailable(name, f"not released within {timeout:g} s", "retry")
    first = blockers[0]
    holder = f"{first.owner} (process {first.pid} on {first.host}, mode {first.mode})"
    return LockUnavailable(
        name, f"held by {holder}, not released within {timeout:g} s", "wait longer, or release it in the holder"
    )
