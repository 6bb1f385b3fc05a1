"""Looks before and after each session whether the user's repository changed otherwise than by a landing.

With a sandbox no session can do that; without one, or where it has a hole, this is how it is noticed. What is found
may also be the user's own doing: it is reported with the sessions that ran, not judged.
"""

from __future__ import annotations

import anyio

from orchestrator.engine.landing.merge_queue import MergeQueue
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.snapshot import RepositorySnapshot, describe_changes, is_user_git_running, take_snapshot
from orchestrator.repo.source.user_checkouts import LocalRepository


class RepositoryGuard:
    """Compares the user's repository between sessions; for one that is reached by a URL there is nothing to see."""

    def __init__(self, ledger: Ledger, shop: RunContext, merging: MergeQueue) -> None:
        """Take a run; `merging` tells when the repository is just being changed by us."""
        self._ledger, self._merge_queue = ledger, merging
        self._repository = shop.repository
        self._git = Git(None, as_user=True, keep_fds=shop.git.keep_fds, environ=shop.git.environ)
        self._compare_lock = anyio.Lock()
        self._snapshot: RepositorySnapshot | None = None
        self._running: set[str] = set()
        self._ran: set[str] = set()

    async def begin(self, task: str) -> None:
        """A session is about to start."""
        await self.look()
        self._running.add(task)
        self._ran.add(task)

    async def end(self, task: str) -> None:
        """A session is over."""
        self._running.discard(task)
        await self.look()

    async def look(self) -> None:
        """Report what has changed since the last look, unless it is just being changed by us or by the user."""
        async with self._compare_lock:
            if self._repository is None or self._merge_queue.is_moving or await is_user_git_running(self._repository):
                return
            try:
                await self._compare(self._repository)
            except (GitError, OSError) as error:  # it can't be read at the moment: the next look will tell
                why = error.stderr if isinstance(error, GitError) else str(error)
                await self._ledger.note("repository.unreadable", {"reason": why})

    async def _compare(self, repository: LocalRepository) -> None:
        before, after = self._snapshot, await take_snapshot(repository, self._git, self._snapshot)
        if self._merge_queue.is_moving:  # it began while we looked
            return
        if before is not None:
            found = describe_changes(before, after, ours=await self._landings(before, after))
            if found:
                details = {"changes": found, "sessions": sorted(self._ran)}
                await self._ledger.note("repository.changed", details)
        self._snapshot = after
        self._ran = set(self._running)

    async def _landings(self, before: RepositorySnapshot, after: RepositorySnapshot) -> dict[str, str]:
        """Return the refs that were moved by a landing, of this run or of any other, with where they are."""
        known = before.refs.content
        moved = {ref: commit for ref, commit in after.refs.content.items() if known.get(ref) != commit}
        return {ref: commit for ref, commit in moved.items() if await self._ledger.intended(commit.split(" ")[0])}
