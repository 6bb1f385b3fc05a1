"""Finds work that somebody else has landed: a person by hand, or whoever merged a pull request of its branch."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.domain.runs.lifecycle import Trigger
from orchestrator.domain.runs.model import CLAIMED_STATUSES, TaskDocument, TaskStatus
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import ClaimLost, GitError, VersionConflict

#: Where what was built may have been landed by others, by hand or squashed.
_BUILT = frozenset({TaskStatus.QUEUED, TaskStatus.CONFLICT, TaskStatus.FAILED})
#: Where a recorded merge counts that is on the target.
_OPEN = _BUILT | {TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.CHECKING}

_LANDED_EXTERNALLY = "somebody else has landed it"


def has_unlanded_work(tasks: Iterable[TaskDocument]) -> bool:
    """Whether a task has built something that is not recorded as landed, but may be on the target."""
    return any(one.status in _BUILT and one.commit is not None for one in tasks)


class Reconciler:
    """Looks at a run's target each time that this has moved."""

    def __init__(self, ledger: Ledger, shop: RunContext) -> None:
        self._ledger, self._context = ledger, shop
        self._seen: tuple[str | None, int] | None = None

    async def look(self, busy: frozenset[str]) -> list[str]:
        """Record as landed what is on the target otherwise than by this orchestrator; return those tasks.

        It is for those that are its own, and, if it coordinates the run, those that are nobody's; not for tasks that
        are `busy` landing.
        """
        target = self._context.target
        try:
            await target.refresh()
            # A task that has failed since may have been landed before.
            now = (target.known, sum(self._ledger.task(task).status in _BUILT for task in self._ledger.run.tasks))
            if now == self._seen:
                return []
            found = [task for task in self._ledger.run.tasks if task not in busy and await self._adopt(task)]
        except GitError:  # it can't be reached: the next look will tell
            return []
        self._seen = now
        return found

    async def _adopt(self, task: str) -> bool:
        document = self._ledger.task(task)
        if document.status not in _OPEN or self._ledger.is_claimed_elsewhere(task):
            return False
        if document.status not in CLAIMED_STATUSES and not self._ledger.became_leader.is_set():
            return False
        commit, reason = self._context.target.find_landing(document.intended), None
        if commit is None:
            commit, reason = await self._landed_by_others(document), _LANDED_EXTERNALLY
        if commit is None:
            return False
        facts = {"landed": commit, "reason": reason, "external": reason is not None}
        try:
            await self._ledger.change(task, Trigger.ADOPT, facts, landed=commit, reason=reason, branch=None)
        except (ClaimLost, VersionConflict):  # another orchestrator was quicker
            return False
        return True

    async def _landed_by_others(self, document: TaskDocument) -> str | None:
        """Return the commit of the target that has what a task built, though not by a recorded merge."""
        tip, built = self._context.target.known, document.commit
        if document.status not in _BUILT or built is None or tip is None:
            return None
        git = self._context.git
        if await self._context.target.contains(built):
            # Not in one call: with --first-parent, --ancestry-path misses what came in by a second parent.
            after = set((await git.line("rev-list", "--ancestry-path", f"{built}..{tip}")).split("\n"))
            line = (await git.line("rev-list", "--first-parent", f"{built}..{tip}")).split("\n")
            return next((commit for commit in reversed(line) if commit and commit in after), built)
        tree, conflicts = await git.merge_tree(tip, built)
        if not conflicts and tree == await git.line("rev-parse", f"{tip}^{{tree}}"):
            return tip  # squashed, or made anew
        return None
