"""Record attempt results: complete phases, retry tasks, or end them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import assert_never

from orchestrator.domain.events.base import AttemptEvent, TaskEvent
from orchestrator.domain.events.tasks import (
    TaskAfterRunFailed,
    TaskCancelled,
    TaskChangesDiscarded,
    TaskFailed,
    TaskHostDenied,
    TaskInterrupted,
    TaskNoChange,
    TaskPostponed,
    TaskRetrying,
    TaskSalvaged,
    TaskSessionApiFailed,
    TaskToolsDenied,
    TaskWorktreePreserved,
)
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import INTERRUPTED, PAUSED
from orchestrator.domain.runs.outcome import (
    Built,
    Failed,
    Interrupted,
    Misconfigured,
    Paused,
    ReadOnlySuccess,
    ResourcesExhausted,
)
from orchestrator.domain.runs.retry import decide_retry
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.settings.failures import FailureClass, FailurePolicy, get_failure_policy
from orchestrator.domain.settings.run_settings import Check
from orchestrator.domain.workflow.routing import pause_task
from orchestrator.engine.checks.base_commands import BaseCommands
from orchestrator.engine.phases.completion import PhaseHandlers
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.active_attempts import ActiveAttempt, AttemptEnd
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import HandoffCorrupted, RefusedError
from orchestrator.sessions.session import SessionResult
from orchestrator.sessions.setup.checks import CHECKS_STOPPED, CheckResult, ChecksNotRun, ChecksPassed
from orchestrator.sessions.setup.handoff_file import read_handoff
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.system.failpoints import failpoint

#: The maximum number of discarded paths to record.
_MAX_DISCARDED_PATHS = 100
#: The maximum number of paths in an event.
MAX_EVENT_PATHS = 200


@dataclass(frozen=True, slots=True)
class AttemptRecorder:
    """Records the ends of the attempts of one run."""

    ledger: Ledger
    context: RunContext
    base_commands: BaseCommands
    phase_handlers: PhaseHandlers

    async def record(self, active: ActiveAttempt, finished: SessionResult) -> AttemptEnd:
        """Record an attempt's end; raise ClaimLost if another orchestrator has the task."""
        await self.ledger.require_claim(active.task)
        if active.cancelled:
            return await self._record_cancelled(active, finished)
        outcome = finished.outcome
        match outcome:
            case Built() | ReadOnlySuccess():
                return await self._record_success(active, finished)
            case Interrupted(reason):
                interrupted = TaskInterrupted(outcome=INTERRUPTED, reason=reason)
                await self._end(active, finished, TaskUpdate(Trigger.INTERRUPT, interrupted))
                return AttemptEnd()
            case Paused():
                return await self._record_pause(active, finished, outcome)
            case ResourcesExhausted(reason):
                postponed = TaskPostponed(outcome=INTERRUPTED, reason=reason)
                await self._end(active, finished, TaskUpdate(Trigger.POSTPONE, postponed))
                return AttemptEnd(shortage=reason)
            case Misconfigured(reason):
                postponed = TaskPostponed(outcome=INTERRUPTED, reason=HaltReason.parse(reason).headline)
                await self._end(active, finished, TaskUpdate(Trigger.POSTPONE, postponed))
                return AttemptEnd(unrunnable=reason)
            case Failed():
                return await self._record_failure(active, finished, outcome)
            case _:
                assert_never(outcome)

    async def _record_pause(self, active: ActiveAttempt, finished: SessionResult, paused: Paused) -> AttemptEnd:
        """Record that the next session continues a conversation and its work."""
        document = self.ledger.task(active.task)
        commit, base = document.start, document.base
        if active.next_phase.phase.writes and finished.folder is not None and finished.work.complete:
            commit, base = finished.work.commit, active.session.assignment.base
        changes = pause_task(document, commit, base, paused.note)
        interrupted = TaskInterrupted(outcome=PAUSED, reason=paused.reason)
        await self._end(active, finished, TaskUpdate(Trigger.INTERRUPT, interrupted, changes))
        return AttemptEnd()

    async def _record_cancelled(self, active: ActiveAttempt, finished: SessionResult) -> AttemptEnd:
        cancelled = TaskCancelled(outcome="cancelled", reason="on request, while running")
        await self._end(active, finished, TaskUpdate(Trigger.CANCEL, cancelled))
        return AttemptEnd()

    async def _record_success(self, active: ActiveAttempt, finished: SessionResult) -> AttemptEnd:
        """Record the phase result of a session that succeeded."""
        phase = active.next_phase.phase
        commit, failed = finished.commit, None
        if commit is not None and phase.until:
            failed = await self._run_phase_checks(active, commit)
        if isinstance(failed, ChecksNotRun | Misconfigured):
            unrunnable = failed.reason if isinstance(failed, Misconfigured) else None
            reason = failed.reason if unrunnable is None else HaltReason.parse(unrunnable).headline
            interrupted = TaskInterrupted(outcome=INTERRUPTED, reason=reason)
            await self._end(active, finished, TaskUpdate(Trigger.INTERRUPT, interrupted))
            return AttemptEnd(unrunnable=unrunnable)
        if active.cancelled:
            return await self._record_cancelled(active, finished)
        file_handoff = await read_handoff(active.session.assignment.worktree) if phase.kind is not None else None
        usage = self.context.accounting.net_usage(finished.transcript, self.ledger.task(active.task).attempts)
        ended = replace(finished, failed_command=failed, handoff_file=file_handoff, submitted=active.handed_over)
        update = await self._complete_phase(active, replace(ended, transcript=usage))
        if isinstance(update, Failed):
            return await self._record_failure(active, finished, update)
        if not active.next_phase.workflow.is_default:
            failpoint("handoff.taken")
        await self._end(active, finished, update)
        failpoint("work.recorded")
        await self.ledger.adapters.clear_cooldown(active.adapter)
        return AttemptEnd()

    async def _complete_phase(self, active: ActiveAttempt, ended: SessionResult) -> TaskUpdate | Failed:
        """Return the update that completes or fails the phase of a session."""
        try:
            return await self.phase_handlers.completer.complete(active.task, active.spec, active.next_phase, ended)
        except (RefusedError, HandoffCorrupted) as error:  # an invalid condition or earlier handoff
            return Failed(FailureClass.INVALID, str(error))

    async def _run_phase_checks(
        self, active: ActiveAttempt, commit: str
    ) -> CommandFailed | ChecksNotRun | Misconfigured | None:
        """Return the failure of the `until` checks of a phase; None if they pass."""
        base, worktree = active.session.assignment.base, active.session.assignment.worktree
        commands, unrunnable = active.next_phase.phase.until, None
        checks = [Check(run=command) for command in commands]
        result: CheckResult = CHECKS_STOPPED
        with active.checks:
            runs = self.base_commands.runs
            request = await runs.request(worktree.task, worktree.attempt, active.spec, checks, commit, base)
            result = (await runs.run(request)).result
            if isinstance(result, CommandFailed):
                unrunnable = await self.base_commands.explain_unrunnable(
                    worktree.task,
                    active.spec,
                    commands,
                    result,
                    base,
                    "correct `until` in the file, then start a new run",
                )
        failpoint("phase.checked")
        if unrunnable is not None:
            return Misconfigured(unrunnable)
        return None if isinstance(result, ChecksPassed) else result

    async def _record_failure(self, active: ActiveAttempt, finished: SessionResult, outcome: Failed) -> AttemptEnd:
        failure, reason = outcome.failure, outcome.reason
        if failure is FailureClass.NO_CHANGE and active.next_phase.phase.kind is not None:
            reason += ": set `access: read` for a phase that should change nothing"
        policy = get_failure_policy(failure, active.spec.retry_on)
        if policy in {FailurePolicy.COOLDOWN, FailurePolicy.DISABLE}:
            # The adapter first: at the end of this attempt, another process may start the next probe.
            if policy is FailurePolicy.COOLDOWN:
                adapter = await self.ledger.adapters.start_cooldown(active.adapter, outcome.until, reason)
            else:
                started = self.ledger.task(active.task).attempts[active.session.assignment.worktree.attempt - 1].started
                adapter = await self.ledger.adapters.disable(active.adapter, reason, started)
            postponed = TaskPostponed(outcome=failure, reason=reason)
            await self._end(active, finished, TaskUpdate(Trigger.POSTPONE, postponed))
            return AttemptEnd(adapter=adapter)
        if finished.transcript.output_tokens:
            await self.ledger.adapters.clear_cooldown(active.adapter)
        failures = self.ledger.task(active.task).failures + 1
        changes = {"failures": failures}
        spec = active.spec
        delay = decide_retry(failure, failures, spec.attempts, spec.retry_on, spec.backoff)
        if delay is not None and not active.is_budget_exhausted:
            delay = round(delay, 3)
            retrying = TaskRetrying(outcome=failure, reason=reason, retry_in=delay)
            await self._end(active, finished, TaskUpdate(Trigger.RETRY, retrying, changes))
            return AttemptEnd(retry_in=delay)
        if failure is FailureClass.NO_CHANGE:
            update = TaskUpdate(Trigger.FINISH_UNCHANGED, TaskNoChange(outcome=failure, reason=reason), changes)
        else:
            update = TaskUpdate(Trigger.FAIL, TaskFailed(outcome=failure, reason=reason), changes)
        await self._end(active, finished, update)
        return AttemptEnd()

    async def _end(self, active: ActiveAttempt, finished: SessionResult, update: TaskUpdate) -> None:
        """Record the end of an attempt together with the update of its task."""
        document, event = self.ledger.task(active.task), update.event
        assert isinstance(event, AttemptEvent), "triggers at the end of an attempt record its outcome"  # noqa: S101  see `Trigger.event`
        attempts = document.with_attempt(
            ended=self.ledger.writer.clock.now(),
            seconds=round(self.ledger.writer.clock.monotonic() - active.began, 3),
            branch=finished.branch,
            outcome=event.outcome,
            reason=event.reason,
            is_kept=not finished.work.complete,
            folder=None if finished.folder is None else str(finished.folder),
            resumed=active.session.assignment.earlier_conversation is not None,
            discarded=finished.work.discarded[:_MAX_DISCARDED_PATHS],
            denied_tools=finished.transcript.denials,
            **self.context.accounting.recorded(finished.transcript, document.attempts),
        )
        branch = finished.branch if active.next_phase.phase.writes else document.branch
        ended = event.replace(reason=event.reason, branch=finished.branch)
        changes = {"attempts": attempts, "branch": branch, "reason": event.reason, **update.changes}
        await self.ledger.change_all({active.task: update._replace(event=ended, changes=changes)})


def end_events(active: ActiveAttempt, finished: SessionResult) -> Iterator[TaskEvent]:
    """Yield the events that accompany the end of a session."""
    task, number = active.task, active.session.assignment.worktree.attempt
    for ref in finished.work.salvaged:
        yield TaskSalvaged(task=task, branch=ref)
    for fault in finished.faults:
        yield TaskAfterRunFailed(task=task, reason=fault)
    for fault in finished.session_api_faults:
        yield TaskSessionApiFailed(task=task, reason=fault)
    for host in finished.denied_hosts:
        yield TaskHostDenied(task=task, host=host)
    if (denials := finished.transcript.denials).count:
        yield TaskToolsDenied(task=task, attempt=number, count=denials.count, tools=denials.tools, reason=str(denials))
    if discarded := finished.work.discarded:
        yield TaskChangesDiscarded(task=task, attempt=number, paths=discarded[:MAX_EVENT_PATHS])
    if not finished.work.complete:
        reason = "; ".join(("it has changes that are not on any branch", *finished.work.notes))
        yield TaskWorktreePreserved(task=task, worktree=str(active.session.assignment.worktree.tree), reason=reason)
