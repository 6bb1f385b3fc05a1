"""Derive a session's activity from its output, for sessions that don't report it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.sessions.contexts import find_edited_file
from orchestrator.engine.session_api.contexts import SessionContexts
from orchestrator.errors import LeaseLost, RefusedError, StoreUnavailable
from orchestrator.protocols import Adapter, AgentMessage, FinalResult, SessionEvent, ToolCall
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.system.clock import Clock

#: Seconds between two reads of a session's output.
POLL_INTERVAL: Final = 1.0
#: The minimum time between two records of its activity in seconds: each is a line in the log.
RECORD_INTERVAL: Final = 5.0


def worktree_roots(worktree: Worktree) -> tuple[str, ...]:
    """Return all paths of a worktree's root. Blocks."""
    return tuple(dict.fromkeys((str(worktree.tree), os.path.realpath(worktree.tree))))


@dataclass(slots=True)
class ObservedActivity:
    """The last observed activity of a session, and its file."""

    worktree: Worktree
    activity: str | None = field(default=None, init=False)
    file: str | None = field(default=None, init=False)

    def update(self, follower: OutputFollower) -> None:
        """Process the output since the last update. Blocks."""
        events = follower.read()
        # Resolved each time, because the worktree has no slot before the session has started.
        roots = worktree_roots(self.worktree) if events else ()
        for event in events or ():
            self._process(event, roots)

    def _process(self, event: SessionEvent, roots: Iterable[str]) -> None:
        match event:
            case ToolCall(name, detail, paths):
                self.activity = f"{name} {detail}".strip()
                self.file = find_edited_file(name, paths, roots) or self.file
            case AgentMessage(text, part=False) | FinalResult(text) if text.strip():
                self.activity = " ".join(text.split())


@asynccontextmanager
async def observe_session(
    contexts: SessionContexts, session: SessionName, adapter: Adapter, log: Path, worktree: Worktree, clock: Clock
) -> AsyncIterator[None]:
    """Record the observed activity of a session within the body; `log` has its output."""
    async with anyio.create_task_group() as group:
        group.start_soon(
            _record_activity,
            contexts,
            session,
            OutputFollower(adapter, log, newest_only=True),
            ObservedActivity(worktree),
            clock,
        )
        yield
        group.cancel_scope.cancel()


async def _record_activity(
    contexts: SessionContexts, session: SessionName, follower: OutputFollower, observed: ObservedActivity, clock: Clock
) -> None:
    recorded, next_record = (observed.activity, observed.file), clock.monotonic()
    while True:
        await anyio.to_thread.run_sync(observed.update, follower, abandon_on_cancel=True)
        now = clock.monotonic()
        if observed.activity is not None and (observed.activity, observed.file) != recorded and now >= next_record:
            try:
                with suppress(StoreUnavailable):  # writes that must succeed report the outage
                    await contexts.record_activity(session, observed.activity, observed.file)
            except (LeaseLost, RefusedError):  # its task was taken over, or the session has ended
                return
            recorded, next_record = (observed.activity, observed.file), now + RECORD_INTERVAL
        await clock.wait(anyio.Event(), now + POLL_INTERVAL)
