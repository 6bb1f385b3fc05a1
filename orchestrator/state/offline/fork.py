"""Buffer commits made while the store is unreachable, and replay them afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import LeaseLost, VersionConflict
from orchestrator.protocols import Commit, CommitRecord, Dump, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.offline.retry import commit_idempotently
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import Clock

#: The kind of the fork's own documents: for each commit, the facts that the log does not record.
FORK_KIND: Final = "outage"
_PROGRESS: Final = Key(FORK_KIND, "replayed")
#: The TTL in seconds of a document that has expired by the time of its replay.
_EXPIRED_TTL: Final = 0.001


@dataclass(frozen=True, slots=True)
class RejectedCommit:
    """A commit that the store refused, with its documents as the fork has them."""

    documents: Sequence[tuple[Key, int, JsonObject | None]]
    """Key, version and value, None where it was deleted."""
    events: Sequence[Event]
    reason: str

    def event(self) -> Event:
        """Return the event that reports it."""
        keys = [str(key) for key, _, _ in self.documents]
        types = [event.type for event in self.events]
        return Event("outage.commit_rejected", {"keys": keys, "events": types, "reason": self.reason})


@dataclass(slots=True)
class ReplayResult:
    """The outcome of a replay."""

    accepted: list[tuple[Commit, int]] = field(default_factory=list)
    """The commits as the store took them, with their positions there."""
    refused: list[RejectedCommit] = field(default_factory=list)
    shifts: dict[Key, int] = field(default_factory=dict)
    """By how much a document's versions are higher in the store than in the fork."""


class Fork:
    """A local store that takes commits for an unreachable one, starting with its known documents."""

    def __init__(self, store: FileStore, clock: Clock) -> None:
        self.store, self._clock = store, clock
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, clock: Clock) -> AsyncIterator[Fork]:
        """Open the fork in a folder, which is created if missing."""
        async with FileStore.open(folder, clock) as store:
            yield cls(store, clock)

    async def begin(self, dump: Dump) -> None:
        """Load the known documents of the unreachable store."""
        await self.store.load(dump)
        await self.store.commit(Commit([Write(_PROGRESS, 0, _Progress(dump.position).value())]))

    async def commit(self, commit: Commit) -> int:
        """Commit to the fork, and record the facts that a replay needs."""
        note = {
            "writes": [[*write.key, write.expected, write.ttl] for write in commit.writes],
            "guards": [[*guard.key, guard.epoch] for guard in commit.guards],
            "durable": commit.durable,
        }
        while True:
            self._count += 1
            key = Key(FORK_KIND, f"commit/{self._count:012d}")
            if await self.store.get(key) is None:  # else an earlier process of this fork made it
                break
        return await self.store.commit(
            Commit([*commit.writes, Write(key, 0, note)], commit.events, commit.guards, durable=commit.durable)
        )

    async def adopt(self, commit: Commit) -> None:
        """Take over a commit that reached the unreachable store after all."""
        with suppress(VersionConflict):  # a later change in the fork is replayed, and refused
            await self.store.commit(Commit(commit.writes, durable=False))

    async def replay(self, target: Store, result: ReplayResult) -> None:
        """Make the fork's commits in `target`, in order, and add their outcome to `result`.

        `target` may refuse a commit; all that build on it are refused as well. StoreUnavailable if it can't be reached
        (again); a later call continues after the last replayed commit.
        """
        progress = await self._progress()
        async with aclosing(read_range(self.store, progress.position, await self.store.position())) as records:
            async for record in records:
                note = next((value for key, (_, value) in record.documents.items() if key.kind == FORK_KIND), None)
                if note is not None and "writes" in note:
                    await self._replay_commit(target, record, note, progress, result)
                progress.position = record.position
                await self.store.commit(Commit([Write(_PROGRESS, progress.version, progress.value())]))
                progress.version += 1
        result.shifts = dict(progress.shifts)

    async def _progress(self) -> _Progress:
        document = await self.store.get(_PROGRESS)
        if document is None:  # the process was killed before the first commit
            return _Progress(await self.store.position())
        value = document.value
        lost = {Key(kind, name) for kind, name in value["lost"]}
        shifts = {Key(kind, name): shift for kind, name, shift in value["shifts"]}
        return _Progress(value["position"], lost, shifts, document.version)

    async def _replay_commit(
        self, target: Store, record: CommitRecord, note: JsonObject, progress: _Progress, result: ReplayResult
    ) -> None:
        commit = _translate(record, note, progress.shifts, self._clock.now())
        written = {write.key for write in commit.writes}
        lost = sorted((written | {guard.key for guard in commit.guards}) & progress.lost)
        reason = f"it builds on a refused change of {', '.join(map(str, lost))}" if lost else ""
        position = 0
        if not lost:
            try:
                position = await commit_idempotently(target, commit)
            except (VersionConflict, LeaseLost) as error:
                reason = str(error)
        if reason:
            progress.lost |= written
            documents = [(key, *record.documents[key]) for key in record.documents if key.kind != FORK_KIND]
            result.refused.append(RejectedCommit(documents, record.events, reason))
            return
        for write in commit.writes:
            # The fork may not have known that the target once had such a document.
            if write.expected == 0 and (document := await target.get(write.key)) is not None:
                progress.shifts[write.key] = document.version - record.documents[write.key][0]
        result.accepted.append((commit, position))


@dataclass(slots=True)
class _Progress:
    position: int
    lost: set[Key] = field(default_factory=set)
    """Documents whose changes in the fork the target refused."""
    shifts: dict[Key, int] = field(default_factory=dict)
    version: int = 0

    def value(self) -> JsonObject:
        return {
            "position": self.position,
            "lost": sorted([*key] for key in self.lost),
            "shifts": sorted([*key, shift] for key, shift in self.shifts.items() if shift),
        }


def _translate(record: CommitRecord, note: JsonObject, shifts: dict[Key, int], now: float) -> Commit:
    """Return a commit of the fork with the target's versions and the remaining TTLs."""
    writes = []
    for kind, name, expected, ttl in note["writes"]:
        key = Key(kind, name)
        remaining: Any = None if ttl is None else max(ttl - max(now - record.time, 0.0), _EXPIRED_TTL)
        target_version = expected + shifts.get(key, 0) if expected else 0
        writes.append(Write(key, target_version, record.documents[key][1], remaining))
    guards = [Guard(Key(kind, name), epoch) for kind, name, epoch in note["guards"]]
    return Commit(writes, record.events, guards, durable=note["durable"])
