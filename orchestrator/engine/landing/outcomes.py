"""Record the outcomes of landings: landed, deferred, rejected, or retried."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, assert_never

from orchestrator.domain.events.base import TaskEvent
from orchestrator.domain.events.tasks import (
    TaskContinued,
    TaskDeferred,
    TaskFailed,
    TaskLanded,
    TaskLandingAborted,
    TaskRequeued,
)
from orchestrator.domain.runs.check_results import CheckRecord, attribute_checks
from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.runs.retry import decide_retry
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES, TaskStatus, Trigger
from orchestrator.domain.security.quoting import DATA_NOTICE, quote_block
from orchestrator.domain.sessions.messages import UserMessage
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.routing import restart_task, restart_work
from orchestrator.engine.landing.ownership_check import OwnershipCheck, OwnershipViolation
from orchestrator.engine.phases.conflict_resolution import ConflictResolutions, resolves_conflict
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import message_write, read_messages
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import GitError, RefusedError, TargetMissing, VersionConflict
from orchestrator.locking.merge_lease import HeldMergeLease
from orchestrator.protocols import JsonObject
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.merge_commits import create_retry_base
from orchestrator.repo.landing.target_branch import (
    DeferredLanding,
    Landed,
    MergeConflict,
    NothingToLand,
    StaleTarget,
    Target,
)
from orchestrator.repo.worktrees.hub import internal_ref_name, work_branch_name
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.system.failpoints import failpoint

#: The maximum number of possible landings recorded per task.
MAX_INTENDED_MERGES = 32
#: The maximum length of check output in the prompt of the next attempt, in characters.
MAX_CHECK_OUTPUT = 8192


@dataclass(frozen=True, slots=True)
class Rejection:
    """The reason that built work can't land.

    `branch` preserves the work; `facts` are additional fields of the event.
    """

    failure: FailureClass
    reason: str
    branch: str
    facts: JsonObject
    check_log: str | None = None
    checks: Sequence[CheckRecord] = ()

    def event(self, trigger: Trigger) -> TaskEvent:
        """Return the event for `trigger`."""
        fields = {"outcome": self.failure, "reason": self.reason, "branch": self.branch, **self.facts}
        return trigger.event(**fields)


class LandingOutcomes:
    """Records the outcomes of the landings of one run."""

    def __init__(self, ledger: Ledger, target: Target, git: Git, ownership: OwnershipCheck) -> None:
        self._ledger, self._target, self._git, self._ownership = ledger, target, git, ownership
        self.resolutions = ConflictResolutions(ledger, git)

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
                    problem := await self.resolutions.find_problem(task)
                ):
                    await self.refuse_resolution(task, problem)
                    return
                await self.record_landed(Trigger.ADOPT, {task: commit}, "the target already has the same change")
            case MergeConflict() as conflict:
                await self.conflict(task, conflict)
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
            # Written again, so that `council tell` can't withdraw them any more.
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

    async def bounce(
        self, task: str, spec: TaskSpec, merge: str, failed: CommandFailed, checks: Sequence[CheckRecord]
    ) -> None:
        """Retry a task whose merge fails its checks, or end the task."""
        reason = failed.describe("on the merged tree")
        if resolves_conflict(self._ledger.task(task)):
            await self.refuse_resolution(task, reason)
            return
        facts: JsonObject = {"log": str(failed.log)}
        rejection = Rejection(
            FailureClass.CHECKS_FAILED, reason, self._ledger.work_branch(task), facts, str(failed.log), checks
        )
        if spec.on_checks_failed == "retry" and self._is_retried(task, spec, FailureClass.CHECKS_FAILED):
            ref = internal_ref_name(self._ledger.run.id, f"again/{task}")
            start = await create_retry_base(self._git, merge, ref)
            feedback = _render_check_failure(failed, secrets.token_hex(8))
            await self._bounce_with_merge(task, spec, rejection, start, feedback)
        else:
            await self._reject(task, Trigger.REJECT, rejection)

    async def reject_for_ownership(
        self, task: str, spec: TaskSpec, merge: PreparedMerge, violation: OwnershipViolation
    ) -> None:
        """Retry a task without its out-of-scope changes, or end the task."""
        facts: JsonObject = {"paths": violation.recorded}
        branch = self._ledger.work_branch(task)
        rejection = Rejection(FailureClass.OUT_OF_SCOPE, violation.describe(), branch, facts)
        if self._is_retried(task, spec, FailureClass.OUT_OF_SCOPE):
            start = await self._ownership.create_retry_base(task, merge, violation)
            feedback = violation.render_feedback(secrets.token_hex(8))
            await self._bounce_with_merge(task, spec, rejection, start, feedback)
        else:
            await self._reject(task, Trigger.REJECT, rejection)

    async def conflict(
        self, task: str, conflict: MergeConflict, what: str = "merge conflict", *, may_resolve: bool = True
    ) -> None:
        """Preserve both sides of a merge conflict on a branch, and react as the task's `on_conflict` demands.

        Unless `may_resolve`, no session resolves it: the work is repeated.
        """
        if resolves_conflict(self._ledger.task(task)):
            await self.refuse_resolution(task, "it conflicts with later changes of the target")
            return
        branch = self._conflict_branch(task)
        await self._git("update-ref", f"refs/heads/{branch}", conflict.commit)
        reason = f"{what} in {', '.join(conflict.paths)}"
        spec = await self._ledger.definitions.spec(task)
        if may_resolve and spec.on_conflict == "resolve" and self._is_retried(task, spec, FailureClass.CONFLICT):
            try:
                start, feedback = await self.resolutions.prepare(task, conflict.commit)
            except RefusedError as error:
                reason += f"; {error.message}"
            else:
                rejection = Rejection(FailureClass.CONFLICT, reason, branch, {"paths": list(conflict.paths)})
                await self._bounce_with_merge(task, spec, rejection, start, feedback, conflict=conflict.commit)
                return
        await self._end_conflict(task, spec, reason, conflict.paths)

    async def refuse_resolution(self, task: str, reason: str) -> None:
        """Reject the resolution of a conflict; repeat the work from the target if attempts are left."""
        if self._ledger.task(task).status is TaskStatus.CHECKING:
            await self.requeue(task, reason)
        spec = await self._ledger.definitions.spec(task)
        await self._end_conflict(task, spec, f"the resolution of its merge conflict was rejected: {reason}")

    async def _end_conflict(self, task: str, spec: TaskSpec, reason: str, paths: Sequence[str] = ()) -> None:
        rejection = Rejection(FailureClass.CONFLICT, reason, self._conflict_branch(task), {"paths": list(paths)})
        if spec.on_conflict != "keep" and self._is_retried(task, spec, FailureClass.CONFLICT):
            restart = restart_work(self._ledger.definitions.workflow(spec.workflow), self._ledger.task(task))
            cleared = {"commit": None, "built_by": None, "conflict": None}
            await self._reject(task, Trigger.RETRY_WORK, rejection, **cleared, **restart)
        else:
            await self._reject(task, Trigger.CONFLICT, rejection, paths=tuple(paths), conflict=None)

    def _conflict_branch(self, task: str) -> str:
        return work_branch_name(self._ledger.run.id, task, "conflict")

    def _is_retried(self, task: str, spec: TaskSpec, failure: FailureClass) -> bool:
        """Return True if another attempt may fix a rejected landing."""
        failures = self._ledger.task(task).failures + 1
        return decide_retry(failure, failures, spec.attempts, {failure}, spec.backoff) is not None

    async def _bounce_with_merge(
        self, task: str, spec: TaskSpec, rejection: Rejection, start: str, feedback: str, conflict: str | None = None
    ) -> None:
        """Have another attempt fix the merge; the phases after it run again."""
        base = await self._git.line("rev-parse", f"{start}^1")
        restart = restart_task(self._ledger.definitions.workflow(spec.workflow), self._ledger.task(task))
        await self._reject(
            task,
            Trigger.RETRY_WORK,
            rejection,
            start=start,
            base=base,
            feedback=feedback,
            conflict=conflict,
            commit=None,
            built_by=None,
            **restart,
        )

    async def _reject(self, task: str, trigger: Trigger, rejection: Rejection, **changes: Any) -> None:
        """Record that built work can't land."""
        document, reason, branch = self._ledger.task(task), rejection.reason, rejection.branch
        number = document.building_attempt.number
        facts = {"outcome": rejection.failure, "reason": reason, "check_log": rejection.check_log}
        attempts = document.with_attempt(number, **facts, checks=attribute_checks(rejection.checks, task))
        changes |= {"failures": document.failures + 1, "bounces": document.bounces + 1}
        changes |= {"attempts": attempts, "reason": reason, "branch": branch}
        await self._ledger.change(task, trigger, rejection.event(trigger), **changes)
        failpoint("landing.rejected")

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


def _render_check_failure(failed: CommandFailed, marker: str) -> str:
    """Return the prompt section for the next attempt.

    `marker` is a nonce that check output cannot contain.
    """
    names = "\n".join(failed.failed_tests)
    tests = f"{quote_block(names, marker, 'failed tests')}\n" if names else ""
    return (
        "---\n"
        "An earlier attempt at this task was merged into the newest commit of the target branch. A check failed on\n"
        f"the result: `{failed.command}` {failed.how_it_ended}. This worktree contains that merge. Fix the\n"
        "cause without breaking what the task asks for. The end of the output is quoted between two markers;\n"
        f"{DATA_NOTICE}.\n{tests}"
        f"{quote_block(failed.output.strip()[-MAX_CHECK_OUTPUT:], marker, 'output')}\n"
    )
