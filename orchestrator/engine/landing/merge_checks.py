"""Decide if a merge may land, by its paths, the locks of sessions, and its checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from orchestrator.domain.events.tasks import TaskChecking
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.runs.statuses import TaskStatus, Trigger
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.landing.base_checks import describe_check_fix
from orchestrator.engine.landing.base_commands import BaseCommands
from orchestrator.engine.landing.outcomes import LandingOutcomes
from orchestrator.engine.landing.ownership_check import OwnershipCheck
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.sessions.setup.checks import CheckResult, CheckRunner, ChecksNotRun, ChecksPassed
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.system.failpoints import failpoint


class MergeChecks:
    """Checks the merges of one run, and records the reasons for rejections."""

    def __init__(
        self,
        ledger: Ledger,
        context: RunContext,
        pool: SlotPool,
        ownership: OwnershipCheck,
        outcomes: LandingOutcomes,
        base_commands: BaseCommands,
        give_up: Callable[[str], None],
    ) -> None:
        """Create the checks; `give_up` ends the run with a reason if they can't run."""
        self._ledger, self._context, self._pool = ledger, context, pool
        self._ownership, self._outcomes, self._base_commands = ownership, outcomes, base_commands
        self._give_up = give_up
        self._running: CheckRunner | None = None
        self._passed: set[tuple[str, str]] = set()
        """The trees that passed the checks of each task: a new merge with the same tree is not checked again."""

    def stop(self) -> None:
        """Stop running checks."""
        if self._running is not None:
            self._running.stop()

    async def pass_merge(self, task: str, merge: PreparedMerge) -> bool:
        """Return True if a merge passes its checks and nothing blocks it.

        Otherwise the reason is recorded.
        """
        spec = await self._ledger.definitions.spec(task)
        if (violation := await self._ownership.find_violation(task, spec, merge)) is not None:
            await self._outcomes.reject_for_ownership(task, spec, merge, violation)
            return False
        if await self._is_locked(task, merge):
            return False
        if not spec.checks:
            return True
        tree = await self._context.git.line("rev-parse", f"{merge.new}^{{tree}}")
        if (task, tree) in self._passed:
            return True
        return await self._check(task, spec, merge, tree) and not await self._is_locked(task, merge)

    async def _is_locked(self, task: str, merge: PreparedMerge) -> bool:
        """Return True if another session has locked a path that a merge changes.

        The merge lands once that session ends or unlocks the path.
        """
        reason = await self._ownership.locked(task, merge)
        if reason is not None and self._ledger.task(task).status is TaskStatus.CHECKING:
            await self._outcomes.requeue(task, reason)
        elif reason is not None:
            await self._outcomes.defer(task, reason)
        return reason is not None

    async def _check(self, task: str, spec: TaskSpec, merge: PreparedMerge, tree: str) -> bool:
        await self._ledger.change(task, Trigger.CHECK, TaskChecking(merge=merge.new))
        failpoint("landing.checking")
        result, unrunnable = await self._run(task, spec, merge)
        match result:
            case ChecksPassed():
                failpoint("landing.checked")
                self._passed.add((task, tree))
            case CommandFailed() if unrunnable is not None:
                await self._outcomes.requeue(task, HaltReason.parse(unrunnable).headline)
                self._give_up(unrunnable)
                return False
            case CommandFailed():
                await self._outcomes.bounce(task, spec, merge, result)
                return False
            case ChecksNotRun(reason):
                await self._outcomes.requeue(task, reason)
                return False
            case _:
                assert_never(result)
        # The target may have become blocked during the checks.
        if (obstacle := await self._context.target.find_obstacle(merge)) is not None:
            await self._outcomes.requeue(task, obstacle)
        return obstacle is None

    async def _run(self, task: str, spec: TaskSpec, merge: PreparedMerge) -> tuple[CheckResult, str | None]:
        """Return a merge's check results, and the reason if a failed check can never run."""
        run, builder = self._ledger.run, self._ledger.task(task).building_attempt
        runner = self._running = self._context.checks(self._pool, run.id, task, builder.number, spec)
        base, unrunnable = merge.old or builder.base, None
        try:
            result = await runner.run(merge.new, base)
            if isinstance(result, CommandFailed):
                unrunnable = await self._base_commands.explain_unrunnable(
                    task, spec, spec.checks, result, base, describe_check_fix(run, [spec], is_built=True)
                )
        finally:
            self._running = None
        return result, unrunnable
