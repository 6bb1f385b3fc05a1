"""Removing the record of a run that is over: its documents go in one commit, and a checkpoint brings them back.

What no checkpoint brings back stays, a few bytes each: the lease, whose epochs must go on rising, and how far sinks and
trackers have been told. So do the run's checkpoints, to be found by. Notes that its sessions left stay as long as there
is another run on the same target, whose sessions they are for, too.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Final

from orchestrator.engine.memory import KIND as NOTE
from orchestrator.failpoints import failpoint
from orchestrator.locking.registry import scope_of
from orchestrator.protocols import Commit, Document, Event, Store, Write
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
    elsewhere = {_scope(one) for key, one in found.items() if key.kind == "run" and key.id != run and not one.damaged}
    writes = [
        Write(key, one.version, None)
        for key, one in found.items()
        if (is_of_run(key, run) and key.kind not in _STAY) or _is_last_note(one, run, elsewhere)
    ]
    if writes:
        removed = Event("run.removed", {"run": run, "checkpoint": checkpoint})
        await store.commit(Commit(writes, [removed]))


def _scope(run: Document) -> str:
    value = run.value
    return scope_of(value.get("repo", ""), value.get("target", ""))


def _is_last_note(found: Document, run: str, elsewhere: Collection[str]) -> bool:
    """Whether a document is a note of a run that nobody else will look for."""
    if found.key.kind != NOTE or found.damaged or found.key.id.partition("/")[0] in elsewhere:
        return False
    return found.value.get("run") == run
