"""A store that goes on on this machine where another can't be reached, and tells that one of it when it is back."""

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
from orchestrator.state.offline.outage import Outage, RetryIntervals, commit_idempotently, is_outage, run_alongside
from orchestrator.state.offline.wrapper import StoreWrapper
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock

T = TypeVar("T")

EventHandler = Callable[[Event], None]

#: How often something is tried before the store counts as one that can't be reached: a moment is no outage.
_TRIES: Final = 3
#: Seconds between two of these tries at most.
_LONGEST_MOMENT: Final = 0.5
_UNREACHABLE: Final = "the state can't be reached"
_UNSEEN: Final = "wait until it can be, as `when_unreachable: pause` does by itself"


class ForkingStore(StoreWrapper):
    """A store in front of another: passed on to it, or to a fork of it on this machine while it can't be reached.

    What is watched, and what is asked of the past, waits for the other store: positions and what was recorded at them
    never change.
    """

    def __init__(
        self,
        inner: Store,
        mirror: Mirror,
        outage: Outage,
        pauses: RetryIntervals,
        clock: Clock,
        place: Path,
        news: EventHandler,
    ) -> None:
        super().__init__(inner)
        self._mirror, self._outage, self._pauses, self._clock = mirror, outage, pauses, clock
        self._place, self._news = place, news
        self._held, self._open = AsyncExitStack(), AsyncExitStack()
        self._fork: Fork | None = None
        self._turn = anyio.Lock()
        """Held while a fork begins or ends, and by whoever uses it."""
        self._departed, self._returned = anyio.Event(), anyio.Event()
        self._replayed = ReplayResult()
        self._lost_epochs: dict[Key, set[int]] = {}
        """Of leases that were taken on a fork, and are somebody else's."""
        self._lost_versions: dict[Key, set[int]] = {}
        """The same of documents that nobody has read since."""
        self._shifts: dict[Key, tuple[int, int]] = {}
        """By how much versions are higher than a fork gave them, up to the highest that it gave."""

    async def commit(self, commit: Commit) -> int:
        """See `Store.commit`; the position is that in the fork while there is one."""
        commit = self._judged(commit)
        while True:
            if self._fork is None:
                try:
                    position = await self._tried(partial(self._inner.commit, commit), partial(self._again, commit))
                except StoreUnavailable as error:
                    await self._start_fork(error)
                else:
                    await self._made(commit, position)
                    return position
            async with self._turn:
                if self._fork is not None:
                    keys = [write.key for write in commit.writes if write.expected]
                    for key in (*keys, *(guard.key for guard in commit.guards)):
                        await self._check_known(self._fork, key)
                    return await self._fork.commit(commit)

    async def _again(self, commit: Commit) -> int:
        return await commit_idempotently(self._inner, commit)

    async def _made(self, commit: Commit, position: int) -> None:
        self._mirror.wrote(commit, position, self._clock.now())
        for write in commit.writes:
            # Whoever takes a lease anew has it by the epoch that is written, even if a fork gave that one, too.
            self._lost_epochs.get(write.key, set()).discard((write.value or {}).get("epoch"))
        if self._fork is not None:  # it could be reached while somebody else was told that not
            async with self._turn:
                if self._fork is not None:
                    await self._fork.adopt(commit)

    def _judged(self, commit: Commit) -> Commit:
        """Return a commit with the versions that the other store has; refuse what relies on what it did not take."""
        for guard in commit.guards:
            if guard.epoch in self._lost_epochs.get(guard.key, ()):
                _, value = self._mirror.newest(guard.key)
                raise LeaseLost(str(guard.key), guard.epoch, (value or {}).get("epoch"))
        writes = []
        for write in commit.writes:
            if write.expected in self._lost_versions.get(write.key, ()):
                version, value = self._mirror.newest(write.key)
                raise VersionConflict(str(write.key), write.expected, 0 if value is None else version)
            # What a fork gave is lower than whatever can be read there since.
            shift, highest = self._shifts.get(write.key, (0, 0))
            is_of_fork = 0 < write.expected <= highest
            writes.append(Write(write.key, write.expected + shift, write.value, write.ttl) if is_of_fork else write)
        return Commit(writes, commit.events, commit.guards, durable=commit.durable)

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`; RefusedError in a fork for what nobody here has ever read."""

        async def here(fork: Fork) -> Document | None:
            await self._check_known(fork, key)
            return await fork.store.get(key)

        async def there() -> Document | None:
            found = await self._inner.get(key)
            self._mirror.read(key, found)
            self._lost_versions.pop(key, None)
            return found

        return await self._read_either(there, here)

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """See `Store.list`; RefusedError in a fork for what nobody here has ever listed."""

        async def here(fork: Fork) -> Sequence[Document]:
            if not self._mirror.knows_all(kind, prefix):
                raise RefusedError(f"{kind}/{prefix}* was never listed here, and {_UNREACHABLE}", _UNSEEN)
            return await fork.store.list(kind, prefix)

        async def there() -> Sequence[Document]:
            found = await self._inner.list(kind, prefix)
            self._mirror.listed(kind, prefix, found)
            for key in [key for key in self._lost_versions if key.kind == kind and key.id.startswith(prefix)]:
                del self._lost_versions[key]
            return found

        return await self._read_either(there, here)

    async def position(self) -> int:
        """See `Store.position`; in a fork it is the last that is known."""

        async def here(_: Fork) -> int:
            return self._mirror.position

        return await self._read_either(self._inner.position, here)

    async def _read_either(self, there: Callable[[], Awaitable[T]], here: Callable[[Fork], Awaitable[T]]) -> T:
        while True:
            if self._fork is None:
                try:
                    return await self._tried(there)
                except StoreUnavailable as error:
                    await self._start_fork(error)
            async with self._turn:
                if self._fork is not None:
                    return await here(self._fork)

    async def _check_known(self, fork: Fork, key: Key) -> None:
        if not self._mirror.knows(key) and not await fork.store.history(key, 1):
            raise RefusedError(f"{key} was never read here, and {_UNREACHABLE}", _UNSEEN)

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        while True:
            await self._wait_until_online()
            try:
                return await self._tried(read)
            except StoreUnavailable as error:
                await self._start_fork(error)

    async def _wait_for_recovery(self, error: StoreUnavailable) -> None:
        await self._start_fork(error)
        await self._wait_until_online()

    async def _wait_until_online(self) -> None:
        while self._fork is not None:
            await self._returned.wait()

    async def _tried(self, call: Callable[[], Awaitable[T]], again: Callable[[], Awaitable[T]] | None = None) -> T:
        """Return what `call` returns, or what `again` does after a first try that failed."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: is_outage(error) and self._fork is None),
            wait=wait_random_exponential(multiplier=self._pauses.first, max=_LONGEST_MOMENT),
            stop=stop_after_attempt(_TRIES),
            sleep=self._sleep,
            reraise=True,
        )
        async for trial in retrying:
            with trial:
                is_first = trial.retry_state.attempt_number == 1
                return await (call if is_first or again is None else again)()
        raise AssertionError("a trial returns or raises")

    async def _sleep(self, seconds: float) -> None:
        await self._clock.wait(self._departed, self._clock.monotonic() + seconds)

    async def _start_fork(self, error: StoreUnavailable) -> None:
        """Begin a fork, unless there is one; the error again where that is no help, or can't be."""
        if not is_outage(error):
            raise error
        async with self._turn:
            if self._fork is not None:
                return
            try:
                await to_thread.run_sync(partial(self._place.parent.mkdir, parents=True, exist_ok=True))
                await self._held.enter_async_context(_lock(self._place).hold(0))
                fork = await self._open.enter_async_context(Fork.open(self._place, self._clock))
                await fork.begin(self._mirror.dump())
            except (OSError, StoreUnavailable):
                await self._close()
                raise error from None
            self._replayed, self._fork = ReplayResult(), fork
            self._outage.begin(error)
            self._departed.set()

    async def run_reconnect(self) -> None:
        """Whenever there is a fork, wait until the store can be reached, and tell it what was committed meanwhile."""
        while True:
            await self._departed.wait()
            await self._outage.until_reached(self._return, note=False)

    async def _return(self) -> None:
        await self._inner.position()
        async with self._turn:
            assert self._fork is not None, "nobody else ends it"
            await self._fork.replay(self._inner, self._replayed)
            await self._apply_replay(self._fork, self._replayed)
            with anyio.CancelScope(shield=True):
                await self._open.aclose()
                await to_thread.run_sync(remove_fork, self._place)
                await self._held.aclose()
            self._fork, self._departed = None, anyio.Event()
            for refused in self._replayed.refused:
                self._news(refused.event())
            self._outage.end(replayed=len(self._replayed.accepted), refused=len(self._replayed.refused))
            self._returned.set()
            self._returned = anyio.Event()

    async def _apply_replay(self, fork: Fork, replayed: ReplayResult) -> None:
        """Know what counts, and what of the fork does not."""
        for commit, position in replayed.accepted:
            self._mirror.wrote(commit, position, self._clock.now())
        for key, shift in replayed.shifts.items():
            self._shifts[key] = (shift, (await fork.store.history(key, 1))[0].version)
        for key, version, value in (one for refused in replayed.refused for one in refused.documents):
            self._mirror.read(key, await self._inner.get(key))
            self._lost_versions.setdefault(key, set()).add(version)
            if value is not None and "epoch" in value:
                self._lost_epochs.setdefault(key, set()).add(value["epoch"])

    async def follow(self) -> None:
        """Keep what was seen up to date."""
        while True:
            with suppress(StoreUnavailable):
                async with aclosing(follow_log(self._inner, self._mirror.followed)) as records:
                    async for record in records:
                        self._mirror.follow(record)
            await self._wait_until_online()
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + self._pauses.first)

    async def close(self) -> None:
        """Let go of the fork, if there is one; what is in it is told by whoever comes next."""
        if self._fork is not None:
            self._news(Event("outage.preserved", {"folder": str(self._place)}))
        await self._close()

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._open.aclose()
            await self._held.aclose()


def _lock(place: Path) -> FileLock:
    return FileLock(place.with_name(f"{place.name}.lock"))


def remove_fork(place: Path) -> None:
    """Remove a fork that was told of, and its lock, which is held. Blocks."""
    rmtree(place, ignore_errors=True)
    _lock(place).path.unlink(missing_ok=True)


@asynccontextmanager
async def continue_offline(
    store: Store, outage: Outage, pauses: RetryIntervals, clock: Clock, folder: Path, news: EventHandler
) -> AsyncIterator[Store]:
    """Put such a store in front of another for the body of the `async with`; forks are made below a folder.

    First of all the other store is told what killed processes left there.
    """
    for event in await _replay_leftovers(store, clock, folder):
        news(event)
    mirror = Mirror(await store.position())
    found = ForkingStore(store, mirror, outage, pauses, clock, folder / token_hex(8), news)
    try:
        async with run_alongside(found.follow, found.run_reconnect, last=0):
            yield found
    finally:
        await found.close()


async def _replay_leftovers(store: Store, clock: Clock, folder: Path) -> Sequence[Event]:
    """Tell a store what stands in forks that nobody holds any more; return what is to be told of that."""
    told = list[Event]()
    for lock in await to_thread.run_sync(lambda: sorted(folder.glob("*.lock"))):
        place = lock.with_suffix("")
        with suppress(LockHeld):
            async with _lock(place).hold(0):
                if await to_thread.run_sync(place.is_dir):
                    replayed = ReplayResult()
                    async with Fork.open(place, clock) as fork:
                        await fork.replay(store, replayed)
                    told += [one.event() for one in replayed.refused]
                    counts = {"replayed": len(replayed.accepted), "refused": len(replayed.refused)}
                    told.append(Event("outage.ended", {"mode": "continue", "seconds": None, **counts}))
                await to_thread.run_sync(remove_fork, place)
    return told
