"""Changing a document by what it is now: read, apply, commit, and once more if somebody else was faster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Store, Write

#: How often an update is tried at all.
MAX_ATTEMPTS: Final = 5
#: Seconds: the longest pause behind the first attempt; it doubles with each, up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0

#: Refuses (RefusedError) what a document must not become; None deletes.
ChangeCheck = Callable[[Key, Document | None, JsonObject | None], None]

T = TypeVar("T")


async def update_document(
    store: Store,
    key: Key,
    change: Callable[[JsonObject | None], JsonObject | None],
    *,
    expected_version: int | None = None,
    ttl: float | None = None,
    events: Sequence[Event] = (),
    guards: Sequence[Guard] = (),
    attempts: int = MAX_ATTEMPTS,
    check: ChangeCheck | None = None,
) -> Document | None:
    """Replace a document's value by what `change` makes of it; return the document after that, None if it is gone.

    `change` gets a copy of its own, None where there is no document, and returns None to delete it. It may be called
    several times: where somebody else commits first, all is done anew with the newer value, after a random pause that
    grows exponentially. A VersionConflict is raised after so many attempts, or at once where the version is not the
    `expected_version` (0: there is none) to begin with. `ttl`, `events` and `guards` are those of the commit. What
    `check` raises for the change is raised, with nothing written.
    """
    tries = 1 if expected_version is not None else attempts
    return await retry_on_conflict(
        lambda: _try(store, key, change, expected_version, ttl, events, guards, check), tries
    )


async def retry_on_conflict(attempt: Callable[[], Awaitable[T]], attempts: int = MAX_ATTEMPTS) -> T:
    """Return what `attempt` returns, which reads and commits, and does both anew where somebody else was faster.

    Before each new attempt is a random pause that grows exponentially; the VersionConflict of the last one is raised.
    """
    async for trial in AsyncRetrying(
        retry=retry_if_exception_type(VersionConflict),
        stop=stop_after_attempt(attempts),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
        reraise=True,
    ):
        with trial:
            return await attempt()
    raise AssertionError("a trial returns or raises")


async def _try(
    store: Store,
    key: Key,
    change: Callable[[JsonObject | None], JsonObject | None],
    expected_version: int | None,
    ttl: float | None,
    events: Sequence[Event],
    guards: Sequence[Guard],
    check: ChangeCheck | None,
) -> Document | None:
    found = await store.get(key)
    version = found.version if found else 0
    if expected_version is not None and expected_version != version:
        by, time = (found.by, found.time) if found else ("", 0.0)
        raise VersionConflict(str(key), expected_version, version, by=by, time=time)
    value = change(found.value if found else None)
    if value is None and found is None:
        return None
    if check is not None:
        check(key, found, value)
    await store.commit(Commit([Write(key, version, value, ttl)], events, guards))
    return await store.get(key) if value is not None else None
