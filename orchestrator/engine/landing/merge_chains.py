"""Merge the work of several tasks, each onto the merge of the previous one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.wording import join_names
from orchestrator.engine.landing.outcomes import LandingOutcomes
from orchestrator.engine.landing.stacked_work import StackedWork
from orchestrator.engine.phases.conflict_resolution import may_merge_structurally
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError, RefusedError
from orchestrator.locking.merge_lease import HeldMergeLease
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.merge_commits import commit_merge
from orchestrator.repo.landing.target_branch import TASK_TRAILER, Target, combine_merges
from orchestrator.system.failpoints import failpoint

#: Errors of the target or of one task's work; the task keeps its position.
LANDING_ERRORS = (GitError, RefusedError)
#: The largest number of tasks in the first line of a merge.
_MAX_NAMED_TASKS = 4


class MergeChains:
    """Prepares the chains of merges that the tasks of one run land as."""

    def __init__(
        self, ledger: Ledger, target: Target, git: Git, outcomes: LandingOutcomes, stacked: StackedWork
    ) -> None:
        self._ledger, self._target, self._git, self._outcomes = ledger, target, git, outcomes
        self._stacked = stacked

    async def prepare(self, lease: HeldMergeLease, tasks: Sequence[str]) -> tuple[dict[str, PreparedMerge], list[str]]:
        """Merge tasks, each onto the previous one.

        Return the merges, and the tasks left for another round.
        """
        merges: dict[str, PreparedMerge] = {}
        last: PreparedMerge | None = None
        behind: list[str] = []
        for index, task in enumerate(tasks):
            if not self._stacked.is_ready(task, merges):  # a task whose work it has is not in the chain
                behind.append(task)
                continue
            document = self._ledger.task(task)
            commit, base = document.commit or "", document.built_base
            resolve = may_merge_structurally(document, await self._ledger.definitions.spec(task))
            label, intended = f"{self._ledger.run.id}/{task}", document.intended_merges
            try:
                await self._ledger.fetch_work(task, commit, f"refs/heads/{self._ledger.work_branch(task)}")
                result = await self._target.prepare(lease, label, commit, base, last, intended, resolve=resolve)
            except LANDING_ERRORS as error:
                if merges:
                    return merges, [*behind, *tasks[index:]]
                if not await self._is_reachable():
                    raise
                await self._outcomes.postpone(task, str(error))
                continue
            if isinstance(result, PreparedMerge):
                merges[task] = last = result
            elif merges:
                return merges, [*behind, *tasks[index:]]
            else:
                await self._outcomes.record_without_merge(task, result)
        return merges, behind

    async def _is_reachable(self) -> bool:
        try:
            await self._target.refresh()
        except GitError:
            return False
        return True

    async def join(self, merges: Mapping[str, PreparedMerge]) -> Mapping[str, PreparedMerge]:
        """Return the merges to move the target to: checked batches land as one merge with the tree of the last one.

        The first-parent history of the target then has no commit that was not checked itself.
        """
        run = self._ledger.run
        if len(merges) == 1 or not run.merge.check_every_commit:
            return merges
        if not (await self._ledger.definitions.spec(next(iter(merges)))).checks:
            return merges
        whole = combine_merges(merges.values())
        trailers = "".join(f"{TASK_TRAILER}: {run.id}/{task}\n" for task in merges)
        message = f"Land {len(merges)} tasks: {join_names(merges, _MAX_NAMED_TASKS)}\n\n{trailers}"
        tree = await self._git.line("rev-parse", f"{whole.new}^{{tree}}")
        new = await commit_merge(self._git, tree, whole.old or run.start, whole.new, message)
        failpoint("landing.joined")
        return dict.fromkeys(merges, PreparedMerge(old=whole.old, new=new))
