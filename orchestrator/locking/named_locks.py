"""Named locks for programs: shared by readers, exclusive for a writer, with an owner, an expiry and a time-out.

A lock is a document of the store, so it counts for all processes and machines that use the store. A holder counts until
it releases the lock, its time is over, or its process is known to have died on this machine. Waiters are served in the
order of asking. For courtesy, as all locks with an expiry are: who was silent for too long is not kept from writing.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, get_args

import anyio

from orchestrator.domain.scheduling.deadlocks import LockWait, find_deadlock, merge_waits
from orchestrator.errors import LockUnavailable, RefusedError, UnreadableDocument, VersionConflict
from orchestrator.protocols import Commit, Document, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import follow_log
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.state.documents.validation import LOCK_KIND, filter_readable, find_document_error
from orchestrator.state.log.boot import boot_id
from orchestrator.state.log.codec import MAX_TTL
from orchestrator.system.clock import Clock
from orchestrator.system.process_table import start_ticks

LockMode = Literal["read", "write"]

#: Seconds until a lock ends by itself, and that it is waited for, unless the caller says otherwise.
DEFAULT_EXPIRY: Final = 30.0
DEFAULT_TIMEOUT: Final = 5.0
#: The longest time between two looks at a lock that is waited for: its holder may have died.
_LOOK: Final = 0.5
_TRIES: Final = 50


@dataclass(frozen=True, slots=True)
class LockInfo:
    """One taking of a lock, held or waited for. Times are wall-clock seconds."""

    id: str
    """Of this one taking, no other's."""
    name: str
    mode: LockMode
    owner: str
    acquired_at: float
    """While it waits: when it was asked for."""
    expires_at: float
    host: str
    boot: str
    pid: int
    started: int | None

    @property
    def is_process_dead(self) -> bool:
        """Whether its process is known to have ended: on this machine alone."""
        if self.host != socket.gethostname():
            return False
        return self.boot != boot_id() or (self.started is not None and start_ticks(self.pid) != self.started)

    def counts(self, now: float) -> bool:
        """Whether it still holds or waits."""
        return now < self.expires_at and not self.is_process_dead


@dataclass(frozen=True, slots=True)
class _LockState:
    version: int = 0
    holders: tuple[LockInfo, ...] = ()
    waiters: tuple[LockInfo, ...] = ()

    @classmethod
    def of(cls, found: Document | None, now: float) -> _LockState:
        """Return what counts of a lock's document."""
        if found is None:
            return cls()
        if (flaw := find_document_error(found)) is not None:
            raise UnreadableDocument(str(found.key), flaw)
        value: dict[str, Any] = found.value
        holders, waiters = (
            tuple(one for one in (LockInfo(**item) for item in value[part]) if one.counts(now))
            for part in ("holders", "waiters")
        )
        return cls(found.version, holders, waiters)

    def to_json(self) -> JsonObject:
        """Return the document."""
        return {"holders": [*map(asdict, self.holders)], "waiters": [*map(asdict, self.waiters)]}

    def blockers(self, wanted: LockInfo) -> list[LockInfo]:
        """Return those that a taking has to wait for: holders, and waiters before it."""
        places = [one.id for one in self.waiters]
        before = self.waiters[: places.index(wanted.id)] if wanted.id in places else self.waiters
        return [one for one in (*self.holders, *before) if "write" in (one.mode, wanted.mode)]


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
        timeout: float = DEFAULT_TIMEOUT,
    ) -> LockInfo:
        """Take a lock, and return what was taken; `release` takes that.

        Any number may hold it in the mode `read` at once, one alone in the mode `write`. `owner` is who wants it, this
        process unless given; `expiry` is after how many seconds it ends by itself, `timeout` how many seconds it is
        waited for (0 only tries). LockRefused names the holder where it was not free in time, and the circle at once
        where waiting would never end because owners wait for each other. RefusedError where the owner has it already,
        for another mode, and for times of more than 1e9 seconds.
        A cancelled call has taken nothing.
        """
        _check(name, mode, owner, expiry, timeout)
        now, until = self._clock.now(), self._clock.monotonic() + timeout
        pid, host = os.getpid(), socket.gethostname()
        who = owner or f"{host}:{pid}"
        wanted = LockInfo(
            secrets.token_hex(8), name, mode, who, now, now + timeout + _LOOK, host, boot_id(), pid, start_ticks(pid)
        )
        is_held = False
        try:
            while True:
                position = await self._store.position()
                state = await retry_on_conflict(lambda: self._try(wanted, expiry, waits=timeout > 0), _TRIES)
                taken = next((one for one in state.holders if one.id == wanted.id), None)
                if taken is not None:
                    is_held = True
                    return taken
                blockers = state.blockers(wanted)
                circle = find_deadlock(who, await self._waits())
                if circle is not None:
                    raise LockUnavailable(
                        name, f"waiting for it would never end: {circle}", "release a lock, and retry"
                    )
                left = until - self._clock.monotonic()
                if left <= 0:
                    raise _timed_out(name, blockers, timeout)
                ends = min((one.expires_at for one in blockers), default=0.0) - self._clock.now()
                await self._change(Key(LOCK_KIND, name), position, min(left, _LOOK, max(ends, 0.0)))
        finally:
            if not is_held and timeout > 0:
                with anyio.CancelScope(shield=True):
                    await retry_on_conflict(lambda: self._drop(wanted), _TRIES)

    async def release(self, lock: LockInfo) -> bool:
        """Release a lock; return whether it was held until now, and had not expired."""
        return await retry_on_conflict(lambda: self._drop(lock), _TRIES)

    async def held(self) -> list[LockInfo]:
        """Return what is held, the oldest first."""
        found = [_LockState.of(one, self._clock.now()) for one in filter_readable(await self._store.list(LOCK_KIND))]
        return sorted((one for state in found for one in state.holders), key=lambda one: (one.acquired_at, one.id))

    async def cleanup_expired(self) -> list[str]:
        """Delete what expired or dead owners left; return the names of the locks that this has freed."""
        freed = []
        for one in filter_readable(await self._store.list(LOCK_KIND)):
            state = _LockState.of(one, self._clock.now())
            if len(state.holders) < len(one.value["holders"]) or not (state.holders or state.waiters):
                try:
                    await self._write(one.key, state)
                    freed.append(one.key.id)
                except VersionConflict:  # somebody has just taken it
                    continue
        return freed

    async def _try(self, wanted: LockInfo, expiry: float, *, waits: bool) -> _LockState:
        """Take a lock if it is free, else wait for it; return how it stands then."""
        key, now = Key(LOCK_KIND, wanted.name), self._clock.now()
        state = _LockState.of(await self._store.get(key), now)
        if any(one.owner == wanted.owner for one in state.holders):
            remedy = "release it first; a read lock can't become a write lock while it is held"
            raise RefusedError(f"{wanted.owner} holds {wanted.name} already", remedy)
        others = tuple(one for one in state.waiters if one.id != wanted.id)
        if not state.blockers(wanted):
            taken = replace(wanted, acquired_at=now, expires_at=now + expiry)
            after = replace(state, holders=(*state.holders, taken), waiters=others)
        elif waits and len(others) == len(state.waiters):
            after = replace(state, waiters=(*state.waiters, wanted))
        else:
            return state
        await self._write(key, after)
        return after

    async def _drop(self, lock: LockInfo) -> bool:
        key = Key(LOCK_KIND, lock.name)
        state = _LockState.of(await self._store.get(key), self._clock.now())
        holders = tuple(one for one in state.holders if one.id != lock.id)
        waiters = tuple(one for one in state.waiters if one.id != lock.id)
        was_held = len(holders) < len(state.holders)
        if was_held or len(waiters) < len(state.waiters):
            await self._write(key, replace(state, holders=holders, waiters=waiters))
        return was_held

    async def _write(self, key: Key, state: _LockState) -> None:
        value = state.to_json() if state.holders or state.waiters else None
        await self._store.commit(Commit([Write(key, state.version, value)], durable=False))

    async def _waits(self) -> dict[str, LockWait]:
        """Return who waits for whom, over all locks."""
        waits: dict[str, LockWait] = {}
        for found in filter_readable(await self._store.list(LOCK_KIND)):
            state = _LockState.of(found, self._clock.now())
            for one in state.waiters:
                blockers = {other.owner for other in state.blockers(one)}
                waits = merge_waits(waits, {one.owner: LockWait(one.acquired_at, one.name, blockers)})
        return waits

    async def _change(self, key: Key, position: int, seconds: float) -> None:
        """Wait until a lock has changed since a position, for at most so many seconds."""
        changed = anyio.Event()

        async def look() -> None:
            async with aclosing(follow_log(self._store, position)) as records:
                async for record in records:
                    if key in record.documents:
                        break
            changed.set()

        async with anyio.create_task_group() as group:
            group.start_soon(look)
            await self._clock.wait(changed, self._clock.monotonic() + seconds)
            group.cancel_scope.cancel()


def _check(name: object, mode: object, owner: object, expiry: float, timeout: float) -> None:
    """Refuse what could not be read back: of programs that check no types, too."""
    if not isinstance(name, str) or not (owner is None or isinstance(owner, str)):
        raise RefusedError(f"lock {name!r} can't be taken by {owner!r}", "its name and its owner are text")
    if mode not in get_args(LockMode):
        raise RefusedError(f"lock {name!r} has no mode {mode!r}", f"choose one of {', '.join(get_args(LockMode))}")
    if not name or not 0 < expiry <= MAX_TTL or not 0 <= timeout <= MAX_TTL:
        what = f"lock {name!r} can't be taken for {expiry:g} s within {timeout:g} s"
        remedy = f"give it a name, an expiry above 0 and a timeout of at least 0, both of at most {MAX_TTL:g} s"
        raise RefusedError(what, remedy)


def _timed_out(name: str, blockers: Sequence[LockInfo], timeout: float) -> LockUnavailable:
    if not blockers:
        return LockUnavailable(name, f"it was not free within {timeout:g} s", "try again")
    first = blockers[0]
    who = f"{first.owner} (process {first.pid} on {first.host}, mode {first.mode})"
    return LockUnavailable(name, f"held by {who}, not free within {timeout:g} s", "wait longer, or release it there")
