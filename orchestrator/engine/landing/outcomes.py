"""Record the outcomes of landings: landed, deferred, or queued again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import assert_never

from orchestrator.domain.events.tasks import (
    TaskContinued,
    TaskDeferred,
    TaskFailed,
    TaskLanded,
    TaskLandingAborted,
    TaskRequeued,
)
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES, TaskStatus, Trigger
from orchestrator.domain.sessions.messages import UserMessage
from orchestrator.domain.workflow.routing import restart_task
from orchestrator.engine.landing.rejections import Rejections
from orchestrator.engine.phases.conflict_resolution import resolves_conflict
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import message_write, read_messages
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import ClaimLost, GitError, TargetMissing, VersionConflict
from orchestrator.locking.merge_lease import HeldMergeLease
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.target_branch import (
    DeferredLanding,
    Landed,
    MergeConflict,
    NothingToLand,
    StaleTarget,
    Target,
)
from orchestrator.system.failpoints import failpoint

#: The maximum number of possible landings recorded per task.
MAX_INTENDED_MERGES = 32


class LandingOutcomes:
    """Records the outcomes of the landings of one run."""

    def __init__(self, ledger: Ledger, target: Target, git: Git, rejections: Rejections) -> None:
        self._ledger, self._target, self._git, self.rejections = ledger, target, git, rejections

    async def record_landed(self, trigger: Trigger, commits: Mapping[str, str], reason: str | None = None) -> None:
        """Record the commits that landed tasks."""
        landed = {
            task: TaskUpdate(
                trigger,
                TaskLanded(landed=commit, reason=reason),
                {"landed": commit, "landing_intent": None, "reason": reason, "branch": None},
            )
            for task, commit in commits.items()
        }
        await self._ledger.change_all(landed)
        failpoint("landing.recorded")

    async def record_without_merge(
        self, task: str, result: Landed | NothingToLand | MergeConflict | DeferredLanding
    ) -> None:
        """Record the outcome of a task that has no separate merge."""
        match result:
            case Landed(commit):
                await self.record_landed(Trigger.ADOPT, {task: commit})
            case NothingToLand(commit):
                # A resolution may have dropped all changes of its task.
                if resolves_conflict(self._ledger.task(task)) and (
                    problem := await self.rejections.resolutions.find_problem(task)
                ):
                    await self.rejections.refuse_resolution(task, problem)
                    return
                await self.record_landed(Trigger.ADOPT, {task: commit}, "the target already has the same change")
            case MergeConflict() as conflict:
                await self.rejections.conflict(task, conflict)
            case DeferredLanding(reason):
                await self.defer(task, reason)
            case _:
                assert_never(result)

    async def abort(self, tasks: Iterable[str]) -> None:
        """Record that the target was not updated: the tasks are queued again."""
        await self._ledger.change_all(
            {task: TaskUpdate(Trigger.ABORT_LANDING, TaskLandingAborted(), {"landing_intent": None}) for task in tasks}
        )

    async def defer(self, task: str, reason: str) -> None:
        """Record the reason why a task can't land now."""
        document = self._ledger.task(task)
        if (document.status, document.reason) != (TaskStatus.QUEUED, reason):  # otherwise already recorded
            await self._ledger.change(
                task, Trigger.DEFER, TaskDeferred(reason=reason), landing_intent=None, reason=reason
            )

    async def requeue(self, task: str, reason: str) -> None:
        """Return a task from its checks to the queue, with the reason."""
        await self._ledger.change(task, Trigger.REQUEUE, TaskRequeued(reason=reason), reason=reason)

    async def requeue_claimed(self, tasks: Iterable[str], reason: str) -> list[str]:
        """Return the tasks that this process still owns, without their interrupted checks."""
        claimed = []
        for task in tasks:
            with suppress(ClaimLost):
                if self._ledger.task(task).status is TaskStatus.CHECKING:
                    await self.requeue(task, reason)
                claimed += [task] if self._ledger.task(task).status in CLAIMED_STATUSES else []
        return claimed

    async def postpone(self, task: str, reason: str) -> None:
        """Keep the position of a task that cannot land because of an error.

        A task with a landing intent stays `landing` until the target is reachable.
        """
        match self._ledger.task(task).status:
            case TaskStatus.QUEUED:
                await self.defer(task, reason)
            case TaskStatus.CHECKING:
                await self.requeue(task, reason)
            case TaskStatus.LANDING:
                await self._ledger.writer.note_once(TaskDeferred(task=task, reason=reason), task, reason)

    async def recover_interrupted(self, lease: HeldMergeLease, tasks: Sequence[str]) -> list[str]:
        """Resolve interrupted updates of the target.

        Return the tasks whose update did not happen.
        """
        again = []
        for task in tasks:
            document = self._ledger.task(task)
            intent = document.landing_intent
            assert intent is not None, "a task is landing only by an intent"  # noqa: S101  an invariant of the table
            settled = await self._target.recover(lease, intent, document.intended_merges)
            match settled:
                case Landed(commit):
                    await self.record_landed(Trigger.LAND, {task: commit})
                case DeferredLanding(reason):
                    await self.defer(task, reason)
                case StaleTarget():
                    await self.abort([task])
                    again.append(task)
                case _:
                    assert_never(settled)
            failpoint("recovery.landing_settled")
        return again

    async def verify_landings(self) -> None:
        """Verify that landed commits are still on the target.

        Another user or program may have rewritten the target.
        """
        exists, change = True, "rewritten"
        try:
            await self._target.refresh()
        except TargetMissing:
            if any(status in CLAIMED_STATUSES for status in self._ledger.statuses().values()):
                raise  # the tasks can still land if the target is created again
            exists, change = False, "deleted"
        for task in self._ledger.run.tasks:
            document = self._ledger.task(task)
            if document.landed is None or (exists and await self._target.contains(document.landed)):
                continue
            branch = self._ledger.work_branch(task)
            await self._git("update-ref", f"refs/heads/{branch}", document.commit or document.landed)
            reason = f"commit {document.landed[:10]} is no longer on the target: the target was {change}"
            lost = TaskFailed(reason=reason, branch=branch)
            await self._ledger.change(task, Trigger.DROP, lost, landed=None, branch=branch, reason=reason)

    async def continue_for_messages(self, task: str) -> bool:
        """Continue the work of a queued task if no session has received a message; return whether it continues.

        `council tell` accepts a message only before a task is queued, so none arrives after this.
        """
        run, document = self._ledger.run.id, self._ledger.task(task)
        if document.commit is None:
            return False
        workflow = self._ledger.definitions.workflow((await self._ledger.definitions.spec(task)).workflow)
        changes = {"start": document.commit, "base": document.built_base, "commit": None, "built_by": None}
        changes |= restart_task(workflow, document)
        due = await self._unreceived_messages(task)
        while due:
            # Written again, so that `council tell` can no longer withdraw them.
            writes = [message_write(run, task, message) for message in due]
            update = TaskUpdate(Trigger.CONTINUE_WORK, TaskContinued(), changes, writes)
            try:
                await self._ledger.change_all({task: update})
            except VersionConflict:
                before, due = due, await self._unreceived_messages(task)
                if due == before:
                    raise
            else:
                return True
        return False

    async def _unreceived_messages(self, task: str) -> list[UserMessage]:
        messages = await read_messages(self._ledger.writer.store, self._ledger.run.id, task)
        return [message for message in messages if not message.attempts]

    async def drop_branches(self, tasks: Iterable[str]) -> None:
        """Delete the branches with the work of tasks that have landed."""
        documents = {task: self._ledger.task(task) for task in tasks}
        branches = [
            self._ledger.work_branch(task)
            for task, document in documents.items()
            if document.status is TaskStatus.LANDED and document.commit is not None
        ]
        if branches:
            lines = "".join(f"delete refs/heads/{branch}\n" for branch in branches)
            # The landings are recorded, and a remaining branch does no harm.
            with suppress(GitError):
                await self._git("update-ref", "--stdin", input_=lines.encode())


def add_intended_merge(intended: Sequence[str], merge: str) -> tuple[str, ...]:
    """Return the possible landings of a task, with `merge` added.

    Older merges are known not to have landed; the newest ones cover a late move by another process.
    """
    return (*intended[1 - MAX_INTENDED_MERGES :], merge)
