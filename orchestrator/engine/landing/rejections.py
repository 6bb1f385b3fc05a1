"""Reject built work that can't land: retry its task, or end it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.domain.events.base import TaskEvent
from orchestrator.domain.events.tasks import TaskRequeued
from orchestrator.domain.runs.check_results import CheckRecord, attribute_checks
from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.runs.retry import decide_retry
from orchestrator.domain.runs.statuses import TaskStatus, Trigger
from orchestrator.domain.security.quoting import DATA_NOTICE, quote_block
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.routing import restart_task, restart_work
from orchestrator.engine.landing.ownership_check import OwnershipCheck, OwnershipViolation
from orchestrator.engine.phases.conflict_resolution import ConflictResolutions, resolves_conflict
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.merge_commits import create_retry_base
from orchestrator.repo.landing.target_branch import MergeConflict
from orchestrator.repo.worktrees.hub import internal_ref_name, work_branch_name
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.system.failpoints import failpoint

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


class Rejections:
    """Rejects the work of tasks of one run."""

    def __init__(self, ledger: Ledger, git: Git, ownership: OwnershipCheck) -> None:
        self._ledger, self._git, self._ownership = ledger, git, ownership
        self.resolutions = ConflictResolutions(ledger, git)

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
            await self._ledger.change(task, Trigger.REQUEUE, TaskRequeued(reason=reason), reason=reason)
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
