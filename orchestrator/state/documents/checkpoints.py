"""Checkpoints: named positions of the log, and their restore.

A checkpoint is a small document of kind `checkpoint`; the state itself stays in the log until it is pruned. A restore
is a normal commit that writes old values again: history is not rewritten, and version numbers continue. By kind, a
restore changes the documents of a run as follows:

run, spec   The old value; also for `imported` and `handoff`. If a task keeps its current state, so do its spec and
            handoffs. A run counts as unfinished while any of its tasks is interrupted (`council resume`
            finishes them), and keeps tasks that plans have added since if they had sessions.
task        As in `domain.runs.rollback`: landed tasks stay landed, and attempts stay on record.
shared      The old value, because repeated sessions share their values again. Version numbers continue.
note        Deleted notes of the run are restored; newer notes stay, because they are still true.
lease       Never: epochs only increase, so that a process that lost the run remains fenced.
request     Never: open user requests remain open.
cursor      Never: events that were sent to sinks and trackers can't be recalled.
adapter, cooldown  Never: usage limits and expired logins exist outside of the state.
checkpoint  Never: later checkpoints make it possible to undo the restore.
ports       Never: they belong to worktree slots of this machine, not to a run.
named_lock  Never: the holders at that time no longer hold the locks.
import      Never: state in earlier formats remains imported.
claim, orchestrator, ownership, context  Never: they belong to processes and sessions that are active now.

Restoring the whole store keeps runs that started after the checkpoint, and restores runs removed since. Checkpoints of
the whole store include documents of other programs' kinds: these get their old values, newer ones are deleted, and
those with an expiry do not change. A task whose record was or is damaged or invalid is not changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import anyio.to_thread

from orchestrator.domain.documents.stored import CheckpointOrigin, CheckpointRecord
from orchestrator.domain.events.state import CheckpointCreated
from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.runs.rollback import roll_back_task
from orchestrator.domain.runs.statuses import ACTIVE_STATUSES, FINAL_STATUSES, TaskStatus, run_state
from orchestrator.errors import HistoryCompacted, RefusedError, UnreadableDocument, VersionConflict
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.log_reader import is_run_document
from orchestrator.state.documents.validation import (
    DOCUMENT_KINDS,
    checkpoint_number,
    filter_readable,
    find_document_error,
)
from orchestrator.system.failpoints import failpoint

CHECKPOINT_KIND: Final = "checkpoint"
#: Replaces the run's id in the names of checkpoints of the whole store.
WHOLE_STORE: Final = "all"

#: The kinds that a restore changes.
_RESTORED_KINDS: Final = ("run", "spec", "task", "imported", "handoff", "shared")
#: Session notes, which are only restored, never deleted. Their ids begin with their scope, not their run.
_NOTE: Final = "note"
#: The kinds that are read.
_COVERED_KINDS: Final = (*_RESTORED_KINDS, _NOTE)
#: How many times all documents are read while other processes commit, before falling back to the slower log.
_MAX_READS: Final = 5


class Checkpoint(CheckpointRecord, extra="ignore"):
    """A named log position of a run or of the whole store (None), with a summary."""

    id: str
    """`<run>/<number>`, or `all/<number>`; numbers increase."""
    run: str | None
    time: float
    """The creation time in wall-clock seconds."""

    @property
    def number(self) -> int:
        """The checkpoint's number within its run."""
        return int(self.id.rpartition("/")[2])


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """The changes that restoring a checkpoint would make now."""

    checkpoint: Checkpoint
    writes: Sequence[Write]
    """Writes of old values over current versions; None deletes."""
    skipped: Mapping[Key, str]
    """Documents that changed since but are kept, with the reason."""
    runs: Mapping[str, RunDocument]
    """The affected runs as of after the restore."""

    @property
    def written(self) -> list[Key]:
        """The documents that would be restored to an old value."""
        return [write.key for write in self.writes if write.value is not None]

    @property
    def deleted(self) -> list[Key]:
        """The documents that would be deleted."""
        return [write.key for write in self.writes if write.value is None]


async def create_checkpoint(
    store: Store,
    run: str | None,
    reason: str,
    *,
    created_by: CheckpointOrigin = CheckpointOrigin.USER,
    is_live: bool = True,
    guards: Sequence[Guard] = (),
) -> Checkpoint:
    """Create a checkpoint of the current state of a run or of the whole store.

    `is_live`: whether a process is active in the run. Raises RefusedError if there is no such run, LeaseLost if one of
    the `guards` fails.
    """
    clean_reason = reason.encode(errors="replace").decode()  # command line arguments may be any bytes
    while True:
        position, documents = await _now(store, run)
        if run is not None and Key("run", run) not in documents:
            raise RefusedError(f"there is no run {run!r}", "`council runs` lists them")
        key = await _free_key(store, run or WHOLE_STORE)
        # Decoded in threads, here and below, because thousands of tasks take a while.
        summary = await anyio.to_thread.run_sync(_summarize, documents.values(), run, is_live)
        facts = {"position": position, "reason": clean_reason, "created_by": created_by, **summary}
        created = CheckpointCreated(checkpoint=key.id, reason=clean_reason)
        event = Event.of(created if run is None else created.within(run=run))
        with suppress(VersionConflict):  # another process took the number
            await store.commit(Commit([Write(key, 0, facts)], [event], guards))
            failpoint("checkpoint.created")
            return await read_checkpoint(store, key.id)


async def list_checkpoints(store: Store, run: str | None = None) -> list[Checkpoint]:
    """Return all checkpoints, or those of a run (or `WHOLE_STORE`), oldest first."""
    found = await store.list(CHECKPOINT_KIND, f"{run}/" if run else "")
    return [_checkpoint(one) for one in sorted(filter_readable(found), key=lambda one: one.position)]


async def read_checkpoint(store: Store, checkpoint: str) -> Checkpoint:
    """Return a checkpoint by its id.

    Raises RefusedError if it is missing or unreadable.
    """
    found = await store.get(Key(CHECKPOINT_KIND, checkpoint))
    if found is not None and (flaw := find_document_error(found)) is not None:
        raise UnreadableDocument(str(found.key), flaw)
    if found is None or found.damaged:
        what = "there is no" if found is None else "the state log is damaged: it has lost"
        raise RefusedError(f"{what} checkpoint {checkpoint!r}", "`council checkpoint list` lists them")
    return _checkpoint(found)


async def read_contents(store: Store, checkpoint: str) -> Mapping[Key, Document]:
    """Return the documents of a checkpoint at its position.

    They are those of its run, or of the whole store. Raises RefusedError if the log does not go back that far.
    """
    return await _read_at_checkpoint(store, await read_checkpoint(store, checkpoint))


async def plan_restore(store: Store, checkpoint: str) -> RestorePlan:
    """Return the changes that restoring a checkpoint would make now.

    Raises the errors of `read_contents`.
    """
    found = await read_checkpoint(store, checkpoint)
    then, now = await _read_at_checkpoint(store, found), await _read_current(store, found.run)
    return await anyio.to_thread.run_sync(_plan, found, then, now)


async def prune_checkpoints(store: Store, run: str, keep: int, guards: Sequence[Guard] = ()) -> list[str]:
    """Delete a run's periodic checkpoints except the newest `keep`.

    Returns the deleted ids.
    """
    by_timer = [one.id for one in await list_checkpoints(store, run) if one.created_by is CheckpointOrigin.TIMER]
    old = by_timer[: max(len(by_timer) - keep, 0)]
    found = [one for name in old if (one := await store.get(Key(CHECKPOINT_KIND, name))) is not None]
    with suppress(VersionConflict):  # another process is also pruning
        if found:
            await store.commit(Commit([Write(one.key, one.version, None) for one in found], (), guards))
    return old


def _checkpoint(found: Document) -> Checkpoint:
    run = found.key.id.rpartition("/")[0]
    own = {"id": found.key.id, "run": None if run == WHOLE_STORE else run, "time": found.time}
    return Checkpoint.model_validate({**found.value, **own})


async def _free_key(store: Store, owner: str) -> Key:
    """Return the next free key; keys of deleted checkpoints are never reused."""
    taken = [checkpoint_number(one.key) or 0 for one in await store.list(CHECKPOINT_KIND, f"{owner}/")]
    number = max(taken, default=0) + 1
    while await store.history(Key(CHECKPOINT_KIND, f"{owner}/{number}"), 1):
        number += 1
    return Key(CHECKPOINT_KIND, f"{owner}/{number}")


async def _now(store: Store, run: str | None) -> tuple[int, Mapping[Key, Document]]:
    """Return the newest position, and all restorable documents at it."""
    position = await store.position()
    for _ in range(_MAX_READS):
        documents = [one for kind in _COVERED_KINDS for one in await _listed(store, kind, run)]
        before, position = position, await store.position()
        if before == position:
            return position, {one.key: one for one in documents}
    found = (await store.at(position)).documents
    return position, {key: one for key, one in found.items() if key.kind in _COVERED_KINDS and _is_of(one, run)}


async def _read_current(store: Store, run: str | None) -> Mapping[Key, Document]:
    """Return all restorable documents in their current state."""
    if run is not None:
        return (await _now(store, run))[1]
    return (await store.at(await store.position())).documents  # only a snapshot includes the kinds of other programs


async def _listed(store: Store, kind: str, run: str | None) -> Iterable[Document]:
    if run is None:
        return await store.list(kind)
    if kind == _NOTE:
        return [one for one in await store.list(kind) if _is_of(one, run)]
    own = await store.get(Key(kind, run))
    return [*([] if own is None else [own]), *await store.list(kind, f"{run}/")]


async def _read_at_checkpoint(store: Store, checkpoint: Checkpoint) -> Mapping[Key, Document]:
    try:
        found = await store.at(checkpoint.position)
    except HistoryCompacted as gone:
        what = f"checkpoint {checkpoint.id} is at position {checkpoint.position}"
        what += f", but the state log goes back only to {gone.first}"
        raise RefusedError(what, "choose a later checkpoint") from None
    return {key: one for key, one in found.documents.items() if _is_of(one, checkpoint.run)}


def _is_of(found: Document, run: str | None) -> bool:
    if run is None or is_run_document(found.key, run):
        return True
    return found.key.kind == _NOTE and not found.damaged and found.value.get("run") == run


def _task_of(key: Key) -> str | None:
    """Return the task that a specification or a handoff belongs to, as `RUN/TASK`."""
    if key.kind == "handoff":
        return key.id.rpartition("/")[0]
    return key.id if key.kind == "spec" else None


def _run_of(key: Key) -> str:
    return key.id.partition("/")[0]


def _summarize(documents: Iterable[Document], run: str | None, is_live: bool) -> JsonObject:
    task_counts: Counter[str] = Counter()
    sessions, end, is_halted = [], None, False
    for found in documents:
        is_known = found.key.kind in {"run", "task"} and not _mark_unreadable(found).damaged
        if found.key.kind == "run":
            document = RunDocument.model_validate_json(found.encoded) if is_known else None
            end = 0.0 if document is None else document.ended
            is_halted = document is not None and document.halted is not None
        elif found.key.kind == "task":
            task = TaskDocument.model_validate_json(found.encoded) if is_known else None
            task_counts["damaged" if task is None else task.status] += 1
            if task is not None and task.status in ACTIVE_STATUSES:
                owner, _, name = found.key.id.partition("/")
                sessions.append({"run": owner, "task": name, "attempt": task.attempt.number, "status": task.status})
    status = None
    if run is not None and end != 0.0:
        status = run_state(task_counts, has_ended=end is not None, is_halted=is_halted, is_live=is_live)
    return {"status": status, "task_counts": dict(task_counts), "sessions": sessions}


def _mark_unreadable(found: Document) -> Document:
    """Return a document, marked as damaged if unreadable."""
    return found if find_document_error(found) is None else found._replace(damaged=True)


def _plan(checkpoint: Checkpoint, then: Mapping[Key, Document], now: Mapping[Key, Document]) -> RestorePlan:
    """Return the writes that restore the documents to `then`, as far as possible."""
    then, now = ({key: _mark_unreadable(one) for key, one in found.items()} for found in (then, now))
    writes: list[Write] = []
    skipped: dict[Key, str] = {}
    runs: dict[str, RunDocument] = {}
    for name, keys in _by_run([*then, *(key for key in now if key not in then)]).items():
        key = Key("run", name)
        if key not in then:
            skipped[key] = "it started after the checkpoint"
        elif then[key].damaged:
            skipped[key] = _DAMAGED_THEN
        else:
            planned = {one: _plan_write(then.get(one), now.get(one)) for one in keys if one != key}
            tasks = {one: what for one, what in planned.items() if one.kind == "task"}
            # Tasks that plans have added since the checkpoint stay in the run if they had sessions.
            staying = [one for one, what in tasks.items() if one not in then and _is_preserved(what)]
            as_now = {one.id for one, what in tasks.items() if isinstance(what, str)} | {one.id for one in staying}
            planned |= {one: _BEGUN for one, what in planned.items() if what is not None and _task_of(one) in as_now}
            skipped |= {one: why for one, why in planned.items() if isinstance(why, str)}
            changed = [one for one in planned.values() if isinstance(one, Write)]
            found = now.get(key)
            if changed or found is None or found.damaged:
                runs[name] = _run(then[key], [now[one] for one in keys if one in now], staying)
                writes += [*_write_run(runs[name], found), *changed]
    for key, note in then.items():
        if key.kind == _NOTE and key not in now and not note.damaged:
            writes.append(_write(note.value, key, None))
    if checkpoint.run is None:
        own = [key for key in dict.fromkeys((*then, *now)) if key.kind not in DOCUMENT_KINDS]
        found_own = {key: _plan_foreign_write(then.get(key), now.get(key)) for key in own}
        skipped |= {key: why for key, why in found_own.items() if isinstance(why, str)}
        writes += [one for one in found_own.values() if isinstance(one, Write)]
    return RestorePlan(checkpoint, writes, skipped, runs)


_DAMAGED_THEN: Final = "its old record is damaged"
_BEGUN: Final = "the work of its sessions remains on record"
_DAMAGED_NOW: Final = "its current record is damaged, so its newer work is unknown"


def _by_run(keys: Iterable[Key]) -> Mapping[str, list[Key]]:
    found: dict[str, list[Key]] = {}
    for key in keys:
        if key.kind in _RESTORED_KINDS:
            found.setdefault(_run_of(key), []).append(key)
    return found


def _plan_write(then: Document | None, now: Document | None) -> Write | str | None:
    """Return the write for a run's document, or why it is kept; None if unchanged."""
    if then is None:
        assert now is not None, "a key has one of these kinds"  # noqa: S101  (for the type checker)
        return _plan_delete(now)
    if now is not None and (now.version, now.damaged) == (then.version, then.damaged):
        return None
    if then.damaged:
        return _DAMAGED_THEN
    if then.key.kind == "task":
        return _plan_task_write(then, now)
    return (
        None if now is not None and not now.damaged and now.value == then.value else _write(then.value, then.key, now)
    )


def _plan_foreign_write(then: Document | None, now: Document | None) -> Write | str | None:
    """Return the write for another program's document, or why it is kept.

    None if the document is unchanged.
    """
    if any(one is not None and one.expires is not None for one in (then, now)):
        return None  # the old value has expired
    if then is None:
        return None if now is None else Write(now.key, now.version, None)
    if then.damaged:
        return _DAMAGED_THEN
    is_same = now is not None and not now.damaged and now.value == then.value
    return None if is_same else _write(then.value, then.key, now)


def _plan_task_write(then: Document, now: Document | None) -> Write | str | None:
    was = TaskDocument.model_validate_json(then.encoded)
    if now is None:
        return _write(was.model_dump(mode="json"), then.key, None)
    if now.damaged:
        return _DAMAGED_NOW
    found = TaskDocument.model_validate_json(now.encoded)
    after = roll_back_task(was, found)
    if isinstance(after, str):
        return after if was != found else None
    return None if after == found else _write(after.model_dump(mode="json"), then.key, now)


def _is_preserved(planned: Write | str | None) -> bool:
    return isinstance(planned, str) or (planned is not None and planned.value is not None)


def _plan_delete(now: Document) -> Write | str:
    """Return the write that deletes a newer document, or cancels a started task."""
    if now.key.kind == "task" and not now.damaged:
        task = TaskDocument.model_validate_json(now.encoded)
        if task.status in {TaskStatus.LANDED, TaskStatus.LANDING}:
            return "it has landed, or may have landed"
        if task.status in FINAL_STATUSES:
            return _BEGUN
        if task.attempts:
            ended = {"status": TaskStatus.CANCELLED, "reason": "the plan that added it was undone"}
            return _write(task.model_copy(update=ended).model_dump(mode="json"), now.key, now)
    return Write(now.key, now.version, None)


def _run(then: Document, now: Iterable[Document], staying: Sequence[Key]) -> RunDocument:
    """Return the old run, not marked as ended if a task is active or interrupted.

    Tasks in `staying` are newer and remain in the run.
    """
    document = RunDocument.model_validate_json(then.encoded)
    tasks = dict.fromkeys((*document.tasks, *(one.id.partition("/")[2] for one in staying)))
    document = document.model_copy(update={"tasks": tuple(tasks)})
    # The status of an unreadable task may have any value.
    at_work = any(one.key.kind == "task" and one.value.get("status") in tuple(ACTIVE_STATUSES) for one in now)
    return document.model_copy(update={"ended": None}) if at_work else document


def _write_run(run: RunDocument, now: Document | None) -> list[Write]:
    value = run.model_dump(mode="json")
    is_same = now is not None and not now.damaged and now.value == value
    return [] if is_same else [_write(value, Key("run", run.id), now)]


def _write(value: JsonObject, key: Key, now: Document | None) -> Write:
    return Write(key, now.version if now else 0, value)
