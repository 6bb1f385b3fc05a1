"""Parts of the log that end, on any store, and the place of a time in it."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
from pydantic import ValidationError

from orchestrator.errors import HistoryCompacted, RefusedError
from orchestrator.protocols import CommitRecord, Key, Store

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

#: How many commits `backwards` reads at once: at first, because most look for what is new, and at most.
_FIRST_PART: Final = 256
_LARGEST_PART: Final = 4096
#: Seconds after which nothing more of a damaged log comes: its newest commits may be those that can't be read.
_PATIENCE: Final = 2.0


async def read_range(store: Store, after: int, until: int) -> AsyncGenerator[CommitRecord]:
    """Yield the records behind position `after` up to position `until`, or up to the newest where that comes first.

    Records that can't be read are missing. Raises HistoryGone where the log does not go back so far.
    """
    until = min(until, await store.position())  # a commit that is not there yet may never come
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
    """Return the next record of one that is not yet to come; None where it can't be read."""
    with anyio.move_on_after(_PATIENCE if store.damage else math.inf):
        return await anext(records, None)
    return None


async def follow_log(store: Store, after: int) -> AsyncGenerator[CommitRecord]:
    """Yield the records behind position `after` as they come; those that the log lets go of meanwhile are missing.

    So who was stopped for long, or reads too slowly, goes on. Never ends by itself.
    """
    while True:
        try:
            async with aclosing(store.watch(after)) as records:
                async for record in records:
                    after = record.position
                    yield record
        except HistoryCompacted as gone:
            after = gone.first


class LogTail:
    """The log from a position on, read in parts by whoever wants no more than what is there."""

    def __init__(self, store: Store, after: int) -> None:
        """Begin behind position `after`."""
        self.position = after
        """The last that was read, or is known to be unreadable."""
        self._store = store
        self._records: AsyncGenerator[CommitRecord] | None = None

    async def part(self, until: int, size: int) -> list[CommitRecord]:
        """Return the next records, at most `size`; none once position `until` or the newest is reached.

        Raises HistoryGone where the log does not go back so far.
        """
        part: list[CommitRecord] = []
        until = min(until, await self._store.position())
        while self.position < until and len(part) < size:
            if self._records is None:
                self._records = self._store.watch(self.position)
            record = await _next(self._store, self._records)
            if record is None:
                await self.close()
                self.position = until
            else:
                self.position = record.position
                part.append(record)
        return part

    async def close(self) -> None:
        """Let go of the log."""
        records, self._records = self._records, None
        if records is not None:
            await records.aclose()


async def read_backwards(store: Store, until: int, after: int = 0) -> AsyncGenerator[list[CommitRecord]]:
    """Yield the records behind position `after` up to `until` in parts, the newest part first, each in the log's order.

    What is looked for among the newest is found without reading the rest. Raises HistoryGone behind the last part
    where the log does not go back to `after`.
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
    """Whether a document is one of a run's."""
    if key.kind == "ownership":  # of what, and then whose
        return key.id.partition("/")[2].startswith(f"{run}/")
    return key.id == run or key.id.startswith(f"{run}/") or key == Key("lease", f"run/{run}")


def find_newest_until(times: Iterable[tuple[int, float]], instant: float) -> int | None:
    """Return the highest of the positions whose time is not later than an instant; None if all are.

    Clocks are set back and forth: what counts is the newest commit that says so, whatever those before it say.
    """
    return max((position for position, time in times if time <= instant), default=None)


async def find_position(store: Store, instant: float) -> int:
    """Return the position of the newest commit that was not written later than an instant (wall-clock seconds).

    0 if all were. RefusedError where that is not known because the log does not go back so far.
    """
    try:
        async with aclosing(read_backwards(store, await store.position())) as parts:
            async for part in parts:
                found = find_newest_until(((record.position, record.time) for record in part), instant)
                if found is not None:
                    return found
    except HistoryCompacted as gone:
        raise RefusedError(
            "the state log does not go back to that time", f"name a later time, or a position from {gone.first} on"
        ) from None
    return 0


def validate_many(model: TypeAdapter[list[T]], encoded: Sequence[bytes]) -> list[T]:
    """Return many documents by one call, which is quick; those that somebody wrote who should not have are left out."""
    try:
        return model.validate_json(b"[" + b",".join(encoded) + b"]")
    except ValidationError as error:
        wrong = {one["loc"][0] for one in error.errors(include_url=False, include_context=False, include_input=False)}
        return validate_many(model, [one for place, one in enumerate(encoded) if place not in wrong])
