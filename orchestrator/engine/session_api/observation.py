"""What a session is at by what its program prints, so that one that says nothing to us is seen all the same."""

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

#: Seconds between two looks at what a session has printed.
POLL_INTERVAL: Final = 1.0
#: Seconds between two records of what it was seen to do, at least: each is a line of the log.
RECORD_INTERVAL: Final = 5.0


def worktree_roots(worktree: Worktree) -> tuple[str, ...]:
    """Return the names that the top of a worktree goes by. Blocks."""
    return tuple(dict.fromkeys((str(worktree.tree), os.path.realpath(worktree.tree))))


@dataclass(slots=True)
class ObservedActivity:
    """What a session was seen to do last, and at which file."""

    worktree: Worktree
    activity: str | None = field(default=None, init=False)
    file: str | None = field(default=None, init=False)

    def look(self, follower: OutputFollower) -> None:
        """Take what it has printed since the last look. Blocks."""
        events = follower.read()
        # Asked anew, because it has its place only once it has begun.
        tops = worktree_roots(self.worktree) if events else ()
        for event in events or ():
            self._take(event, tops)

    def _take(self, event: SessionEvent, tops: Iterable[str]) -> None:
        match event:
            case ToolCall(name, detail, paths):
                self.activity = f"{name} {detail}".strip()
                self.file = find_edited_file(name, paths, tops) or self.file
            case AgentMessage(text, part=False) | FinalResult(text) if text.strip():
                self.activity = " ".join(text.split())


@asynccontextmanager
async def observe_session(
    contexts: SessionContexts, session: SessionName, adapter: Adapter, log: Path, worktree: Worktree, clock: Clock
) -> AsyncIterator[None]:
    """Record for the body what a session is seen to do; `log` has its output."""
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
    contexts: SessionContexts, session: SessionName, follower: OutputFollower, sight: ObservedActivity, clock: Clock
) -> None:
    told, next_record = (sight.activity, sight.file), clock.monotonic()
    while True:
        await anyio.to_thread.run_sync(sight.look, follower, abandon_on_cancel=True)
        now = clock.monotonic()
        if sight.activity is not None and (sight.activity, sight.file) != told and now >= next_record:
            try:
                with suppress(StoreUnavailable):  # what must be recorded will say so
                    await contexts.record_activity(session, sight.activity, sight.file)
            except (LeaseLost, RefusedError):  # it is another's by now, or over
                return
            told, next_record = (sight.activity, sight.file), now + RECORD_INTERVAL
        await clock.wait(anyio.Event(), now + POLL_INTERVAL)
