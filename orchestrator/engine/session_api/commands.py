"""Handle session requests for reports, peers, notes, shared values and handoffs."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, create_model

from orchestrator.client.commands import (
    HOOK_REQUESTS,
    MAX_HANDOFF_BYTES,
    MAX_PATH_CHARS,
    MAX_WAIT_SECONDS,
    OBJECT,
    PATH,
    PATHS,
    SECONDS,
    SESSION_COMMANDS,
    TEXT,
    VALUE,
    VERSION,
    Argument,
)
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.sessions.contexts import SessionContext, SessionStatus, filter_active
from orchestrator.domain.settings.run_settings import Check
from orchestrator.engine.session_api.contexts import SessionContexts, SessionStatusUpdate
from orchestrator.engine.session_api.details import SessionWorkspace, read_session_details
from orchestrator.engine.session_api.locks import ActiveSession
from orchestrator.engine.session_api.messages import MessageDelivery
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.engine.session_api.shared_values import DEFAULT_WAIT, SharedValues, require_new_value, require_value
from orchestrator.errors import GitError, RefusedError
from orchestrator.protocols import JsonObject
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.diffs import list_session_changes

#: The maximum number of paths in one request.
MAX_PATHS: Final = 200
#: The maximum number of notes in one response.
MAX_NOTES_RETURNED: Final = 50

_Path = Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARS)]
#: The types of arguments, by kind.
_TYPES: Final[Mapping[str, Any]] = {
    TEXT: str,
    PATH: _Path,
    PATHS: Annotated[list[_Path], Field(max_length=MAX_PATHS)],
    SECONDS: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)],
    VERSION: Annotated[int, Field(ge=0)],
    VALUE: JsonValue,
    OBJECT: JsonObject,
}


def parse_arguments(command: str, arguments: JsonObject) -> dict[str, Any]:
    """Return a command's arguments by name; raise RefusedError if they are invalid."""
    model = _arguments_model(command)
    try:
        parsed = model.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        location = ".".join(map(str, first["loc"]))
        known = ", ".join(model.model_fields) or "none"
        message = f"invalid arguments for `{command}`: {f'{location}: ' if location else ''}{first['msg'].lower()}"
        raise RefusedError(message, f"its arguments are: {known}") from None
    given = {name: getattr(parsed, name) for name in parsed.model_fields_set}
    return {name: value for name, value in given.items() if value is not None or model.model_fields[name].is_required()}


@cache
def _arguments_model(command: str) -> type[BaseModel]:
    described = HOOK_REQUESTS.get(command) or SESSION_COMMANDS[command]
    fields: dict[str, Any] = {argument.name: _field(argument) for argument in described.arguments}
    config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
    return create_model(command, __config__=config, **fields)


def _field(argument: Argument) -> tuple[Any, Any]:
    kind = Literal[argument.choices] if argument.choices else _TYPES[argument.kind]
    if not argument.is_word:
        return kind | None, None
    return (Annotated[kind, Field(min_length=1)], ...) if argument.kind == PATHS else (kind, ...)


class SessionCommands:
    """Handles the requests of one process's sessions, except for locks.

    `elsewhere` finds the workspaces of other processes' sessions; `git` runs in the trusted repository.
    """

    def __init__(
        self,
        contexts: SessionContexts,
        notes: NoteStore,
        git: Git,
        active: Mapping[SessionName, ActiveSession],
        elsewhere: Callable[[SessionName], Awaitable[SessionWorkspace]],
        messages: MessageDelivery,
    ) -> None:
        self._contexts, self._note_store, self._git, self._active = contexts, notes, git, active
        self._elsewhere, self._messages = elsewhere, messages

    async def begin_stop(self, active: ActiveSession) -> JsonObject:
        """Return why a session may not end yet: new messages of the user, or else the checks to run.

        After too many continuations because of checks, there are none.
        """
        if message := await self._messages.deliver(active):
            return {"message": message, "checks": [], "timeout": 0.0}
        stop = active.stop_checks
        if stop is None or not stop.continuations:
            return {"message": None, "checks": [], "timeout": 0.0}
        stop.continuations -= 1
        checks = await self._select_checks(active, stop.checks)
        return {"message": None, "checks": [check.run for check in checks], "timeout": stop.timeout}

    async def _select_checks(self, active: ActiveSession, checks: Sequence[Check]) -> Sequence[Check]:
        """Return the checks that the changes of a session select; all of them if the changes can't be read."""
        changed, workspace = None, active.workspace
        if any(check.paths for check in checks):
            with suppress(GitError, OSError, RefusedError):
                async with active.query_lock:
                    changed = await list_session_changes(
                        self._git, workspace.worktree, workspace.base, rules=workspace.rules
                    )
        return checks if changed is None else [check for check in checks if check.is_selected(changed)]

    async def report(
        self,
        active: ActiveSession,
        status: str | None = None,
        file: str | None = None,
        message: str | None = None,
        progress: str | None = None,
        blocked_on: str | None = None,
    ) -> JsonObject:
        """Report the status of a session to the other sessions."""
        update: SessionStatusUpdate = {}
        if status is not None:
            update["status"] = SessionStatus(status)
            update["blocked_on"] = None  # belonged to the previous status
        if file is not None:
            [update["file"]] = await active.paths([file], self._contexts.redactor)
        if message is not None:
            update["message"] = message
        if progress is not None:
            update["progress"] = _format_progress(progress)
        if blocked_on is not None:
            update["blocked_on"] = blocked_on
        await self._contexts.update(active.name, **update)
        return {}

    async def peers(self, active: ActiveSession) -> JsonObject:
        """List the active sessions with their activity."""
        contexts = await self._contexts.all()
        names = {context.session for context in filter_active(contexts)} | {active.name}
        return {"peers": [_peer_json(context, active.name) for context in contexts if context.session in names]}

    async def note(
        self, active: ActiveSession, text: str, topic: str | None = None, paths: Sequence[str] = ()
    ) -> JsonObject:
        """Leave a note for later sessions."""
        note = await self._note_store.add(active.name, text, topic=topic, paths=paths, claim=active.claim)
        return {"id": note.id}

    async def notes(
        self, active: ActiveSession, task: str | None = None, topic: str | None = None, paths: Sequence[str] = ()
    ) -> JsonObject:
        """Return the newest matching notes."""
        async with active.query_lock:
            notes = await self._note_store.find(task=task, topic=topic, paths=paths)
        newest = [note.to_json() for note in notes[-MAX_NOTES_RETURNED:]]
        names = ("id", "task", "topic", "paths", "text", "time")
        return {"notes": [{name: note[name] for name in names} for note in newest]}

    async def ask(self, active: ActiveSession, task: str) -> JsonObject:
        """Return the state of another task."""
        running = filter_active(await self._contexts.all(active.name.run))
        contexts = [context for context in running if context.task == task]
        if not contexts:
            raise RefusedError(f"task {task!r} has no running session in this run", "`peers` lists running sessions")
        newest = max(contexts, key=lambda context: context.attempt)
        own = self._active.get(newest.session)
        workspace = await self._elsewhere(newest.session) if own is None else own.workspace
        async with active.query_lock:
            details = await read_session_details(self._git, workspace, self._contexts.redactor)
        return {**details.to_json(), "status": newest.status.value}

    def _shared(self, active: ActiveSession) -> SharedValues:
        contexts = self._contexts
        return SharedValues(contexts.store, contexts.clock, contexts.redactor, active.name.run)

    async def share_put(self, active: ActiveSession, key: str, value: Any, if_version: int | None = None) -> JsonObject:
        """Share a value with the other sessions of the run."""
        claim = self._contexts.claim(active.name)
        stored = await self._shared(active).put(key, value, writer=active.name, claim=claim, if_version=if_version)
        return {"key": stored.key, "version": stored.version}

    async def share_get(self, active: ActiveSession, key: str) -> JsonObject:
        """Return a shared value."""
        return require_value(key, await self._shared(active).get(key)).to_json()

    async def share_wait(
        self,
        active: ActiveSession,
        key: str,
        after: int | None = None,
        timeout: float = DEFAULT_WAIT,  # noqa: ASYNC109  a timeout of our clock
    ) -> JsonObject:
        """Wait until another session shares a value."""
        shared = self._shared(active)
        value = await shared.wait(key, after=after, timeout=0)
        if value is None and timeout > 0:
            async with self._contexts.waiting(active.name, f"the shared value {key}"):
                value = await shared.wait(key, after=after, timeout=timeout)
        return require_new_value(key, value, timeout).to_json()

    async def share_list(self, active: ActiveSession, prefix: str = "") -> JsonObject:
        """List the shared values of the run."""
        return {"shared": [entry.to_json() for entry in await self._shared(active).list(prefix)]}

    async def submit_handoff(self, active: ActiveSession, data: JsonObject) -> JsonObject:
        """Submit the handoff of a session's phase."""
        if active.validate_handoff is None:
            raise RefusedError("this session has no result to submit", "only change files as the task requires")
        if (size := len(orjson.dumps(data))) > MAX_HANDOFF_BYTES:
            remedy = "submit only values that the next phase needs, and refer to files for the rest"
            raise RefusedError(f"the handoff has {size} bytes (limit: {MAX_HANDOFF_BYTES})", remedy)
        errors = await active.validate_handoff(data)
        if errors:
            remedy = "fix these errors, and submit the complete result again:"
            raise RefusedError("the handoff is not valid", remedy + "".join(f"\n- {error}" for error in errors))
        active.handoff = data
        return {"size": size}


def _peer_json(context: SessionContext, me: SessionName) -> JsonObject:
    value = context.to_json()
    names = ("run", "task", "attempt", "adapter", "status", "file", "progress", "blocked_on", "files", "updated")
    return {**{name: value[name] for name in names}, "message": context.words, "is_me": context.session == me}


def _format_progress(progress: str) -> str:
    """Format progress as text; a bare number is a percentage."""
    is_number = re.fullmatch(r"\d+(\.\d+)?", progress.strip(), re.ASCII) is not None
    return f"{float(progress):g}%" if is_number else progress
