"""Run single attempts of tasks.

An attempt is recorded before it starts, its session runs, and its outcome is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, assert_never

from orchestrator.config.model import TaskSpec
from orchestrator.domain.events import runs as run_events
from orchestrator.domain.events.base import AttemptEvent, TaskEvent
from orchestrator.domain.events.tasks import (
    TaskAfterRunFailed,
    TaskCancelled,
    TaskChangesDiscarded,
    TaskClaimLost,
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
from orchestrator.domain.runs.failures import FailureClass, FailurePolicy, get_failure_policy
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import INTERRUPTED, AdapterDocument, Attempt, TaskDocument
from orchestrator.domain.runs.outcome import (
    Built,
    Failed,
    Interrupted,
    Misconfigured,
    ReadOnlySuccess,
    ResourcesExhausted,
    SessionLimits,
)
from orchestrator.domain.runs.retry import compute_cooldown_end, retry_delay
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict
from orchestrator.domain.sessions.notes import format_notes
from orchestrator.engine.landing.base_checks import BaseChecks
from orchestrator.engine.landing.base_selection import BaseSelector
from orchestrator.engine.phases.completion import EndedSession, PhaseHandlers
from orchestrator.engine.phases.start import NextPhase
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.budgets import BudgetReached, Budgets
from orchestrator.engine.session_api.details import SessionWorkspace
from orchestrator.engine.state.ledger import Ledger, OutdatedBase
from orchestrator.engine.state.run_state import AdapterUpdate
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import ClaimLost, HandoffCorrupted, RefusedError
from orchestrator.protocols import Capability, Guard, JsonObject, Write
from orchestrator.repo.intake.diffs import diff_commits_bounded
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.repo.worktrees.preserved import try_to_preserve
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import log_path
from orchestrator.sessions.session import Assignment, Conversation, Session, SessionResult
from orchestrator.sessions.setup.checks import CheckRunner, ChecksNotRun, ChecksPassed
from orchestrator.sessions.setup.handoff_file import read_handoff
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds by which a cooldown must move to be recorded again: programs report whole seconds.
_MIN_EXTENSION = 1.0
#: Number of discarded paths that are recorded.
_MAX_DISCARDED_PATHS = 100
#: Number of paths that an event names.
MAX_EVENT_PATHS = 200

#: Why an attempt restarts although there is work to fix.
_RESTART_REASON = "the earlier work conflicts with the target: starting from scratch"


class AttemptEnd(NamedTuple):
    """The effects of an ended attempt on later ones; the ledger has the status of its task."""

    retry_in: float = 0.0
    """Seconds until the task may start again, if it is pending."""
    adapter: AdapterDocument | None = None
    """The state of its adapter, if the attempt changed it or found it changed."""
    shortage: str | None = None
    """The resource that the machine is short of: nothing should start for a while."""
    unrunnable: str | None = None
    """Why no attempt can work: a check or setup command cannot run here."""


@dataclass(slots=True)
class ActiveAttempt:
    """A running attempt; `cancelled` is set once a person cancels the task."""

    task: str
    spec: TaskSpec
    adapter: str
    session: Session
    next_phase: NextPhase
    checks: CheckRunner | None = field(default=None, init=False)
    """The `until` checks of its phase, while they run."""
    handed_over: JsonObject | None = field(default=None, init=False)
    """The handoff that its session submitted while it ran."""
    cancelled: bool = field(default=False, init=False)
    is_budget_exhausted: bool = field(default=False, init=False)
    """Whether the budget of the task is exhausted, so that no attempt follows."""

    @property
    def name(self) -> SessionName:
        """Return the name of its session."""
        worktree = self.session.assignment.worktree
        return SessionName(worktree.run, worktree.task, worktree.attempt)

    def stop_for_budget(self, reached: BudgetReached) -> None:
        """Stop the session because a budget is exhausted."""
        self.is_budget_exhausted = reached.scope == "task"
        self.session.stop(reached.outcome if isinstance(reached.outcome, Failed) else None)

    def stop(self) -> None:
        """Stop the session, and the checks that follow it."""
        self.session.stop()
        if self.checks is not None:
            self.checks.stop()

    def cancel(self) -> None:
        """Stop the attempt; no other attempt follows."""
        self.cancelled = True
        self.stop()


@dataclass(frozen=True, slots=True)
class AttemptRunner:
    """Prepares and performs the attempts of one run."""

    ledger: Ledger
    context: RunContext
    pool: SlotPool
    budgets: Budgets
    base_selector: BaseSelector
    base_checks: BaseChecks
    phase_handlers: PhaseHandlers
    clock: Clock

    async def prepare(self, task: str, spec: TaskSpec, next_phase: NextPhase, adapter: str) -> ActiveAttempt:
        """Return the next attempt of a task, with one of its adapters.

        Nothing is created yet.
        """
        assert next_phase.base is not None, "its start is selected"  # noqa: S101  the caller has selected it
        document = self.ledger.task(task)
        notes = await self._notes(task, spec)
        prompt = await self.phase_handlers.starter.build_prompt(task, spec, next_phase, await self._diff(next_phase))
        conversation = None
        if Capability.RESUME in self.context.adapters[adapter].capabilities():
            conversation = None if next_phase.is_restart else _conversation(document, next_phase.earlier, adapter)
        timeout = next_phase.phase.timeout or spec.timeout
        assignment = Assignment(
            worktree=Worktree(self.context.hub, self.ledger.run.id, task, len(document.attempts) + 1),
            base=next_phase.base,
            start=next_phase.start,
            prompt=prompt.text,
            context="\n\n".join(filter(None, (notes, prompt.suffix))) or None,
            adapter=self.context.adapters[adapter],
            adapter_name=adapter,
            reach=self.context.configs[adapter].reach,
            limits=SessionLimits(timeout, spec.idle_timeout),
            max_file=spec.max_file,
            instructions=spec.instructions,
            mcp_servers=self.context.mcp_servers,
            max_cost=self.budgets.cost_left(task, spec),
            earlier_conversation=conversation,
            follow_up="\n\n".join(filter(None, (notes, prompt.follow_up))) or None,
            task_prompt=spec.prompt,
            phase=None if next_phase.workflow.is_default else next_phase.phase.name,
            writes=next_phase.phase.writes,
        )
        session = Session(self.context.tools, self.pool, assignment, partial(self.ledger.confirm_claim, task))
        return ActiveAttempt(task, spec, adapter, session, replace(next_phase, prompt=prompt))

    async def _diff(self, next_phase: NextPhase) -> str | None:
        """Return the diff that a phase starts with, if its template may show it."""
        if next_phase.base is None or next_phase.start is None or not next_phase.phase.shows_diff:
            return None
        return self.context.tools.redactor.text(
            await diff_commits_bounded(self.context.git, next_phase.base, next_phase.start)
        )

    async def perform(self, active: ActiveAttempt) -> AttemptEnd | None:
        """Record the attempt, run it, record its end, and clean up.

        Return None if another orchestrator owns the task or its paths; the ledger then has its current state.
        """
        if not await self._begin(active):
            return None
        failpoint("attempt.recorded")
        number = active.session.assignment.worktree.attempt
        if active.spec.checks or active.next_phase.phase.until:
            self.pool.prewarm_checks(active.session.assignment.base)
        finished = self._apply_budget(active, await self._run(active))
        if not finished.collected:
            assignment = active.session.assignment
            notes = await try_to_preserve(self.context.git, assignment.worktree, assignment.start or assignment.base)
            finished = replace(finished, notes=(*finished.notes, *notes))
        try:
            end = await self._record(active, finished)
        except ClaimLost as error:
            lost = TaskClaimLost(task=active.task, attempt=number, by=error.by, branch=finished.branch)
            await self.ledger.note(lost)
            await active.session.release(saved=finished.collected)
            return None
        failpoint("attempt.ended")
        await self.budgets.count(active.task, active.spec, self.ledger.task(active.task).attempts[number - 1])
        for event in _end_events(active, finished):
            await self.ledger.note(event)
        await active.session.release(saved=finished.collected)
        return end

    async def _begin(self, active: ActiveAttempt) -> bool:
        """Record an attempt with its claims.

        Return False if another orchestrator has the task or its paths.
        """
        assignment = active.session.assignment
        attempt = Attempt(
            number=assignment.worktree.attempt,
            adapter=active.adapter,
            base=assignment.base,
            start=assignment.start,
            started=self.clock.now(),
            secrets=active.session.secret_names(),
            phase=assignment.phase,
        )
        earlier = self.ledger.task(active.task).attempts
        if len(earlier) + 1 != attempt.number:  # another orchestrator has made an attempt since this one was prepared
            return False
        update = self.phase_handlers.starter.build_start_update(
            active.task, active.next_phase, attempt, (*earlier, attempt)
        )
        if active.next_phase.is_restart:
            update = update._replace(
                event=update.event.replace(reason=_RESTART_REASON),
                changes={**update.changes, "start": None, "base": None, "feedback": None},
            )
        return await self.ledger.start(active.task, update, partial(self._paths, active)) is None

    async def _run(self, active: ActiveAttempt) -> SessionResult:
        """Run the session of an attempt within its budget, with the session API served."""
        assignment, session_service = active.session.assignment, self.context.session_service
        log = log_path(self.context.tools.logs, active.task, assignment.worktree.attempt, "stdout")
        async with AsyncExitStack() as stack:
            watched = self.budgets.watched(
                active.task, assignment.worktree.attempt, active.spec, assignment.adapter, log, active.stop_for_budget
            )
            await stack.enter_async_context(watched)
            if session_service is None:
                return await active.session.run()
            check_handoff = self.phase_handlers.completer.make_handoff_checker(
                active.task, active.spec, active.next_phase.phase
            )
            service = session_service.serve_session(
                active.name,
                active.adapter,
                self._session_workspace(active),
                keep_ownership=True,
                validate_handoff=check_handoff,
            )
            await stack.enter_async_context(service)
            finished = await active.session.run()
            active.handed_over = session_service.submitted_handoff(active.name)
        return finished

    def _session_workspace(self, active: ActiveAttempt) -> SessionWorkspace:
        assignment, tools = active.session.assignment, self.context.tools
        return SessionWorkspace(
            assignment.worktree, assignment.base, assignment.adapter, tools.logs, tools.admission(assignment.max_file)
        )

    async def _notes(self, task: str, spec: TaskSpec) -> str | None:
        """Return the notes of earlier sessions for the next one.

        They are of this task or about paths that it owns.
        """
        if self.context.session_service is None:
            return None
        return format_notes(await self.context.session_service.notes.find_relevant(task, spec.owns))

    async def _paths(self, active: ActiveAttempt, claim: Guard) -> Sequence[Write] | OwnershipConflict | OutdatedBase:
        """Return the writes that claim the paths of a task.

        `claim` is the guard of the task claim that is about to be taken.
        """
        owns = active.spec.owns
        if not owns:
            return []
        orchestrator = self.ledger.orchestrators.me.id
        planned = await self.context.registry.plan(active.name, owns, orchestrator=orchestrator, claim=claim)
        # The previous owner may have landed since the start point was read; from now on no other task can.
        if isinstance(planned, OwnershipConflict) or not active.next_phase.is_newest:
            return planned
        if not await self.base_selector.is_outdated(owns, active.session.assignment.base):
            return planned
        return OutdatedBase()

    def _apply_budget(self, active: ActiveAttempt, finished: SessionResult) -> SessionResult:
        """Return the result of a session.

        Attribute a limit that it stopped at to the matching budget.
        """
        if not isinstance(finished.outcome, Failed) or finished.outcome.failure is not FailureClass.LIMIT:
            return finished
        reached = self.budgets.find_reached(active.task, active.spec, finished.transcript)
        if reached is None:
            return finished
        active.is_budget_exhausted = reached.scope == "task"
        return replace(finished, outcome=reached.outcome)

    async def _record(self, active: ActiveAttempt, finished: SessionResult) -> AttemptEnd:
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
            case ResourcesExhausted(reason):
                postponed = TaskPostponed(outcome=INTERRUPTED, reason=reason)
                await self._end(active, finished, TaskUpdate(Trigger.HOLD, postponed))
                return AttemptEnd(shortage=reason)
            case Misconfigured(reason):
                postponed = TaskPostponed(outcome=INTERRUPTED, reason=HaltReason.parse(reason).headline)
                await self._end(active, finished, TaskUpdate(Trigger.HOLD, postponed))
                return AttemptEnd(unrunnable=reason)
            case Failed():
                return await self._record_failure(active, finished, outcome)
            case _:
                assert_never(outcome)

    async def _record_cancelled(self, active: ActiveAttempt, finished: SessionResult) -> AttemptEnd:
        cancelled = TaskCancelled(outcome="cancelled", reason="on request, while running")
        await self._end(active, finished, TaskUpdate(Trigger.CANCEL, cancelled))
        return AttemptEnd()

    async def _record_success(self, active: ActiveAttempt, finished: SessionResult) -> AttemptEnd:
        """Record the phase result of a session that succeeded."""
        phase = active.next_phase.phase
        commit = finished.outcome.commit if isinstance(finished.outcome, Built) else None
        failed = await self._run_phase_checks(active, commit) if commit is not None and phase.until else None
        if isinstance(failed, ChecksNotRun | Misconfigured):
            unrunnable = failed.reason if isinstance(failed, Misconfigured) else None
            reason = failed.reason if unrunnable is None else HaltReason.parse(unrunnable).headline
            interrupted = TaskInterrupted(outcome=INTERRUPTED, reason=reason)
            await self._end(active, finished, TaskUpdate(Trigger.INTERRUPT, interrupted))
            return AttemptEnd(unrunnable=unrunnable)
        if active.cancelled:
            return await self._record_cancelled(active, finished)
        file_handoff = await read_handoff(active.session.assignment.worktree) if phase.produces is not None else None
        usage = self.context.accounting.net_usage(finished.transcript, self.ledger.task(active.task).attempts)
        ended = EndedSession(commit, failed, file_handoff, active.handed_over, finished.answer, usage)
        update = await self._complete_phase(active, ended)
        if isinstance(update, Failed):
            return await self._record_failure(active, finished, update)
        if not active.next_phase.workflow.is_default:
            failpoint("handoff.taken")
        await self._end(active, finished, update)
        failpoint("work.recorded")
        await self._clear_cooldown(active.adapter)
        return AttemptEnd()

    async def _complete_phase(self, active: ActiveAttempt, ended: EndedSession) -> TaskUpdate | Failed:
        """Return the update that completes the phase of a session, or why the phase failed."""
        try:
            return await self.phase_handlers.completer.complete(active.task, active.spec, active.next_phase, ended)
        except (RefusedError, HandoffCorrupted) as error:  # an invalid condition or earlier handoff
            return Failed(FailureClass.INVALID, str(error))

    async def _run_phase_checks(
        self, active: ActiveAttempt, commit: str
    ) -> CommandFailed | ChecksNotRun | Misconfigured | None:
        """Return why the work fails the `until` checks of its phase; None if it passes."""
        base, worktree = active.session.assignment.base, active.session.assignment.worktree
        active.checks = self.context.checks(
            self.pool,
            worktree.run,
            worktree.task,
            worktree.attempt,
            active.spec,
            commands=active.next_phase.phase.until,
        )
        unrunnable = None
        try:
            result = await active.checks.run(commit, base)
            if isinstance(result, CommandFailed):
                commands = active.next_phase.phase.until
                unrunnable = await self.base_checks.explain_unrunnable(
                    worktree.task,
                    active.spec,
                    commands,
                    result,
                    base,
                    "correct `until` in the file, then start a new run",
                )
        finally:
            active.checks = None
        failpoint("phase.checked")
        if unrunnable is not None:
            return Misconfigured(unrunnable)
        return None if isinstance(result, ChecksPassed) else result

    async def finish(self, task: str, update: TaskUpdate) -> bool:
        """Finish a task that needs no further session: queue its work to land, or mark it done.

        Return False if another orchestrator owns the task.
        """
        if await self.ledger.start(task, update) is not None:
            return False
        failpoint("phase.finished")
        return True

    async def _record_failure(self, active: ActiveAttempt, finished: SessionResult, outcome: Failed) -> AttemptEnd:
        failure, reason = outcome.failure, outcome.reason
        if failure is FailureClass.NO_CHANGE and active.next_phase.phase.produces is not None:
            reason += ": set `access: read` for a phase that should change nothing"
        policy = get_failure_policy(failure, active.spec.retry_on)
        if policy in {FailurePolicy.PARK, FailurePolicy.CLOSE}:
            postponed = TaskPostponed(outcome=failure, reason=reason)
            await self._end(active, finished, TaskUpdate(Trigger.HOLD, postponed))
            if policy is FailurePolicy.PARK:
                return AttemptEnd(adapter=await self._start_cooldown(active.adapter, outcome))
            return AttemptEnd(adapter=await self._disable_adapter(active, reason))
        failures = self.ledger.task(active.task).failures + 1
        changes = {"failures": failures}
        if policy is FailurePolicy.RETRY and failures < active.spec.attempts and not active.is_budget_exhausted:
            delay = round(retry_delay(active.spec.backoff.policy(), failures), 3)
            retrying = TaskRetrying(outcome=failure, reason=reason, retry_in=delay)
            await self._end(active, finished, TaskUpdate(Trigger.RETRY, retrying, changes))
            return AttemptEnd(retry_in=delay)
        if failure is FailureClass.NO_CHANGE:
            update = TaskUpdate(Trigger.IDLE, TaskNoChange(outcome=failure, reason=reason), changes)
        else:
            update = TaskUpdate(Trigger.FAIL, TaskFailed(outcome=failure, reason=reason), changes)
        await self._end(active, finished, update)
        return AttemptEnd()

    async def _start_cooldown(self, adapter: str, outcome: Failed) -> AdapterDocument:
        now = self.clock.now()

        def judge(known: AdapterDocument) -> AdapterUpdate | None:
            # Concurrent sessions that reach the same limit count as one cooldown.
            cooldown_until = known.cooldown_until if _is_cooling_down(known, now) else None
            cooldowns = known.cooldowns + (cooldown_until is None)
            until = compute_cooldown_end(now, outcome.until, cooldowns)
            if cooldown_until is not None and (outcome.until is None or until - cooldown_until < _MIN_EXTENSION):
                return None
            learned = AdapterDocument(cooldown_until=until, cooldowns=cooldowns)
            return AdapterUpdate(learned, run_events.AdapterCooldown(until=until, reason=outcome.reason))

        known, is_new = await self.ledger.adapters.update(adapter, judge)
        if is_new:
            failpoint("adapter.cooling_down")
        return known

    async def _disable_adapter(self, active: ActiveAttempt, reason: str) -> AdapterDocument:
        closed = AdapterUpdate(AdapterDocument(disabled_reason=reason), run_events.AdapterDisabled(reason=reason))
        started = self.ledger.task(active.task).attempts[active.session.assignment.worktree.attempt - 1].started

        def judge(known: AdapterDocument) -> AdapterUpdate | None:
            return closed if known.disabled_reason is None and started >= (known.enabled_at or 0.0) else None

        known, _ = await self.ledger.adapters.update(active.adapter, judge)
        return known

    async def _clear_cooldown(self, adapter: str) -> None:
        """Forget the cooldowns of an adapter: a session that started after them succeeded."""
        opened, now = AdapterUpdate(AdapterDocument(), run_events.AdapterEnabled()), self.clock.now()
        await self.ledger.adapters.update(
            adapter, lambda known: opened if known.cooldowns and not _is_cooling_down(known, now) else None
        )

    async def _end(self, active: ActiveAttempt, finished: SessionResult, update: TaskUpdate) -> None:
        """Record the end of an attempt together with the update of its task."""
        document, event = self.ledger.task(active.task), update.event
        assert isinstance(event, AttemptEvent), "triggers at the end of an attempt record its outcome"  # noqa: S101
        attempts = document.with_attempt(
            ended=self.clock.now(),
            branch=finished.branch,
            outcome=event.outcome,
            reason=event.reason,
            is_kept=not finished.collected,
            folder=None if finished.folder is None else str(finished.folder),
            resumed=active.session.assignment.earlier_conversation is not None,
            discarded=finished.discarded[:_MAX_DISCARDED_PATHS],
            denied_tools=finished.transcript.denials,
            **self.context.accounting.recorded(finished.transcript, document.attempts),
        )
        branch = finished.branch if active.next_phase.phase.writes else document.branch
        ended = event.replace(reason=event.reason, branch=finished.branch)
        changes = {"attempts": attempts, "branch": branch, "reason": event.reason, **update.changes}
        await self.ledger.change_all({active.task: update._replace(event=ended, changes=changes)})


def _end_events(active: ActiveAttempt, finished: SessionResult) -> Iterator[TaskEvent]:
    """Yield the events that accompany the end of a session."""
    task, number = active.task, active.session.assignment.worktree.attempt
    for ref in finished.salvaged:
        yield TaskSalvaged(task=task, branch=ref)
    for fault in finished.faults:
        yield TaskAfterRunFailed(task=task, reason=fault)
    for fault in finished.session_api_faults:
        yield TaskSessionApiFailed(task=task, reason=fault)
    for host in finished.denied_hosts:
        yield TaskHostDenied(task=task, host=host)
    if (denials := finished.transcript.denials).count:
        yield TaskToolsDenied(task=task, attempt=number, count=denials.count, tools=denials.tools, reason=str(denials))
    if finished.discarded:
        yield TaskChangesDiscarded(task=task, attempt=number, paths=finished.discarded[:MAX_EVENT_PATHS])
    if not finished.collected:
        reason = "; ".join(("it has changes that are on no branch", *finished.notes))
        yield TaskWorktreePreserved(task=task, worktree=str(active.session.assignment.worktree.tree), reason=reason)


def _conversation(document: TaskDocument, number: int | None, adapter: str) -> Conversation | None:
    """Return the conversation of an attempt to resume.

    None unless it used the same adapter.
    """
    if number is None:
        return None
    attempt = document.attempts[number - 1]
    if attempt.adapter != adapter or attempt.session is None or attempt.folder is None:
        return None
    return Conversation(attempt.session, Path(attempt.folder))


def _is_cooling_down(adapter: AdapterDocument, now: float) -> bool:
    return adapter.cooldown_until is not None and adapter.cooldown_until > now
