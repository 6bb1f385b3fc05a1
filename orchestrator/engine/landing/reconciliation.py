"""Find work that was landed externally.

A user may have landed it manually, or merged a pull request of its branch.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from orchestrator.domain.events.tasks import TaskLanded
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES, TaskStatus, Trigger
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import ClaimLost, GitError, RefusedError, VersionConflict
from orchestrator.repo.git.reading import list_refs
from orchestrator.repo.landing.salvage import delete_refs, list_unmerged_work

#: Statuses in which built work may have been landed externally, even squashed.
_BUILT = frozenset({TaskStatus.QUEUED, TaskStatus.CONFLICT, TaskStatus.FAILED})
#: Statuses in which a recorded merge on the target counts as the landing.
_OPEN = _BUILT | {TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.CHECKING}

_LANDED_EXTERNALLY = "landed externally"


def has_unlanded_work(tasks: Iterable[TaskDocument]) -> bool:
    """Return True if a task's built work is not recorded as landed.

    The work may be on the target.
    """
    return any(one.status in _BUILT and one.commit is not None for one in tasks)


class Reconciler:
    """Compares the tasks of a run with its target each time the target changes."""

    def __init__(self, ledger: Ledger, context: RunContext) -> None:
        self._ledger, self._context = ledger, context
        self._seen: tuple[str | None, int] | None = None

    async def adopt_landings(self, busy: frozenset[str]) -> list[str]:
        """Record external landings on the target; return their tasks.

        Covers the tasks of this orchestrator and, if it leads the run, unclaimed tasks, but not `busy` tasks, which are
        landing.
        """
        target = self._context.target
        try:
            await target.refresh()
            # A task that has failed since may have landed before.
            snapshot = (target.known, sum(self._ledger.task(task).status in _BUILT for task in self._ledger.run.tasks))
            if snapshot == self._seen:
                return []
            adopted = [task for task in self._ledger.run.tasks if task not in busy and await self._adopt(task)]
        except GitError:  # unreachable: the next sweep retries
            return []
        self._seen = snapshot
        return adopted

    async def _adopt(self, task: str) -> bool:
        document = self._ledger.task(task)
        if document.status not in _OPEN or self._ledger.is_claimed_elsewhere(task):
            return False
        if document.status not in CLAIMED_STATUSES and not self._ledger.writer.became_leader.is_set():
            return False
        commit, reason = self._context.target.find_landing(document.intended_merges), None
        if commit is None:
            commit, reason = await self._landed_by_others(document), _LANDED_EXTERNALLY
        if commit is None:
            return False
        adopted = TaskLanded(landed=commit, reason=reason)
        try:
            await self._ledger.change(task, Trigger.ADOPT, adopted, landed=commit, reason=reason, branch=None)
        except (ClaimLost, VersionConflict):  # another orchestrator was first
            return False
        await self._drop_contained_work(task, commit)
        return True

    async def _drop_contained_work(self, task: str, landed: str) -> None:
        """Delete the refs of a task's work whose commits the landing contains."""
        git = self._context.git
        with suppress(GitError, RefusedError):  # the landing is recorded, and a remaining ref does no harm
            preserved = [one for one in await list_unmerged_work(git, self._ledger.run.id) if one.task == task]
            await delete_refs(git, [one for one in preserved if await git.is_ancestor(one.commit, landed)])

    async def _landed_by_others(self, document: TaskDocument) -> str | None:
        """Return the commit of the target that contains a task's work.

        Only work without a recorded merge counts.
        """
        tip, built = self._context.target.known, document.commit
        if document.status not in _BUILT or built is None or tip is None:
            return None
        git = self._context.git
        if await self._context.target.contains(built):
            return await self._find_containing_commit(document, built, tip)
        tree, conflicts = await git.merge_tree(tip, built)
        if not conflicts and tree == await git.line("rev-parse", f"{tip}^{{tree}}"):
            return tip  # squashed or recreated
        return None

    async def _find_containing_commit(self, document: TaskDocument, built: str, tip: str) -> str:
        """Return the first commit on the target's own line that contains the work.

        The commit that preserves a conflict contains it too, with conflict markers: the next one resolves it.
        """
        git = self._context.git
        line = (await git.line("rev-list", "--first-parent", "--parents", f"{built}..{tip}")).splitlines()
        first_parents = {commit: parents[:1] for commit, *parents in map(str.split, reversed(line))}
        if [built] in first_parents.values():
            return built
        # Not in one call: with --first-parent, --ancestry-path misses commits merged by a second parent.
        after = set((await git.line("rev-list", "--ancestry-path", f"{built}..{tip}")).splitlines())
        containing = [commit for commit in first_parents if commit in after]
        branch = f"refs/heads/{document.branch}"
        marked = (await list_refs(git, branch)).get(branch) if document.branch else None
        return next((commit for commit in containing if commit != marked), tip)
