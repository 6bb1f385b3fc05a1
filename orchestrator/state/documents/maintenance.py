"""Periodic maintenance of a store: delete expired documents and prune the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, CompactionResult, Event, JsonObject, Key, Store, Write
from orchestrator.system.clock import Clock

_MOST_NAMED = 100


async def delete_expired(store: Store, facts: JsonObject) -> Sequence[Key]:
    """Delete expired documents, and return their keys.

    Readers already treat them as missing; this records the deletion. The event `state.expired_deleted` has their count,
    the names of the first hundred, and `facts`.
    """
    expired = (await store.statistics()).expired
    if not expired:
        return ()
    named = {"count": len(expired), "documents": [str(key) for key in expired[:_MOST_NAMED]]}
    event = Event("state.expired_deleted", facts | named)
    with suppress(VersionConflict):  # one of them was written again: the next call deletes the rest
        await store.commit(Commit([Write(key, 0, None) for key in expired], [event]))
        return expired
    return ()


async def compact_log(store: Store, clock: Clock, age: float | None, size: int, facts: JsonObject) -> CompactionResult:
    """Prune commits older than `age` seconds (None: none by age), or beyond `size` bytes of log.

    If any was pruned, records an event `state.compacted` with `facts`.
    """
    first = (await store.statistics()).first
    result = await store.compact(-math.inf if age is None else clock.now() - age, size)
    if result.first > first:
        sizes = {"before": result.before, "after": result.after, "first": result.first}
        await store.commit(Commit([], [Event("state.compacted", facts | sizes)]))
    return result
