"""Store the notes of sessions, by repository and target."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import cache, partial
from typing import Final

import anyio.to_thread
from pydantic import TypeAdapter

from orchestrator.domain.events.coordination import NoteAdded, NoteDeleted
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.path_ownership import check_patterns
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.notes import (
    MAX_NOTES,
    MAX_PATH_CHARS,
    MAX_PATHS,
    MAX_PATHS_CHARS,
    MAX_TASK_NOTES,
    MAX_TEXT_BYTES,
    MAX_TOPIC_CHARS,
    Note,
    filter_notes,
    filter_relevant,
)
from orchestrator.errors import RefusedError
from orchestrator.protocols import Commit, Document, Event, Guard, Key, Store, Write
from orchestrator.state.documents.log_reader import validate_many
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.system.clock import Clock

KIND: Final = "note"
_NOTES = cache(lambda: TypeAdapter(list[Note]))


class NoteStore:
    """The notes of one scope (repository and target), from all runs."""

    def __init__(self, store: Store, clock: Clock, scope: str, redactor: Redactor) -> None:
        self._store, self._clock, self._redactor = store, clock, redactor
        self._prefix = f"{scope}/"

    async def add(
        self,
        session: SessionName,
        text: str,
        *,
        topic: str | None = None,
        paths: Sequence[str] = (),
        claim: Guard | None = None,
    ) -> Note:
        """Add a note; above the limits, delete the oldest note of the task, or of all.

        Raises RefusedError if the note is too large or empty, LeaseLost if the session has lost its `claim`.
        """
        text, topic = self._clean(text).strip(), None if topic is None else " ".join(self._clean(topic).split())
        _check(text, topic, paths)
        patterns = tuple(check_patterns([self._clean(path) for path in paths]))

        async def attempt() -> Note:
            notes = await self._documents()
            now = self._clock.now()
            # Sorted by microseconds; the suffix distinguishes simultaneous notes.
            name = f"{int(now * 1_000_000):016d}-{secrets.token_hex(3)}"
            note = Note(id=name, **session._asdict(), topic=topic, paths=patterns, text=text, time=now)
            # A task above its limit replaces its own notes first.
            own = [one for one in notes if not one.damaged and one.value["task"] == session.task]
            old = own[: max(len(own) - MAX_TASK_NOTES + 1, 0)] or notes[: max(len(notes) - MAX_NOTES + 1, 0)]
            writes = [Write(self._key(name), 0, note.to_json()), *(Write(one.key, one.version, None) for one in old)]
            event = NoteAdded(**session._asdict(), note=name, topic=topic, paths=patterns)
            await self._store.commit(Commit(writes, [Event.of(event)], [claim] if claim else []))
            return note

        return await retry_on_conflict(attempt)

    async def all(self) -> list[Note]:
        """Return all notes, oldest first."""
        readable = [one.encoded for one in await self._documents() if not one.damaged]
        return validate_many(_NOTES(), readable)

    async def find(self, *, task: str | None = None, topic: str | None = None, paths: Sequence[str] = ()) -> list[Note]:
        """Return notes that match a task, a topic and paths, oldest first.

        Paths match by overlapping patterns; criteria that are not given match all notes. Raises RefusedError for
        invalid patterns, and for more paths than a note can have.
        """
        _check_paths(paths)
        patterns, matches = check_patterns(paths), list[Note]()
        for note in filter_notes(await self.all(), task=task, topic=topic):
            # A separate thread call per note: unusual patterns are slow to compare, and must neither block the event
            # loop nor delay cancellation.
            matches += (
                await anyio.to_thread.run_sync(partial(filter_notes, [note], paths=patterns)) if patterns else [note]
            )
        return matches

    async def find_relevant(self, task: str, owns: Sequence[str]) -> list[Note]:
        """Return the notes to include in the prompt of a task that owns these patterns."""
        notes = await self.all()
        return await anyio.to_thread.run_sync(filter_relevant, notes, task, owns) if notes else []

    async def drop(self, note: str) -> None:
        """Delete a note by its id; raise RefusedError if there is none."""
        key = self._key(note)

        async def attempt() -> None:
            document = await self._store.get(key)
            if document is None:
                raise RefusedError(f"note {note!r} not found", "`notes` lists all notes")
            deletion = Write(key, document.version, None)
            await self._store.commit(Commit([deletion], [Event.of(NoteDeleted(note=note))]))

        await retry_on_conflict(attempt)

    async def _documents(self) -> Sequence[Document]:
        return await self._store.list(KIND, self._prefix)

    def _key(self, note: str) -> Key:
        return Key(KIND, f"{self._prefix}{note}")

    def _clean(self, text: str) -> str:
        return self._redactor.text(text.encode(errors="replace").decode())


def _check(text: str, topic: str | None, paths: Sequence[str]) -> None:
    size = len(text.encode())
    if not text:
        raise RefusedError("the note is empty", "enter facts that help a later session")
    if size > MAX_TEXT_BYTES:
        remedy = "include only facts that a later session needs, and refer to files for the rest"
        raise RefusedError(f"the note has {size} bytes (limit: {MAX_TEXT_BYTES})", remedy)
    if topic is not None and not 0 < len(topic) <= MAX_TOPIC_CHARS:
        raise RefusedError(f"the topic has {len(topic)} characters", f"use 1 to {MAX_TOPIC_CHARS} characters")
    _check_paths(paths)


def _check_paths(paths: Sequence[str]) -> None:
    if len(paths) > MAX_PATHS:
        raise RefusedError(f"{len(paths)} paths given (limit: {MAX_PATHS})", "use patterns for folders")
    if (longest := max(map(len, paths), default=0)) > MAX_PATH_CHARS:
        raise RefusedError(f"a path has {longest} characters (limit: {MAX_PATH_CHARS})", "use a shorter one")
    if (length := sum(map(len, paths))) > MAX_PATHS_CHARS:
        raise RefusedError(f"the paths have {length} characters (limit: {MAX_PATHS_CHARS})", "use patterns for folders")
