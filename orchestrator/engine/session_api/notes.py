"""Notes that sessions leave, kept in the store with the repository and target that they are about."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import cache, partial
from typing import Final

import anyio.to_thread
from pydantic import TypeAdapter

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
    """The notes of one scope: whatever sessions left there, in any run."""

    def __init__(self, store: Store, clock: Clock, scope: str, redactor: Redactor) -> None:
        self._store, self._clock, self._redactor = store, clock, redactor
        self._prefix = f"{scope}/"

    async def leave(
        self,
        session: SessionName,
        text: str,
        *,
        topic: str | None = None,
        paths: Sequence[str] = (),
        claim: Guard | None = None,
    ) -> Note:
        """Keep a note; where there are too many, the oldest go: of the task, else of all.

        RefusedError for one that is too large or says nothing; LeaseLost where the `claim` is not the session's.
        """
        text, topic = self._clean(text).strip(), None if topic is None else " ".join(self._clean(topic).split())
        _check(text, topic, paths)
        patterns = tuple(check_patterns([self._clean(path) for path in paths]))

        async def attempt() -> Note:
            kept = await self._documents()
            now = self._clock.now()
            # Sorts by time, and no two sessions that write in one moment take the same.
            name = f"{int(now * 1000):013d}-{secrets.token_hex(3)}"
            note = Note(id=name, **session._asdict(), topic=topic, paths=patterns, text=text, time=now)
            # One that leaves many takes the place of its own.
            own = [one for one in kept if not one.damaged and one.value["task"] == session.task]
            old = own[: max(len(own) - MAX_TASK_NOTES + 1, 0)] or kept[: max(len(kept) - MAX_NOTES + 1, 0)]
            writes = [Write(self._key(name), 0, note.to_json()), *(Write(one.key, one.version, None) for one in old)]
            event = Event("note.added", {**session._asdict(), "note": name, "topic": topic, "paths": list(patterns)})
            await self._store.commit(Commit(writes, [event], [claim] if claim else []))
            return note

        return await retry_on_conflict(attempt)

    async def all(self) -> list[Note]:
        """Return all notes, the oldest first."""
        readable = [one.encoded for one in await self._documents() if not one.damaged]
        return validate_many(_NOTES(), readable)

    async def find(self, *, task: str | None = None, topic: str | None = None, paths: Sequence[str] = ()) -> list[Note]:
        """Return the notes of a task, of a topic and about paths (patterns that overlap), the oldest first.

        What is not asked for is not looked at. RefusedError for what is no pattern, and for more than a note can name.
        """
        _check_paths(paths)
        patterns, told = check_patterns(paths), []
        for one in filter_notes(await self.all(), task=task, topic=topic):
            # Odd patterns take long to compare: whoever else is at work goes on meanwhile, and who asked may leave.
            told += await anyio.to_thread.run_sync(partial(filter_notes, [one], paths=patterns)) if patterns else [one]
        return told

    async def find_relevant(self, task: str, owns: Sequence[str]) -> list[Note]:
        """Return the notes that a session of a task, which owns these patterns, is to be told."""
        return await anyio.to_thread.run_sync(filter_relevant, await self.all(), task, owns)

    async def drop(self, note: str) -> None:
        """Delete a note by its id; RefusedError where there is none."""
        key = self._key(note)

        async def attempt() -> None:
            there = await self._store.get(key)
            if there is None:
                raise RefusedError(f"there is no note {note!r}", "`notes` names those that there are")
            await self._store.commit(Commit([Write(key, there.version, None)], [Event("note.deleted", {"note": note})]))

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
        raise RefusedError("the note has no text", "say what a later session should know")
    if size > MAX_TEXT_BYTES:
        remedy = "leave what a later session needs, and name files for the rest"
        raise RefusedError(f"the note has {size} bytes, {MAX_TEXT_BYTES} fit", remedy)
    if topic is not None and not 0 < len(topic) <= MAX_TOPIC_CHARS:
        raise RefusedError(f"the topic has {len(topic)} characters", f"name it in 1 to {MAX_TOPIC_CHARS}")
    _check_paths(paths)


def _check_paths(paths: Sequence[str]) -> None:
    if len(paths) > MAX_PATHS:
        raise RefusedError(f"these are {len(paths)} paths, {MAX_PATHS} fit", "name folders by patterns")
    if (longest := max(map(len, paths), default=0)) > MAX_PATH_CHARS:
        raise RefusedError(f"one of the paths has {longest} characters", f"name one of at most {MAX_PATH_CHARS}")
    if (length := sum(map(len, paths))) > MAX_PATHS_CHARS:
        raise RefusedError(f"the paths have {length} characters, {MAX_PATHS_CHARS} fit", "name folders by patterns")
