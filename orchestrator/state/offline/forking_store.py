"""A store that continues on this machine while the inner store can't be reached, and replays its commits afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Final, TypeVar

import anyio
from anyio import to_thread
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from orchestrator.errors import LeaseLost, LockHeld, RefusedError, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Document, Event, Key, Store, Write
from orchestrator.state.documents.log_reader import follow_log
from orchestrator.state.offline.fork import Fork, ReplayResult
from orchestrator.state.offline.mirror import Mirror
from orchestrator.state.offline.retry import (
    EventHandler,
    Outage,
    RetryIntervals,
    commit_idempotently,
    is_outage,
    run_alongside,
)
from orchestrator.state.offline.wrapper import StoreWrapper
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock

T = TypeVar("T")

#: Attempts before the store counts as unreachable: a short hiccup is no outage.
_ATTEMPTS: Final = 3
#: The longest pause between two of these attempts, in seconds.
_LONGEST_PAUSE: Final = 0.5
_UNREACHABLE: Final = "the state can't be reached"
_WAIT_REMEDY: Final = "wait until it can be reached, as `when_unreachable: pause` does automatically"


class ForkingStore(StoreWrapper):
    """A wrapper that uses the inner store, or a fork of it on this machine while it can't be reached.

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
        """Held while a fork begins or ends, and by each user of it."""
        self._went_offline, self._went_online = anyio.Event(), anyio.Event()
        self._replayed = ReplayResult()
        self._lost_epochs: dict[Key, set[int]] = {}
        """Epochs of leases that were acquired on a fork and belong to another process."""
        self._lost_versions: dict[Key, set[int]] = {}
        """Versions of documents that the inner store refused and that were not read since."""
        self._shifts: dict[Key, tuple[int, int]] = {}
        """By how much the inner store's versions exceed the fork's, and the highest version of the fork."""

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`; the position is that in the fork while there is one."""
        commit = self._to_inner_versions(commit)
        while True:
            if self._fork is None:
                try:
                    position = await self._try(partial(self._inner.commit, commit), partial(self._retry, commit))
                except StoreUnavailable as error:
                    await self._start_fork(error)
                else:
                    await self._record_commit(commit, position)
                    return position
            async with self._fork_lock:
                if self._fork is not None:
                    keys = [write.key for write in commit.writes if write.expected]
                    for key in (*keys, *(guard.key for guard in commit.guards)):
                        await self._check_known(self._fork, key)
                    return await self._fork.commit(commit)

    async def _retry(self, commit: Commit) -> int:
        return await commit_idempotently(self._inner, commit)

    async def _record_commit(self, commit: Commit, position: int) -> None:
        self._mirror.record_commit(commit, position, self._clock.now())
        for write in commit.writes:
            # A lease that is acquired again has the written epoch, even if a fork had the same one.
            self._lost_epochs.get(write.key, set()).discard((write.value or {}).get("epoch"))
        if self._fork is not None:  # another call failed to reach the store while this one did reach it
            async with self._fork_lock:
                if self._fork is not None:
                    await self._fork.adopt(commit)

    def _to_inner_versions(self, commit: Commit) -> Commit:
        """Return a commit with the inner store's versions.

        LeaseLost or VersionConflict if it builds on a change that the inner store refused.
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
            # A version of the fork is lower than all that were read from the inner store since.
            shift, highest = self._shifts.get(write.key, (0, 0))
            is_of_fork = 0 < write.expected <= highest
            writes.append(Write(write.key, write.expected + shift, write.value, write.ttl) if is_of_fork else write)
        return Commit(writes, commit.events, commit.guards, durable=commit.durable)

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`; RefusedError in a fork for a document that this process has never read."""

        async def get_offline(fork: Fork) -> Document | None:
            await self._check_known(fork, key)
            return await fork.store.get(key)

        async def get_online() -> Document | None:
            document = await self._inner.get(key)
            self._mirror.record_read(key, document)
            self._lost_versions.pop(key, None)
            return document

        return await self._read_either(get_online, get_offline)

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`; RefusedError in a fork for a prefix that this process has never listed."""

        async def list_offline(fork: Fork) -> Sequence[Document]:
            if not self._mirror.knows_all(kind, prefix):
                raise RefusedError(f"{kind}/{prefix}* was never listed here, and {_UNREACHABLE}", _WAIT_REMEDY)
            return await fork.store.list(kind, prefix)

        async def list_online() -> Sequence[Document]:
            documents = await self._inner.list(kind, prefix)
            self._mirror.record_list(kind, prefix, documents)
            for key in [key for key in self._lost_versions if key.kind == kind and key.id.startswith(prefix)]:
                del self._lost_versions[key]
            return documents

        return await self._read_either(list_online, list_offline)

    async def position(self) -> int:
        """See `Store.position`; in a fork it is the last known position of the inner store."""

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
            raise RefusedError(f"{key} was never read here, and {_UNREACHABLE}", _WAIT_REMEDY)

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
        """Return the result of `call`, or of `retry` in the attempts after the first."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: is_outage(error) and self._fork is None),
            wait=wait_random_exponential(multiplier=self._intervals.first, max=_LONGEST_PAUSE),
            stop=stop_after_attempt(_ATTEMPTS),
            sleep=self._sleep,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                is_first = attempt.retry_state.attempt_number == 1
                return await (call if is_first or retry is None else retry)()
        raise AssertionError("an attempt returns or raises")

    async def _sleep(self, seconds: float) -> None:
        await self._clock.wait(self._went_offline, self._clock.monotonic() + seconds)

    async def _start_fork(self, error: StoreUnavailable) -> None:
        """Start a fork unless there is one; raise the error if a fork can't help or can't be made."""
        if not is_outage(error):
            raise error
        async with self._fork_lock:
            if self._fork is not None:
                return
            try:
                await to_thread.run_sync(partial(self._folder.parent.mkdir, parents=True, exist_ok=True))
                await self._held_lock.enter_async_context(_lock(self._folder).hold(0))
                fork = await self._open_fork.enter_async_context(Fork.open(self._folder, self._clock))
                await fork.begin(self._mirror.dump())
            except (OSError, StoreUnavailable):
                await self._close()
                raise error from None
            self._replayed, self._fork = ReplayResult(), fork
            self._outage.begin(error)
            self._went_offline.set()

    async def run_reconnect(self) -> None:
        """For each fork, wait until the inner store can be reached, and replay the fork's commits."""
        while True:
            await self._went_offline.wait()
            await self._outage.retry_until_reached(self._end_fork, update_status=False)

    async def _end_fork(self) -> None:
        await self._inner.position()
        async with self._fork_lock:
            assert self._fork is not None, "only this method ends a fork"  # noqa: S101
            await self._fork.replay(self._inner, self._replayed)
            await self._apply_replay(self._fork, self._replayed)
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

    async def _apply_replay(self, fork: Fork, replayed: ReplayResult) -> None:
        """Record which changes of the fork the inner store accepted, and which it refused."""
        for commit, position in replayed.accepted:
            self._mirror.record_commit(commit, position, self._clock.now())
        for key, shift in replayed.shifts.items():
            self._shifts[key] = (shift, (await fork.store.history(key, 1))[0].version)
        for key, version, value in (document for refused in replayed.refused for document in refused.documents):
            self._mirror.record_read(key, await self._inner.get(key))
            self._lost_versions.setdefault(key, set()).add(version)
            if value is not None and "epoch" in value:
                self._lost_epochs.setdefault(key, set()).add(value["epoch"])

    async def follow(self) -> None:
        """Keep the mirror up to date with the inner store's log."""
        while True:
            with suppress(StoreUnavailable):
                async with aclosing(follow_log(self._inner, self._mirror.followed)) as records:
                    async for record in records:
                        self._mirror.follow(record)
            await self._wait_until_online()
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + self._intervals.first)

    async def close(self) -> None:
        """Close the fork, if there is one; the next process that opens the store replays it."""
        if self._fork is not None:
            self._on_event(Event("outage.preserved", {"folder": str(self._folder)}))
        await self._close()

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._open_fork.aclose()
            await self._held_lock.aclose()


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def remove_fork(folder: Path) -> None:
    """Remove a replayed fork and its lock, which the caller holds. Blocks."""
    rmtree(folder, ignore_errors=True)
    _lock(folder).path.unlink(missing_ok=True)


@asynccontextmanager
async def continue_offline(
    store: Store, outage: Outage, intervals: RetryIntervals, clock: Clock, folder: Path, on_event: EventHandler
) -> AsyncIterator[Store]:
    """Wrap a store in a ForkingStore for the body of the `async with`; forks are made below `folder`.

    Forks of killed processes are replayed first.
    """
    for event in await _replay_leftovers(store, clock, folder):
        on_event(event)
    mirror = Mirror(await store.position())
    forking_store = ForkingStore(store, mirror, outage, intervals, clock, folder / token_hex(8), on_event)
    try:
        async with run_alongside(forking_store.follow, forking_store.run_reconnect, grace_period=0):
            yield forking_store
    finally:
        await forking_store.close()


async def _replay_leftovers(store: Store, clock: Clock, folder: Path) -> Sequence[Event]:
    """Replay the forks whose process is gone; return the events to send."""
    events = list[Event]()
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
                    events.append(Event("outage.ended", {"mode": "continue", "seconds": None, **counts}))
                await to_thread.run_sync(remove_fork, fork_folder)
    return events
