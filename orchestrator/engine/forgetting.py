"""Removing the record of a run that is over: its documents go in one commit, and a checkpoint brings them back.

What no checkpoint brings back stays, a few bytes each: the lease, whose epochs must go on rising, and how far sinks and
trackers have been told. So do the run's checkpoints, to be found by.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from orchestrator.failpoints import failpoint
from orchestrator.protocols import Commit, Event, Store, Write
from orchestrator.state.checkpoints import KIND as CHECKPOINT
from orchestrator.state.reading import is_of_run
from orchestrator.state.update import retried

_STAY: Final = frozenset({"lease", "cursor", CHECKPOINT})


async def forget_run(store: Store, run: str, checkpoint: str) -> None:
    """Delete the documents of a run that nobody is at work in; `checkpoint` is of how it stands."""
    await retried(partial(_forget, store, run, checkpoint))
    failpoint("run.removed")


async def _forget(store: Store, run: str, checkpoint: str) -> None:
    found = (await store.at(await store.position())).documents
    writes = [
        Write(key, one.version, None) for key, one in found.items() if is_of_run(key, run) and key.kind not in _STAY
    ]
    if writes:
        removed = Event("run.removed", {"run": run, "checkpoint": checkpoint})
        await store.commit(Commit(writes, [removed]))
