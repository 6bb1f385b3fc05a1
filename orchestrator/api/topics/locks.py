"""The topic `locks`: listing and revocation of locks, and named locks."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.api.topic import Topic
from orchestrator.locking.lock_overview import LockOverview, LockStatus
from orchestrator.locking.named_locks import NamedLocks


class Locks(Topic):
    """The locks of a project. Available as `council.locks`."""

    async def list(self) -> Sequence[LockStatus]:
        """Return the locks of all three layers, with their holders and waiters."""
        return await self._overview().locks()

    async def revoke(self, name: str, reason: str) -> LockStatus:
        """Revoke a lock by its name in `list`; return its previous status.

        The reason is recorded. Raises RefusedError if the lock is free, or if only the process that holds it can
        release it.
        """
        return await self._overview().break_lock(name, reason)

    @property
    def named(self) -> NamedLocks:
        """Return the named locks: shared by readers or exclusive to a writer.

        They have an owner, an expiry and a timeout.
        """
        return NamedLocks(self._context.store, self._context.clock)

    def _overview(self) -> LockOverview:
        return LockOverview(self._context.store, self._context.clock, self._context.project.file_locks)
