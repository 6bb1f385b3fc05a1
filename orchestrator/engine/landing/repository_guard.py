"""Detect changes to the user's repository that no landing made.

Snapshots before and after each session are compared. A sandboxed session can't make such changes, so this detects
sessions without a sandbox, or with a defective one. The user may have made the changes as well, so the report lists the
sessions that ran, without blaming one.
"""

from __future__ import annotations

import anyio

from orchestrator.domain.events.runs import RepositoryChanged, RepositoryUnreadable
from orchestrator.engine.landing.merge_queue import MergeQueue
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.snapshot import RepositorySnapshot, describe_changes, is_user_git_running, take_snapshot
from orchestrator.repo.source.user_checkouts import LocalRepository


class RepositoryGuard:
    """Compares the user's repository between sessions.

    Does nothing for a remote repository.
    """

    def __init__(self, ledger: Ledger, context: RunContext, merge_queue: MergeQueue) -> None:
        """Guard the repository of a run.

        `merge_queue` reports when this process is changing it.
        """
        self._ledger, self._merge_queue = ledger, merge_queue
        self._repository = context.repository
        self._git = Git(None, as_user=True, keep_fds=context.git.keep_fds, environ=context.git.environ)
        self._compare_lock = anyio.Lock()
        self._snapshot: RepositorySnapshot | None = None
        self._running: set[str] = set()
        self._ran: set[str] = set()

    async def begin(self, task: str) -> None:
        """Compare the repository before a session starts."""
        await self.compare()
        self._running.add(task)
        self._ran.add(task)

    async def end(self, task: str) -> None:
        """Compare the repository after a session has ended."""
        self._running.discard(task)
        await self.compare()

    async def compare(self) -> None:
        """Report changes since the last comparison.

        Do nothing while this process or the user is changing the repository.
        """
        async with self._compare_lock:
            if self._repository is None or self._merge_queue.is_moving or await is_user_git_running(self._repository):
                return
            try:
                await self._compare(self._repository)
            except (GitError, OSError) as error:  # unreadable now: the next comparison reports the changes
                reason = error.stderr if isinstance(error, GitError) else str(error)
                await self._ledger.note(RepositoryUnreadable(reason=reason))

    async def _compare(self, repository: LocalRepository) -> None:
        before, after = self._snapshot, await take_snapshot(repository, self._git, self._snapshot)
        if self._merge_queue.is_moving:  # a landing began during the snapshot
            return
        if before is not None:
            changes = describe_changes(before, after, ours=await self._landings(before, after))
            if changes:
                await self._ledger.note(RepositoryChanged(changes=changes, sessions=sorted(self._ran)))
        self._snapshot = after
        self._ran = set(self._running)

    async def _landings(self, before: RepositorySnapshot, after: RepositorySnapshot) -> dict[str, str]:
        """Return the refs that a landing of any run moved, with their commits."""
        earlier = before.content("refs")
        moved = {ref: commit for ref, commit in after.content("refs").items() if earlier.get(ref) != commit}
        return {
            ref: commit
            for ref, commit in moved.items()
            if await self._ledger.tasks.is_landing_intent(commit.split(" ")[0])
        }
