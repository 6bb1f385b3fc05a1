"""Commits that were made apart from the store that they are for, and how it is told of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import LeaseLost, VersionConflict
from orchestrator.protocols import Commit, CommitRecord, Dump, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.offline.outage import commit_idempotently
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import Clock

#: The kind of the documents that are the fork's own: beside each commit what the log does not say of it.
FORK_KIND: Final = "outage"
_PROGRESS: Final = Key(FORK_KIND, "replayed")
#: Seconds that a document gets whose time is over by when it is told of.
_NO_TIME: Final = 0.001


@dataclass(frozen=True, slots=True)
class RejectedCommit:
    """A commit that the store did not take, with what its documents had become apart from it."""

    documents: Sequence[tuple[Key, int, JsonObject | None]]
    """Key, version and value, None where it was deleted."""
    events: Sequence[Event]
    reason: str

    def event(self) -> Event:
        """Return what is told of it."""
        keys = [str(key) for key, _, _ in self.documents]
        return Event(
            "outage.commit_rejected", {"keys": keys, "events": [one.type for one in self.events], "reason": self.reason}
        )


@dataclass(slots=True)
class ReplayResult:
    """What came of the commits that the store was told of."""

    accepted: list[tuple[Commit, int]] = field(default_factory=list)
    """As they were made there, and their positions."""
    refused: list[RejectedCommit] = field(default_factory=list)
    shifts: dict[Key, int] = field(default_factory=dict)
    """By how much the versions of a document are higher there than they were here."""


class Fork:
    """A store that takes commits in the place of another, beginning with what is known of that one."""

    def __init__(self, store: FileStore, clock: Clock) -> None:
        self.store, self._clock = store, clock
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, clock: Clock) -> AsyncIterator[Fork]:
        """Open the fork in a folder, which is made if need be."""
        async with FileStore.open(folder, clock) as store:
            yield cls(store, clock)

    async def begin(self, dump: Dump) -> None:
        """Take what is known of the other store."""
        await self.store.load(dump)
        await self.store.commit(Commit([Write(_PROGRESS, 0, _Progress(dump.position).value())]))

    async def commit(self, commit: Commit) -> int:
        """Commit here, and note what it takes to do so there."""
        note = {
            "writes": [[*write.key, write.expected, write.ttl] for write in commit.writes],
            "guards": [[*guard.key, guard.epoch] for guard in commit.guards],
            "durable": commit.durable,
        }
        while True:
            self._count += 1
            key = Key(FORK_KIND, f"commit/{self._count:012d}")
            if await self.store.get(key) is None:  # else it was there before this process was
                break
        return await self.store.commit(
            Commit([*commit.writes, Write(key, 0, note)], commit.events, commit.guards, durable=commit.durable)
        )

    async def adopt(self, commit: Commit) -> None:
        """Take a commit that was made there after all."""
        with suppress(VersionConflict):  # what was changed here since is told there, and refused
            await self.store.commit(Commit(commit.writes, durable=False))

    async def replay(self, target: Store, found: ReplayResult) -> None:
        """Make there, in their order, the commits that it was not told of, and add to `found` what came of them.

        Some may be refused, and then what builds on them is, too. StoreUnavailable where it can't be reached (again):
        what was told stays told.
        """
        progress = await self._progress()
        async with aclosing(read_range(self.store, progress.position, await self.store.position())) as records:
            async for record in records:
                note = next((one for key, (_, one) in record.documents.items() if key.kind == FORK_KIND), None)
                if note is not None and "writes" in note:
                    await self._tell(target, record, note, progress, found)
                progress.position = record.position
                await self.store.commit(Commit([Write(_PROGRESS, progress.version, progress.value())]))
                progress.version += 1
        found.shifts = dict(progress.shifts)

    async def _progress(self) -> _Progress:
        document = await self.store.get(_PROGRESS)
        if document is None:  # it was killed before anything could be committed here
            return _Progress(await self.store.position())
        value = document.value
        lost = {Key(kind, name) for kind, name in value["lost"]}
        shifts = {Key(kind, name): shift for kind, name, shift in value["shifts"]}
        return _Progress(value["position"], lost, shifts, document.version)

    async def _tell(
        self, target: Store, record: CommitRecord, note: JsonObject, progress: _Progress, found: ReplayResult
    ) -> None:
        commit = _translate(record, note, progress.shifts, self._clock.now())
        written = {write.key for write in commit.writes}
        lost = sorted((written | {guard.key for guard in commit.guards}) & progress.lost)
        reason = f"it builds on what was refused of {', '.join(map(str, lost))}" if lost else ""
        position = 0
        if not lost:
            try:
                position = await commit_idempotently(target, commit)
            except (VersionConflict, LeaseLost) as error:
                reason = str(error)
        if reason:
            progress.lost |= written
            documents = [(key, *record.documents[key]) for key in record.documents if key.kind != FORK_KIND]
            found.refused.append(RejectedCommit(documents, record.events, reason))
            return
        for write in commit.writes:
            # Nobody here may have known that there had been such a document before.
            if write.expected == 0 and (there := await target.get(write.key)) is not None:
                progress.shifts[write.key] = there.version - record.documents[write.key][0]
        found.accepted.append((commit, position))


@dataclass(slots=True)
class _Progress:
    position: int
    lost: set[Key] = field(default_factory=set)
    """Documents that are not there what they were here."""
    shifts: dict[Key, int] = field(default_factory=dict)
    version: int = 0

    def value(self) -> JsonObject:
        return {
            "position": self.position,
            "lost": sorted([*key] for key in self.lost),
            "shifts": sorted([*key, shift] for key, shift in self.shifts.items() if shift),
        }


def _translate(record: CommitRecord, note: JsonObject, shifts: dict[Key, int], now: float) -> Commit:
    """Return a commit of the fork as it is to be made where versions are perhaps higher."""
    writes = []
    for kind, name, expected, ttl in note["writes"]:
        key = Key(kind, name)
        left: Any = None if ttl is None else max(ttl - max(now - record.time, 0.0), _NO_TIME)
        there = expected + shifts.get(key, 0) if expected else 0
        writes.append(Write(key, there, record.documents[key][1], left))
    guards = [Guard(Key(kind, name), epoch) for kind, name, epoch in note["guards"]]
    return Commit(writes, record.events, guards, durable=note["durable"])
