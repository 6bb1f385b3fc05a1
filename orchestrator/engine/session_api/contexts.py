"""Record the status of a project's sessions in the store, for all processes.

No decision depends on these records, so their commits are not durable. They expire after half an hour, including those
of killed processes. If the task is claimed, a record is written under the claim, so that a session whose task was taken
over can no longer write.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
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
    filter_active,
    filter_stale,
)
from orchestrator.errors import LeaseLost, RefusedError, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Guard, Key, Store, Write
from orchestrator.state.documents.log_reader import validate_many
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.system.clock import Clock

KIND: Final = "context"

_CONTEXTS = cache(lambda: TypeAdapter(list[SessionContext]))
#: The maximum length of fields with text from programs, in characters.
_TEXT_LIMITS: Final = {
    "file": MAX_PATH_CHARS,
    "progress": MAX_PROGRESS_CHARS,
    "message": MAX_MESSAGE_CHARS,
    "seen": MAX_MESSAGE_CHARS,
    "blocked_on": MAX_MESSAGE_CHARS,
}


class SessionStatusUpdate(TypedDict, total=False):
    """The fields that a session can report; omitted fields stay unchanged."""

    status: SessionStatus
    file: str | None
    progress: str | None
    message: str | None
    blocked_on: str | None


def context_key(session: SessionName) -> Key:
    """Return the key of a session's record."""
    return Key(KIND, str(session))


async def read_contexts(store: Store, run: str | None = None) -> list[SessionContext]:
    """Return session records of one or all runs, up to half an hour after they end."""
    documents = [one.encoded for one in await store.list(KIND, f"{run}/" if run else "") if not one.damaged]
    return validate_many(_CONTEXTS(), documents)


async def read_active_contexts(store: Store, run: str) -> list[SessionContext]:
    """Return the session records of a run's sessions that have not ended."""
    return filter_active(await read_contexts(store, run))


async def clean_contexts(store: Store, now: float, after: float = STALE_CONTEXT_SECONDS) -> list[str]:
    """Delete records without an update for `after` seconds; return session names."""
    old = {context_key(context.session): 0 for context in filter_stale(await read_contexts(store), now, after)}
    for key in old:
        document = await store.get(key)
        old[key] = document.version if document else 0
    expired = dict.fromkeys((key for key in (await store.statistics()).expired if key.kind == KIND), 0)
    removed = []
    for key, version in {**expired, **old}.items():
        with suppress(VersionConflict):  # just updated
            await store.commit(Commit([Write(key, version, None)], durable=False))
            removed.append(key.id)
    return sorted(removed)


class SessionContexts:
    """The records of this process's sessions, and read access to all others."""

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
        """Create contexts of a process; `claim` returns the guard for each record."""
        self.store, self.clock, self._scope, self.redactor = store, clock, scope, redactor
        self.orchestrator, self.claim = orchestrator, claim
        self._own: dict[SessionName, _OwnRecord] = {}

    async def begin(self, session: SessionName, adapter: str) -> SessionContext:
        """Record the start of a session."""
        now = self.clock.now()
        context = SessionContext(
            **session._asdict(),
            adapter=adapter,
            orchestrator=self.orchestrator,
            scope=self._scope,
            started=now,
            updated=now,
        )
        self._own[session] = _OwnRecord(context, self.claim(session))
        return await self._note(session, {})

    async def update(self, session: SessionName, **changes: Unpack[SessionStatusUpdate]) -> SessionContext:
        """Record a session's report and heartbeat; raise RefusedError if it is not ours."""
        return await self._write(session, changes)

    async def record_activity(self, session: SessionName, activity: str, file: str | None) -> SessionContext:
        """Record the observed activity of a session and its file (None: unchanged)."""
        return await self._write(session, {"seen": activity, **({} if file is None else {"file": file})})

    async def hold(self, session: SessionName, files: Sequence[str]) -> SessionContext:
        """Record all files that a session has locked."""
        return await self._note(session, {"files": tuple(sorted(files))})

    async def predict(self, session: SessionName, conflicts: Mapping[str, Sequence[str]]) -> SessionContext:
        """Record the paths of a session's predicted merge conflicts, by other task."""
        return await self._note(session, {"conflicts": {task: tuple(paths) for task, paths in conflicts.items()}})

    @asynccontextmanager
    async def waiting(self, session: SessionName, message: str) -> AsyncIterator[None]:
        """Record a session as waiting within the body.

        Afterwards restore its status, unless it has reported another.
        """
        before = self._owned(session).context
        await self._note(session, {"status": SessionStatus.WAITING, "blocked_on": message})
        try:
            yield
        finally:
            own = self._own.get(session)
            if own is not None and own.context.status is SessionStatus.WAITING:
                with anyio.CancelScope(shield=True), suppress(LeaseLost):
                    await self._note(session, {"status": before.status, "blocked_on": before.blocked_on})

    async def end(self, session: SessionName) -> None:
        """Record that a session has ended and holds no files.

        Its last report remains readable for half an hour. Safe to repeat, and for a session of another process that was
        killed.
        """
        if session not in self._own:
            document = await self.store.get(context_key(session))
            if document is None or document.damaged:
                return
            context = SessionContext.model_validate_json(document.encoded)
            if context.status is SessionStatus.DONE:
                return
            self._own[session] = _OwnRecord(context, self.claim(session))
        try:
            await self._note(session, {"status": SessionStatus.DONE, "files": (), "blocked_on": None, "conflicts": {}})
        except LeaseLost:  # the process that took over the task records its status
            pass
        finally:
            self._own.pop(session, None)

    async def all(self, run: str | None = None) -> list[SessionContext]:
        """Return records of this scope's sessions, of all processes, in one or all runs."""
        return [context for context in await read_contexts(self.store, run) if context.scope == self._scope]

    def _owned(self, session: SessionName) -> _OwnRecord:
        own = self._own.get(session)
        if own is None:
            raise RefusedError(f"session {session} is not running here", "call this command within a running session")
        return own

    async def _note(self, session: SessionName, changes: dict[str, Any]) -> SessionContext:
        """Record a change on a best-effort basis: ignore an unreachable store."""
        with suppress(StoreUnavailable):
            await self._write(session, changes)
        return self._owned(session).context

    async def _write(self, session: SessionName, changes: dict[str, Any] | SessionStatusUpdate) -> SessionContext:
        own = self._owned(session)
        values = {name: self._fit(name, value) for name, value in changes.items()}
        # Concurrent writes of one process would conflict with each other.
        async with own.write_lock:
            own.context = own.context.model_copy(update={**values, "updated": self.clock.now()})
            await retry_on_conflict(partial(self._commit, own))  # only this process and cleanups write it
            return own.context

    async def _commit(self, own: _OwnRecord) -> None:
        key = context_key(own.context.session)
        document = await self.store.get(key)
        version = document.version if document else 0
        write = Write(key, version, own.context.to_json(), STALE_CONTEXT_SECONDS)
        await self.store.commit(Commit([write], (), [own.claim] if own.claim else [], durable=False))

    def _fit(self, name: str, value: Any) -> Any:
        if name not in _TEXT_LIMITS or value is None:
            return value
        # Programs that truncate text can leave an unpaired surrogate, which no store accepts.
        text = self.redactor.text(str(value).encode(errors="replace").decode()).strip()
        return text if len(text) <= _TEXT_LIMITS[name] else f"{text[: _TEXT_LIMITS[name] - 1]}…"


class _OwnRecord:
    """The last written record of a session, and the claim under which it started."""

    def __init__(self, context: SessionContext, claim: Guard | None) -> None:
        self.context, self.claim = context, claim
        self.write_lock = anyio.Lock()
