"""Remove the record of an ended run in one commit, which a checkpoint can restore.

Some small documents are not restored by checkpoints, and remain: the lease and the claims, whose epochs must keep
increasing, and the cursors of sinks and trackers. The run's checkpoints remain as well. Notes of its sessions remain
for later runs, unless the target was the run's own branch. Records of its orchestrators are deleted; their ids are
never reused, and an orchestrator without a record counts as ended, so that its claims can be taken.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from orchestrator.domain.events.runs import RunRemoved
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
    """Delete the documents of an inactive run, whose state is saved in `checkpoint`."""
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
        removed = Event.of(RunRemoved(run=run, checkpoint=checkpoint))
        await store.commit(Commit(writes, [removed]))


def _notes_prefix(document: Document | None, run: str) -> str | None:
    """Return the id prefix of notes that no other run uses; None if there are none."""
    value = {} if document is None or document.damaged else document.value
    if value.get("target") != f"council/{run}":
        return None
    return f"{ownership_scope(value['repo'], value['target'])}/"
