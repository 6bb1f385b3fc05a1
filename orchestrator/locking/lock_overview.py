"""All that sessions and landings hold, in its three layers: files, ownership of paths, and the merge permit.

Any process of the project can look, and break what it sees: what stands in the store is taken away there, and whoever
held it gives back the rest as soon as it reads of it (`heed`). The kernel's locks can't be taken from a process that
lives, and need not be from one that is dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

import anyio.to_thread

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.claims import MergeParticipant
from orchestrator.domain.scheduling.path_ownership import PathOwnership, is_current
from orchestrator.errors import RefusedError
from orchestrator.locking.file_locks import FileLockRecord, FileLocks, list_file_locks
from orchestrator.locking.merge_permit import merge_lease_key, read_merge_leases
from orchestrator.locking.ownership import OWNERSHIP_KIND, claim_key
from orchestrator.protocols import Commit, CommitRecord, Event, JsonObject, Store, Write
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.state.documents.validation import filter_readable
from orchestrator.system.clock import Clock

#: The event that tells everybody of a lock that a person broke.
LOCK_BROKEN: Final = "lock.broken"

_MERGE: Final = "merge/"


class LockLayer(StrEnum):
    """What kind of lock one is."""

    FILE = "file"  #: a session is at work at a file: between the processes of one machine
    OWNERSHIP = "ownership"  #: what a session may change: in the store
    MERGE = "merge"  #: whose turn it is to land on a target


@dataclass(frozen=True, slots=True)
class LockParty:
    """Somebody who holds a lock, or waits for it."""

    owner: str
    """The session, as `<run>/<task>.<attempt>`; of a merge permit the process."""
    since: float | None
    """Wall-clock seconds; None where that is not known."""
    age: float | None
    """Seconds since then."""
    wants: tuple[str, ...] = ()
    """Of who waits for ownership: the patterns."""


@dataclass(frozen=True, slots=True)
class LockStatus:
    """A lock with who holds it and who waits for it."""

    name: str
    """By which it is broken: `file/<path>`, `ownership/<session>` or `merge/<scope>`."""
    layer: LockLayer
    what: tuple[str, ...]
    """The file, the patterns, or the target's scope."""
    mode: Literal["exclusive", "shared"]
    holders: tuple[LockParty, ...]
    waiters: tuple[LockParty, ...] = ()
    epoch: int | None = None
    """Of the claim that the ownership is part of, or of the merge permit."""

    def to_json(self) -> dict[str, Any]:
        """Return the object that programs get."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LockOverview:
    """Looks at all locks of a project: its store, and the folder of its file locks."""

    store: Store
    clock: Clock
    files: Path

    async def locks(self) -> list[LockStatus]:
        """Return all that is held or waited for: files, ownership, merge permits, each by age."""
        found = await anyio.to_thread.run_sync(list_file_locks, self.files)
        return [*self._files(found), *await self._ownership(), *await self._merges()]

    async def break_lock(self, name: str, reason: str) -> LockStatus:
        """Take a lock away from whoever holds it, by its name; return it as it was. The reason is recorded.

        RefusedError where nobody holds it, and where only the process that does can give it back.
        """
        found = next((one for one in await self.locks() if one.name == name and one.holders), None)
        if found is None:
            what, listed = f"nobody holds {name!r}", "`council locks` lists what is held"
            if name.startswith(f"{LockLayer.FILE}/"):
                listed = f"what a dead process had locked is free already, without breaking; {listed}"
            raise RefusedError(what, listed)
        await retry_on_conflict(lambda: self._break(found, reason))
        return found

    async def _break(self, lock: LockStatus, reason: str) -> None:
        holders = [one.owner for one in lock.holders]
        facts: JsonObject = {"name": lock.name, "layer": str(lock.layer), "what": list(lock.what), "holders": holders}
        await self.store.commit(Commit(await self._writes(lock), [Event(LOCK_BROKEN, {**facts, "reason": reason})]))

    async def _writes(self, lock: LockStatus) -> Sequence[Write]:
        match lock.layer:
            case LockLayer.FILE:
                return ()
            case LockLayer.OWNERSHIP:
                holder = lock.holders[0].owner
                found = [one for one in await self.store.list(OWNERSHIP_KIND) if one.key.id.endswith(f"/{holder}")]
                # It stays on record without them: what it once had would count where what it changed is to land.
                left = {one.key: PathOwnership.from_json(one.value).without_patterns() for one in found}
                return [Write(one.key, one.version, left[one.key].to_json()) for one in found]
            case LockLayer.MERGE:
                document, lease = (await read_merge_leases(self.store))[lock.name.removeprefix(_MERGE)]
                freed = lease.model_copy(update={"epoch": lease.epoch + 1, "holder": None})
                return [Write(document.key, document.version, freed.model_dump(mode="json"))]

    def _files(self, found: Sequence[FileLockRecord]) -> list[LockStatus]:
        locks: dict[str, LockStatus] = {}
        for one in found:
            user = self._user(one.owner, one.since)
            name = f"{LockLayer.FILE}/{one.path}"
            known = locks.get(one.path) or LockStatus(name, LockLayer.FILE, (one.path,), one.mode, ())
            if one.state == "held":
                locks[one.path] = replace(known, mode=one.mode, holders=(*known.holders, user))
            else:
                locks[one.path] = replace(known, waiters=(*known.waiters, user))
        return list(locks.values())

    async def _ownership(self) -> list[LockStatus]:
        live: list[PathOwnership] = []
        for document in filter_readable(await self.store.list(OWNERSHIP_KIND)):
            if "/" in document.key.id:  # else it is the turnstile of a scope
                holding = PathOwnership.from_json(document.value)
                claim = await self.store.get(claim_key(holding.session))
                if is_current(holding, None if claim is None else claim.value):
                    live.append(holding)
        live.sort(key=lambda one: (one.since, one.session))
        return [self._owned(one, live) for one in live if one.patterns]

    def _owned(self, one: PathOwnership, live: Sequence[PathOwnership]) -> LockStatus:
        waiters = tuple(
            self._user(str(other.session), other.waiting.since, other.waiting.patterns)
            for other in live
            if other.waiting is not None and one.has_conflict_with(other.session, other.waiting.patterns)
        )
        name, holder = f"{LockLayer.OWNERSHIP}/{one.session}", self._user(str(one.session), one.since)
        return LockStatus(name, LockLayer.OWNERSHIP, one.patterns, "exclusive", (holder,), waiters, one.epoch)

    async def _merges(self) -> list[LockStatus]:
        return [
            LockStatus(
                merge_lease_key(scope).id,
                LockLayer.MERGE,
                (f"{lease.target} of {lease.repository}",),
                "exclusive",
                () if lease.holder is None else (self._user(_process(lease.holder), lease.holder.since),),
                tuple(self._user(_process(one), one.since) for one in lease.waiting),
                lease.epoch,
            )
            for scope, (_, lease) in (await read_merge_leases(self.store)).items()
            if lease.holder is not None or lease.waiting
        ]

    def _user(self, owner: str, since: float | None, wants: tuple[str, ...] = ()) -> LockParty:
        age = None if since is None else max(0.0, self.clock.now() - since)
        return LockParty(owner, since, age, wants)


@dataclass(frozen=True, slots=True)
class BrokenLock:
    """What of a session's was broken: single files, or all that it owned."""

    sessions: tuple[str, ...]
    paths: tuple[str, ...] = field(default=())
    """Files; none: all that they have locked."""


def read_broken_locks(record: CommitRecord) -> list[BrokenLock]:
    """Return what a commit says that a person has broken of sessions."""
    found = []
    for event in record.events:
        if event.type == LOCK_BROKEN and event.data["layer"] != LockLayer.MERGE:
            paths = event.data["what"] if event.data["layer"] == LockLayer.FILE else ()
            found.append(BrokenLock(tuple(event.data["holders"]), tuple(paths)))
    return found


async def release_broken_locks(record: CommitRecord, files: FileLocks, sessions: Sequence[SessionName]) -> int:
    """Have sessions of this process give back the file locks that a commit says are broken; return how many."""
    given = 0
    for one in read_broken_locks(record):
        for session in sessions:
            if str(session) in one.sessions:
                given += await (files.release(session, one.paths) if one.paths else files.release_all(session))
    return given


def _process(party: MergeParticipant) -> str:
    return f"{party.id} (process {party.pid} on {party.host})"
