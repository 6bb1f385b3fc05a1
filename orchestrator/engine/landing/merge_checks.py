"""Decide if merges may land, by their paths, the locks of sessions, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from orchestrator.domain.events.tasks import TaskChecking
from orchestrator.domain.runs.check_results import CheckRecord
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.runs.statuses import TaskStatus, Trigger
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.checks.base_checks import describe_check_fix
from orchestrator.engine.checks.base_commands import BaseCommands
from orchestrator.engine.checks.check_runs import CheckedTree, CheckRequest
from orchestrator.engine.landing.outcomes import LandingOutcomes
from orchestrator.engine.landing.ownership_check import OwnershipCheck, OwnershipViolation
from orchestrator.engine.phases.conflict_resolution import resolves_conflict
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.sessions.setup.checks import CHECKS_STOPPED, ChecksNotRun, ChecksPassed
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.system.failpoints import failpoint

_NOT_REACHED = "a check fails on the merge with the tasks before it"


@dataclass(frozen=True, slots=True)
class CheckedMerges:
    """How many merges, from the first, may land, and the other tasks to check again now."""

    passed: int
    again: Sequence[str] = ()
    culprit: str | None = None
    """A task that has failed only together with the tasks before it."""
    records: Sequence[CheckRecord] = ()
    """The results of the checks on the last merge that may land."""


class MergeChecks:
    """Checks the merges of one run, and records the reasons for rejections."""

    def __init__(
        self,
        ledger: Ledger,
        context: RunContext,
        ownership: OwnershipCheck,
        outcomes: LandingOutcomes,
        base_commands: BaseCommands,
        give_up: Callable[[str], None],
    ) -> None:
        """Create the checks; `give_up` ends the run with a reason if they can't run."""
        self._ledger, self._context = ledger, context
        self._ownership, self._outcomes, self._base_commands = ownership, outcomes, base_commands
        self.runs = base_commands.runs
        self._give_up = give_up

    async def judged_alone(self, merges: Mapping[str, PreparedMerge]) -> list[str]:
        """Return the tasks of a chain from the first one that may be sent back, but not if it is the first of all.

        Another attempt would start from the unlanded merges before it, which may never land.
        """
        for index, (task, merge) in enumerate(merges.items()):
            if index and (self._is_resolution(task, merge) or await self._find_violation(task, merge) is not None):
                return list(merges)[index:]
        return []

    def _is_resolution(self, task: str, merge: PreparedMerge) -> bool:
        return bool(merge.resolved_by) or resolves_conflict(self._ledger.task(task))

    async def _find_violation(self, task: str, merge: PreparedMerge) -> OwnershipViolation | None:
        return await self._ownership.find_violation(task, await self._ledger.definitions.spec(task), merge)

    async def is_allowed(self, task: str, merge: PreparedMerge) -> bool:
        """Return True if a task may land its paths now; otherwise the reason is recorded."""
        spec = await self._ledger.definitions.spec(task)
        # First: other rejections let a session continue this work.
        if self._is_resolution(task, merge) and not await self._is_verified(task, spec, merge):
            return False
        if (violation := await self._find_violation(task, merge)) is not None:
            await self._outcomes.rejections.reject_for_ownership(task, spec, merge, violation)
            return False
        return not await self._is_locked(task, merge)

    async def _is_verified(self, task: str, spec: TaskSpec, merge: PreparedMerge) -> bool:
        """Return True if a conflict resolution has both sides and passes the checks of the other tasks."""
        resolutions, document = self._outcomes.rejections.resolutions, self._ledger.task(task)
        attempt = document.building_attempt
        problem = None if merge.resolved_by else await resolutions.find_problem(task)
        if problem is None and (checks := await resolutions.other_checks(task, spec, merge)):
            base = merge.old or document.built_base
            request = await self.runs.request(task, attempt.number, spec, checks, merge.new, base, "conflict")
            match (await self.runs.run(request, confirm=True)).result:
                case CommandFailed() as failed:
                    problem = failed.describe("on the merged tree")
                case ChecksNotRun(reason):
                    await self._outcomes.defer(task, reason)
                    return False
        if problem is not None and merge.resolved_by:  # a session may do better
            label, base = f"{self._ledger.run.id}/{task}", document.built_base
            onto = await self._context.git.line("rev-parse", first_parent(merge))
            conflict = await self._context.target.preserve_conflict(label, document.commit or "", base, onto)
            await self._outcomes.rejections.conflict(task, conflict)
        elif problem is not None:
            await self._outcomes.rejections.refuse_resolution(task, problem)
        return problem is None

    async def request(self, task: str, merge: PreparedMerge, since: str) -> CheckRequest | None:
        """Return the request for the checks of a task on a merge; None if it has no checks.

        `since` is the commit on the target that the merge, or its whole batch, lands on: the changes between the two
        select the checks. The request has no checks if the changes select none.
        """
        spec = await self._ledger.definitions.spec(task)
        return await self._request(task, spec, merge, since) if spec.checks else None

    async def _request(self, task: str, spec: TaskSpec, merge: PreparedMerge, since: str) -> CheckRequest:
        builder, checks = self._ledger.task(task).building_attempt, spec.checks
        if any(check.paths for check in checks):
            changed = [change.path for change in await self._context.git.changes(since, merge.new)]
            checks = tuple(check for check in checks if check.is_selected(changed))
        request = await self.runs.request(task, builder.number, spec, checks, merge.new, merge.old or builder.base)
        return replace(request, skipped=tuple(check for check in spec.checks if check not in checks))

    async def check(
        self, merges: Mapping[str, PreparedMerge], whole: CheckRequest, search: Callable[[], None]
    ) -> CheckedMerges:
        """Check consecutive merges, whose tasks have the same checks; `whole` is the request for the last one.

        If the last merge fails them, `search` is called, and the first failing merge is located: its task and later
        ones are queued again. The failure of a single merge is recorded as its outcome.
        """
        tasks = list(merges)
        if not await self.runs.has_passed(whole):
            checking = {
                task: TaskUpdate(Trigger.CHECK, TaskChecking(merge=merge.new), {}) for task, merge in merges.items()
            }
            await self._ledger.change_all(checking)
            failpoint("landing.checking")
        checked = await (self._search_failure(merges, whole, search) if len(tasks) > 1 else self._check_single(whole))
        leading = tasks[: checked.passed]
        if leading and (reason := await self._find_obstacle(merges, leading)) is not None:
            await self.requeue(leading, reason)
            return CheckedMerges(0, [*leading, *checked.again] if len(tasks) > 1 else ())
        return checked

    async def _search_failure(
        self, merges: Mapping[str, PreparedMerge], whole: CheckRequest, search: Callable[[], None]
    ) -> CheckedMerges:
        """Find the leading merges that pass: all, or those before the first that fails."""
        tasks = list(merges)
        passed, failed = 0, len(tasks)
        position, records = failed, tuple[CheckRecord, ...]()
        while passed < failed:
            task = tasks[position - 1]
            request = whole
            if task != whole.task:
                request = await self._request(task, whole.spec, merges[task], first_parent(merges[tasks[0]]))
            checked = await self.runs.run(request)
            match checked.result:
                case ChecksPassed():
                    failpoint("landing.checked")
                    passed, records = position, (*checked.records, *self.runs.describe_skipped(request))
                case CommandFailed():
                    search()  # later merges contain the failure: their checks have no use
                    failed = position - 1
                case ChecksNotRun(reason) as result:
                    await self.requeue(tasks[passed:], reason)
                    # Other reasons, such as a full disk, may persist: these tasks wait like a single one.
                    again = tasks[passed:] if result is CHECKS_STOPPED else ()
                    return CheckedMerges(passed, again, records=records)
            position = (passed + failed + 1) // 2
        await self.requeue(tasks[passed:], _NOT_REACHED)
        return CheckedMerges(passed, tasks[passed:], next(iter(tasks[passed:]), None), records)

    async def _check_single(self, request: CheckRequest) -> CheckedMerges:
        task, spec = request.task, request.spec
        (result, records), unrunnable = await self._run(request)
        records = (*records, *self.runs.describe_skipped(request))
        match result:
            case ChecksPassed():
                failpoint("landing.checked")
                return CheckedMerges(1, records=records)
            case CommandFailed() if unrunnable is not None:
                await self.requeue([task], HaltReason.parse(unrunnable).headline)
                self._give_up(unrunnable)
            case CommandFailed():
                await self._outcomes.rejections.bounce(task, spec, request.commit, result, records)
            case ChecksNotRun(reason):
                await self.requeue([task], reason)
            case _:
                assert_never(result)
        return CheckedMerges(0)

    async def _run(self, request: CheckRequest) -> tuple[CheckedTree, str | None]:
        """Return a merge's check results, and the reason if a failed check can never run."""
        task, spec = request.task, request.spec
        checked, unrunnable = await self.runs.run(request, confirm=True), None
        if isinstance(result := checked.result, CommandFailed):
            correction = describe_check_fix(self._ledger.run, [spec], is_built=True)
            unrunnable = await self._base_commands.explain_unrunnable(
                task, spec, tuple(check.run for check in request.key.checks), result, request.base, correction
            )
        return checked, unrunnable

    async def _find_obstacle(self, merges: Mapping[str, PreparedMerge], tasks: list[str]) -> str | None:
        """Return the obstacle to landing checked merges that appeared during the checks, or None."""
        for task in tasks:
            if (reason := await self._ownership.locked(task, merges[task])) is not None:
                return reason
        whole = PreparedMerge(old=merges[tasks[0]].old, new=merges[tasks[-1]].new)
        return await self._context.target.find_obstacle(whole)

    async def requeue(self, tasks: Sequence[str], reason: str) -> None:
        """Return tasks that are queued or being checked to the queue, with the reason."""
        for task in tasks:
            if self._ledger.task(task).status is TaskStatus.CHECKING:
                await self._outcomes.requeue(task, reason)
            else:
                await self._outcomes.defer(task, reason)

    async def _is_locked(self, task: str, merge: PreparedMerge) -> bool:
        """Return True if another session has locked a path that a merge changes.

        The merge lands once that session ends or unlocks the path.
        """
        if (reason := await self._ownership.locked(task, merge)) is not None:
            await self._outcomes.defer(task, reason)
        return reason is not None


def first_parent(merge: PreparedMerge) -> str:
    """Return the revision that a merge is made onto."""
    return f"{merge.new}^1"
