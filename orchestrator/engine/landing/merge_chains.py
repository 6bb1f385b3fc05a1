"""Merge the work of several tasks, each onto the merge of the previous one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.engine.landing.outcomes import LandingOutcomes
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError, RefusedError
from orchestrator.locking.merge_lease import HeldMergeLease
from orchestrator.repo.landing.target_branch import Target

#: Errors of the target or of one task's work; the task keeps its position.
LANDING_ERRORS = (GitError, RefusedError)


class MergeChains:
    """Prepares the chains of merges that the tasks of one run land as."""

    def __init__(self, ledger: Ledger, target: Target, outcomes: LandingOutcomes) -> None:
        self._ledger, self._target, self._outcomes = ledger, target, outcomes

    async def prepare(self, lease: HeldMergeLease, tasks: Sequence[str]) -> tuple[dict[str, PreparedMerge], list[str]]:
        """Merge tasks, each onto the previous one.

        Return the merges, and the tasks left for another round.
        """
        merges: dict[str, PreparedMerge] = {}
        last: PreparedMerge | None = None
        for index, task in enumerate(tasks):
            document = self._ledger.task(task)
            commit, base = document.commit or "", document.building_attempt.base
            try:
                result = await self._target.prepare(
                    lease, f"{self._ledger.run.id}/{task}", commit, base, last, document.intended_merges
                )
            except LANDING_ERRORS as error:
                if merges:
                    return merges, list(tasks[index:])
                if not await self._is_reachable():
                    raise
                await self._outcomes.postpone(task, str(error))
                continue
            if isinstance(result, PreparedMerge):
                merges[task] = last = result
            elif merges:
                return merges, list(tasks[index:])
            else:
                await self._outcomes.record_without_merge(task, result)
        return merges, []

    async def _is_reachable(self) -> bool:
        try:
            await self._target.refresh()
        except GitError:
            return False
        return True

    async def join(self, lease: HeldMergeLease, merges: Mapping[str, PreparedMerge]) -> Mapping[str, PreparedMerge]:
        """Return the merges to move the target to; checked batches land as one merge."""
        run = self._ledger.run
        if len(merges) == 1 or not run.merge.check_every_commit:
            return merges
        if not (await self._ledger.definitions.spec(next(iter(merges)))).checks:
            return merges
        labels = [f"{run.id}/{task}" for task in merges]
        joined = await self._target.join(lease, labels, list(merges.values()))
        return dict.fromkeys(merges, joined)
