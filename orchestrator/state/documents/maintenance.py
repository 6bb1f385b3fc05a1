"""What a store needs from time to time: what has expired is deleted, and of the past no more stays than is to stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, CompactionResult, Event, JsonObject, Key, Store, Write
from orchestrator.system.clock import Clock

_MOST_NAMED = 100


async def delete_expired(store: Store, facts: JsonObject) -> Sequence[Key]:
    """Delete what has expired, and return its keys.

    It was as if it were not there before; from then on it is not even on record as a value. The event `state.expired_deleted`
    has their count, the names of the first hundred, and `facts`.
    """
    expired = (await store.statistics()).expired
    if not expired:
        return ()
    named = {"count": len(expired), "documents": [str(key) for key in expired[:_MOST_NAMED]]}
    with suppress(VersionConflict):  # somebody has written one of them anew: the others go the next time
        await store.commit(
            Commit([Write(key, 0, None) for key in expired], [Event("state.expired_deleted", facts | named)])
        )
        return expired
    return ()


async def compact_log(store: Store, clock: Clock, age: float | None, size: int, facts: JsonObject) -> CompactionResult:
    """Let go of the past that is older than `age` seconds (None: of nothing), or more than `size` bytes of log.

    Where anything went, the event `state.compacted` says so, with `facts`.
    """
    first = (await store.statistics()).first
    done = await store.compact(-math.inf if age is None else clock.now() - age, size)
    if done.first > first:
        told = {"before": done.before, "after": done.after, "first": done.first}
        await store.commit(Commit([], [Event("state.compacted", facts | told)]))
    return done
