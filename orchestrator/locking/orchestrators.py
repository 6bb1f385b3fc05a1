"""Membership of orchestrators in a run: their records and heartbeats.

Heartbeats are commits that need not be durable. An orchestrator without a heartbeat for too long, or whose process is
proven dead, is declared gone by the first peer that notices. Its record then gets a new epoch, which fences all of its
later writes.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

import anyio
from pydantic import ValidationError

from orchestrator.domain.scheduling.claims import (
    MIN_WATCHED_HEARTBEATS,
    ClaimCounters,
    LeaseParticipant,
    OrchestratorIdentity,
    OrchestratorLease,
    OwnerStatus,
    Role,
    describe_loss,
    determine_owner_status,
)
from orchestrator.domain.settings.run_settings import CoordinationSettings
from orchestrator.errors import (
    CouncilError,
    OrchestratorFenced,
    UnreadableDocument,
    VersionConflict,
    describe_validation_error,
)
from orchestrator.protocols import Commit, Document, Guard, Key, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.process_table import boot_id, start_ticks

_KIND = "orchestrator"

#: Seconds for which a process found alive is not checked again.
_LIVENESS_CACHE_SECONDS = 1.0

_log = logging.getLogger("orchestrator.claims")
# Without a handler, Python would print warnings to the terminal.
_log.addHandler(logging.NullHandler())


def orchestrator_key(run: str, orchestrator: str) -> Key:
    """Return the key of an orchestrator's record."""
    return Key(_KIND, f"{run}/{orchestrator}")


def create_owner(role: Role, *, shares: bool = True, labels: Sequence[str] = ()) -> OrchestratorIdentity:
    """Return a new identity for this process, with the labels of its machine; `shares` allows peers in its runs."""
    host, pid = socket.gethostname(), os.getpid()
    return OrchestratorIdentity(
        id=f"{host}-{pid}-{secrets.token_hex(3)}",
        host=host,
        boot=boot_id(),
        pid=pid,
        started=start_ticks(pid),
        role=role,
        shares=shares,
        labels=tuple(labels),
    )


async def read_orchestrators(store: Store, run: str) -> dict[str, OrchestratorLease]:
    """Return the records of all orchestrators that ever joined a run, keyed by name."""
    records = [_read(document) for document in await store.list(_KIND, f"{run}/")]
    return {record.owner.id: record for record in records if record is not None}


def _read(document: Document | None) -> OrchestratorLease | None:
    """Return a record, or None if missing or damaged."""
    if document is None or document.damaged:
        return None
    try:
        return OrchestratorLease.model_validate_json(document.encoded)
    except ValidationError as error:
        raise UnreadableDocument(str(document.key), describe_validation_error(error)) from None


class _Heartbeat(NamedTuple):
    """The last heartbeat; when it was first seen and last checked (monotonic seconds)."""

    heartbeat: float
    since: float
    checked: float


class PeerObserver:
    """Decides by heartbeats and processes whether a run's orchestrators are alive."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        run: str,
        me: OrchestratorIdentity,
        timing: CoordinationSettings,
        is_dead: Callable[[str, OrchestratorIdentity], Awaitable[bool]],
    ) -> None:
        self._store = store
        self._clock, self._run, self._me, self._timing, self._is_dead = clock, run, me, timing, is_dead
        self._seen: dict[tuple[str, str], _Heartbeat] = {}
        """Heartbeats, keyed by run and name."""
        self._alive: dict[str, float] = {}
        """When a process was last checked and not proven dead (monotonic seconds), keyed by orchestrator."""
        self._renewed = math.inf
        """When our own heartbeat was last written (monotonic seconds); infinite if unknown."""

    async def all(self) -> dict[str, OrchestratorLease]:
        """Return the records of all orchestrators that ever joined the run, keyed by name."""
        return await read_orchestrators(self._store, self._run)

    async def find(self, orchestrator: str, run: str | None = None) -> OrchestratorLease | None:
        """Return the record of an orchestrator of this run or another."""
        return _read(await self._store.get(orchestrator_key(run or self._run, orchestrator)))

    async def read_liveness(self, orchestrator: str, run: str | None = None) -> OwnerStatus:
        """Return an orchestrator's status by name; ENDED if it has no record."""
        record = await self.find(orchestrator, run)
        return OwnerStatus.ENDED if record is None else await self.assess(record, run)

    async def find_exclusive_peer(self) -> OrchestratorLease | None:
        """Return a live peer with which this orchestrator can't share the run, or None.

        One of the two does not share its runs. Each checks after joining, so if two join simultaneously, at least one
        sees the other.
        """
        for record in (await self.all()).values():
            is_me = record.owner.id == self._me.id
            if is_me or (record.owner.shares and self._me.shares):
                continue
            if await self.assess(record) is OwnerStatus.ALIVE:
                return record
        return None

    async def find_gone(self) -> dict[str, tuple[Document, OrchestratorLease, OwnerStatus]]:
        """Return the orchestrators that are gone but not yet fenced, keyed by name."""
        gone: dict[str, tuple[Document, OrchestratorLease, OwnerStatus]] = {}
        for document in await self._store.list(_KIND, f"{self._run}/"):
            record = _read(document)
            if record is not None and (status := await self.assess(record)) in {
                OwnerStatus.STALE,
                OwnerStatus.DEAD,
            }:
                gone[record.owner.id] = (document, record, status)
        return gone

    async def assess(self, record: OrchestratorLease, run: str | None = None) -> OwnerStatus:
        """Return an orchestrator's status, given its record."""
        owner = record.owner
        if owner.id == self._me.id:
            return OwnerStatus.ALIVE if record.ended is None else OwnerStatus.ENDED
        is_here = (owner.host, owner.boot) == (self._me.host, self._me.boot)
        run = run or self._run
        # No process survives a reboot. The lock shows whether a host with the same name is this machine.
        is_dead = record.ended is None and owner.host == self._me.host and await self._is_proven_dead(run, owner)
        now, watched = self._clock.now(), self._seconds_unchanged(run, record)
        return determine_owner_status(record, now, watched, self._timing, is_here=is_here, is_dead=is_dead)

    async def _is_proven_dead(self, run: str, owner: OrchestratorIdentity) -> bool:
        # Cached, because an owner's status is read once for each task that it has claimed.
        now, checked = self._clock.monotonic(), self._alive.get(owner.id)
        if checked is not None and now - checked < _LIVENESS_CACHE_SECONDS:
            return False
        if await self._is_dead(run, owner):
            return True
        self._alive[owner.id] = now
        return False

    def expire_liveness(self, orchestrators: Iterable[str]) -> None:
        """Drop the cached liveness of these orchestrators."""
        for orchestrator in orchestrators:
            self._alive.pop(orchestrator, None)

    def mark_renewed(self) -> None:
        """Record that our own heartbeat is written."""
        self._forget_if_late()
        self._renewed = self._clock.monotonic()

    def _forget_if_late(self) -> None:
        """Observe all peers from scratch if our own heartbeat is late.

        Theirs may be late for the same reason: the store was unreachable, or the machine was suspended.
        """
        if self._clock.monotonic() - self._renewed > MIN_WATCHED_HEARTBEATS * self._timing.heartbeat_interval:
            self._seen.clear()
            self._renewed = math.inf  # once

    def _seconds_unchanged(self, run: str, record: OrchestratorLease) -> float:
        """Return the time in seconds for which a heartbeat was observed without a long gap."""
        self._forget_if_late()
        now, seen = self._clock.monotonic(), self._seen.get((run, record.owner.id))
        # After a suspension of this process or machine, start again: the peer may also have been suspended.
        max_gap = max(self._timing.stale_after, 2 * self._timing.stale_check_interval)
        is_new = seen is None or seen.heartbeat != record.heartbeat or now - seen.checked > max_gap
        since = now if seen is None or is_new else seen.since
        self._seen[run, record.owner.id] = _Heartbeat(record.heartbeat, since, now)
        return now - since


class RunMembership:
    """The orchestrators of one run, as seen by one of them, `me`."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        run: str,
        me: OrchestratorIdentity,
        timing: CoordinationSettings,
        is_dead: Callable[[str, OrchestratorIdentity], Awaitable[bool]],
    ) -> None:
        """Represent `me` in a run; `is_dead` returns whether an orchestrator's process is proven dead."""
        self.run, self.me, self.timing = run, me, timing
        self.counters = ClaimCounters()
        self.guard = Guard(orchestrator_key(run, me.id), 1)
        """The guard that rejects our commits once this orchestrator is declared gone."""
        self.peers = PeerObserver(store, clock, run, me, timing, is_dead)
        self._store, self._clock = store, clock
        self._version = 0
        self._record: OrchestratorLease | None = None
        self._writing = anyio.Lock()
        self._process_locks: dict[str, anyio.Lock] = {}
        self._deferred: list[Callable[[], Awaitable[None]]] = []

    def promote(self) -> None:
        """Record that this orchestrator is now the leader of its run."""
        self.me = self.me.model_copy(update={"role": Role.LEADER})
        if self._record is not None:
            self._record = self._record.model_copy(update={"owner": self.me})

    def count(self, **more: int) -> None:
        """Add to the claim counters, which are recorded with the next heartbeat."""
        self.counters = self.counters.plus(**more)

    def process_lock(self, name: str) -> anyio.Lock:
        """Return the lock that serializes an action between the tasks of this process."""
        return self._process_locks.setdefault(name, anyio.Lock())

    def defer(self, action: Callable[[], Awaitable[None]]) -> None:
        """Run an action with the next heartbeat, when the store may be reachable again."""
        self._deferred.append(action)

    def join_write(self) -> Write:
        """Return the write that adds this process; call `mark_joined` after the commit."""
        now = self._clock.now()
        expires = now + self.timing.stale_after
        self._record = OrchestratorLease(owner=self.me, epoch=1, since=now, heartbeat=now, expires=expires)
        return Write(self.guard.key, 0, self._record.model_dump(mode="json"))

    def mark_joined(self) -> None:
        """Record that the write of `join_write` is committed."""
        self._version = 1
        self.peers.mark_renewed()

    async def join(self) -> None:
        """Join the run."""
        try:
            await self._store.commit(Commit([self.join_write()]))
        except VersionConflict:  # the name is unique, so our earlier commit succeeded without confirmation
            self._version = await self._own_version()
        else:
            self.mark_joined()

    async def renew(self) -> None:
        """Write one heartbeat for all claims. Raises OrchestratorFenced after a takeover."""
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
        """Record the end of this orchestrator, which holds no claims; no-op if fenced."""
        try:
            await self._write(ended=self._clock.now(), reason=reason, epoch=2)
        except OrchestratorFenced:
            return

    async def _write(self, **changes: object) -> None:
        async with self._writing:
            assert self._record is not None, "the orchestrator has joined"  # noqa: S101  (for the type checker)
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
                    self.peers.mark_renewed()
                    return

    async def _own_version(self) -> int:
        """Return the version of our record, which our unconfirmed commit may have written."""
        document = await self._store.get(self.guard.key)
        record = _read(document)
        if document is None or record is None or record.epoch != self.guard.epoch:
            raise self._error(record)
        return document.version

    def participant(self) -> LeaseParticipant:
        """Return this orchestrator as the holder of a lease, or as a waiter, from now on."""
        return LeaseParticipant(
            id=self.me.id, host=self.me.host, pid=self.me.pid, run=self.run, since=self._clock.now()
        )

    async def is_gone(self, party: LeaseParticipant) -> bool:
        """Return whether a participant has lost its lease or position: it is not alive, or an earlier one of ours."""
        return party.id == self.me.id or await self.peers.read_liveness(party.id, party.run) is not OwnerStatus.ALIVE

    async def find_fencing_error(self) -> OrchestratorFenced | None:
        """Return the error of a fenced orchestrator, or None if it is not fenced."""
        record = _read(await self._store.get(self.guard.key))
        return None if record is not None and record.epoch == self.guard.epoch else self._error(record)

    def _error(self, record: OrchestratorLease | None) -> OrchestratorFenced:
        reason = "its record is missing" if record is None else record.reason or "it has ended"
        return OrchestratorFenced(self.run, self.me.id, reason)

    async def is_outranked(self) -> bool:
        """Return whether a live peer takes precedence as leader of the run by its role."""
        if self.me.role is Role.LEADER:
            return False
        leaders = [record for record in (await self.peers.all()).values() if record.owner.role is Role.LEADER]
        return any([await self.peers.assess(record) is OwnerStatus.ALIVE for record in leaders])

    def fence_write(self, document: Document, record: OrchestratorLease, status: OwnerStatus) -> Write:
        """Return the write that fences an orchestrator that is gone."""
        reason = f"{self.me.id} took over: {describe_loss(record, status, self._clock.now())}"
        changes = {"ended": self._clock.now(), "reason": reason, "epoch": record.epoch + 1}
        return Write(document.key, document.version, record.model_copy(update=changes).model_dump(mode="json"))
