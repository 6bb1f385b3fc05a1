"""Update documents with retries, delete expired ones, and prune the log."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from orchestrator.domain.events.base import TypedEvent
from orchestrator.domain.events.state import StateCompacted, StateExpiredDeleted
from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, CompactionResult, Document, Event, JsonObject, Key, Store, Write
from orchestrator.system.clock import Clock

#: The maximum number of attempts of an update.
MAX_ATTEMPTS: Final = 5
#: Seconds: the maximum pause after the first attempt, which doubles with each attempt, and its upper limit.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0

#: The maximum number of expired documents listed in an event.
_MOST_NAMED: Final = 100

#: Raises RefusedError if a document's new value is forbidden; None means deletion.
ChangeCheck = Callable[[Key, Document | None, JsonObject | None], None]

T = TypeVar("T")


async def update_document(
    store: Store,
    key: Key,
    change: Callable[[JsonObject | None], JsonObject | None],
    *,
    expected_version: int | None = None,
    ttl: float | None = None,
    attempts: int = MAX_ATTEMPTS,
    check: ChangeCheck | None = None,
) -> Document | None:
    """Replace a document's value with `change(value)`, and return the new document.

    `change` gets a copy of the value (None if there is no document), and returns None to delete it; then the result is
    also None. If another process commits first, `change` is called again with the newer value after a random pause that
    grows exponentially. The document expires after `ttl` seconds. Raises VersionConflict after `attempts`, or
    immediately if the version is not `expected_version` (0 means no document). If `check` raises an error, nothing is
    written.
    """
    attempts = 1 if expected_version is not None else attempts
    return await retry_on_conflict(lambda: _try(store, key, change, expected_version, ttl, check), attempts)


async def retry_on_conflict(attempt: Callable[[], Awaitable[T]], attempts: int = MAX_ATTEMPTS) -> T:
    """Call `attempt`, which reads and commits, until it has no VersionConflict.

    Retries follow a random pause that grows exponentially. The VersionConflict of the last attempt is raised.
    """
    async for trial in AsyncRetrying(
        retry=retry_if_exception_type(VersionConflict),
        stop=stop_after_attempt(attempts),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
        reraise=True,
    ):
        with trial:
            return await attempt()
    raise AssertionError("an attempt returns or raises")


async def _try(
    store: Store,
    key: Key,
    change: Callable[[JsonObject | None], JsonObject | None],
    expected_version: int | None,
    ttl: float | None,
    check: ChangeCheck | None,
) -> Document | None:
    found = await store.get(key)
    version = found.version if found else 0
    if expected_version is not None and expected_version != version:
        writer, time = (found.writer, found.time) if found else ("", 0.0)
        raise VersionConflict(str(key), expected_version, version, writer=writer, time=time)
    value = change(found.value if found else None)
    if value is None and found is None:
        return None
    if check is not None:
        check(key, found, value)
    await store.commit(Commit([Write(key, version, value, ttl)]))
    return await store.get(key) if value is not None else None


async def delete_expired(store: Store, run: str | None = None) -> Sequence[Key]:
    """Delete expired documents, and return their keys.

    Readers already treat them as missing; this records the deletion, as an event of `run` if given.
    """
    expired = (await store.statistics()).expired
    if not expired:
        return ()
    deleted = StateExpiredDeleted(count=len(expired), documents=[str(key) for key in expired[:_MOST_NAMED]])
    event = _of_run(deleted, run)
    with suppress(VersionConflict):  # one of them was rewritten: the next call deletes the rest
        await store.commit(Commit([Write(key, 0, None) for key in expired], [event]))
        return expired
    return ()


async def compact_log(
    store: Store, clock: Clock, age: float | None, size: int, run: str | None = None
) -> CompactionResult:
    """Prune commits older than `age` seconds, or beyond `size` bytes of log.

    An `age` of None means no age limit. Records an event, of `run` if given, when commits were pruned.
    """
    first = (await store.statistics()).first
    result = await store.compact(-math.inf if age is None else clock.now() - age, size)
    if result.first > first:
        event = StateCompacted(before=result.before, after=result.after, first=result.first)
        await store.commit(Commit([], [_of_run(event, run)]))
    return result


def _of_run(event: TypedEvent, run: str | None) -> Event:
    return Event.of(event if run is None else event.within(run=run))
