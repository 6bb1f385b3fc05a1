"""Resolve conflicting updates to a document, or record a conflict.

Both happen in the commit that writes the updates. A recorded conflict waits for a user's decision. It is a document of
kind `conflict`; the document that it concerns does not change.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from orchestrator.domain.documents.conflicts import (
    ConflictStrategy,
    DocumentUpdate,
    Unresolved,
    group_by_key,
    parse_strategy,
    resolve_updates,
)
from orchestrator.domain.documents.stored import ConflictRecord
from orchestrator.domain.events.state import StateConflictAutoResolved, StateConflictRecorded, StateConflictResolved
from orchestrator.errors import RefusedError, format_writer
from orchestrator.protocols import Commit, Document, DocumentVersion, Event, JsonObject, Key, Store, Write
from orchestrator.state.documents.update import ChangeCheck, retry_on_conflict
from orchestrator.state.documents.validation import filter_readable, find_document_error

#: The kind of the documents with pending conflicts.
CONFLICT_KIND: Final = "conflict"

_MOST_NAMED: Final = 5
_OF_CANDIDATE: Final = ("time", "writer", "value", "base")


@dataclass(frozen=True, slots=True)
class Conflict:
    """Updates to a document from which a user has to choose, ordered by time."""

    id: str
    key: Key
    version: int
    """The version of the document when the conflict was found; 0 if there was none."""
    candidates: Sequence[DocumentUpdate[Key]]


class ConflictResolution(NamedTuple):
    """A resolved conflict, and its document, or None if that was deleted."""

    conflict: Conflict
    document: Document | None


class UpdateResult(NamedTuple):
    """The outcome of a batch of updates, grouped by document key."""

    written: Sequence[Key]
    """Documents with a new value, from the only update or from resolved ones."""
    resolved: Sequence[Key]
    """Written documents that had conflicting updates."""
    waiting: Sequence[Conflict]
    """Conflicts that a user has to resolve (`resolve_conflict`); their documents did not change."""


async def apply_updates(
    store: Store,
    updates: Sequence[DocumentUpdate[Key]],
    strategy: str = ConflictStrategy.LAST_WRITE_WINS,
    *,
    check: ChangeCheck | None = None,
) -> UpdateResult:
    """Apply updates to documents in one commit; return the outcome for each.

    Several updates to a document are resolved by the strategy, with an event `state.conflict_auto_resolved` (key,
    strategy, writers). With `manual`, the document is not written; its candidates are recorded, with an event
    `state.conflict_recorded` (key, conflict, writers). If an update has a `base` and the document has changed since,
    the current value also counts as an update, with the time and writer of its commit; an update without a base
    replaces any value. If another process commits first, everything is retried as in `update_document`. Raises
    RefusedError for an unknown strategy, the errors of `check` for new values, and the errors of `Store.commit`, for
    example if the candidates together are too large for one document. On an error nothing is changed.
    """
    chosen = parse_strategy(strategy)
    return await retry_on_conflict(partial(_apply, store, group_by_key(updates), chosen, check))


async def list_pending(store: Store) -> list[Conflict]:
    """Return the readable pending conflicts, oldest first."""
    documents = filter_readable(await store.list(CONFLICT_KIND))
    return [_read(one) for one in sorted(documents, key=lambda one: (one.position, one.key))]


async def find_conflict(store: Store, name: str, run: str | None = None) -> Conflict:
    """Return a conflict by its id, or by its document.

    A document is `kind/id`, or `kind/rest` for one of the run. Raises RefusedError unless exactly one conflict matches.
    """
    found = await list_pending(store)
    kind, _, rest = name.partition("/")
    keys = [Key(kind, rest), Key(kind, f"{run}/{rest}")]
    for meant in (
        [one for one in found if one.id == name],
        *([one for one in found if one.key == key] for key in keys),
    ):
        if len(meant) > 1:
            several = ", ".join(one.id for one in meant)
            raise RefusedError(f"{meant[0].key} has {len(meant)} pending conflicts", f"choose one by its id: {several}")
        if meant:
            return meant[0]
    # A damaged conflict is not listed, and has a specific error.
    if await store.get(Key(CONFLICT_KIND, name)) is not None:
        raise _damaged(name)
    raise _unknown(name, found)


async def resolve_conflict(
    store: Store,
    conflict: str,
    choice: int | JsonObject,
    *,
    force: bool = False,
    check: ChangeCheck | None = None,
) -> Document | None:
    """Write the chosen value and delete the conflict in one commit.

    `conflict` is the conflict's id, `choice` the number of a candidate (from 1, ordered by time) or another value.
    Returns the document, or None if deleted. Records an event `state.conflict_resolved` (key, conflict, and the
    candidate's writer, or null for a value). Raises RefusedError for an unknown id or number or, without `force`, if
    the document has changed since the conflict was found, and the errors of `check`.
    """
    return await retry_on_conflict(partial(_resolve, store, conflict, choice, force, check))


class _Step(NamedTuple):
    """The part of a commit for one document."""

    found: Document | None
    writes: Sequence[Write]
    event: Event | None = None
    conflict: Conflict | None = None


async def _apply(
    store: Store,
    grouped: Mapping[Key, Sequence[DocumentUpdate[Key]]],
    strategy: ConflictStrategy,
    check: ChangeCheck | None,
) -> UpdateResult:
    steps = {key: await _step(store, key, updates, strategy) for key, updates in grouped.items()}
    writes = [write for step in steps.values() for write in step.writes]
    if check is not None:
        for key, step in steps.items():
            for write in step.writes if step.conflict is None else ():
                check(key, step.found, write.value)
    events = [step.event for step in steps.values() if step.event is not None]
    if writes or events:
        await store.commit(Commit(writes, events))
    return UpdateResult(
        [key for key, step in steps.items() if step.conflict is None],
        [key for key, step in steps.items() if step.conflict is None and step.event is not None],
        [step.conflict for step in steps.values() if step.conflict is not None],
    )


async def _step(store: Store, key: Key, updates: Sequence[DocumentUpdate[Key]], strategy: ConflictStrategy) -> _Step:
    found = await store.get(key)
    version = found.version if found else 0
    conflicting = [*await _unseen(store, key, found, updates), *updates]
    if len(conflicting) == 1:
        return _Step(found, _replace(key, version, updates[0].value))
    outcome = resolve_updates(conflicting, strategy)
    writers = [one.writer for one in sorted(conflicting, key=lambda one: one.time)]
    if isinstance(outcome, Unresolved):
        kept = Conflict(secrets.token_hex(8), key, version, outcome.candidates)
        unresolved = StateConflictRecorded(key=str(key), writers=writers, conflict=kept.id)
        return _Step(found, [_record(kept)], Event.of(unresolved), kept)
    event = Event.of(StateConflictAutoResolved(key=str(key), writers=writers, strategy=strategy))
    return _Step(found, _replace(key, version, outcome.value), event)


async def _unseen(
    store: Store, key: Key, found: Document | None, updates: Sequence[DocumentUpdate[Key]]
) -> list[DocumentUpdate[Key]]:
    """Return the current value as an update if an update was based on an older one."""
    bases = [update.base for update in updates if update.base is not None]
    if all(base == (found.version if found else 0) for base in bases):
        return []
    if found is None:
        gone = await _deletion(store, key)
        return [DocumentUpdate(key, gone.time, gone.writer, None)] if gone else []
    # The readable value of a damaged document is outdated, so it is not a valid candidate.
    return [] if found.damaged else [DocumentUpdate(key, found.time, found.writer, found.value)]


async def _deletion(store: Store, key: Key) -> DocumentVersion | None:
    """Return the version that deleted a document; None if it expired, or unknown."""
    newest = next(iter(await store.history(key, limit=1)), None)
    return newest if newest and newest.value is None and not newest.damaged else None


def _replace(key: Key, version: int, value: JsonObject | None) -> list[Write]:
    return [Write(key, version, value)] if version or value is not None else []


def _record(conflict: Conflict) -> Write:
    # Version 0 makes the id unique: if it is taken, the commit fails, and the next attempt uses another id.
    candidates = [{name: getattr(one, name) for name in _OF_CANDIDATE} for one in conflict.candidates]
    value = {"key": list(conflict.key), "version": conflict.version, "candidates": candidates}
    return Write(Key(CONFLICT_KIND, conflict.id), 0, value)


def _read(document: Document) -> Conflict:
    record = ConflictRecord.model_validate_json(document.encoded)
    key = Key(*record.key)
    candidates = tuple(DocumentUpdate(key, **dict(one)) for one in record.candidates)
    return Conflict(document.key.id, key, record.version, candidates)


async def _resolve(
    store: Store, name: str, choice: int | JsonObject, force: bool, check: ChangeCheck | None
) -> Document | None:
    record = await store.get(Key(CONFLICT_KIND, name))
    if record is None:
        raise _unknown(name, await list_pending(store))
    if record.damaged or find_document_error(record) is not None:
        raise _damaged(name)
    conflict = _read(record)
    value, writer = (choice, None) if isinstance(choice, dict) else _candidate(conflict, choice)
    found = await store.get(conflict.key)
    if check is not None:
        check(conflict.key, found, value)
    version = found.version if found else 0
    if version != conflict.version and not force:
        raise await _changed(store, conflict, found)
    event = Event.of(StateConflictResolved(key=str(conflict.key), conflict=name, writer=writer))
    writes = [Write(record.key, record.version, None), *_replace(conflict.key, version, value)]
    await store.commit(Commit(writes, [event]))
    return await store.get(conflict.key)


def _candidate(conflict: Conflict, number: int) -> tuple[JsonObject | None, str]:
    if not 1 <= number <= len(conflict.candidates):
        raise RefusedError(
            f"conflict {conflict.id!r} has no candidate {number}",
            f"choose one of 1 to {len(conflict.candidates)}, or set a value",
        )
    chosen = conflict.candidates[number - 1]
    return chosen.value, chosen.writer


def _damaged(name: str) -> RefusedError:
    return RefusedError(f"the record of conflict {name!r} is damaged", "`council state verify` shows details")


def _unknown(name: str, waiting: Sequence[Conflict]) -> RefusedError:
    names = [one.id for one in waiting]
    more = ", …" if len(names) > _MOST_NAMED else ""
    remedy = f"pending conflicts: {', '.join(names[:_MOST_NAMED])}{more}" if names else "there are none"
    return RefusedError(f"no pending conflict {name!r}", remedy)


async def _changed(store: Store, conflict: Conflict, found: Document | None) -> RefusedError:
    key, deletion = conflict.key, None if found else await _deletion(store, conflict.key)
    if found:
        what = f"{key} was changed by {format_writer(found.writer, found.time)}"
    elif deletion:
        what = f"{key} was deleted by {format_writer(deletion.writer, deletion.time)}"
    else:
        what = f"{key} no longer exists"
    return RefusedError(
        f"{what}, after conflict {conflict.id!r} was found", "inspect it first, then use --force to overwrite it"
    )
