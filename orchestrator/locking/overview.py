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

from orchestrator.clock import Clock
from orchestrator.domain.holdings import Holding, counts
from orchestrator.domain.sessions import SessionName
from orchestrator.errors import RefusedError
from orchestrator.filelock import FileLock, Signature, waiting_processes
from orchestrator.locking.files import FileLockRecord, FileLocks, records
from orchestrator.locking.registry import KIND, claim_key
from orchestrator.protocols import Commit, Document, Event, JsonObject, Key, Record, Store, Write
from orchestrator.state.update import retried

#: The event that tells everybody of a lock that a person broke.
BROKEN: Final = "lock.broken"

_MERGE: Final = "merge/"


class LockLayer(StrEnum):
    """What kind of lock one is."""

    FILE = "file"  #: a session is at work at a file: between the processes of one machine
    OWNERSHIP = "ownership"  #: what a session may change: in the store
    MERGE = "merge"  #: whose turn it is to land on a target


@dataclass(frozen=True, slots=True)
class LockUser:
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
class Lock:
    """A lock with who holds it and who waits for it."""

    name: str
    """By which it is broken: `file/<path>`, `ownership/<session>` or `merge/<scope>`."""
    layer: LockLayer
    what: tuple[str, ...]
    """The file, the patterns, or the target's scope."""
    mode: Literal["exclusive", "shared"]
    holders: tuple[LockUser, ...]
    waiters: tuple[LockUser, ...] = ()
    epoch: int | None = None
    """Of the claim that the ownership is part of, or of the merge permit."""
    expires: float | None = None
    """When a merge permit is over unless it is renewed, in wall-clock seconds."""

    def to_json(self) -> dict[str, Any]:
        """Return the object that programs get."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Overview:
    """Looks at all locks of a project: its store, the folder of its file locks, and that of its hub's locks, if any."""

    store: Store
    clock: Clock
    files: Path
    landings: Path | None = None

    async def locks(self) -> list[Lock]:
        """Return all that is held or waited for: files, ownership, merge permits, each by age."""
        found = await anyio.to_thread.run_sync(records, self.files)
        return [*self._files(found), *await self._ownership(), *await self._merges()]

    async def break_lock(self, name: str, reason: str) -> Lock:
        """Take a lock away from whoever holds it, by its name; return it as it was. The reason is recorded.

        RefusedError where nobody holds it, and where only the process that does can give it back.
        """
        found = next((one for one in await self.locks() if one.name == name and one.holders), None)
        if found is None:
            what, listed = f"nobody holds {name!r}", "`council locks` lists what is held"
            if name.startswith(f"{LockLayer.FILE}/"):
                listed = f"what a dead process had locked is free already, without breaking; {listed}"
            raise RefusedError(what, listed)
        if found.layer is LockLayer.MERGE and found.epoch is None:
            remedy = "end it, which gives the turn back; `council resume` goes on with its run"
            raise RefusedError(f"the turn to land is held by {found.holders[0].owner} itself", remedy)
        await retried(lambda: self._break(found, reason))
        return found

    async def _break(self, lock: Lock, reason: str) -> None:
        holders = [one.owner for one in lock.holders]
        facts: JsonObject = {"name": lock.name, "layer": str(lock.layer), "what": list(lock.what), "holders": holders}
        await self.store.commit(Commit(await self._writes(lock), [Event(BROKEN, {**facts, "reason": reason})]))

    async def _writes(self, lock: Lock) -> Sequence[Write]:
        match lock.layer:
            case LockLayer.FILE:
                return ()
            case LockLayer.OWNERSHIP:
                holder = lock.holders[0].owner
                found = [one for one in await self.store.list(KIND) if one.key.id.endswith(f"/{holder}")]
                return [Write(one.key, one.version, None) for one in found]
            case LockLayer.MERGE:
                permit = await self.store.get(_permit_key(lock.name))
                if permit is None:
                    return ()
                # Whoever takes it writes an epoch of its own, which is never lower than its version.
                epoch, now = max(_epoch(permit), permit.version) + 1, self.clock.now()
                freed = {**permit.value, "holder": None, "epoch": epoch, "since": now, "expires": now}
                return [Write(permit.key, permit.version, freed)]

    def _files(self, found: Sequence[FileLockRecord]) -> list[Lock]:
        locks: dict[str, Lock] = {}
        for one in found:
            user = self._user(one.owner, one.since)
            name = f"{LockLayer.FILE}/{one.path}"
            known = locks.get(one.path) or Lock(name, LockLayer.FILE, (one.path,), one.mode, ())
            if one.state == "held":
                locks[one.path] = replace(known, mode=one.mode, holders=(*known.holders, user))
            else:
                locks[one.path] = replace(known, waiters=(*known.waiters, user))
        return list(locks.values())

    async def _ownership(self) -> list[Lock]:
        live: list[Holding] = []
        for document in await self.store.list(KIND):
            if "/" in document.key.id:  # else it is the turnstile of a scope
                holding = Holding.from_json(document.value)
                claim = await self.store.get(claim_key(holding.session))
                if counts(holding, None if claim is None else claim.value):
                    live.append(holding)
        live.sort(key=lambda one: (one.since, one.session))
        return [self._owned(one, live) for one in live if one.patterns]

    def _owned(self, one: Holding, live: Sequence[Holding]) -> Lock:
        waiters = tuple(
            self._user(str(other.session), other.waiting.since, other.waiting.patterns)
            for other in live
            if other.waiting is not None and one.stands_in_the_way(other.session, other.waiting.patterns)
        )
        name, holder = f"{LockLayer.OWNERSHIP}/{one.session}", self._user(str(one.session), one.since)
        return Lock(name, LockLayer.OWNERSHIP, one.patterns, "exclusive", (holder,), waiters, one.epoch)

    async def _merges(self) -> list[Lock]:
        locks: dict[str, Lock] = {}
        for document in await self.store.list("lease", _MERGE):
            name, value = document.key.id, document.value
            holder, expires = value.get("holder"), value.get("expires")
            if holder and (expires is None or expires > self.clock.now()):
                user, scope = self._user(_process(holder), value.get("since")), name.removeprefix(_MERGE)
                epoch = _epoch(document)
                locks[name] = Lock(name, LockLayer.MERGE, (scope,), "exclusive", (user,), (), epoch, expires)
        for scope, signature, waiting in await anyio.to_thread.run_sync(_landings, self.landings):
            name = f"{_MERGE}{scope}"
            user = self._user(f"process {signature.pid}", signature.since)
            known = locks.get(name) or Lock(name, LockLayer.MERGE, (scope,), "exclusive", (user,))
            waiters = tuple(self._user(f"process {pid}", None) for pid in waiting)
            locks[name] = replace(known, waiters=waiters)
        return list(locks.values())

    def _user(self, owner: str, since: float | None, wants: tuple[str, ...] = ()) -> LockUser:
        age = None if since is None else max(0.0, self.clock.now() - since)
        return LockUser(owner, since, age, wants)


@dataclass(frozen=True, slots=True)
class Broken:
    """What of a session's was broken: single files, or all that it owned."""

    sessions: tuple[str, ...]
    paths: tuple[str, ...] = field(default=())
    """Files; none: all that they have locked."""


def broken(record: Record) -> list[Broken]:
    """Return what a commit says that a person has broken of sessions."""
    found = []
    for event in record.events:
        if event.type == BROKEN and event.data["layer"] != LockLayer.MERGE:
            paths = event.data["what"] if event.data["layer"] == LockLayer.FILE else ()
            found.append(Broken(tuple(event.data["holders"]), tuple(paths)))
    return found


async def heed(record: Record, files: FileLocks, sessions: Sequence[SessionName]) -> int:
    """Have sessions of this process give back the file locks that a commit says are broken; return how many."""
    given = 0
    for one in broken(record):
        for session in sessions:
            if str(session) in one.sessions:
                given += await (files.release(session, one.paths) if one.paths else files.release_all(session))
    return given


def _landings(folder: Path | None) -> list[tuple[str, Signature, list[int]]]:
    """Return the scopes of targets whose turn a process of this machine has, with what it has signed. Blocks.

    Last come the processes that wait for it, as far as the system tells.
    """
    found = []
    for path in sorted(folder.glob("landing-*")) if folder is not None else ():
        signature = Signature.read(path)
        if (free := FileLock(path).take_now(shared=True)) is not None:
            free.release()
        elif signature is not None:
            found.append((path.name.removeprefix("landing-"), signature, waiting_processes(path)))
    return found


def _permit_key(name: str) -> Key:
    return Key("lease", name)


def _epoch(permit: Document) -> int:
    return int(permit.value.get("epoch", permit.version))


def _process(holder: JsonObject) -> str:
    host, pid = holder.get("host"), holder.get("pid")
    where = f" (process {pid} on {host})" if pid is not None else ""
    return f"{holder.get('id', 'a process')}{where}"
