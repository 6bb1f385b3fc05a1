"""Group the commits of a process: one write and one sync, or one transaction, for all waiting ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import anyio.lowlevel

from orchestrator.errors import StateError, StoreUnavailable
from orchestrator.state.log.codec import EncodedCommit


@dataclass(slots=True)
class PendingCommit:
    """A commit queued for the next group, and later its outcome."""

    commit: EncodedCommit
    position: int = 0
    failure: StateError | StoreUnavailable | AssertionError | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the outcome is known."""
        return bool(self.position or self.failure)


class CommitQueue:
    """A queue of commits for the next group.

    The first waiter without a group leads the next one.
    """

    def __init__(self, commit_group: Callable[[deque[PendingCommit]], Awaitable[None]]) -> None:
        """Commit by `commit_group`, which takes the first commits from the queue and sets their outcomes."""
        self._commit_group = commit_group
        self._pending: deque[PendingCommit] = deque()
        self._has_leader = False
        self.committed = anyio.Event()
        """Set after the current group, or else the next one; then replaced."""

    async def commit(self, commit: EncodedCommit) -> int:
        """Commit as part of a group and return the position, even if cancelled."""
        pending = PendingCommit(commit)
        self._pending.append(pending)
        with anyio.CancelScope(shield=True):
            while not pending.is_settled:
                if self._has_leader:
                    await self.committed.wait()
                else:
                    await self._lead_group()
        if pending.failure:
            raise pending.failure
        return pending.position

    async def _lead_group(self) -> None:
        """Commit the next group; later commits are part of another one."""
        self._has_leader = True
        try:
            await anyio.lowlevel.checkpoint()  # let other tasks add their commits to the group
            await self._commit_group(self._pending)
        finally:
            self._has_leader = False
            self.announce()

    def announce(self) -> None:
        """Wake the waiters for `committed`."""
        self.committed.set()
        self.committed = anyio.Event()
