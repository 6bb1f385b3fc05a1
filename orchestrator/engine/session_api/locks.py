"""Lock files for sessions, in the shared registry and then on this machine.

Locking takes two steps: the registry, which is shared by all machines, assigns the paths to the session; then their
files are locked on this machine. They are released in reverse order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import anyio
import anyio.to_thread

from orchestrator.client.commands import MAX_WAIT_SECONDS
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict, escape_path
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.path_patterns import is_match
from orchestrator.domain.settings.run_settings import Check
from orchestrator.engine.session_api.contexts import SessionContexts
from orchestrator.engine.session_api.details import SessionWorkspace
from orchestrator.errors import FileLocked, LeaseLost, RefusedError, StoreUnavailable
from orchestrator.locking.file_locks import FILE_LOCK_TIMEOUT, FileLocks
from orchestrator.locking.lock_names import canonical_path
from orchestrator.locking.lock_overview import release_broken_locks
from orchestrator.locking.ownership import OwnershipRegistry
from orchestrator.protocols import CommitRecord, Guard, JsonObject
from orchestrator.system.clock import format_local_time

_ALLOWED: Final[JsonObject] = {"allowed": True, "owner": None, "since": None, "reason": None, "warning": None}

#: Returns the errors in a submitted result, one sentence each; empty if it is accepted.
HandoffValidator = Callable[[JsonObject], Awaitable[Sequence[str]]]


@dataclass(slots=True)
class StopChecks:
    """The checks that a session runs before it ends, and how often it may continue; `timeout` is in seconds each."""

    checks: Sequence[Check]
    timeout: float
    continuations: int = 3


@dataclass(slots=True)
class ActiveSession:
    """A session of this process, and the locks that it holds."""

    name: SessionName
    workspace: SessionWorkspace
    claim: Guard | None
    """The claim on its task at its start, which is never renewed: after a takeover its writes are rejected."""
    taken: Counter[str] = field(default_factory=Counter)
    """The number of locks per pattern, except for patterns that the session owned before."""
    locked: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    """All patterns that it ever requested: each later lock or report writes them again."""
    query_lock: anyio.Lock = field(default_factory=anyio.Lock)
    """Serializes expensive queries, so that one session's requests do not block those of other sessions."""
    slot: anyio.Lock = field(default_factory=anyio.Lock)
    """Held with a slot for a heavy command: a session has at most one."""
    validate_handoff: HandoffValidator | None = None
    stop_checks: StopChecks | None = None
    handoff: JsonObject | None = None
    warning: str | None = None
    """A message for its next edit."""

    async def paths(self, paths: Sequence[str], redactor: Redactor) -> list[str]:
        """Return canonical paths without duplicates; raise RefusedError for outside paths."""
        worktree = self.workspace.worktree

        def canonicalize() -> list[str]:
            tree = worktree.tree
            return list(dict.fromkeys(canonical_path(path, tree) for path in paths))

        canonical = await anyio.to_thread.run_sync(canonicalize)
        if any(redactor.text(path) != path for path in canonical):
            raise RefusedError("a file name contains a secret", "rename the file, because it can't land with this name")
        return canonical


class SessionLocks:
    """The file locks of one process's sessions, for one repository and target."""

    def __init__(
        self,
        contexts: SessionContexts,
        files: FileLocks,
        registry: OwnershipRegistry,
        timeout: float = FILE_LOCK_TIMEOUT,
    ) -> None:
        """Create locks with a default `timeout` in seconds for requests without one."""
        self._contexts, self._files, self._registry = contexts, files, registry
        self._clock, self._timeout = contexts.clock, min(timeout, MAX_WAIT_SECONDS)

    async def lock(self, active: ActiveSession, paths: Sequence[str], wait: float | None = None) -> JsonObject:
        """Lock files for a session, all of them or none."""
        claim, session = active.claim, active.name
        if claim is None:
            raise RefusedError(f"task {session.task} is not claimed", "only sessions of running tasks can lock paths")
        until = self._clock.monotonic() + (self._timeout if wait is None else wait)
        names = await active.paths(paths, self._contexts.redactor)
        # Unlocking must not release patterns that the session owned before it locked them.
        owned = next((held.patterns for held in await self._registry.holdings() if held.session == session), ())
        wanted = [pattern for pattern in map(escape_path, names) if pattern in active.taken or pattern not in owned]
        active.taken.update(wanted)
        active.named.update(wanted)
        try:
            await self._own(session, list(map(escape_path, names)), claim, until)
            await self._lock_files(session, names, until)
        except BaseException:  # also a cancellation: without the files, the session keeps none of the patterns
            with anyio.CancelScope(shield=True):
                await self._release_patterns(active, wanted)
            raise
        active.locked.update(names)
        await self._contexts.hold(session, sorted(active.locked))
        return {"locked": names}

    async def _own(self, session: SessionName, patterns: Sequence[str], claim: Guard, until: float) -> None:
        if not patterns:
            return
        orchestrator = self._contexts.orchestrator
        planned = await self._registry.plan(session, patterns, orchestrator=orchestrator, claim=claim, is_lock=True)
        # Try without waiting only if the paths seem free, because a rejection and a wait each write a record.
        conflict = planned if isinstance(planned, OwnershipConflict) else None
        acquire = partial(
            self._registry.acquire, session, patterns, orchestrator=orchestrator, claim=claim, is_lock=True
        )
        if conflict is None:
            conflict = await acquire()
        left = until - self._clock.monotonic()
        if conflict is not None and left > 0:
            async with self._contexts.waiting(session, f"{conflict.wanted} (held by {conflict.holder.task})"):
                conflict = await acquire(wait=left, also=self._files.list_waits)
        if conflict is not None:
            message = f"{conflict.describe()} since {format_local_time(conflict.since)}"
            raise RefusedError(message, "work on something else, or request it with a longer wait")

    async def _lock_files(self, session: SessionName, paths: Sequence[str], until: float) -> None:
        try:
            await self._files.acquire(session, paths, timeout=0)
        except FileLocked as held:
            left = until - self._clock.monotonic()
            if left <= 0:
                raise
            async with self._contexts.waiting(session, f"{held.path} (held by {held.holder})"):
                await self._files.acquire(session, paths, timeout=left, also=self._registry.list_waits)

    async def unlock(self, active: ActiveSession, paths: Sequence[str]) -> JsonObject:
        """Release files that a session locked."""
        names = await active.paths(paths, self._contexts.redactor)
        locked = [path for path in names if path in active.locked]
        active.locked.difference_update(locked)
        await self._files.release(active.name, locked)
        await self._release_patterns(active, [name for name in map(escape_path, locked) if name in active.taken])
        await self._contexts.hold(active.name, sorted(active.locked))
        return {"unlocked": locked}

    async def _release_patterns(self, active: ActiveSession, patterns: Sequence[str]) -> None:
        """Release patterns that no other lock of the session needs."""
        active.taken.subtract(patterns)
        unused = [pattern for pattern in patterns if active.taken[pattern] <= 0]
        for pattern in unused:
            del active.taken[pattern]
        if unused and active.claim is not None:
            with suppress(LeaseLost):  # taken over: its records no longer count
                await self._registry.release_patterns(active.name, unused, active.claim)

    async def check_edit(self, active: ActiveSession, path: str) -> JsonObject:
        """Check whether a session may edit a file; an allowed edit also gets the pending warning."""
        try:
            [relative] = await active.paths([path], self._contexts.redactor)
        except RefusedError:  # not a path in the worktree, so no session owns it
            return _ALLOWED
        for holding in await self._registry.holdings():
            owner = holding.session
            pattern = next((pattern for pattern in holding.patterns if is_match(pattern, relative)), None)
            if pattern is None or owner[:2] == active.name[:2]:
                continue
            since = holding.taken.get(pattern, holding.since)
            reason = f"task {owner.task} of run {owner.run} owns {pattern} since {format_local_time(since)}"
            return {**_ALLOWED, "allowed": False, "owner": str(owner), "since": since, "reason": reason}
        warning, active.warning = active.warning, None
        return {**_ALLOWED, "warning": warning}

    async def release_all(self, session: SessionName) -> None:
        """Release all locked files of a session; its task keeps its paths."""
        await self._files.release_all(session)
        with suppress(StoreUnavailable):  # writes that must succeed report the outage
            await self._registry.stop_waiting(session)

    async def release_broken(self, record: CommitRecord, sessions: Sequence[SessionName]) -> None:
        """Release the file locks of sessions that a user broke in a commit."""
        await release_broken_locks(record, self._files, sessions)
