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

from orchestrator.clock import Clock
from orchestrator.domain.contexts import file_at
from orchestrator.domain.sessions import SessionName
from orchestrator.engine.contexts import Contexts
from orchestrator.errors import LeaseLost, RefusedError, StoreUnavailable
from orchestrator.protocols import Adapter, Concluded, Said, SessionEvent, UsedTool
from orchestrator.sessions.following import Follower

#: Seconds between two looks at what a session has printed.
PAUSE: Final = 1.0
#: Seconds between two records of what it was seen to do, at least: each is a line of the log.
RECORD_PAUSE: Final = 5.0


@dataclass(slots=True)
class Sight:
    """What a session was seen to do last, and at which file."""

    tops: Iterable[str]
    """The names that the top of its worktree goes by."""
    doing: str | None = field(default=None, init=False)
    file: str | None = field(default=None, init=False)

    def take(self, event: SessionEvent) -> None:
        """Take what it printed."""
        match event:
            case UsedTool(name, detail, paths):
                self.doing = f"{name} {detail}".strip()
                self.file = file_at(name, paths, self.tops) or self.file
            case Said(text, part=False) | Concluded(text) if text.strip():
                self.doing = " ".join(text.split())


@asynccontextmanager
async def observed(
    contexts: Contexts, session: SessionName, adapter: Adapter, log: Path, tree: Path, clock: Clock
) -> AsyncIterator[None]:
    """Record for the body what a session is seen to do; `log` has its output, `tree` is its worktree's top."""
    async with anyio.create_task_group() as group:
        group.start_soon(_observe, contexts, session, Follower(adapter, log, newest_only=True), tree, clock)
        yield
        group.cancel_scope.cancel()


async def _observe(contexts: Contexts, session: SessionName, follower: Follower, tree: Path, clock: Clock) -> None:
    sight = Sight(await anyio.to_thread.run_sync(lambda: tuple({str(tree), os.path.realpath(tree)})))
    told, next_record = (sight.doing, sight.file), clock.monotonic()
    while True:
        for event in await anyio.to_thread.run_sync(follower.read, abandon_on_cancel=True) or ():
            sight.take(event)
        now = clock.monotonic()
        if sight.doing is not None and (sight.doing, sight.file) != told and now >= next_record:
            try:
                with suppress(StoreUnavailable):  # what must be recorded will say so
                    await contexts.saw(session, sight.doing, sight.file)
            except (LeaseLost, RefusedError):  # it is another's by now, or over
                return
            told, next_record = (sight.doing, sight.file), now + RECORD_PAUSE
        await clock.wait(anyio.Event(), now + PAUSE)
