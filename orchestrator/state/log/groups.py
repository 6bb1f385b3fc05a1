"""Group the commits of a process: one write and one sync for all waiting ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import anyio

from orchestrator.state.log.codec import EncodedCommit
from orchestrator.state.log.journal import InlineResult, Journal, PendingCommit

_PAUSES: Final = (0, 0.005, 0.005, 0.01, 0.01)
"""Seconds between inline commit attempts while other processes commit, before a thread waits for them."""


class CommitGroups:
    """A queue of commits for the next group.

    The first waiter without a group leads the next one.
    """

    def __init__(self, journal: Journal, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        self._journal, self._in_thread = journal, in_thread
        self._pending: deque[PendingCommit] = deque()
        self._group: anyio.Event | None = None
        """Set when the current group is committed."""
        self._news: anyio.Event | None = None
        """Set after a commit of this process; None if there are no waiters."""

    async def commit(self, commit: EncodedCommit) -> int:
        """Append a commit and return its position, even if cancelled."""
        pending = PendingCommit(commit)
        self._pending.append(pending)
        with anyio.CancelScope(shield=True):
            if not pending.commit.durable:
                await self._commit_at_once()
            while not pending.is_settled:
                if self._group is None:
                    await self._lead_group()
                else:
                    await self._group.wait()
        if pending.failure:
            raise pending.failure
        return pending.position

    async def _commit_at_once(self) -> None:
        """Append the pending commits without a thread if that needs no waiting."""
        for pause in _PAUSES:
            await anyio.sleep(pause)  # first let other tasks add their commits to the group
            if not self._pending or self._group is not None:
                return
            done = self._journal.try_commit_inline(self._pending)
            if done is InlineResult.DONE:
                self.announce()
            if done is not InlineResult.BUSY:
                return

    async def _lead_group(self) -> None:
        """Commit all pending commits; later ones are part of the next group."""
        self._group = done = anyio.Event()
        try:
            await self._in_thread(partial(self._journal.commit, self._pending))
        finally:
            self._group = None
            done.set()
            self.announce()

    def news(self) -> anyio.Event:
        """Return the event that is set after the next commit of this process."""
        self._news = self._news or anyio.Event()
        return self._news

    def announce(self) -> None:
        """Wake the waiters for news."""
        if self._news is not None:
            self._news.set()
            self._news = None
