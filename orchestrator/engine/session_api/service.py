"""Serve the session API: handle the requests of running sessions for locks, reports, peers, notes and shared values.

Locking takes two steps: the registry, valid on all machines, assigns the paths to the session; then their files are
locked on this machine. They are released in the opposite order. `leave` releases everything that a session holds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeVar

import anyio
import anyio.to_thread
import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from orchestrator.client.commands import MAX_HANDOFF_BYTES, MAX_WAIT_SECONDS
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict, escape_path
from orchestrator.domain.scheduling.path_patterns import is_match
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.contexts import SessionContext, SessionStatus, filter_active
from orchestrator.engine.session_api.contexts import SessionContexts, SessionStatusUpdate
from orchestrator.engine.session_api.details import SessionWorkspace, read_session_details
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.engine.session_api.observation import observe_session
from orchestrator.engine.session_api.quota import WriteQuota
from orchestrator.engine.session_api.shared_values import DEFAULT_WAIT, SharedValues, require_new_value, require_value
from orchestrator.errors import FileLocked, HistoryCompacted, LeaseLost, RefusedError, StoreUnavailable, VersionConflict
from orchestrator.locking.file_locks import FILE_LOCK_TIMEOUT, FileLocks
from orchestrator.locking.lock_names import canonical_path
from orchestrator.locking.lock_overview import release_broken_locks
from orchestrator.locking.ownership import OwnershipRegistry
from orchestrator.protocols import Commit, Guard, JsonObject, Store
from orchestrator.repo.git.command import Git
from orchestrator.sessions.output.log_files import log_path
from orchestrator.system.clock import Clock
from orchestrator.system.instants import format_local_time

#: Paths in one request.
MAX_PATHS: Final = 200
#: Notes in one response, the newest.
MAX_NOTES_RETURNED: Final = 50

Paths = Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=MAX_PATHS)]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _LockArguments(_Arguments):
    paths: Paths
    wait: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] | None = None


class _UnlockArguments(_Arguments):
    paths: Paths


class _ReportArguments(_Arguments):
    status: SessionStatus | None = None
    file: str | None = None
    message: str | None = None
    progress: str | int | float | None = None
    blocked_on: str | None = None


class _NoArguments(_Arguments):
    pass


class _NoteArguments(_Arguments):
    text: str
    topic: str | None = None
    paths: list[str] = []


class _NotesArguments(_Arguments):
    task: str | None = None
    topic: str | None = None
    paths: list[str] | None = None


class _AskArguments(_Arguments):
    task: str


class _SharePutArguments(_Arguments):
    key: str
    value: JsonValue
    if_version: Annotated[int, Field(ge=0)] | None = None


class _ShareGetArguments(_Arguments):
    key: str


class _ShareWaitArguments(_Arguments):
    key: str
    after: Annotated[int, Field(ge=0)] | None = None
    timeout: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = DEFAULT_WAIT


class _ShareListArguments(_Arguments):
    prefix: str = ""


class _HandoffArguments(_Arguments):
    data: JsonObject


class _CheckEditArguments(_Arguments):
    path: Annotated[str, Field(min_length=1, max_length=4096)]


#: Returns the errors of a submitted result, one sentence each; empty if it is accepted.
HandoffValidator = Callable[[JsonObject], Awaitable[Sequence[str]]]


@dataclass(slots=True)
class _ActiveSession:
    """A session of this process, and the locks that it holds."""

    workspace: SessionWorkspace
    claim: Guard | None
    """The claim on its task when it began, never renewed: after a takeover its writes are rejected."""
    taken: Counter[str] = field(default_factory=Counter)
    """The number of locks per pattern, without patterns that the session owned before."""
    locked: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    """All patterns that it ever asked to lock: each later lock or report writes them again."""
    query_lock: anyio.Lock = field(default_factory=anyio.Lock)
    """Serializes expensive queries, so that one session's requests do not block those of other sessions."""
    validate_handoff: HandoffValidator | None = None
    handoff: JsonObject | None = None


A = TypeVar("A", bound=_Arguments)

#: The commands that always write to the store.
_WRITE_COMMANDS: Final = frozenset({"lock", "unlock", "report", "note", "share_put", "share_wait"})
_ALLOWED: Final[JsonObject] = {"allowed": True, "owner": None, "since": None, "reason": None}


class SessionService:
    """Handles the requests of the sessions of one process, which all have the same repository and target.

    `claim` returns the guard of the claim on a session's task; without one, the session can read, but not lock.
    `elsewhere` finds the workspaces of other processes' sessions; `git` runs in the trusted repository.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        git: Git,
        contexts: SessionContexts,
        memory: NoteStore,
        files: FileLocks,
        registry: OwnershipRegistry,
        redactor: Redactor,
        orchestrator: str,
        claim: Callable[[SessionName], Guard | None],
        elsewhere: Callable[[SessionName], Awaitable[SessionWorkspace]],
        lock_timeout: float = FILE_LOCK_TIMEOUT,
    ) -> None:
        """Wait `lock_timeout` seconds for a lock if the request does not say how long."""
        self._store, self._clock, self._git = store, clock, git
        self._contexts, self.memory, self._files, self._registry = contexts, memory, files, registry
        self._redactor, self._orchestrator, self._claim, self._elsewhere = redactor, orchestrator, claim, elsewhere
        self._lock_timeout = min(lock_timeout, MAX_WAIT_SECONDS)
        self._active: dict[SessionName, _ActiveSession] = {}
        self._quota = WriteQuota(clock)
        self._handlers: Mapping[str, Callable[[SessionName, JsonObject], Awaitable[JsonObject]]] = {
            "lock": self._lock,
            "unlock": self._unlock,
            "report": self._report,
            "peers": self._peers,
            "note": self._note,
            "notes": self._notes,
            "ask": self._ask,
            "share_put": self._share_put,
            "share_get": self._share_get,
            "share_wait": self._share_wait,
            "share_list": self._share_list,
            "submit_handoff": self._submit_handoff,
            "check_edit": self._check_edit,
        }

    @asynccontextmanager
    async def serve_session(
        self,
        session: SessionName,
        adapter: str,
        workspace: SessionWorkspace,
        *,
        keep_ownership: bool = False,
        validate_handoff: HandoffValidator | None = None,
    ) -> AsyncIterator[None]:
        """Serve a session and record its observed activity within the body, then release everything that it holds.

        `adapter` is the adapter's name. For `keep_ownership` see `leave`, for `validate_handoff` see `enter`.
        """
        await self.enter(session, adapter, workspace, validate_handoff=validate_handoff)
        try:
            log = log_path(workspace.logs, session.task, session.attempt, "stdout")
            async with observe_session(
                self._contexts, session, workspace.adapter, log, workspace.worktree, self._clock
            ):
                yield
        finally:
            with anyio.CancelScope(shield=True):
                await self.leave(session, keep_ownership=keep_ownership)

    async def enter(
        self,
        session: SessionName,
        adapter: str,
        workspace: SessionWorkspace,
        *,
        validate_handoff: HandoffValidator | None = None,
    ) -> None:
        """Start to serve a session; without `validate_handoff` it has no result to submit."""
        self._active[session] = _ActiveSession(workspace, self._claim(session), validate_handoff=validate_handoff)
        await self._contexts.begin(session, adapter)

    def submitted_handoff(self, session: SessionName) -> JsonObject | None:
        """Return the last accepted result of a session, without secrets; None if there is none.

        Call it before the session leaves.
        """
        active = self._active.get(session)
        return None if active is None else active.handoff

    async def leave(self, session: SessionName, *, keep_ownership: bool = False) -> None:
        """Release everything that a session holds, however it ended.

        Safe to repeat, and for a session of a dead process. With `keep_ownership` it keeps its paths, which belong to
        its task until that has landed.
        """
        active = self._active.pop(session, None)
        self._quota.close(session)
        claim = self._claim(session) if active is None else active.claim
        await self._files.release_all(session)
        with suppress(StoreUnavailable):  # writes that must succeed report the outage
            await (self._registry.stop_waiting(session) if keep_ownership else self._release(session, claim))
        await self._contexts.end(session)

    async def _release(self, session: SessionName, claim: Guard | None) -> None:
        while writes := await self._registry.release(session):
            with suppress(VersionConflict):  # a concurrent end of its waiting: try again
                with suppress(LeaseLost):  # taken over: its records no longer count
                    await self._store.commit(Commit(writes, (), [claim] if claim else []))
                return

    async def follow_lock_breaks(self) -> None:
        """Release the file locks that a person breaks, until cancelled."""
        while True:
            with suppress(HistoryCompacted):  # after a long pause: start again from the current position
                async for record in self._store.watch(await self._store.position()):
                    await release_broken_locks(record, self._files, tuple(self._active))

    async def answer(self, session: SessionName, command: str, arguments: JsonObject) -> JsonObject:
        """Handle the request of a session and return the result; raise RefusedError if it can't be done.

        Agents' text becomes records here, so secrets in it are redacted here.
        """
        handler = self._handlers.get(command)
        if handler is None:
            raise RefusedError(f"unknown command {command!r}", f"use one of {', '.join(self._handlers)}")
        if session not in self._active:
            raise RefusedError(
                f"session {session} has ended", "stop here: its task continues in a later session, if any"
            )
        if command in _WRITE_COMMANDS:
            written = len(json.dumps(arguments, ensure_ascii=False)) + sum(map(len, self._active[session].named))
            self._quota.charge(session, written)
        # A redacted path is no path: `_paths` rejects paths with secrets instead.
        paths = {name: arguments[name] for name in ("paths", "path", "file") if name in arguments}
        redacted = await anyio.to_thread.run_sync(self._redactor.json, arguments)
        if command != "note":
            redacted = {**redacted, **paths}
        try:
            return await handler(session, redacted)
        except LeaseLost:
            what = f"task {session.task} was taken over by another process"
            raise RefusedError(what, "stop here: further work of this session can't land") from None

    async def _lock(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        request = _parse_arguments(_LockArguments, "lock", arguments)
        active = self._active[session]
        claim = active.claim
        if claim is None:
            raise RefusedError(f"task {session.task} is not claimed", "only sessions of running tasks can lock paths")
        until = self._clock.monotonic() + (self._lock_timeout if request.wait is None else request.wait)
        paths = await self._paths(session, request.paths)
        # Unlocking must not release patterns that the session owned before it locked them.
        owned = next((held.patterns for held in await self._registry.holdings() if held.session == session), ())
        wanted = [pattern for pattern in map(escape_path, paths) if pattern in active.taken or pattern not in owned]
        active.taken.update(wanted)
        active.named.update(wanted)
        try:
            await self._own(session, list(map(escape_path, paths)), claim, until)
            await self._lock_files(session, paths, until)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._release_patterns(session, active, wanted)
            raise
        active.locked.update(paths)
        await self._contexts.hold(session, sorted(active.locked))
        return {"locked": paths}

    async def _own(self, session: SessionName, patterns: Sequence[str], claim: Guard, until: float) -> None:
        if not patterns:
            return
        orchestrator = self._orchestrator
        planned = await self._registry.plan(session, patterns, orchestrator=orchestrator, claim=claim, is_lock=True)
        # Try without waiting only if the paths look free: a rejection and a wait each write a record.
        conflict = planned if isinstance(planned, OwnershipConflict) else None
        if conflict is None:
            conflict = await self._registry.acquire(
                session, patterns, orchestrator=orchestrator, claim=claim, is_lock=True
            )
        left = until - self._clock.monotonic()
        if conflict is not None and left > 0:
            async with self._contexts.waiting(session, f"{conflict.wanted} (held by {conflict.holder.task})"):
                conflict = await self._registry.acquire(
                    session,
                    patterns,
                    orchestrator=orchestrator,
                    claim=claim,
                    is_lock=True,
                    wait=left,
                    also=self._files.list_waits,
                )
        if conflict is not None:
            what = f"{conflict.describe()} since {format_local_time(conflict.since)}"
            raise RefusedError(what, "work on something else, or ask again with a longer wait")

    async def _lock_files(self, session: SessionName, paths: Sequence[str], until: float) -> None:
        try:
            await self._files.acquire(session, paths, timeout=0)
        except FileLocked as held:
            left = until - self._clock.monotonic()
            if left <= 0:
                raise
            async with self._contexts.waiting(session, f"{held.path} (held by {held.holder})"):
                await self._files.acquire(session, paths, timeout=left, also=self._registry.list_waits)

    async def _unlock(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        active = self._active[session]
        paths = await self._paths(session, _parse_arguments(_UnlockArguments, "unlock", arguments).paths)
        locked = [path for path in paths if path in active.locked]
        active.locked.difference_update(locked)
        await self._files.release(session, locked)
        patterns = [pattern for pattern in map(escape_path, locked) if pattern in active.taken]
        await self._release_patterns(session, active, patterns)
        await self._contexts.hold(session, sorted(active.locked))
        return {"unlocked": locked}

    async def _release_patterns(self, session: SessionName, active: _ActiveSession, patterns: Sequence[str]) -> None:
        """Release patterns that no other lock of the session needs."""
        active.taken.subtract(patterns)
        unused = [pattern for pattern in patterns if active.taken[pattern] <= 0]
        for pattern in unused:
            del active.taken[pattern]
        if unused and active.claim is not None:
            with suppress(LeaseLost):  # taken over: its records no longer count
                await self._registry.release_patterns(session, unused, active.claim)

    async def _report(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        report = _parse_arguments(_ReportArguments, "report", arguments)
        update: SessionStatusUpdate = {}
        if report.status is not None:
            update["status"] = report.status
            update["blocked_on"] = None  # belongs to the previous status
        if report.file is not None:
            [update["file"]] = await self._paths(session, [report.file])
        if report.message is not None:
            update["message"] = report.message
        if report.progress is not None:
            update["progress"] = _format_progress(report.progress)
        if report.blocked_on is not None:
            update["blocked_on"] = report.blocked_on
        await self._contexts.update(session, **update)
        return {}

    async def _peers(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        _parse_arguments(_NoArguments, "peers", arguments)
        contexts = await self._contexts.all()
        active = {context.session for context in filter_active(contexts)} | {session}
        return {"peers": [_peer_json(context, session) for context in contexts if context.session in active]}

    async def _note(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        request = _parse_arguments(_NoteArguments, "note", arguments)
        claim = self._active[session].claim
        note = await self.memory.add(session, request.text, topic=request.topic, paths=request.paths, claim=claim)
        return {"id": note.id}

    async def _notes(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        request = _parse_arguments(_NotesArguments, "notes", arguments)
        async with self._active[session].query_lock:
            notes = await self.memory.find(task=request.task, topic=request.topic, paths=request.paths or ())
        newest = [note.to_json() for note in notes[-MAX_NOTES_RETURNED:]]
        names = ("id", "task", "topic", "paths", "text", "time")
        return {"notes": [{name: note[name] for name in names} for note in newest]}

    async def _ask(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        task = _parse_arguments(_AskArguments, "ask", arguments).task
        active = filter_active(await self._contexts.all(session.run))
        contexts = [context for context in active if context.task == task]
        if not contexts:
            raise RefusedError(f"task {task!r} has no running session in this run", "`peers` lists running sessions")
        newest = max(contexts, key=lambda context: context.attempt)
        own = self._active.get(newest.session)
        workspace = await self._elsewhere(newest.session) if own is None else own.workspace
        async with self._active[session].query_lock:
            details = await read_session_details(self._git, workspace, self._redactor)
        return {**details.to_json(), "status": newest.status.value}

    def _shared(self, session: SessionName) -> SharedValues:
        return SharedValues(self._store, self._clock, self._redactor, session.run)

    async def _share_put(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        request = _parse_arguments(_SharePutArguments, "share_put", arguments)
        stored = await self._shared(session).put(
            request.key, request.value, writer=session, claim=self._claim(session), if_version=request.if_version
        )
        return {"key": stored.key, "version": stored.version}

    async def _share_get(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        key = _parse_arguments(_ShareGetArguments, "share_get", arguments).key
        return require_value(key, await self._shared(session).get(key)).to_json()

    async def _share_wait(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        request = _parse_arguments(_ShareWaitArguments, "share_wait", arguments)
        shared = self._shared(session)
        value = await shared.wait(request.key, after=request.after, timeout=0)
        if value is None and request.timeout > 0:
            async with self._contexts.waiting(session, f"the shared value {request.key}"):
                value = await shared.wait(request.key, after=request.after, timeout=request.timeout)
        return require_new_value(request.key, value, request.timeout).to_json()

    async def _share_list(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        prefix = _parse_arguments(_ShareListArguments, "share_list", arguments).prefix
        return {"shared": [entry.to_json() for entry in await self._shared(session).list(prefix)]}

    async def _submit_handoff(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        data = _parse_arguments(_HandoffArguments, "submit_handoff", arguments).data
        active = self._active[session]
        if active.validate_handoff is None:
            raise RefusedError("this session has no result to submit", "just make the changes of its task")
        if (size := len(orjson.dumps(data))) > MAX_HANDOFF_BYTES:
            remedy = "submit what the next phase needs, and refer to files for the rest"
            raise RefusedError(f"the handoff has {size} bytes (limit: {MAX_HANDOFF_BYTES})", remedy)
        errors = await active.validate_handoff(data)
        if errors:
            remedy = "fix these errors, and submit the complete result again:"
            raise RefusedError("the handoff is not valid", remedy + "".join(f"\n- {error}" for error in errors))
        active.handoff = data
        return {"size": size}

    async def _check_edit(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        path = _parse_arguments(_CheckEditArguments, "check_edit", arguments).path
        try:
            [relative] = await self._paths(session, [path])
        except RefusedError:  # not a path in the worktree, so no session owns it
            return _ALLOWED
        for holding in await self._registry.holdings():
            owner = holding.session
            pattern = next((pattern for pattern in holding.patterns if is_match(pattern, relative)), None)
            if pattern is None or owner[:2] == session[:2]:
                continue
            since = holding.taken.get(pattern, holding.since)
            reason = f"task {owner.task} of run {owner.run} owns {pattern} since {format_local_time(since)}"
            return {"allowed": False, "owner": str(owner), "since": since, "reason": reason}
        return _ALLOWED

    async def _paths(self, session: SessionName, paths: Sequence[str]) -> list[str]:
        """Return the canonical form of each path, without duplicates; raise RefusedError for paths outside."""
        worktree = self._active[session].workspace.worktree

        def canonicalize() -> list[str]:
            tree = worktree.tree
            return list(dict.fromkeys(canonical_path(path, tree) for path in paths))

        canonical = await anyio.to_thread.run_sync(canonicalize)
        if any(self._redactor.text(path) != path for path in canonical):
            raise RefusedError("a file name contains a secret", "rename the file: it can't land under this name")
        return canonical


def _peer_json(context: SessionContext, me: SessionName) -> JsonObject:
    value = context.to_json()
    names = ("run", "task", "attempt", "adapter", "status", "file", "progress", "blocked_on", "files", "updated")
    return {**{name: value[name] for name in names}, "message": context.words, "is_me": context.session == me}


def _parse_arguments(model: type[A], command: str, arguments: JsonObject) -> A:
    try:
        return model.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        location = ".".join(map(str, first["loc"]))
        known = ", ".join(model.model_fields) or "none"
        what = f"invalid arguments for `{command}`: {f'{location}: ' if location else ''}{first['msg'].lower()}"
        raise RefusedError(what, f"its arguments are: {known}") from None


def _format_progress(progress: str | float) -> str:
    """Format progress as text; a bare number is a percentage."""
    if isinstance(progress, str) and re.fullmatch(r"\d+(\.\d+)?", progress.strip(), re.ASCII) is None:
        return progress
    return f"{float(progress):g}%"
