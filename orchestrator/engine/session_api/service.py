"""Answer session requests for locks, reports, peers, notes and shared values.

`leave` releases all locks of a session.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import anyio
import anyio.to_thread

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.engine.session_api.commands import SessionCommands, parse_arguments
from orchestrator.engine.session_api.contexts import SessionContexts
from orchestrator.engine.session_api.details import SessionWorkspace
from orchestrator.engine.session_api.locks import ActiveSession, HandoffValidator, SessionLocks, StopChecks
from orchestrator.engine.session_api.messages import MessageDelivery
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.engine.session_api.observation import observe_session
from orchestrator.errors import HistoryCompacted, LeaseLost, RefusedError
from orchestrator.protocols import JsonObject
from orchestrator.repo.git.command import Git
from orchestrator.sessions.output.log_files import log_path
from orchestrator.system.clock import Clock

#: Bytes charged for each request in addition to its size, for the header of a log line and the cost of a commit.
OVERHEAD: Final = 4096
#: The burst size of a session in bytes, and its sustained rate in bytes per second.
BURST, RATE = 4 << 20, 64 << 10
#: The total size in bytes that a session may write, and all sessions of a run in one process.
MAX_SESSION_BYTES, MAX_RUN_BYTES = 32 << 20, 256 << 20

_REMEDY: Final = "write large results to files in the repository, and share their paths"


@dataclass(slots=True)
class _Account:
    available: float
    """Bytes available now, as of `updated`."""
    updated: float
    """By the monotonic clock."""
    total: int = 0


@dataclass(slots=True)
class WriteQuota:
    """Counts the bytes that the sessions of one process write."""

    clock: Clock
    limits: Mapping[str, int] = field(
        default_factory=lambda: {"burst": BURST, "rate": RATE, "session": MAX_SESSION_BYTES, "run": MAX_RUN_BYTES}
    )
    _sessions: dict[SessionName, _Account] = field(default_factory=dict)
    _runs: dict[str, int] = field(default_factory=dict)

    def charge(self, session: SessionName, size: int) -> None:
        """Count a request of `size` bytes; raise RefusedError, uncounted, above a limit."""
        limits, now, size = self.limits, self.clock.monotonic(), size + OVERHEAD
        account = self._sessions.setdefault(session, _Account(limits["burst"], now))
        account.available = min(limits["burst"], account.available + limits["rate"] * (now - account.updated))
        account.updated = now
        if account.total + size > limits["session"]:
            raise RefusedError(f"this session has reached its limit of {_mib(limits['session'])} of state", _REMEDY)
        if self._runs.get(session.run, 0) + size > limits["run"]:
            message = f"the sessions of run {session.run} have reached their limit of {_mib(limits['run'])} of state"
            raise RefusedError(message, _REMEDY)
        if size > account.available:
            seconds = max(1, round((size - account.available) / limits["rate"]))
            message = f"this session exceeds its rate limit of {limits['rate'] >> 10} KiB of state per second"
            raise RefusedError(message, f"retry in {seconds} s, and write less at once")
        account.available -= size
        account.total += size
        self._runs[session.run] = self._runs.get(session.run, 0) + size

    def close(self, session: SessionName) -> None:
        """Forget an ended session; its bytes still count towards the total of its run."""
        self._sessions.pop(session, None)


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"


#: The commands that always write to the store.
_WRITE_COMMANDS: Final = frozenset({"lock", "unlock", "report", "note", "share_put", "share_wait"})


class SessionService:
    """Serves the sessions of one process, for one repository and target."""

    def __init__(
        self,
        contexts: SessionContexts,
        notes: NoteStore,
        locks: SessionLocks,
        git: Git,
        elsewhere: Callable[[SessionName], Awaitable[SessionWorkspace]],
        slots: anyio.CapacityLimiter,
    ) -> None:
        """Create a service of sessions whose records are in `contexts`.

        A session without a claim on its task can read, but not lock. `elsewhere` finds the workspaces of other
        processes' sessions; `git` runs in the trusted repository. `slots` are those of checks.
        """
        self.notes, self._slots = notes, slots
        self._contexts, self._locks = contexts, locks
        self._active: dict[SessionName, ActiveSession] = {}
        self._quota = WriteQuota(contexts.clock)
        self._messages = MessageDelivery(contexts.store)
        commands = SessionCommands(contexts, notes, git, self._active, elsewhere, self._messages)
        self._handlers: Mapping[str, Callable[..., Awaitable[JsonObject]]] = {
            "lock": locks.lock,
            "unlock": locks.unlock,
            "report": commands.report,
            "peers": commands.peers,
            "note": commands.note,
            "notes": commands.notes,
            "ask": commands.ask,
            "share_put": commands.share_put,
            "share_get": commands.share_get,
            "share_wait": commands.share_wait,
            "share_list": commands.share_list,
            "submit_handoff": commands.submit_handoff,
            "check_edit": locks.check_edit,
            "begin_stop": commands.begin_stop,
            "take_messages": self._messages.take,
        }

    @asynccontextmanager
    async def serve_session(
        self,
        session: SessionName,
        adapter: str,
        workspace: SessionWorkspace,
        *,
        validate_handoff: HandoffValidator | None = None,
        stop_checks: StopChecks | None = None,
    ) -> AsyncIterator[None]:
        """Serve a session and record its activity within the body, then release its locks.

        `adapter` is the adapter's name. For the others see `enter`.
        """
        await self.enter(session, adapter, workspace, validate_handoff=validate_handoff, stop_checks=stop_checks)
        try:
            log = log_path(workspace.logs, session.task, session.attempt, "stdout")
            async with observe_session(
                self._contexts, session, workspace.adapter, log, workspace.worktree, self._contexts.clock
            ):
                yield
        finally:
            with anyio.CancelScope(shield=True):
                await self.leave(session)

    async def enter(
        self,
        session: SessionName,
        adapter: str,
        workspace: SessionWorkspace,
        *,
        validate_handoff: HandoffValidator | None = None,
        stop_checks: StopChecks | None = None,
    ) -> None:
        """Start to serve a session; without `validate_handoff`, it submits no result.

        Without `stop_checks`, it may end at any time.
        """
        claim = self._contexts.claim(session)
        self._active[session] = ActiveSession(
            session, workspace, claim, validate_handoff=validate_handoff, stop_checks=stop_checks
        )
        await self._contexts.begin(session, adapter)

    def submitted_handoff(self, session: SessionName) -> JsonObject | None:
        """Return a session's last accepted result, without secrets; None if there is none.

        Call this before `leave`.
        """
        active = self._active.get(session)
        return None if active is None else active.handoff

    async def record_conflicts(
        self, session: SessionName, conflicts: Mapping[str, Sequence[str]], warning: str | None
    ) -> None:
        """Record the predicted conflicts of a session, by other task; `warning` reaches it at its next edit."""
        if (active := self._active.get(session)) is not None:
            active.warning = warning
            with suppress(LeaseLost):  # taken over: its record no longer counts
                await self._contexts.predict(session, conflicts)

    async def leave(self, session: SessionName) -> None:
        """Release all locks of a session, regardless of how it ended; its paths remain with its task until that lands.

        Safe to repeat, and to call for a session of a dead process.
        """
        self._active.pop(session, None)
        self._quota.close(session)
        await self._locks.release_all(session)
        await self._contexts.end(session)

    async def follow_user_changes(self) -> None:
        """Release the file locks that a user breaks, and announce messages of the user, until cancelled."""
        store = self._contexts.store
        while True:
            with suppress(HistoryCompacted):  # after a long pause: start again from the current position
                async for record in store.watch(await store.position()):
                    await self._locks.release_broken(record, tuple(self._active))
                    await self._messages.announce(record, tuple(self._active.values()))

    async def handle(self, session: SessionName, command: str, arguments: JsonObject) -> JsonObject:
        """Return the result of a session's request; raise RefusedError if impossible.

        Text from agents is recorded here, so this is where its secrets are redacted.
        """
        handler = self._handlers.get(command)
        if handler is None:
            raise RefusedError(f"unknown command {command!r}", f"use one of {', '.join(self._handlers)}")
        active = self._require_active(session)
        if command in _WRITE_COMMANDS:
            written = len(json.dumps(arguments, ensure_ascii=False)) + sum(map(len, active.named))
            self._quota.charge(session, written)
        # Redaction would break paths: `ActiveSession.paths` rejects paths with secrets instead.
        paths = {name: arguments[name] for name in ("paths", "path", "file") if name in arguments}
        redacted = await anyio.to_thread.run_sync(self._contexts.redactor.json, arguments)
        if command != "note":
            redacted = {**redacted, **paths}
        try:
            return await handler(active, **parse_arguments(command, redacted))
        except LeaseLost:
            message = f"task {session.task} was taken over by another process"
            raise RefusedError(message, "stop working: further work of this session can't land") from None

    @asynccontextmanager
    async def hold_slot(self, session: SessionName) -> AsyncIterator[None]:
        """Hold one of the slots of checks during the block; wait until one is free.

        A session has at most one. Raises RefusedError if the session has ended.
        """
        async with self._require_active(session).slot, self._slots:
            yield

    def _require_active(self, session: SessionName) -> ActiveSession:
        active = self._active.get(session)
        if active is None:
            raise RefusedError(f"session {session} has ended", "stop working: a later session may continue its task")
        return active
