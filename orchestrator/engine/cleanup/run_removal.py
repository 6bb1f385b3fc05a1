"""Removing the record of a run that is over: its documents go in one commit, and a checkpoint brings them back.

What no checkpoint brings back stays, a few bytes each: the lease and the claims, whose epochs must go on rising, and
how far sinks and trackers have been told. So do the run's checkpoints, to be found by. Notes of its sessions stay for
later runs, unless its target was a branch of its own. The records of its orchestrators go, whose names never come
again: who has none has ended, so that claims which one left are anybody's.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from orchestrator.engine.session_api.notes import KIND as NOTE
from orchestrator.engine.state.records import run_key
from orchestrator.locking.ownership import ownership_scope
from orchestrator.protocols import Commit, Document, Event, Store, Write
from orchestrator.state.documents.checkpoints import CHECKPOINT_KIND as CHECKPOINT
from orchestrator.state.documents.log_reader import is_run_document
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.system.failpoints import failpoint

_KEPT_KINDS: Final = frozenset({"lease", "claim", "cursor", CHECKPOINT})


async def remove_run(store: Store, run: str, checkpoint: str) -> None:
    """Delete the documents of a run that nobody is at work in; `checkpoint` is of how it stands."""
    await retry_on_conflict(partial(_remove, store, run, checkpoint))
    failpoint("run.removed")


async def _remove(store: Store, run: str, checkpoint: str) -> None:
    found = (await store.at(await store.position())).documents
    notes = _notes_prefix(found.get(run_key(run)), run)
    writes = [
        Write(key, one.version, None)
        for key, one in found.items()
        if (is_run_document(key, run) and key.kind not in _KEPT_KINDS)
        or (notes and key.kind == NOTE and key.id.startswith(notes))
    ]
    if writes:
        removed = Event("run.removed", {"run": run, "checkpoint": checkpoint})
        await store.commit(Commit(writes, [removed]))


def _notes_prefix(found: Document | None, run: str) -> str | None:
    """Return what the names of the notes begin with that are of no other run's use; None if there are none such."""
    value = {} if found is None or found.damaged else found.value
    if value.get("target") != f"council/{run}":
        return None
    return f"{ownership_scope(value['repo'], value['target'])}/"
