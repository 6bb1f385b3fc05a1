"""Prepare the next attempts of tasks, and fail tasks that may have no further session."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.domain.events.tasks import TaskFailed
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.scheduling.claims import ClaimVerdict, should_try
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.engine.scheduler.active_attempts import ActiveAttempt
from orchestrator.engine.scheduler.attempts import AttemptRunner
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import ClaimLost, HandoffCorrupted, RefusedError, VersionConflict


@dataclass(frozen=True, slots=True)
class AttemptPreparer:
    """Prepares the attempts of the tasks that the board starts."""

    local: LocalWork
    attempts: AttemptRunner

    async def prepare(self, task: str, tips: dict[bool, str]) -> ActiveAttempt | TaskUpdate | None:
        """Return the next attempt of a task; None if the task may no longer start.

        A task that needs no further session has an update instead, which queues its work to land or marks it done.
        `tips` caches commits for tasks that start together.
        """
        spec = await self.attempts.ledger.definitions.spec(task)
        if self.attempts.budgets.is_halted():
            return None
        if (merged := self.attempts.ledger.run.merges) is not None:  # its work is built already
            reason = f"a merge run starts no session: `council merge {merged}` merges again"
            await self._refuse(task, Failed(FailureClass.INVALID, reason))
            return None
        if self.local.has_open_subtasks(task):  # subtasks that another process created
            await self.attempts.ledger.tasks.load_new()
            self.local.show(task)
            self.local.wake()
            return None
        obstacle = self.attempts.budgets.find_obstacle(task, spec) or await self._check_retry_limit(task)
        if obstacle is not None:
            await self._refuse(task, obstacle)
            return None
        try:
            next_phase = await self.attempts.phase_handlers.starter.next_phase(task, spec)
            if isinstance(next_phase, TaskUpdate):
                return next_phase
            next_phase = await self.attempts.base_selector.select(task, spec, next_phase, tips)
            if not self.local.board.is_running(task):  # cancelled in the meantime
                return None
            return await self.attempts.prepare(task, spec, next_phase, self.local.board.adapter_of(task))
        except (RefusedError, HandoffCorrupted) as error:  # an invalid template, condition or handoff
            await self._refuse(task, Failed(FailureClass.INVALID, str(error)))
            return None

    async def _check_retry_limit(self, task: str) -> Failed | None:
        """Return why a task has no retries left, counting its own attempts and takeovers."""
        claims, timing = self.attempts.ledger.claims, self.attempts.ledger.orchestrators.timing
        if claims is None:
            return None
        claim = await claims.read(task)
        if claim is None or should_try(claim, None, timing, ignored=None) is not ClaimVerdict.TRIED_OUT:
            return None
        reason = f"tried {claim.retries + 1} times, some of them by orchestrators that exited before its end"
        return Failed(FailureClass.CRASHED, f"{reason}: find out why they exited, then `council retry {task}`")

    async def _refuse(self, task: str, failure: Failed) -> None:
        """Fail a task that may have no further session."""
        ledger, failed = self.attempts.ledger, TaskFailed(outcome=failure.failure, reason=failure.reason)
        try:
            await ledger.change(task, Trigger.FAIL, failed, reason=failure.reason, refused=failure.failure)
        except (ClaimLost, VersionConflict):  # another orchestrator was first
            await ledger.tasks.refresh(task)
            self.local.sync_task(task)
        else:
            self.local.board.ended(task)
        self.local.wake()
