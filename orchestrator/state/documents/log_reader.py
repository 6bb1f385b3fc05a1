"""Read and follow a store's log, wait for changes, and find positions by time."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import anyio
from pydantic import ValidationError

from orchestrator.errors import HistoryCompacted, RefusedError
from orchestrator.protocols import CommitRecord, JsonObject, Key, Store
from orchestrator.system.background import run_in_background
from orchestrator.system.clock import Clock

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

#: How many commits `read_backwards` reads at a time: initially (most searches end soon), and at most.
_FIRST_PART: Final = 256
_LARGEST_PART: Final = 4096
#: Seconds to wait for a record of a damaged log, whose newest commits may be unreadable.
_PATIENCE: Final = 2.0


async def read_range(store: Store, after: int, until: int) -> AsyncGenerator[CommitRecord]:
    """Yield the readable records after position `after` up to `until`.

    Ends at the newest record if `until` is higher. Raises HistoryCompacted if the log does not go back that far.
    """
    until = min(until, await store.position())  # a future commit may never come
    if after >= until:
        return
    async with aclosing(store.watch(after)) as records:
        while after < until:
            record = await _next(store, records)
            if record is None or record.position > until:
                return
            after = record.position
            yield record


async def _next(store: Store, records: AsyncGenerator[CommitRecord]) -> CommitRecord | None:
    """Return the next existing record, or None if it can't be read."""
    with anyio.move_on_after(_PATIENCE if store.damage else math.inf):
        return await anext(records, None)
    return None


async def follow_log(store: Store, after: int) -> AsyncGenerator[CommitRecord]:
    """Yield the records after position `after` as they are committed.

    Skips pruned records, so that a slow or stopped reader can continue. Never ends on its own.
    """
    while True:
        try:
            async with aclosing(store.watch(after)) as records:
                async for record in records:
                    after = record.position
                    yield record
        except HistoryCompacted as gone:
            after = gone.first


async def wait_for_commit(
    store: Store, clock: Clock, after: int, matches: Callable[[CommitRecord], bool], until: float
) -> None:
    """Wait for a matching commit after position `after`, at most until `until`.

    `until` is on the monotonic clock.
    """
    found = anyio.Event()

    async def watch() -> None:
        async with aclosing(follow_log(store, after)) as records:
            async for record in records:
                if matches(record):
                    break
        found.set()

    async with run_in_background(watch):
        await clock.wait(found, None if math.isinf(until) else until)


async def read_backwards(store: Store, until: int, after: int = 0) -> AsyncGenerator[list[CommitRecord]]:
    """Yield the records after `after` up to `until` in parts, newest part first.

    Each part is in log order. So a search among the newest records need not read older ones. Raises HistoryCompacted
    after the last part if the log does not go back to `after`.
    """
    size, gone = _FIRST_PART, None
    while after < until:
        start = max(until - size, after)
        try:
            part = [record async for record in read_range(store, start, until)]
        except HistoryCompacted as error:
            gone, after = error, error.first
            continue
        yield part
        until, size = start, min(2 * size, _LARGEST_PART)
    if gone is not None:
        raise gone


def is_run_document(key: Key, run: str) -> bool:
    """Return True if a document belongs to a run."""
    if key.kind == "ownership":  # SCOPE/RUN/TASK
        return key.id.partition("/")[2].startswith(f"{run}/")
    return key.id == run or key.id.startswith(f"{run}/") or key == Key("lease", f"run/{run}")


def find_newest_until(times: Iterable[tuple[int, float]], instant: float) -> int | None:
    """Return the highest position whose time is not later than an instant, or None.

    Clocks may be set back, so times are not monotonic: the newest matching commit counts.
    """
    return max((position for position, time in times if time <= instant), default=None)


async def find_position(store: Store, instant: float) -> int:
    """Return the position of the newest commit up to an instant, or 0.

    The instant is in wall-clock seconds. Raises RefusedError if the log does not go back that far.
    """
    try:
        async with aclosing(read_backwards(store, await store.position())) as parts:
            async for part in parts:
                found = find_newest_until(((record.position, record.time) for record in part), instant)
                if found is not None:
                    return found
    except HistoryCompacted as gone:
        raise RefusedError(
            "the state log does not go back to that time", f"use a later time, or position {gone.first} or later"
        ) from None
    return 0


def validate_many(model: TypeAdapter[list[T]], encoded: Sequence[bytes]) -> list[T]:
    """Parse many documents in one fast call; skip documents that are not valid."""
    try:
        return model.validate_json(b"[" + b",".join(encoded) + b"]")
    except ValidationError as error:
        wrong = {one["loc"][0] for one in error.errors(include_url=False, include_context=False, include_input=False)}
        return validate_many(model, [one for place, one in enumerate(encoded) if place not in wrong])


class DocumentChange(NamedTuple):
    """A new version of a document; `value` is None if it was deleted."""

    key: Key
    version: int
    value: JsonObject | None
    position: int
    time: float
    writer: str


async def subscribe(store: Store, pattern: str, after: int | None = None) -> AsyncGenerator[DocumentChange]:
    """Yield each new version of documents whose name matches an fnmatch(3) pattern.

    The name is `kind/id`; `*` matches any characters, including `/`. Starts after the position `after`: 0 is the
    beginning of the log, None is now. An expired document is reported when it is deleted from the store.
    """
    begin = await store.position() if after is None else after
    async with aclosing(store.watch(begin)) as records:
        async for record in records:
            for key, (version, value) in record.documents.items():
                if fnmatchcase(str(key), pattern):
                    yield DocumentChange(key, version, value, record.position, record.time, record.writer)
