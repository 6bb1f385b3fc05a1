"""The orchestrators of a run: each has a record in the store, by which the others know that it is at work.

Signs of life are commits that need not be durable. Who has given none for too long, or whose process is proven to have
ended, is taken for gone by whoever notices first; its record then carries another epoch, so that nothing of what it may
still want to write is accepted.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import anyio
from pydantic import ValidationError

from orchestrator.domain.scheduling.claims import (
    ClaimCounters,
    ClaimTiming,
    OrchestratorIdentity,
    OrchestratorLease,
    OwnerStatus,
    Role,
    judge_owner_status,
)
from orchestrator.errors import (
    CouncilError,
    OrchestratorFenced,
    UnreadableDocument,
    VersionConflict,
    describe_validation_error,
)
from orchestrator.protocols import Commit, Document, Guard, Key, Store, Write
from orchestrator.state.log.boot import boot_id
from orchestrator.system.clock import Clock
from orchestrator.system.process_table import start_ticks

_KIND = "orchestrator"

#: For so many seconds a process that was not dead is taken not to be, without a look at it.
_LIVENESS_CACHE_SECONDS = 1.0

_log = logging.getLogger("orchestrator.claims")
# Who wants to read it says so: without a handler, Python would print warnings to the terminal.
_log.addHandler(logging.NullHandler())


def orchestrator_key(run: str, orchestrator: str) -> Key:
    """Return the key of an orchestrator's record."""
    return Key(_KIND, f"{run}/{orchestrator}")


def create_owner(role: Role, *, shares: bool = True) -> OrchestratorIdentity:
    """Return this process as an orchestrator under a new name; `shares` says whether others can be beside it."""
    host, pid = socket.gethostname(), os.getpid()
    return OrchestratorIdentity(
        id=f"{host}-{pid}-{secrets.token_hex(3)}",
        host=host,
        boot=boot_id(),
        pid=pid,
        started=start_ticks(pid),
        role=role,
        shares=shares,
    )


async def read_orchestrators(store: Store, run: str) -> dict[str, OrchestratorLease]:
    """Return the records of all that were ever at work in a run, by their names."""
    found = [_read(document) for document in await store.list(_KIND, f"{run}/")]
    return {one.owner.id: one for one in found if one is not None}


def _read(document: Document | None) -> OrchestratorLease | None:
    """Return a record; None where there is none, or nobody knows what it is by now."""
    if document is None or document.damaged:
        return None
    try:
        return OrchestratorLease.model_validate_json(document.encoded)
    except ValidationError as error:
        raise UnreadableDocument(str(document.key), describe_validation_error(error)) from None


class _Heartbeat(NamedTuple):
    """A sign of life: which, since when it is the last, and when that was last looked at (monotonic seconds)."""

    heartbeat: float
    since: float
    looked: float


class RunMembership:
    """Those of one run, as one of them, `me`, sees them."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        run: str,
        me: OrchestratorIdentity,
        timing: ClaimTiming,
        is_dead: Callable[[str, OrchestratorIdentity], Awaitable[bool]],
    ) -> None:
        """Take a run; `is_dead` tells whether a process is proven to have ended, by its run and itself."""
        self.run, self.me, self.timing = run, me, timing
        self.counters = ClaimCounters()
        self.guard = Guard(orchestrator_key(run, me.id), 1)
        """What makes a commit refused once this orchestrator is taken for gone."""
        self._store, self._clock, self._is_dead = store, clock, is_dead
        self._version = 0
        self._record: OrchestratorLease | None = None
        self._writing = anyio.Lock()
        self._turns: dict[str, anyio.Lock] = {}
        self._deferred: list[Callable[[], Awaitable[None]]] = []
        self._seen: dict[tuple[str, str], _Heartbeat] = {}
        """By run and name."""
        self._alive: dict[str, float] = {}
        """When a process was last asked for, and was not proven to have ended (monotonic seconds)."""

    def promote(self) -> None:
        """This orchestrator has become the leader of its run."""
        self.me = self.me.model_copy(update={"role": Role.LEADER})
        if self._record is not None:
            self._record = self._record.model_copy(update={"owner": self.me})

    def count(self, **more: int) -> None:
        """Count what became of claims; it is recorded with the next sign of life."""
        self.counters = self.counters.plus(**more)

    def turn(self, what: str) -> anyio.Lock:
        """Return what the tasks of this process take turns by at something that all of them do as this orchestrator."""
        return self._turns.setdefault(what, anyio.Lock())

    def defer(self, what: Callable[[], Awaitable[None]]) -> None:
        """Have something done with the next sign of life: the store could not be reached for it now."""
        self._deferred.append(what)

    def join_write(self) -> Write:
        """Return the write that makes this process one of them; `joined` is to follow."""
        now = self._clock.now()
        expires = now + self.timing.stale_after
        self._record = OrchestratorLease(owner=self.me, epoch=1, since=now, heartbeat=now, expires=expires)
        return Write(self.guard.key, 0, self._record.model_dump(mode="json"))

    def mark_joined(self) -> None:
        """The write of `joining` was committed."""
        self._version = 1

    async def join(self) -> None:
        """Become one of them."""
        try:
            await self._store.commit(Commit([self.join_write()]))
        except VersionConflict:  # nobody else has this name: a commit that we never learned of has done it
            self._version = await self._own_version()
        else:
            self.mark_joined()

    async def renew(self) -> None:
        """Give a sign of life for this orchestrator and all of its claims. Fenced where another took over."""
        now = self._clock.now()
        self.count(renewals=1)
        try:
            await self._write(heartbeat=now, expires=now + self.timing.stale_after)
        except CouncilError as error:
            _log.warning("claim sync failed: run %s, %s: %s", self.run, self.me.id, error)
            raise
        _log.info("claims synced: run %s, %s", self.run, self.me.id)
        while self._deferred:
            await self._deferred.pop(0)()

    async def leave(self, reason: str | None = None) -> None:
        """Say that this orchestrator is at work no more, which holds no claims by then; nothing where it is fenced."""
        try:
            await self._write(ended=self._clock.now(), reason=reason, epoch=2)
        except OrchestratorFenced:
            return

    async def _write(self, **changes: object) -> None:
        async with self._writing:
            assert self._record is not None, "it has joined"
            record = self._record.model_copy(update={"owner": self.me, **changes, "counters": self.counters})
            value = record.model_dump(mode="json")
            while True:
                write = Write(self.guard.key, self._version, value)
                try:
                    await self._store.commit(Commit([write], durable=False))
                except VersionConflict:
                    self._version = await self._own_version()
                else:
                    self._version, self._record = self._version + 1, record
                    return

    async def _own_version(self) -> int:
        """Return the version of our record, which a commit that we never learned of may have written."""
        found = await self._store.get(self.guard.key)
        record = _read(found)
        if found is None or record is None or record.epoch != self.guard.epoch:
            raise self._error(record)
        return found.version

    async def find_fencing_error(self) -> OrchestratorFenced | None:
        """Return the error that says why this orchestrator may write nothing any more; None if it still may."""
        record = _read(await self._store.get(self.guard.key))
        return None if record is not None and record.epoch == self.guard.epoch else self._error(record)

    def _error(self, record: OrchestratorLease | None) -> OrchestratorFenced:
        why = "its record is gone" if record is None else record.reason or "it has said that it ended"
        return OrchestratorFenced(self.run, self.me.id, why)

    async def all(self) -> dict[str, OrchestratorLease]:
        """Return the records of all that were ever at work in the run, by their names."""
        return await read_orchestrators(self._store, self.run)

    async def find_exclusive_peer(self) -> OrchestratorLease | None:
        """Return one beside which this one can't be at work, as one of the two shares the run with nobody.

        Each looks when it has joined: of two who join at once, one at least sees the other.
        """
        for one in (await self.all()).values():
            is_me = one.owner.id == self.me.id
            if is_me or (one.owner.shares and self.me.shares):
                continue
            if await self.standing(one) is OwnerStatus.ALIVE:
                return one
        return None

    async def is_outranked(self) -> bool:
        """Whether another process that is alive is to coordinate the run rather than this one, by their roles."""
        if self.me.role is Role.LEADER:
            return False
        others = [one for one in (await self.all()).values() if one.owner.role is Role.LEADER]
        return any([await self.standing(one) is OwnerStatus.ALIVE for one in others])

    async def find(self, orchestrator: str, run: str | None = None) -> OrchestratorLease | None:
        """Return the record of one, of this run or another."""
        return _read(await self._store.get(orchestrator_key(run or self.run, orchestrator)))

    async def read_liveness(self, orchestrator: str, run: str | None = None) -> OwnerStatus:
        """Return how one stands by its name; one without a record has ended."""
        found = await self.find(orchestrator, run)
        return OwnerStatus.ENDED if found is None else await self.standing(found, run)

    async def standing(self, one: OrchestratorLease, run: str | None = None) -> OwnerStatus:
        """Return how one stands."""
        if one.owner.id == self.me.id:
            return OwnerStatus.ALIVE if one.ended is None else OwnerStatus.ENDED
        is_here = (one.owner.host, one.owner.boot) == (self.me.host, self.me.boot)
        run = run or self.run
        # Nothing of a process outlives the machine's start; whose host has the same name is told by its lock.
        is_dead = one.ended is None and one.owner.host == self.me.host and await self._is_proven_dead(run, one.owner)
        now, watched = self._clock.now(), self._seconds_unchanged(run, one)
        return judge_owner_status(one, now, watched, self.timing, is_here=is_here, is_dead=is_dead)

    async def _is_proven_dead(self, run: str, owner: OrchestratorIdentity) -> bool:
        # As many tasks as somebody has claimed, as often it is asked how that one stands.
        now, asked = self._clock.monotonic(), self._alive.get(owner.id)
        if asked is not None and now - asked < _LIVENESS_CACHE_SECONDS:
            return False
        if await self._is_dead(run, owner):
            return True
        self._alive[owner.id] = now
        return False

    def expire_liveness(self, orchestrators: Iterable[str]) -> None:
        """Have it be looked again, the next time that somebody asks, whether these are dead."""
        for one in orchestrators:
            self._alive.pop(one, None)

    def _seconds_unchanged(self, run: str, one: OrchestratorLease) -> float:
        """Return for how many seconds this has been seen to be its last sign of life, without a long look away."""
        now, seen = self._clock.monotonic(), self._seen.get((run, one.owner.id))
        # A process that was stopped, or a whole machine, has to look anew: so may have been the other.
        away = max(self.timing.stale_after, 2 * self.timing.sweep_interval)
        is_new = seen is None or seen.heartbeat != one.heartbeat or now - seen.looked > away
        since = now if seen is None or is_new else seen.since
        self._seen[run, one.owner.id] = _Heartbeat(one.heartbeat, since, now)
        return now - since

    async def gone(self) -> dict[str, tuple[Document, OrchestratorLease, OwnerStatus]]:
        """Return those that are taken for gone and have not been told so yet."""
        self.count(sweeps=1)
        found: dict[str, tuple[Document, OrchestratorLease, OwnerStatus]] = {}
        for document in await self._store.list(_KIND, f"{self.run}/"):
            one = _read(document)
            if one is not None and (stands := await self.standing(one)) in {OwnerStatus.STALE, OwnerStatus.DEAD}:
                found[one.owner.id] = (document, one, stands)
        return found

    def describe_loss(self, one: OrchestratorLease, stands: OwnerStatus) -> str:
        """Return why one is gone, in words."""
        silence = self._clock.now() - one.heartbeat
        return "process exited" if stands is OwnerStatus.DEAD else f"no heartbeat for {silence:.0f} s"

    def ending(self, document: Document, one: OrchestratorLease, stands: OwnerStatus) -> Write:
        """Return the write that fences one that is gone."""
        reason = f"{self.me.id} took over: {self.describe_loss(one, stands)}"
        changes = {"ended": self._clock.now(), "reason": reason, "epoch": one.epoch + 1}
        return Write(document.key, document.version, one.model_copy(update=changes).model_dump(mode="json"))
