"""Keep built work that is stacked on the unlanded work of other tasks up to date, until it may land."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Final

from orchestrator.domain.events.tasks import TaskRebased, TaskWithdrawn
from orchestrator.domain.runs.model import RebasedWork, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus, Trigger
from orchestrator.domain.scheduling.stacked_work import StackState, StackVerdict, judge_stack
from orchestrator.engine.landing.outcomes import LandingOutcomes
from orchestrator.engine.phases.base_selection import BaseSelector, StackedBase
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import ClaimLost, GitError, RefusedError
from orchestrator.repo.landing.merge_commits import commit_conflict, rebase_work
from orchestrator.repo.landing.target_branch import MergeConflict
from orchestrator.repo.worktrees.hub import internal_ref_name
from orchestrator.system.failpoints import failpoint

_UNSETTLED: Final = frozenset({StackState.OUTDATED, StackState.ABANDONED})


class StackedWork:
    """The built tasks of one run whose work is based on the unlanded work of other tasks."""

    def __init__(
        self,
        ledger: Ledger,
        context: RunContext,
        bases: BaseSelector,
        outcomes: LandingOutcomes,
        blocked: Mapping[str, str],
    ) -> None:
        """Create the collection; `blocked` has the tasks of the run that can no longer start."""
        self._ledger, self._git, self._bases, self._outcomes = ledger, context.git, bases, outcomes
        self._branch, self._blocked = context.target.branch, blocked
        self._postponed: dict[str, tuple[TaskDocument, ...]] = {}
        """Tasks that can't be rebased yet, with the states of the tasks that they are stacked on."""

    def judge(self, task: str, ahead: Container[str] = ()) -> StackVerdict:
        """Return the state of a built task, if the tasks that are `ahead` land first."""
        stack = self._ledger.task(task).stack
        verdict = judge_stack(stack, self._ledger.tasks.documents(), self._blocked, ahead)
        if verdict.state is StackState.OUTDATED and self._postponed.get(task) == self._needs(stack):
            return StackVerdict(StackState.WAITS, verdict.need)
        return verdict

    def is_ready(self, task: str, ahead: Container[str] = ()) -> bool:
        """Return whether a built task may land after those that are `ahead`."""
        return self.judge(task, ahead).state is StackState.READY

    def is_unsettled(self, task: str) -> bool:
        """Return whether `settle` has to change a task before it can land."""
        return self._ledger.task(task).status is TaskStatus.QUEUED and self.judge(task).state in _UNSETTLED

    def _needs(self, stack: Mapping[str, str]) -> tuple[TaskDocument, ...]:
        return tuple(self._ledger.task(need) for need in stack)

    async def settle(self, tasks: Iterable[str]) -> tuple[list[str], list[str]]:
        """Rebase queued tasks onto work that has changed, or let them wait for a task that has ended.

        Return those that are still queued, and the others, without those that another orchestrator owns.
        """
        settled, others = list[str](), list[str]()
        for task in tasks:
            is_queued = False
            try:
                await self._settle(task)
                is_queued = self._ledger.task(task).status is TaskStatus.QUEUED
            except ClaimLost:
                continue
            except (GitError, RefusedError) as error:
                await self._outcomes.postpone(task, str(error))
            (settled if is_queued else others).append(task)
        return settled, others

    async def _settle(self, task: str) -> None:
        verdict = self.judge(task)
        match verdict.state:
            case StackState.ABANDONED:
                await self._withdraw(task, verdict.need)
            case StackState.OUTDATED:
                await self._rebase(task, verdict.need)

    async def _withdraw(self, task: str, need: str) -> None:
        """Let a task wait like one whose need did not land; once that is built again, its work is queued again."""
        branch, reason = self._ledger.work_branch(task), f"it is built on the work of {need}, which did not land"
        event = TaskWithdrawn(reason=reason, branch=branch)
        await self._ledger.change(task, Trigger.WITHDRAW, event, reason=reason, branch=branch)
        failpoint("stack.withdrawn")

    async def _rebase(self, task: str, need: str) -> None:
        document, spec = self._ledger.task(task), await self._ledger.definitions.spec(task)
        tip = await self._bases.newest(builds_on_target=True)
        onto = await self._bases.stack(task, spec.built_needs, tip)
        if onto is None:  # its needs conflict; at most one of them lands without a change
            self._postponed[task] = self._needs(document.stack)
        elif document.commit is not None:
            await self._rebase_onto(task, need, document.commit, onto)

    async def _rebase_onto(self, task: str, need: str, work: str, onto: StackedBase) -> None:
        run, document = self._ledger.run.id, self._ledger.task(task)
        branch = f"refs/heads/{self._ledger.work_branch(task)}"
        await self._ledger.fetch_work(task, work, branch)
        # A checkpoint may restore the earlier work.
        await self._git("update-ref", internal_ref_name(run, f"rebased/{task}/{work}"), work)
        rebased = await rebase_work(self._git, document.built_base, work, onto.base, branch)
        if not isinstance(rebased, str):
            sides = (self._branch, rebased.ours), (f"{run}/{task}", work)
            conflict = MergeConflict(rebased.paths, await commit_conflict(self._git, *sides, onto.base))
            what = f"conflict with the new work of {need}"
            await self._outcomes.rejections.conflict(task, conflict, what, may_resolve=False)
            return
        failpoint("stack.rebased")
        record = RebasedWork(commit=rebased, base=onto.base, stacked_on=dict(onto.stacked_on))
        event = TaskRebased(commit=rebased, base=onto.base, need=need)
        await self._ledger.change(task, Trigger.REBASE, event, commit=rebased, rebased=record, reason=None)
        failpoint("stack.recorded")
