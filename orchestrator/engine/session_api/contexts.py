"""What the sessions of a project are at now: a record of each in the store, which every process reads.

Nobody's decision rests on it, so that its commits are not durable; and each lasts half an hour, so that of a process
that was killed nothing stays. A record is written under the claim of its task where there is one: who was taken over
writes nothing any more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import Any, Final, TypedDict, Unpack

import anyio
from pydantic import TypeAdapter

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.contexts import (
    MAX_MESSAGE_CHARS,
    MAX_PATH_CHARS,
    MAX_PROGRESS_CHARS,
    STALE_CONTEXT_SECONDS,
    SessionContext,
    SessionStatus,
    TaskSummary,
    filter_stale,
    find_file_conflicts,
    find_sessions_on,
    summarize_task,
)
from orchestrator.errors import LeaseLost, RefusedError, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Guard, Key, Store, Write
from orchestrator.state.documents.log_reader import validate_many
from orchestrator.system.clock import Clock

KIND: Final = "context"

#: How often a write is tried: the one who writes a session's record beside its own process is whoever cleans up.
_MAX_TRIES: Final = 5
_CONTEXTS = cache(lambda: TypeAdapter(list[SessionContext]))
#: The fields whose text is a program's, and how many characters of it are kept.
_TEXT_LIMITS: Final = {
    "file": MAX_PATH_CHARS,
    "progress": MAX_PROGRESS_CHARS,
    "message": MAX_MESSAGE_CHARS,
    "seen": MAX_MESSAGE_CHARS,
    "blocked_on": MAX_MESSAGE_CHARS,
}


class SessionStatusUpdate(TypedDict, total=False):
    """What a session tells of itself; what is not named stays as it was."""

    status: SessionStatus
    file: str | None
    progress: str | None
    message: str | None
    blocked_on: str | None


def context_key(session: SessionName) -> Key:
    """Return the key of what a session is at."""
    return Key(KIND, str(session))


async def read_contexts(store: Store, run: str | None = None) -> list[SessionContext]:
    """Return what the sessions of a run, or of all runs, are at, those that have ended within half an hour, too."""
    found = [one.encoded for one in await store.list(KIND, f"{run}/" if run else "") if not one.damaged]
    return validate_many(_CONTEXTS(), found)


async def clean_contexts(store: Store, now: float, after: float = STALE_CONTEXT_SECONDS) -> list[str]:
    """Remove what was not heard of for `after` seconds, and what has expired; return the names of those sessions."""
    old = {context_key(one.session): 0 for one in filter_stale(await read_contexts(store), now, after)}
    for key in old:
        found = await store.get(key)
        old[key] = found.version if found else 0
    expired = dict.fromkeys((key for key in (await store.statistics()).expired if key.kind == KIND), 0)
    removed = []
    for key, version in {**expired, **old}.items():
        with suppress(VersionConflict):  # it has just said something
            await store.commit(Commit([Write(key, version, None)], durable=False))
            removed.append(key.id)
    return sorted(removed)


class SessionContexts:
    """The records of the sessions that this process runs, and a look at all others."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        scope: str,
        redactor: Redactor,
        *,
        orchestrator: str = "",
        claim: Callable[[SessionName], Guard | None] = lambda _: None,
    ) -> None:
        """Write as the process `orchestrator`, each record under the guard that `claim` returns for it."""
        self._store, self._clock, self._scope, self._redactor = store, clock, scope, redactor
        self._orchestrator, self._claim = orchestrator, claim
        self._own: dict[SessionName, _OwnRecord] = {}

    async def begin(self, session: SessionName, adapter: str) -> SessionContext:
        """Record that a session is at work from now on."""
        now = self._clock.now()
        context = SessionContext(
            **session._asdict(),
            adapter=adapter,
            orchestrator=self._orchestrator,
            scope=self._scope,
            started=now,
            updated=now,
        )
        self._own[session] = _OwnRecord(context, claim=self._claim(session))
        return await self._note(session, {})

    async def update(self, session: SessionName, **changes: Unpack[SessionStatusUpdate]) -> SessionContext:
        """Record what a session tells of itself, and that it lives. RefusedError where it is not at work here."""
        return await self._write(session, changes)

    async def mark_blocked(self, session: SessionName, reason: str, on: str) -> SessionContext:
        """Record that a session can't go on before something happens."""
        return await self.update(session, status=SessionStatus.BLOCKED, message=reason, blocked_on=on)

    async def record_activity(self, session: SessionName, doing: str, file: str | None) -> SessionContext:
        """Record what a session was seen to do, and the file that it is at (None: the same as before)."""
        return await self._write(session, {"seen": doing, **({} if file is None else {"file": file})})

    async def hold(self, session: SessionName, files: Sequence[str]) -> SessionContext:
        """Record which files a session has locked, in all."""
        return await self._note(session, {"files": tuple(sorted(files))})

    @asynccontextmanager
    async def waiting(self, session: SessionName, what: str) -> AsyncIterator[None]:
        """Have a session wait for something for the body; it then is as it was, unless it has said otherwise."""
        before = self._owned(session).context
        await self._note(session, {"status": SessionStatus.WAITING, "blocked_on": what})
        try:
            yield
        finally:
            own = self._own.get(session)
            if own is not None and own.context.status is SessionStatus.WAITING:
                with anyio.CancelScope(shield=True), suppress(LeaseLost):
                    await self._note(session, {"status": before.status, "blocked_on": before.blocked_on})

    async def end(self, session: SessionName) -> None:
        """Record that a session is over and holds nothing; what it said last stays to be read for half an hour.

        Safe to repeat, and for a session that is not at work here, which a process that was killed has left behind.
        """
        if session not in self._own:
            found = await self._store.get(context_key(session))
            if found is None or found.damaged:
                return
            left = SessionContext.model_validate_json(found.encoded)
            if left.status is SessionStatus.DONE:
                return
            self._own[session] = _OwnRecord(left, found.version, self._claim(session))
        try:
            await self._note(session, {"status": SessionStatus.DONE, "files": (), "blocked_on": None})
        except LeaseLost:  # whoever has taken the task over says how it goes on
            pass
        finally:
            self._own.pop(session, None)

    async def read(self, session: SessionName) -> SessionContext | None:
        """Return what a session is at, whichever process runs it; None if there is none, or nothing was heard of it."""
        found = await self._store.get(context_key(session))
        return None if found is None or found.damaged else SessionContext.model_validate_json(found.encoded)

    async def all(self, run: str | None = None) -> list[SessionContext]:
        """Return what the sessions of this scope are at, in all runs or in one, whichever processes run them."""
        return [one for one in await read_contexts(self._store, run) if one.scope == self._scope]

    async def sessions_on_file(self, path: str) -> list[SessionContext]:
        """Return the sessions that are at work on a file, or have it locked."""
        return find_sessions_on(await self.all(), path)

    async def conflicts(self) -> dict[str, list[SessionContext]]:
        """Return the files that several sessions are on."""
        return find_file_conflicts(await self.all())

    async def summary(self, run: str, task: str) -> TaskSummary:
        """Return the sessions of a task at a glance."""
        return summarize_task(task, await self.all(run))

    async def clean(self, after: float = STALE_CONTEXT_SECONDS) -> list[str]:
        """See `clean_contexts`."""
        return await clean_contexts(self._store, self._clock.now(), after)

    def _owned(self, session: SessionName) -> _OwnRecord:
        own = self._own.get(session)
        if own is None:
            raise RefusedError(f"session {session} is not at work here", "ask from within a session that is")
        return own

    async def _note(self, session: SessionName, changes: dict[str, Any]) -> SessionContext:
        """Record what nobody has asked for: where the store can't be reached, what is being done goes on without."""
        with suppress(StoreUnavailable):
            await self._write(session, changes)
        return self._owned(session).context

    async def _write(self, session: SessionName, changes: dict[str, Any] | SessionStatusUpdate) -> SessionContext:
        own = self._owned(session)
        said = {name: self._fit(name, value) for name, value in changes.items()}
        # One at a time, or each of two would find the other's version.
        async with own.turn:
            own.context = own.context.model_copy(update={**said, "updated": self._clock.now()})
            for left in reversed(range(_MAX_TRIES)):
                write = Write(context_key(session), own.version, own.context.to_json(), STALE_CONTEXT_SECONDS)
                try:
                    await self._store.commit(Commit([write], (), [own.claim] if own.claim else [], durable=False))
                except VersionConflict:
                    if not left:
                        raise
                    found = await self._store.get(context_key(session))
                    own.version = found.version if found else 0
                else:
                    own.version = await self._version(session, own.version)
                    return own.context
        raise AssertionError("the last try returns or raises")

    async def _version(self, session: SessionName, written: int) -> int:
        """Return the version that a write has made: the next one, but for a record that was gone before."""
        if written:
            return written + 1
        found = await self._store.get(context_key(session))
        return found.version if found else 0

    def _fit(self, name: str, value: Any) -> Any:
        if name not in _TEXT_LIMITS or value is None:
            return value
        # Programs that cut text in two leave half a surrogate pair, which no store takes.
        text = self._redactor.text(str(value).encode(errors="replace").decode()).strip()
        return text if len(text) <= _TEXT_LIMITS[name] else f"{text[: _TEXT_LIMITS[name] - 1]}…"


class _OwnRecord:
    """The record of a session: as it was written last, under which version, and the claim that it began under."""

    def __init__(self, context: SessionContext, version: int = 0, claim: Guard | None = None) -> None:
        self.context, self.version, self.claim = context, version, claim
        self.turn = anyio.Lock()
