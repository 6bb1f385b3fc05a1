"""List and break locks in three layers: files, path ownership, and merge leases.

Any process of the project can list and break locks. A broken lock is removed from the store, and its holder releases
the rest when it reads the change (`release_broken_locks`). Kernel locks can't be taken from a live process, and a dead
process has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

import anyio.to_thread

from orchestrator.domain.events.coordination import LockBroken
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.claims import LeaseParticipant
from orchestrator.domain.scheduling.path_ownership import PathOwnership, is_current
from orchestrator.errors import RefusedError
from orchestrator.locking.file_locks import FileLockRecord, FileLocks, list_file_locks
from orchestrator.locking.merge_lease import merge_lease_key, read_merge_leases
from orchestrator.locking.ownership import OWNERSHIP_KIND, claim_key
from orchestrator.protocols import Commit, CommitRecord, Event, Store, Write
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.state.documents.validation import filter_readable
from orchestrator.system.clock import Clock

_MERGE: Final = "merge/"


class LockLayer(StrEnum):
    """The kind of a lock."""

    FILE = "file"  #: a session edits a file; shared between the processes of one machine
    OWNERSHIP = "ownership"  #: the paths that a session may change; in the store
    MERGE = "merge"  #: the merge lease of a target


@dataclass(frozen=True, slots=True)
class LockParty:
    """A holder or waiter of a lock."""

    owner: str
    """The session, as `<run>/<task>.<attempt>`; for a merge lease, the process."""
    since: float | None
    """Wall-clock seconds, or None if unknown."""
    age: float | None
    """The age in seconds."""
    wants: tuple[str, ...] = ()
    """The patterns that a waiter for ownership requested."""


@dataclass(frozen=True, slots=True)
class LockStatus:
    """A lock with its holders and waiters."""

    name: str
    """The name for `break_lock`: `file/<path>`, `ownership/<session>` or `merge/<scope>`."""
    layer: LockLayer
    resources: tuple[str, ...]
    """The file, the patterns, or the target's scope."""
    mode: Literal["exclusive", "shared"]
    holders: tuple[LockParty, ...]
    waiters: tuple[LockParty, ...] = ()
    epoch: int | None = None
    """The epoch of the claim that the ownership belongs to, or of the merge lease."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON representation."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LockOverview:
    """Lists and breaks a project's locks, in its store and its folder of file locks."""

    store: Store
    clock: Clock
    files: Path

    async def locks(self) -> list[LockStatus]:
        """Return the locks that have holders or waiters, sorted by kind and age."""
        records = await anyio.to_thread.run_sync(list_file_locks, self.files)
        return [*self._files(records), *await self._ownership(), *await self._merges()]

    async def break_lock(self, name: str, reason: str) -> LockStatus:
        """Break a lock by its name and record the reason; return its previous status.

        Raises RefusedError if the lock is not held.
        """
        lock = next((lock for lock in await self.locks() if lock.name == name and lock.holders), None)
        if lock is None:
            remedy = "list the held locks with `council locks`"
            if name.startswith(f"{LockLayer.FILE}/"):
                remedy = f"file locks of dead processes are released automatically; {remedy}"
            raise RefusedError(f"lock {name!r} is not held", remedy)
        await retry_on_conflict(lambda: self._break(lock, reason))
        return lock

    async def _break(self, lock: LockStatus, reason: str) -> None:
        holders = [party.owner for party in lock.holders]
        event = LockBroken(lock=lock.name, layer=lock.layer, resources=lock.resources, holders=holders, reason=reason)
        await self.store.commit(Commit(await self._writes(lock), [Event.of(event)]))

    async def _writes(self, lock: LockStatus) -> Sequence[Write]:
        match lock.layer:
            case LockLayer.FILE:
                return ()
            case LockLayer.OWNERSHIP:
                holder = lock.holders[0].owner
                documents = await self.store.list(OWNERSHIP_KIND)
                # Keep the record without patterns: if it were missing, its earlier patterns would count at landing.
                return [
                    Write(
                        document.key,
                        document.version,
                        PathOwnership.model_validate(document.value).without_patterns().model_dump(mode="json"),
                    )
                    for document in documents
                    if document.key.id.endswith(f"/{holder}")
                ]
            case LockLayer.MERGE:
                document, lease = (await read_merge_leases(self.store))[lock.name.removeprefix(_MERGE)]
                freed = lease.model_copy(update={"epoch": lease.epoch + 1, "holder": None})
                return [Write(document.key, document.version, freed.model_dump(mode="json"))]

    def _files(self, records: Sequence[FileLockRecord]) -> list[LockStatus]:
        locks: dict[str, LockStatus] = {}
        for record in records:
            party, path = self._party(record.owner, record.since), record.path
            name = f"{LockLayer.FILE}/{path}"
            known = locks.get(path) or LockStatus(name, LockLayer.FILE, (path,), record.mode, ())
            if record.state == "held":
                locks[path] = replace(known, mode=record.mode, holders=(*known.holders, party))
            else:
                locks[path] = replace(known, waiters=(*known.waiters, party))
        return list(locks.values())

    async def _ownership(self) -> list[LockStatus]:
        live: list[PathOwnership] = []
        for document in filter_readable(await self.store.list(OWNERSHIP_KIND)):
            if "/" in document.key.id:  # a name without a slash is the version guard of a scope
                holding = PathOwnership.model_validate(document.value)
                claim = await self.store.get(claim_key(holding.session))
                if is_current(holding, None if claim is None else claim.value):
                    live.append(holding)
        live.sort(key=lambda holding: (holding.since, holding.session))
        return [self._owned(holding, live) for holding in live if holding.patterns]

    def _owned(self, holding: PathOwnership, live: Sequence[PathOwnership]) -> LockStatus:
        waiters = tuple(
            self._party(str(other.session), other.waiting.since, other.waiting.patterns)
            for other in live
            if other.waiting is not None and holding.has_conflict_with(other.session, other.waiting.patterns)
        )
        name, holder = f"{LockLayer.OWNERSHIP}/{holding.session}", self._party(str(holding.session), holding.since)
        return LockStatus(name, LockLayer.OWNERSHIP, holding.patterns, "exclusive", (holder,), waiters, holding.epoch)

    async def _merges(self) -> list[LockStatus]:
        return [
            LockStatus(
                merge_lease_key(scope).id,
                LockLayer.MERGE,
                (f"{lease.target} of {lease.repository}",),
                "exclusive",
                () if lease.holder is None else (self._party(_process(lease.holder), lease.holder.since),),
                tuple(self._party(_process(process), process.since) for process in lease.waiting),
                lease.epoch,
            )
            for scope, (_, lease) in (await read_merge_leases(self.store)).items()
            if lease.holder is not None or lease.waiting
        ]

    def _party(self, owner: str, since: float | None, wants: tuple[str, ...] = ()) -> LockParty:
        age = None if since is None else max(0.0, self.clock.now() - since)
        return LockParty(owner, since, age, wants)


@dataclass(frozen=True, slots=True)
class BrokenLock:
    """Broken locks of sessions: individual files, or everything they own."""

    sessions: tuple[str, ...]
    paths: tuple[str, ...] = field(default=())
    """The files; empty means all locked files."""


def read_broken_locks(record: CommitRecord) -> list[BrokenLock]:
    """Return the broken session locks that a commit records."""
    broken = []
    for event in record.events:
        if event.type == LockBroken.type and event.data["layer"] != LockLayer.MERGE:
            paths = event.data["resources"] if event.data["layer"] == LockLayer.FILE else ()
            broken.append(BrokenLock(tuple(event.data["holders"]), tuple(paths)))
    return broken


async def release_broken_locks(record: CommitRecord, files: FileLocks, sessions: Sequence[SessionName]) -> int:
    """Release our sessions' file locks that a commit broke; return their number."""
    released = 0
    for broken in read_broken_locks(record):
        for session in sessions:
            if str(session) in broken.sessions:
                released += await (files.release(session, broken.paths) if broken.paths else files.release_all(session))
    return released


def _process(party: LeaseParticipant) -> str:
    return f"{party.id} (process {party.pid} on {party.host})"
