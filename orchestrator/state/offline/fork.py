"""Continue locally while a store is unreachable, and replay commits afterwards.

A fork is a local store that accepts commits in place of an unreachable store. It starts with the documents that this
process has seen, at their versions. Each commit also records its guards and expected versions, so that it can be
replayed on the real store, which decides. Entry point: `survive_outages`.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Any, Final, Literal, TypeVar

import anyio
from anyio import to_thread
from anyio.streams.memory import MemoryObjectReceiveStream
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from orchestrator.domain.events.base import TypedEvent
from orchestrator.domain.events.state import OutageCommitRejected, OutageEnded, OutagePreserved
from orchestrator.errors import LeaseLost, LockHeld, RefusedError, StoreUnavailable, VersionConflict
from orchestrator.protocols import (
    Commit,
    CommitRecord,
    Document,
    Dump,
    DumpedCommit,
    DumpedDocument,
    Event,
    Guard,
    JsonObject,
    Key,
    Store,
    Write,
)
from orchestrator.state.documents.log_reader import follow_log, read_range
from orchestrator.state.log.codec import encode_object, get_writer_name
from orchestrator.state.log.table import TableEntry
from orchestrator.state.offline.outage import (
    DEFAULT_INTERVALS,
    EventHandler,
    Outage,
    PausingStore,
    RetryIntervals,
    StoreWrapper,
    commit_idempotently,
    find_commit,
    is_outage,
)
from orchestrator.state.stores.file import FileStore
from orchestrator.system.background import run_in_background
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock

T = TypeVar("T")

#: Receives events one at a time, in order, in a separate task.
EventSink = Callable[[TypedEvent], Awaitable[None]]

#: Seconds to send the remaining events after the `with` block.
_FLUSH_TIMEOUT: Final = 5.0
#: The kind of the fork's own documents: for each commit, facts that the log does not record.
FORK_KIND: Final = "outage"
_PROGRESS: Final = Key(FORK_KIND, "replayed")
#: The TTL in seconds for a document that has expired before its replay.
_EXPIRED_TTL: Final = 0.001
#: Attempts before the store counts as unreachable, because a brief failure is not an outage.
_ATTEMPTS: Final = 3
#: The longest pause between two of these attempts, in seconds.
_LONGEST_PAUSE: Final = 0.5
_UNREACHABLE: Final = "the state can't be reached"
_WAIT_REMEDY: Final = "wait until it can be reached, as `when_unreachable: pause` does automatically"


_NEVER: Final = TableEntry(0, None, 0)


class Mirror:
    """The newest known versions of documents that this process has read or written.

    Neither the value nor the existence of other documents is known.
    """

    def __init__(self, position: int) -> None:
        """Start empty, to follow all commits after `position`."""
        self.position = position
        """The position of the newest known commit."""
        self.followed = position
        """The position up to which all commits are known."""
        self._by = get_writer_name()
        self._seen: dict[Key, TableEntry] = {}
        self._listed: dict[str, set[str]] = {}

    def record_read(self, key: Key, document: Document | None) -> None:
        """Record the document read at a key, or None if missing."""
        if document is None:  # a known document has expired, or was deleted, which the log will show
            self._seen.setdefault(key, _NEVER)
        elif not document.damaged:
            self._put(key, TableEntry(*document[1:]))

    def record_list(self, kind: str, prefix: str, documents: Sequence[Document]) -> None:
        """Record listed documents, and that there are no others."""
        for document in documents:
            self.record_read(document.key, document)
        self._listed.setdefault(kind, set()).add(prefix)

    def record_commit(self, commit: Commit, position: int, now: float) -> None:
        """Record a commit of this process."""
        for write in commit.writes:
            seen = self._seen.get(write.key, _NEVER)
            if seen.position >= position:  # the log was faster
                continue
            version = seen.version if write.expected == 0 else write.expected
            encoded = None if write.value is None else encode_object(write.key, write.value)
            expires = None if write.ttl is None else now + write.ttl
            self._put(write.key, TableEntry(version + 1, encoded, position, False, now, self._by, expires))
        self.position = max(self.position, position)

    def follow(self, record: CommitRecord) -> None:
        """Record a commit of any process, as read from the log."""
        for key, (version, value) in record.documents.items():
            before = self._seen.get(key, _NEVER)
            # Records have no expiry, so the TTL of the previous version is assumed.
            expires = None if before.expires is None else record.time + before.expires - before.time
            encoded = None if value is None else encode_object(key, value)
            self._put(key, TableEntry(version, encoded, record.position, False, record.time, record.writer, expires))
        for key in record.unreadable:
            self._seen.pop(key, None)
        self.position, self.followed = max(self.position, record.position), record.position

    def _put(self, key: Key, seen: TableEntry) -> None:
        # Concurrent reads, writes and log records arrive in any order.
        if seen.version > self._seen.get(key, _NEVER).version:
            self._seen[key] = seen
        self.position = max(self.position, seen.position)

    def newest(self, key: Key) -> tuple[int, JsonObject | None]:
        """Return the newest known version of a document and its value, or None if deleted."""
        seen = self._seen.get(key, _NEVER)
        return seen.version, None if seen.value is None else json.loads(seen.value)

    def knows(self, key: Key) -> bool:
        """Return True if it is known whether this document exists."""
        return key in self._seen or any(key.id.startswith(prefix) for prefix in self._listed.get(key.kind, ()))

    def knows_all(self, kind: str, prefix: str) -> bool:
        """Return True if all documents of a kind with an id prefix are known."""
        return any(prefix.startswith(listed) for listed in self._listed.get(kind, ()))

    def dump(self) -> Dump:
        """Return all documents as a log of only their newest versions."""
        return Dump(self.position, self.position, self._dump_commits())

    async def _dump_commits(self) -> AsyncGenerator[DumpedCommit]:
        entries = [(seen.position or 1, key, seen) for key, seen in self._seen.items() if seen.version]
        entries.sort(key=lambda entry: entry[:2])
        for position, group in groupby(entries, key=lambda entry: entry[0]):
            commit = [(key, seen) for _, key, seen in group]
            documents = [DumpedDocument(key, seen.version, seen.value, seen.expires) for key, seen in commit]
            yield DumpedCommit(position, commit[0][1].time, commit[0][1].writer, documents)


@dataclass(frozen=True, slots=True)
class RejectedCommit:
    """A commit that the store refused, with its documents as in the fork."""

    documents: Sequence[tuple[Key, int, JsonObject | None]]
    """Keys, versions and values; None for deleted documents."""
    events: Sequence[Event]
    reason: str

    def event(self) -> OutageCommitRejected:
        """Return the event that reports the refused commit."""
        keys = [str(key) for key, _, _ in self.documents]
        types = [event.type for event in self.events]
        return OutageCommitRejected(keys=keys, events=types, reason=self.reason)


@dataclass(slots=True)
class ReplayResult:
    """The outcome of a replay."""

    accepted: list[tuple[Commit, int]] = field(default_factory=list)
    """The commits as accepted by the store, with their positions there."""
    refused: list[RejectedCommit] = field(default_factory=list)
    shifts: dict[Key, int] = field(default_factory=dict)
    """How much higher a document's versions are in the store than in the fork."""


class Fork:
    """A local store that accepts commits in place of an unreachable one.

    It starts with the known documents.
    """

    def __init__(self, store: FileStore, clock: Clock) -> None:
        self.store, self._clock = store, clock
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, clock: Clock) -> AsyncIterator[Fork]:
        """Open the fork in a folder, creating it if missing."""
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
            "id": commit.id,
        }
        while True:
            self._count += 1
            key = Key(FORK_KIND, f"commit/{self._count:012d}")
            if await self.store.get(key) is None:  # otherwise an earlier process of this fork created it
                break
        return await self.store.commit(
            Commit([*commit.writes, Write(key, 0, note)], commit.events, commit.guards, durable=commit.durable)
        )

    async def adopt(self, commit: Commit) -> None:
        """Adopt a commit that did reach the unreachable store."""
        with suppress(VersionConflict):  # a later change in the fork is replayed and then refused
            await self.store.commit(Commit(commit.writes, durable=False))

    async def replay(self, target: Store, result: ReplayResult) -> None:
        """Replay the fork's commits in `target`, and add their outcomes to `result`.

        If `target` refuses a commit, all commits that build on it are refused as well. Raises StoreUnavailable if
        `target` can't be reached; a later call continues after the last replayed commit.
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
        reason = f"it builds on a refused change to {', '.join(map(str, lost))}" if lost else ""
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
            # The fork may not have known that the target once had this document.
            if write.expected == 0 and (document := await target.get(write.key)) is not None:
                progress.shifts[write.key] = document.version - record.documents[write.key][0]
        result.accepted.append((commit, position))


@dataclass(slots=True)
class _Progress:
    position: int
    lost: set[Key] = field(default_factory=set)
    """Documents whose changes in the fork were refused by the target."""
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
    return Commit(writes, record.events, guards, note["durable"], id=note["id"])


class _ForkVersions:
    """The document versions of ended forks, and those of the inner store."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._lost_epochs: dict[Key, set[int]] = {}
        """Epochs of leases that were acquired on a fork and belong to another process."""
        self._lost_versions: dict[Key, set[int]] = {}
        """Versions of documents that the inner store refused and that have not been read since."""
        self._shifts: dict[Key, tuple[int, int]] = {}
        """How much the inner store's versions exceed the fork's, and the highest version in the fork."""

    def to_inner(self, commit: Commit) -> Commit:
        """Return a commit with the inner store's versions.

        Raises LeaseLost or VersionConflict if it builds on a change that the inner store refused.
        """
        for guard in commit.guards:
            if guard.epoch in self._lost_epochs.get(guard.key, ()):
                _, value = self._mirror.newest(guard.key)
                raise LeaseLost(str(guard.key), guard.epoch, (value or {}).get("epoch"))
        writes = []
        for write in commit.writes:
            if write.expected in self._lost_versions.get(write.key, ()):
                version, value = self._mirror.newest(write.key)
                raise VersionConflict(str(write.key), write.expected, 0 if value is None else version)
            # A version from the fork is lower than all versions read from the inner store since.
            shift, highest = self._shifts.get(write.key, (0, 0))
            is_of_fork = 0 < write.expected <= highest
            writes.append(Write(write.key, write.expected + shift, write.value, write.ttl) if is_of_fork else write)
        return replace(commit, writes=writes)

    def mark_committed(self, commit: Commit) -> None:
        """Accept the epochs of leases that a commit acquired again.

        An epoch is accepted even if a fork had the same one.
        """
        for write in commit.writes:
            self._lost_epochs.get(write.key, set()).discard((write.value or {}).get("epoch"))

    def mark_read(self, key: Key) -> None:
        """Accept writes that build on a document that was read from the inner store."""
        self._lost_versions.pop(key, None)

    def mark_listed(self, kind: str, prefix: str) -> None:
        """Accept writes that build on any of the listed documents."""
        for key in [key for key in self._lost_versions if key.kind == kind and key.id.startswith(prefix)]:
            del self._lost_versions[key]

    async def apply(self, replayed: ReplayResult, fork: Fork, inner: Store, now: float) -> None:
        """Record which changes of the fork the inner store accepted, and which it refused."""
        for commit, position in replayed.accepted:
            self._mirror.record_commit(commit, position, now)
        for key, shift in replayed.shifts.items():
            self._shifts[key] = (shift, (await fork.store.history(key, 1))[0].version)
        for key, version, value in (document for refused in replayed.refused for document in refused.documents):
            self._mirror.record_read(key, await inner.get(key))
            self._lost_versions.setdefault(key, set()).add(version)
            if value is not None and "epoch" in value:
                self._lost_epochs.setdefault(key, set()).add(value["epoch"])


class ForkingStore(StoreWrapper):
    """A store that uses a local fork while its inner store is unreachable.

    `watch`, `history` and `at` wait for the inner store: positions and their records never change.
    """

    def __init__(
        self,
        inner: Store,
        mirror: Mirror,
        outage: Outage,
        intervals: RetryIntervals,
        clock: Clock,
        folder: Path,
        on_event: EventHandler,
    ) -> None:
        super().__init__(inner)
        self._mirror, self._outage, self._intervals, self._clock = mirror, outage, intervals, clock
        self._folder, self._on_event = folder, on_event
        self._held_lock, self._open_fork = AsyncExitStack(), AsyncExitStack()
        self._fork: Fork | None = None
        self._fork_lock = anyio.Lock()
        """Held while a fork begins or ends, and by each caller that uses it."""
        self._went_offline, self._went_online = anyio.Event(), anyio.Event()
        self._replayed, self._versions = ReplayResult(), _ForkVersions(mirror)

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`; while there is a fork, returns the position in the fork."""
        commit, was_tried = self._versions.to_inner(commit), False
        while True:
            if self._fork is None:
                try:
                    position = await self._try(
                        partial(self._inner.commit, commit), partial(commit_idempotently, self._inner, commit)
                    )
                except StoreUnavailable as error:
                    await self._start_fork(error)
                    was_tried = True
                else:
                    await self._record_commit(commit, position)
                    return position
            async with self._fork_lock:
                if self._fork is not None:
                    keys = [write.key for write in commit.writes if write.expected]
                    for key in (*keys, *(guard.key for guard in commit.guards)):
                        await self._check_known(self._fork, key)
                    try:
                        return await self._fork.commit(commit)
                    except (VersionConflict, LeaseLost):
                        # An attempt may have succeeded without a response, and may since have been read from the log.
                        found = await find_commit(self._fork.store, commit) if was_tried else None
                        if found is None:
                            raise
                        return found

    async def _record_commit(self, commit: Commit, position: int) -> None:
        self._mirror.record_commit(commit, position, self._clock.now())
        self._versions.mark_committed(commit)
        if self._fork is not None:  # another call failed to reach the store while this one reached it
            async with self._fork_lock:
                if self._fork is not None:
                    await self._fork.adopt(commit)

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`.

        In a fork, raises RefusedError for a document that this process never read.
        """

        async def get_offline(fork: Fork) -> Document | None:
            await self._check_known(fork, key)
            return await fork.store.get(key)

        async def get_online() -> Document | None:
            document = await self._inner.get(key)
            self._mirror.record_read(key, document)
            self._versions.mark_read(key)
            return document

        return await self._read_either(get_online, get_offline)

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`.

        In a fork, raises RefusedError for a prefix that this process never listed.
        """

        async def list_offline(fork: Fork) -> Sequence[Document]:
            if not self._mirror.knows_all(kind, prefix):
                raise RefusedError(
                    f"{kind}/{prefix}* was never listed by this process, and {_UNREACHABLE}", _WAIT_REMEDY
                )
            return await fork.store.list(kind, prefix)

        async def list_online() -> Sequence[Document]:
            documents = await self._inner.list(kind, prefix)
            self._mirror.record_list(kind, prefix, documents)
            self._versions.mark_listed(kind, prefix)
            return documents

        return await self._read_either(list_online, list_offline)

    async def position(self) -> int:
        """See `Store.position`; in a fork, the last known position of the inner store."""

        async def get_last_position(_: Fork) -> int:
            return self._mirror.position

        return await self._read_either(self._inner.position, get_last_position)

    async def _read_either(self, online: Callable[[], Awaitable[T]], offline: Callable[[Fork], Awaitable[T]]) -> T:
        while True:
            if self._fork is None:
                try:
                    return await self._try(online)
                except StoreUnavailable as error:
                    await self._start_fork(error)
            async with self._fork_lock:
                if self._fork is not None:
                    return await offline(self._fork)

    async def _check_known(self, fork: Fork, key: Key) -> None:
        if not self._mirror.knows(key) and not await fork.store.history(key, 1):
            raise RefusedError(f"{key} was never read by this process, and {_UNREACHABLE}", _WAIT_REMEDY)

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        while True:
            await self._wait_until_online()
            try:
                return await self._try(read)
            except StoreUnavailable as error:
                await self._start_fork(error)

    async def _wait_for_recovery(self, error: StoreUnavailable) -> None:
        await self._start_fork(error)
        await self._wait_until_online()

    async def _wait_until_online(self) -> None:
        while self._fork is not None:
            await self._went_online.wait()

    async def _try(self, call: Callable[[], Awaitable[T]], retry: Callable[[], Awaitable[T]] | None = None) -> T:
        """Return the result of `call` or, in attempts after the first, of `retry`."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: is_outage(error) and self._fork is None),
            wait=wait_random_exponential(multiplier=self._intervals.first, max=_LONGEST_PAUSE),
            stop=stop_after_attempt(_ATTEMPTS),
            sleep=lambda seconds: self._clock.wait(self._went_offline, self._clock.monotonic() + seconds),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                is_first = attempt.retry_state.attempt_number == 1
                return await (call if is_first or retry is None else retry)()
        raise AssertionError("an attempt returns or raises")

    async def _start_fork(self, error: StoreUnavailable) -> None:
        """Start a fork unless there is one.

        Raises the error if a fork can't help or can't be created.
        """
        if not is_outage(error):
            raise error
        async with self._fork_lock:
            if self._fork is not None:
                return
            try:
                await to_thread.run_sync(partial(self._folder.parent.mkdir, 0o700, parents=True, exist_ok=True))
                await self._held_lock.enter_async_context(_lock(self._folder).hold(0))
                fork = await self._open_fork.enter_async_context(Fork.open(self._folder, self._clock))
                await fork.begin(self._mirror.dump())
            except (OSError, StoreUnavailable):
                await self.close()
                raise error from None
            self._replayed, self._fork = ReplayResult(), fork
            self._outage.begin(error)
            self._went_offline.set()

    async def run_reconnect(self) -> None:
        """Replay each fork's commits once the inner store can be reached."""
        while True:
            await self._went_offline.wait()
            await self._outage.retry_until_reached(self._end_fork, update_status=False)

    async def _end_fork(self) -> None:
        await self._inner.position()
        async with self._fork_lock:
            assert self._fork is not None, "only this method ends a fork"  # noqa: S101  (for the type checker)
            await self._fork.replay(self._inner, self._replayed)
            await self._versions.apply(self._replayed, self._fork, self._inner, self._clock.now())
            with anyio.CancelScope(shield=True):
                await self._open_fork.aclose()
                await to_thread.run_sync(remove_fork, self._folder)
                await self._held_lock.aclose()
            self._fork, self._went_offline = None, anyio.Event()
            for refused in self._replayed.refused:
                self._on_event(refused.event())
            self._outage.end(replayed=len(self._replayed.accepted), refused=len(self._replayed.refused))
            self._went_online.set()
            self._went_online = anyio.Event()

    async def follow(self) -> None:
        """Keep the mirror up to date with the inner store's log."""
        while True:
            with suppress(StoreUnavailable):
                async with aclosing(follow_log(self._inner, self._mirror.followed)) as records:
                    async for record in records:
                        self._mirror.follow(record)
            await self._wait_until_online()
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + self._intervals.first)

    def report_preserved(self) -> None:
        """Report the fork, if any: the next process that opens the store replays it."""
        if self._fork is not None:
            self._on_event(OutagePreserved(folder=str(self._folder)))

    async def close(self) -> None:
        """Close the fork, if any."""
        with anyio.CancelScope(shield=True):
            await self._open_fork.aclose()
            await self._held_lock.aclose()


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def remove_fork(folder: Path) -> None:
    """Remove a replayed fork and its lock, which the caller must hold. Blocks."""
    rmtree(folder, ignore_errors=True)
    _lock(folder).path.unlink(missing_ok=True)


@asynccontextmanager
async def continue_offline(
    store: Store,
    outage: Outage,
    intervals: RetryIntervals,
    clock: Clock,
    folder: Path,
    on_event: EventHandler,
    kinds: Collection[str] = (),
) -> AsyncIterator[ForkingStore]:
    """Wrap a store in a ForkingStore during the block.

    Forks are created below `folder`. Forks of killed processes are replayed first. All documents of `kinds` are read.
    """
    for event in await _replay_leftovers(store, clock, folder):
        on_event(event)
    mirror = Mirror(await store.position())
    forking_store = ForkingStore(store, mirror, outage, intervals, clock, folder / token_hex(8), on_event)
    for kind in kinds:
        mirror.record_list(kind, "", await store.list(kind))
    try:
        async with run_in_background(forking_store.follow, forking_store.run_reconnect):
            yield forking_store
    finally:
        await forking_store.close()


async def _replay_leftovers(store: Store, clock: Clock, folder: Path) -> Sequence[TypedEvent]:
    """Replay the forks of processes that have exited; return the events to send."""
    events = list[TypedEvent]()
    for lock in await to_thread.run_sync(lambda: sorted(folder.glob("*.lock"))):
        fork_folder = lock.with_suffix("")
        with suppress(LockHeld):
            async with _lock(fork_folder).hold(0):
                if await to_thread.run_sync(fork_folder.is_dir):
                    replayed = ReplayResult()
                    async with Fork.open(fork_folder, clock) as fork:
                        await fork.replay(store, replayed)
                    events += [refused.event() for refused in replayed.refused]
                    counts = {"replayed": len(replayed.accepted), "refused": len(replayed.refused)}
                    events.append(OutageEnded(mode="continue", seconds=None).replace(**counts))
                await to_thread.run_sync(remove_fork, fork_folder)
    return events


@asynccontextmanager
async def survive_outages(
    store: Store,
    mode: Literal["pause", "continue"],
    clock: Clock,
    folder: Path,
    send_event: EventSink,
    *,
    intervals: RetryIntervals = DEFAULT_INTERVALS,
    is_temporary: Callable[[BaseException], bool] = is_outage,
    gives_up: Callable[[], bool] = lambda: False,
    kinds: Collection[str] = (),
) -> AsyncIterator[Store]:
    """Wrap an open store during the block, so that a run survives outages.

    With `pause`, commits and reads wait until the store can be reached. With `continue`, they use a fork below
    `folder`, which starts with the documents of `kinds` and those that this process has seen. When the store is
    reachable again, the fork's commits are replayed in order; conflicting changes of other processes take precedence.
    Forks of killed processes are replayed first. `is_temporary` selects the errors that `pause` waits for. Once
    `gives_up` returns True, they are raised.

    `send_event` receives an event when an outage begins (`OutageStarted`), when it ends (`OutageEnded`), and for each
    commit that is then refused (`OutageCommitRejected`). It may commit to the yielded store, which waits like any other
    commit; an error that it raises ends the block.
    """
    send_stream, receive_stream = anyio.create_memory_object_stream[TypedEvent | anyio.Event](math.inf)

    def on_event(event: TypedEvent) -> None:
        with suppress(anyio.ClosedResourceError):  # an outage while the last events are being sent
            send_stream.send_nowait(event)

    sent, flushed = 0, 0

    async def send(event: TypedEvent) -> None:
        nonlocal sent
        await send_event(event)
        sent += 1

    async def flush_events() -> bool:
        nonlocal flushed
        is_first = True
        # Sending may end the outage that it waits for, or begin another one: then there are more events.
        while is_first or receive_stream.statistics().current_buffer_used:
            is_first, earlier_sent = False, anyio.Event()
            send_stream.send_nowait(earlier_sent)
            await earlier_sent.wait()
        before, flushed = flushed, sent
        return sent > before

    sender = partial(_send_events, receive_stream, send)
    async with AsyncExitStack() as stack:
        forking_store = None
        if mode == "continue":
            outage = Outage(clock, intervals, on_event, mode)
            offline_store = continue_offline(store, outage, intervals, clock, folder, on_event, kinds)
            store = forking_store = await stack.enter_async_context(offline_store)
        async with run_in_background(sender, grace=_FLUSH_TIMEOUT), send_stream:
            try:
                # If the local disk is full, the fork can't be written either, so `continue` also waits.
                outage = Outage(clock, intervals, on_event, "pause", is_temporary, gives_up)
                yield PausingStore(store, outage, flush_events)
            finally:
                if forking_store is not None:
                    forking_store.report_preserved()


async def _send_events(
    receive_stream: MemoryObjectReceiveStream[TypedEvent | anyio.Event], send_event: EventSink
) -> None:
    """Send the events in a stream, and set those of `anyio` when all events before them are sent."""
    with receive_stream:
        async for event in receive_stream:
            if isinstance(event, anyio.Event):
                event.set()
            else:
                await send_event(event)
