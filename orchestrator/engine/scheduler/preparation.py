"""Prepare the next attempts of tasks, and fail tasks that may have no further session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from orchestrator.domain.events.tasks import TaskFailed
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.scheduling.claims import ClaimVerdict, should_try
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.engine.landing.base_selection import BaseSelector
from orchestrator.engine.phases.start import PhaseStarter
from orchestrator.engine.scheduler.active_attempts import ActiveAttempt, AttemptEnd
from orchestrator.engine.scheduler.attempts import AttemptRunner
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import ClaimLost, HandoffCorrupted, RefusedError, VersionConflict


class AttemptPreparer:
    """Prepares the attempts of the tasks that the board starts."""

    def __init__(
        self,
        ledger: Ledger,
        local: LocalWork,
        budgets: Budgets,
        phase_starter: PhaseStarter,
        base_selector: BaseSelector,
        attempts: AttemptRunner,
        apply_end: Callable[[str, AttemptEnd | None], Awaitable[None]],
    ) -> None:
        """Prepare attempts; `apply_end` applies the end of a task that needs no further session."""
        self._ledger, self._local, self._budgets = ledger, local, budgets
        self._phase_starter, self._base_selector, self._attempts = phase_starter, base_selector, attempts
        self._apply_end = apply_end

    async def prepare(self, task: str, tips: dict[bool, str]) -> ActiveAttempt | None:
        """Return the next attempt of a task; None if the task may no longer start.

        `tips` caches commits for tasks that start together.
        """
        spec = await self._ledger.definitions.spec(task)
        if self._budgets.is_halted():
            return None
        if (merged := self._ledger.run.merges) is not None:  # its work is built already
            reason = f"a merge run starts no session: `council merge {merged}` merges again"
            await self._refuse(task, Failed(FailureClass.INVALID, reason))
            return None
        if self._local.has_open_subtasks(task):  # subtasks that another process created
            await self._ledger.tasks.load_new()
            self._local.show(task)
            self._local.wake()
            return None
        obstacle = self._budgets.find_obstacle(task, spec) or await self._check_retry_limit(task)
        if obstacle is not None:
            await self._refuse(task, obstacle)
            return None
        try:
            next_phase = await self._phase_starter.next_phase(task, spec)
            if isinstance(next_phase, TaskUpdate):
                await self._apply_end(task, AttemptEnd() if await self._attempts.finish(task, next_phase) else None)
                self._local.wake()  # dependent tasks may start
                return None
            next_phase = await self._base_selector.select(task, spec, next_phase, tips)
            if not self._local.board.is_running(task):  # cancelled in the meantime
                return None
            return await self._attempts.prepare(task, spec, next_phase, self._local.board.adapter_of(task))
        except (
            RefusedError,
            HandoffCorrupted,
        ) as error:  # an invalid template, condition or handoff
            await self._refuse(task, Failed(FailureClass.INVALID, str(error)))
            return None

    async def _check_retry_limit(self, task: str) -> Failed | None:
        """Return why a task has no retries left, counting its own attempts and takeovers."""
        claims, timing = self._ledger.claims, self._ledger.orchestrators.timing
        if claims is None:
            return None
        claim = await claims.read(task)
        if claim is None or should_try(claim, None, timing, ignored=None) is not ClaimVerdict.TRIED_OUT:
            return None
        reason = f"tried {claim.retries + 1} times, some of them by orchestrators that exited before its end"
        return Failed(FailureClass.CRASHED, f"{reason}: find out why they exited, then `council retry {task}`")

    async def _refuse(self, task: str, failure: Failed) -> None:
        """Fail a task that may have no further session."""
        failed = TaskFailed(outcome=failure.failure, reason=failure.reason)
        try:
            await self._ledger.change(task, Trigger.FAIL, failed, reason=failure.reason, refused=failure.failure)
        except (ClaimLost, VersionConflict):  # another orchestrator was first
            await self._ledger.tasks.refresh(task)
            self._local.sync_task(task)
        else:
            self._local.board.ended(task)
        self._local.wake()
