"""What sessions ask while they are at work is answered here: locks, reports, peers, notes.

A lock is two: the paths become the session's in the registry, which counts on all machines, then their files are
locked, which counts on this one. They are given back in the opposite order. All that a session has goes with `leave`.
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

#: How many paths a session can name at once.
MAX_PATHS: Final = 200
#: How many notes are told at once, the newest.
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


#: Returns what is wrong with what a session hands over, a sentence each; nothing where it is taken.
HandoffValidator = Callable[[JsonObject], Awaitable[Sequence[str]]]


@dataclass(slots=True)
class _ActiveSession:
    """A session of this process, and what it has taken."""

    at: SessionWorkspace
    claim: Guard | None
    """That on its task when it began; it has no other: who was taken over is refused by that, whoever has it now."""
    taken: Counter[str] = field(default_factory=Counter)
    """The patterns that it has for its locks, and for how many; what it owned before is not among them."""
    locked: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    """All patterns that it has asked to lock: each later lock or report writes them again."""
    query_lock: anyio.Lock = field(default_factory=anyio.Lock)
    """For what takes long to answer: one at a time, or who asks much at once would keep all others waiting."""
    takes: HandoffValidator | None = None
    handed_over: JsonObject | None = None


A = TypeVar("A", bound=_Arguments)

#: What changes the store, each time.
_WRITE_COMMANDS: Final = frozenset({"lock", "unlock", "report", "note", "share_put", "share_wait"})
_ALLOWED: Final[JsonObject] = {"allowed": True, "owner": None, "since": None, "reason": None}


class SessionService:
    """Answers the sessions of one process, which all work for one repository and target.

    `claim` returns the guard of the claim on a session's task, None where there is none: it may then look, and lock
    nothing. `elsewhere` finds where sessions of other processes work; `git` runs in the trusted repository.
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
        """Have who does not say how long to wait for a lock wait `lock_timeout` seconds."""
        self._store, self._clock, self._git = store, clock, git
        self._contexts, self.memory, self._files, self._registry = contexts, memory, files, registry
        self._redactor, self._orchestrator, self._claim, self._elsewhere = redactor, orchestrator, claim, elsewhere
        self._lock_timeout = min(lock_timeout, MAX_WAIT_SECONDS)
        self._active: dict[SessionName, _ActiveSession] = {}
        self._quota = WriteQuota(clock)
        self._answers: Mapping[str, Callable[[SessionName, JsonObject], Awaitable[JsonObject]]] = {
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
        at: SessionWorkspace,
        *,
        keep_ownership: bool = False,
        takes: HandoffValidator | None = None,
    ) -> AsyncIterator[None]:
        """Answer a session for the body, and record what it is seen to do; it has nothing left behind that.

        `adapter` is what its adapter is called. For `keep_ownership` see `leave`, for `takes` see `enter`.
        """
        await self.enter(session, adapter, at, takes=takes)
        try:
            log = log_path(at.logs, session.task, session.attempt, "stdout")
            async with observe_session(self._contexts, session, at.adapter, log, at.worktree, self._clock):
                yield
        finally:
            with anyio.CancelScope(shield=True):
                await self.leave(session, keep_ownership=keep_ownership)

    async def enter(
        self, session: SessionName, adapter: str, at: SessionWorkspace, *, takes: HandoffValidator | None = None
    ) -> None:
        """Answer a session from now on.

        `takes` says what is wrong with what it hands over; None: it has nothing to hand over.
        """
        self._active[session] = _ActiveSession(at, self._claim(session), takes=takes)
        await self._contexts.begin(session, adapter)

    def handed_over(self, session: SessionName) -> JsonObject | None:
        """Return what a session has handed over last that was taken, without secrets; None where nothing was.

        To be asked before the session leaves.
        """
        sitting = self._active.get(session)
        return None if sitting is None else sitting.handed_over

    async def leave(self, session: SessionName, *, keep_ownership: bool = False) -> None:
        """Give back all that a session has, however it has ended.

        Safe to repeat, and for a session of a process that is gone. With `keep_ownership` its paths stay its own, where
        they are to be its task's until that has landed.
        """
        sitting = self._active.pop(session, None)
        self._quota.close(session)
        claim = self._claim(session) if sitting is None else sitting.claim
        await self._files.release_all(session)
        with suppress(StoreUnavailable):  # what must be recorded of its end will say so
            await (self._registry.stop_waiting(session) if keep_ownership else self._release(session, claim))
        await self._contexts.end(session)

    async def _release(self, session: SessionName, claim: Guard | None) -> None:
        while writes := await self._registry.release(session):
            with suppress(VersionConflict):  # it has just stopped waiting
                with suppress(LeaseLost):  # nothing of it counts any more
                    await self._store.commit(Commit(writes, (), [claim] if claim else []))
                return

    async def follow_lock_breaks(self) -> None:
        """Have sessions give back the file locks that a person breaks, until it is cancelled."""
        while True:
            with suppress(HistoryCompacted):  # who was stopped for long looks anew
                async for record in self._store.watch(await self._store.position()):
                    await release_broken_locks(record, self._files, tuple(self._active))

    async def answer(self, session: SessionName, command: str, arguments: JsonObject) -> JsonObject:
        """Do what a session asks, and return the result. RefusedError says what can't be done, and what to do.

        This is where the words of an agent become records: no secret of theirs gets further than this.
        """
        answer = self._answers.get(command)
        if answer is None:
            raise RefusedError(f"there is no command {command!r}", f"name one of {', '.join(self._answers)}")
        if session not in self._active:
            raise RefusedError(f"session {session} is over", "its work goes on in a later one, if at all")
        if command in _WRITE_COMMANDS:
            written = len(json.dumps(arguments, ensure_ascii=False)) + sum(map(len, self._active[session].named))
            self._quota.charge(session, written)
        # The paths of files lead nowhere with a part left out: `_paths` refuses those.
        named = {name: arguments[name] for name in ("paths", "path", "file") if name in arguments}
        redacted = await anyio.to_thread.run_sync(self._redactor.json, arguments)
        if command != "note":
            redacted = {**redacted, **named}
        try:
            return await answer(session, redacted)
        except LeaseLost:
            what = f"task {session.task} was taken over by another process"
            raise RefusedError(what, "end here: what this session still does won't land") from None

    async def _lock(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        asked = _parse_arguments(_LockArguments, "lock", arguments)
        sitting = self._active[session]
        claim = sitting.claim
        if claim is None:
            raise RefusedError(f"there is no claim on task {session.task}", "locks are for tasks that are at work")
        until = self._clock.monotonic() + (self._lock_timeout if asked.wait is None else asked.wait)
        paths = await self._paths(session, asked.paths)
        # What it owned before it asked is not the lock's to give back.
        mine = next((one.patterns for one in await self._registry.holdings() if one.session == session), ())
        wanted = [pattern for pattern in map(escape_path, paths) if pattern in sitting.taken or pattern not in mine]
        sitting.taken.update(wanted)
        sitting.named.update(wanted)
        try:
            await self._own(session, list(map(escape_path, paths)), claim, until)
            await self._lock_files(session, paths, until)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._release_patterns(session, sitting, wanted)
            raise
        sitting.locked.update(paths)
        await self._contexts.hold(session, sorted(sitting.locked))
        return {"locked": paths}

    async def _own(self, session: SessionName, patterns: Sequence[str], claim: Guard, until: float) -> None:
        if not patterns:
            return
        who = self._orchestrator
        held = await self._registry.plan(session, patterns, orchestrator=who, claim=claim, is_lock=True)
        # Only tried first where it looks free: who is refused is on record, and who waits is so by another record.
        still = held if isinstance(held, OwnershipConflict) else None
        if still is None:
            still = await self._registry.acquire(session, patterns, orchestrator=who, claim=claim, is_lock=True)
        left = until - self._clock.monotonic()
        if still is not None and left > 0:
            async with self._contexts.waiting(session, f"{still.wanted}, which {still.holder.task} has"):
                still = await self._registry.acquire(
                    session,
                    patterns,
                    orchestrator=who,
                    claim=claim,
                    is_lock=True,
                    wait=left,
                    also=self._files.list_waits,
                )
        if still is not None:
            what = f"{still.describe()} since {format_local_time(still.since)}"
            raise RefusedError(what, "work on something else meanwhile, or ask again with a longer wait")

    async def _lock_files(self, session: SessionName, paths: Sequence[str], until: float) -> None:
        try:
            await self._files.acquire(session, paths, timeout=0)
        except FileLocked as held:
            left = until - self._clock.monotonic()
            if left <= 0:
                raise
            async with self._contexts.waiting(session, f"{held.path}, which {held.holder} has"):
                await self._files.acquire(session, paths, timeout=left, also=self._registry.list_waits)

    async def _unlock(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        sitting = self._active[session]
        paths = await self._paths(session, _parse_arguments(_UnlockArguments, "unlock", arguments).paths)
        held = [path for path in paths if path in sitting.locked]
        sitting.locked.difference_update(held)
        await self._files.release(session, held)
        await self._release_patterns(session, sitting, [one for one in map(escape_path, held) if one in sitting.taken])
        await self._contexts.hold(session, sorted(sitting.locked))
        return {"unlocked": held}

    async def _release_patterns(self, session: SessionName, sitting: _ActiveSession, patterns: Sequence[str]) -> None:
        """Give back patterns that no other lock of the session needs."""
        sitting.taken.subtract(patterns)
        given = [pattern for pattern in patterns if sitting.taken[pattern] <= 0]
        for pattern in given:
            del sitting.taken[pattern]
        if given and sitting.claim is not None:
            with suppress(LeaseLost):  # nothing of it counts any more
                await self._registry.release_patterns(session, given, sitting.claim)

    async def _report(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        asked = _parse_arguments(_ReportArguments, "report", arguments)
        told: SessionStatusUpdate = {}
        if asked.status is not None:
            told["status"] = asked.status
            told["blocked_on"] = None  # that of the status before
        if asked.file is not None:
            [told["file"]] = await self._paths(session, [asked.file])
        if asked.message is not None:
            told["message"] = asked.message
        if asked.progress is not None:
            told["progress"] = _format_progress(asked.progress)
        if asked.blocked_on is not None:
            told["blocked_on"] = asked.blocked_on
        await self._contexts.update(session, **told)
        return {}

    async def _peers(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        _parse_arguments(_NoArguments, "peers", arguments)
        found = await self._contexts.all()
        working = {one.session for one in filter_active(found)} | {session}
        return {"peers": [_peer_json(one, session) for one in found if one.session in working]}

    async def _note(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        asked = _parse_arguments(_NoteArguments, "note", arguments)
        claim = self._active[session].claim
        note = await self.memory.leave(session, asked.text, topic=asked.topic, paths=asked.paths, claim=claim)
        return {"id": note.id}

    async def _notes(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        asked = _parse_arguments(_NotesArguments, "notes", arguments)
        async with self._active[session].query_lock:
            found = await self.memory.find(task=asked.task, topic=asked.topic, paths=asked.paths or ())
        told = [note.to_json() for note in found[-MAX_NOTES_RETURNED:]]
        names = ("id", "task", "topic", "paths", "text", "time")
        return {"notes": [{name: note[name] for name in names} for note in told]}

    async def _ask(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        task = _parse_arguments(_AskArguments, "ask", arguments).task
        found = [one for one in filter_active(await self._contexts.all(session.run)) if one.task == task]
        if not found:
            raise RefusedError(f"task {task!r} has no session at work in this run", "`peers` names those that have")
        newest = max(found, key=lambda one: one.attempt)
        here = self._active.get(newest.session)
        at = await self._elsewhere(newest.session) if here is None else here.at
        async with self._active[session].query_lock:
            told = await read_session_details(self._git, at, self._redactor)
        return {**told.to_json(), "status": newest.status.value}

    def _shared(self, session: SessionName) -> SharedValues:
        return SharedValues(self._store, self._clock, self._redactor, session.run)

    async def _share_put(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        asked = _parse_arguments(_SharePutArguments, "share_put", arguments)
        put = await self._shared(session).put(
            asked.key, asked.value, writer=session, claim=self._claim(session), if_version=asked.if_version
        )
        return {"key": put.key, "version": put.version}

    async def _share_get(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        key = _parse_arguments(_ShareGetArguments, "share_get", arguments).key
        return require_value(key, await self._shared(session).get(key)).to_json()

    async def _share_wait(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        asked = _parse_arguments(_ShareWaitArguments, "share_wait", arguments)
        shared = self._shared(session)
        found = await shared.wait(asked.key, after=asked.after, timeout=0)
        if found is None and asked.timeout > 0:
            async with self._contexts.waiting(session, f"the shared value {asked.key}"):
                found = await shared.wait(asked.key, after=asked.after, timeout=asked.timeout)
        return require_new_value(asked.key, found, asked.timeout).to_json()

    async def _share_list(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        asked = _parse_arguments(_ShareListArguments, "share_list", arguments)
        return {"shared": [one.to_json() for one in await self._shared(session).list(asked.prefix)]}

    async def _submit_handoff(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        given = _parse_arguments(_HandoffArguments, "submit_handoff", arguments).data
        sitting = self._active[session]
        if sitting.takes is None:
            raise RefusedError("this session has nothing to hand over", "what it is to do ends with its changes")
        if (size := len(orjson.dumps(given))) > MAX_HANDOFF_BYTES:
            remedy = "hand over what the next phase needs, and name files for the rest"
            raise RefusedError(f"the handoff has {size} bytes, {MAX_HANDOFF_BYTES} fit", remedy)
        wrong = await sitting.takes(given)
        if wrong:
            remedy = "mend this, and hand all of it over again:"
            raise RefusedError("the handoff is not taken", remedy + "".join(f"\n- {one}" for one in wrong))
        sitting.handed_over = given
        return {"size": size}

    async def _check_edit(self, session: SessionName, arguments: JsonObject) -> JsonObject:
        path = _parse_arguments(_CheckEditArguments, "check_edit", arguments).path
        try:
            [inside] = await self._paths(session, [path])
        except RefusedError:  # whatever that is, it is nobody's here
            return _ALLOWED
        for one in await self._registry.holdings():
            pattern = next((pattern for pattern in one.patterns if is_match(pattern, inside)), None)
            if pattern is None or one.session[:2] == session[:2]:
                continue
            since = one.taken.get(pattern, one.since)
            reason = f"task {one.session.task} of run {one.session.run} owns {pattern} since {format_local_time(since)}"
            return {"allowed": False, "owner": str(one.session), "since": since, "reason": reason}
        return _ALLOWED

    async def _paths(self, session: SessionName, paths: Sequence[str]) -> list[str]:
        """Return the one spelling of each path, each once; RefusedError for one that lies outside of the worktree."""
        worktree = self._active[session].at.worktree

        def look() -> list[str]:
            tree = worktree.tree
            return list(dict.fromkeys(canonical_path(path, tree) for path in paths))

        found = await anyio.to_thread.run_sync(look)
        if any(self._redactor.text(path) != path for path in found):
            raise RefusedError("the name of a file holds a secret", "rename the file: under this name it can't land")
        return found


def _peer_json(one: SessionContext, me: SessionName) -> JsonObject:
    value = one.to_json()
    names = ("run", "task", "attempt", "adapter", "status", "file", "progress", "blocked_on", "files", "updated")
    return {**{name: value[name] for name in names}, "message": one.words, "is_me": one.session == me}


def _parse_arguments(model: type[A], command: str, arguments: JsonObject) -> A:
    try:
        return model.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        known = ", ".join(model.model_fields) or "none"
        what = f"`{command}` can't be asked like this: {f'{place}: ' if place else ''}{first['msg'].lower()}"
        raise RefusedError(what, f"its arguments are: {known}") from None


def _format_progress(said: str | float) -> str:
    """Return progress in words: a number alone, as typed or as a number, is a percentage."""
    if isinstance(said, str) and re.fullmatch(r"\d+(\.\d+)?", said.strip(), re.ASCII) is None:
        return said
    return f"{float(said):g}%"
