"""One attempt of a task: recorded before anything of it exists, run, and recorded as what it came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, assert_never

from orchestrator.config.model import TaskSpec
from orchestrator.domain.runs.failures import FailureClass, FailurePolicy, get_failure_policy
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.lifecycle import Trigger
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
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict as OwnedBy
from orchestrator.domain.sessions.notes import format_notes
from orchestrator.engine.landing.base_checks import BaseChecks
from orchestrator.engine.landing.base_selection import BaseSelector, StartPoint
from orchestrator.engine.phases.completion import EndedSession, PhaseCompletion, PhaseHandlers
from orchestrator.engine.phases.start import NextPhase, NoPhaseLeft
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.budgets import BudgetReached, Budgets
from orchestrator.engine.session_api.details import SessionWorkspace
from orchestrator.engine.state.ledger import AdapterUpdate, Ledger, OutdatedBase
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

#: By how many seconds the end of a limit must be later than was known to be told again: programs tell whole seconds.
_MIN_EXTENSION = 1.0
#: Paths that are recorded of what was discarded.
_MAX_DISCARDED_PATHS = 100
_NO_TASKS: Final[Mapping[str, TaskSpec]] = {}
#: Paths that an event names.
MAX_EVENT_PATHS = 200

#: Why an attempt begins anew though there is work that it was to mend.
_RESTART_REASON = "what was built before conflicts with what has landed since: it is done anew"


@dataclass(frozen=True, slots=True)
class ReadyToLand:
    """The work waits to land."""


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """No attempt follows."""


@dataclass(frozen=True, slots=True)
class TaskDone:
    """Nothing is left to do, and there is nothing to land."""


@dataclass(frozen=True, slots=True)
class AwaitingApproval:
    """A person is to approve what its phase came to."""


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Another attempt may follow after `delay` seconds; None: not while this process runs."""

    delay: float | None


@dataclass(frozen=True, slots=True)
class AdapterCoolingDown:
    """Nothing of the adapter may start before `until` (wall-clock seconds); the task then starts anew."""

    adapter: str
    until: float


@dataclass(frozen=True, slots=True)
class AdapterDisabled:
    """Nothing of the adapter may start until a person has seen to it."""

    adapter: str
    reason: str


@dataclass(frozen=True, slots=True)
class ResourceShortage:
    """The machine has not enough of something: nothing should start for a while."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunHalted:
    """No attempt can work: a command of checks or setup can't be run here."""

    reason: str


AttemptOutcome = (
    ReadyToLand
    | TaskEnded
    | TaskDone
    | AwaitingApproval
    | RetryAfter
    | AdapterCoolingDown
    | AdapterDisabled
    | ResourceShortage
    | RunHalted
)


@dataclass(frozen=True, slots=True)
class ClaimedElsewhere:
    """Another orchestrator has the task, or had paths that it is to own: where it is now is in the ledger."""


@dataclass(slots=True)
class ActiveAttempt:
    """An attempt under way; `cancelled` says that a person does not want the task any more."""

    task: str
    spec: TaskSpec
    adapter: str
    session: Session
    turn: NextPhase
    checks: CheckRunner | None = field(default=None, init=False)
    """What its work has to pass before its phase is complete, while that is under way."""
    handed_over: JsonObject | None = field(default=None, init=False)
    """What its session handed over while it ran."""
    cancelled: bool = field(default=False, init=False)
    is_budget_exhausted: bool = field(default=False, init=False)
    """Whether the task's budget is used up, so that no other attempt follows."""

    @property
    def name(self) -> SessionName:
        """What its session is called."""
        worktree = self.session.assignment.worktree
        return SessionName(worktree.run, worktree.task, worktree.attempt)

    def stop_for_budget(self, found: BudgetReached) -> None:
        """End it because a budget is used up."""
        self.is_budget_exhausted = found.scope == "task"
        self.session.stop(found.outcome if isinstance(found.outcome, Failed) else None)

    def stop(self) -> None:
        """End its session, and the checks that follow that."""
        self.session.stop()
        if self.checks is not None:
            self.checks.stop()

    def cancel(self) -> None:
        """End it for good."""
        self.cancelled = True
        self.stop()


@dataclass(frozen=True, slots=True)
class AttemptRunner:
    """Makes and performs the attempts of one run."""

    ledger: Ledger
    context: RunContext
    pool: SlotPool
    budgets: Budgets
    base_selector: BaseSelector
    base_checks: BaseChecks
    phase_handlers: PhaseHandlers
    clock: Clock

    async def prepare(
        self, task: str, spec: TaskSpec, turn: NextPhase, adapter: str, start: StartPoint
    ) -> ActiveAttempt:
        """Return the next attempt of a task, at its turn, with one of its adapters; nothing of it exists yet."""
        document = self.ledger.task(task)
        notes = await self._notes(task, spec)
        is_anew = document.start is not None and start.commit is None
        turn = replace(turn, base=start.base, start=start.commit, is_restart=is_anew, is_newest=start.is_newest)
        brief = await self.phase_handlers.starter.brief(task, spec, turn, await self._diff(turn))
        earlier = None
        if Capability.RESUME in self.context.adapters[adapter].capabilities():
            earlier = None if turn.is_restart else _conversation(document, turn.earlier, adapter)
        timeout = turn.phase.timeout or spec.timeout
        assignment = Assignment(
            worktree=Worktree(self.context.hub, self.ledger.run.id, task, len(document.attempts) + 1),
            base=start.base,
            start=start.commit,
            prompt=brief.text,
            told="\n\n".join(filter(None, (notes, brief.told))) or None,
            adapter=self.context.adapters[adapter],
            adapter_name=adapter,
            reach=self.context.configs[adapter].reach,
            limits=SessionLimits(timeout, spec.silence),
            max_file=spec.max_file,
            instructions=spec.instructions,
            mcp_servers=self.context.mcp_servers,
            max_cost=self.budgets.cost_left(task, spec),
            earlier=earlier,
            follow_up="\n\n".join(filter(None, (notes, brief.follow_up))) or None,
            task_prompt=spec.prompt,
            phase=None if turn.workflow.is_default else turn.phase.name,
            writes=turn.phase.writes,
        )
        session = Session(self.context.tools, self.pool, assignment, partial(self.ledger.confirm, task))
        return ActiveAttempt(task, spec, adapter, session, replace(turn, brief=brief))

    async def _diff(self, turn: NextPhase) -> str | None:
        """Return the changes that a phase starts with, if its template may show them."""
        if turn.base is None or turn.start is None or not turn.phase.shows_diff:
            return None
        return self.context.tools.redactor.text(await diff_commits_bounded(self.context.git, turn.base, turn.start))

    async def perform(self, work: ActiveAttempt) -> AttemptOutcome | ClaimedElsewhere:
        """Record the attempt, run it, record its end, and clean up behind it."""
        if not await self._begin(work):
            return ClaimedElsewhere()
        failpoint("attempt.recorded")
        number = work.session.assignment.worktree.attempt
        if work.spec.checks or work.turn.phase.until:
            self.pool.prewarm_checks(work.session.assignment.base)
        finished = self._apply_budget(work, await self._run(work))
        if not finished.collected:
            what = work.session.assignment
            told = await try_to_preserve(self.context.git, what.worktree, what.start or what.base)
            finished = replace(finished, notes=(*finished.notes, *told))
        try:
            after = await self._record(work, finished)
        except ClaimLost as lost:
            facts = {"task": work.task, "attempt": number, "by": lost.by, "branch": finished.branch}
            await self.ledger.note("task.claim_lost", facts)
            await work.session.release(saved=finished.collected)
            return ClaimedElsewhere()
        failpoint("attempt.ended")
        await self.budgets.count(work.task, work.spec, self.ledger.task(work.task).attempts[number - 1])
        for event, facts in _end_events(work, finished):
            await self.ledger.note(event, {"task": work.task, **facts})
        await work.session.release(saved=finished.collected)
        return after

    async def _begin(self, work: ActiveAttempt) -> bool:
        """Record an attempt, with all that it is to have; False where another orchestrator has it, or had its paths."""
        what = work.session.assignment
        attempt = Attempt(
            number=what.worktree.attempt,
            adapter=work.adapter,
            base=what.base,
            start=what.start,
            started=self.clock.now(),
            secrets=work.session.secret_names(),
            phase=what.phase,
        )
        earlier = self.ledger.task(work.task).attempts
        if len(earlier) + 1 != attempt.number:  # another orchestrator has tried it since this one was prepared
            return False
        update = self.phase_handlers.starter.build_start_update(work.task, work.turn, attempt, (*earlier, attempt))
        if work.turn.is_restart:
            update = update._replace(
                details={**update.details, "reason": _RESTART_REASON},
                changes={**update.changes, "start": None, "base": None, "feedback": None},
            )
        return await self.ledger.start(work.task, update, partial(self._paths, work)) is None

    async def _run(self, work: ActiveAttempt) -> SessionResult:
        """Have an attempt's session at work, within its budget, with a seat at the desk."""
        what, desk = work.session.assignment, self.context.session_service
        log = log_path(self.context.tools.logs, work.task, what.worktree.attempt, "stdout")
        async with AsyncExitStack() as stack:
            watched = self.budgets.watched(
                work.task, what.worktree.attempt, work.spec, what.adapter, log, work.stop_for_budget
            )
            await stack.enter_async_context(watched)
            if desk is None:
                return await work.session.run()
            takes = self.phase_handlers.completer.make_handoff_checker(work.task, work.spec, work.turn.phase)
            seat = desk.serve_session(
                work.name, work.adapter, self._session_workspace(work), keep_ownership=True, takes=takes
            )
            await stack.enter_async_context(seat)
            finished = await work.session.run()
            work.handed_over = desk.handed_over(work.name)
        return finished

    def _session_workspace(self, work: ActiveAttempt) -> SessionWorkspace:
        what, tools = work.session.assignment, self.context.tools
        return SessionWorkspace(what.worktree, what.base, what.adapter, tools.logs, tools.admission(what.max_file))

    async def _notes(self, task: str, spec: TaskSpec) -> str | None:
        """Return what earlier sessions left for one of this task, or of the paths that it owns, to read."""
        if self.context.session_service is None:
            return None
        return format_notes(await self.context.session_service.memory.find_relevant(task, spec.owns))

    async def _paths(self, work: ActiveAttempt, claim: Guard) -> Sequence[Write] | OwnedBy | OutdatedBase:
        """Return what it takes to own a task's paths under a claim that is about to be taken."""
        owns = work.spec.owns
        if not owns:
            return []
        orchestrator = self.ledger.orchestrators.me.id
        planned = await self.context.registry.plan(work.name, owns, orchestrator=orchestrator, claim=claim)
        # Whoever had them may have landed since it was looked where to start; from now on nobody else can.
        if isinstance(planned, OwnedBy) or not work.turn.is_newest:
            return planned
        if not await self.base_selector.is_outdated(owns, work.session.assignment.base):
            return planned
        return OutdatedBase()

    def _apply_budget(self, work: ActiveAttempt, finished: SessionResult) -> SessionResult:
        """Return the end of a session; one that stopped itself at a limit of ours is that limit's."""
        if not isinstance(finished.outcome, Failed) or finished.outcome.failure is not FailureClass.LIMIT:
            return finished
        found = self.budgets.find_reached(work.task, work.spec, finished.transcript)
        if found is None:
            return finished
        work.is_budget_exhausted = found.scope == "task"
        return replace(finished, outcome=found.outcome)

    async def _record(self, work: ActiveAttempt, finished: SessionResult) -> AttemptOutcome:
        await self.ledger.hold(work.task)
        if work.cancelled:
            await self._end(work, Trigger.CANCEL, finished, "cancelled", "on request, while it ran")
            return TaskEnded()
        outcome = finished.outcome
        match outcome:
            case Built() | ReadOnlySuccess():
                return await self._record_success(work, finished)
            case Interrupted(reason):
                await self._end(work, Trigger.INTERRUPT, finished, INTERRUPTED, reason)
                return RetryAfter(None)
            case ResourcesExhausted(reason):
                await self._end(work, Trigger.HOLD, finished, INTERRUPTED, reason)
                return ResourceShortage(reason)
            case Misconfigured(reason):
                await self._end(work, Trigger.HOLD, finished, INTERRUPTED, HaltReason.parse(reason).headline)
                return RunHalted(reason)
            case Failed():
                return await self._failed(work, finished, outcome)
            case _:
                assert_never(outcome)

    async def _record_success(self, work: ActiveAttempt, finished: SessionResult) -> AttemptOutcome:
        """Record what a session that ended well makes of its phase."""
        commit = finished.outcome.commit if isinstance(finished.outcome, Built) else None
        failed = await self._until(work, commit) if commit is not None and work.turn.phase.until else None
        if isinstance(failed, ChecksNotRun | Misconfigured):
            why = failed.reason if isinstance(failed, ChecksNotRun) else HaltReason.parse(failed.reason).headline
            await self._end(work, Trigger.INTERRUPT, finished, INTERRUPTED, why)
            return RetryAfter(None) if isinstance(failed, ChecksNotRun) else RunHalted(failed.reason)
        if work.cancelled:
            await self._end(work, Trigger.CANCEL, finished, "cancelled", "on request, while it ran")
            return TaskEnded()
        place = work.session.assignment.worktree
        file = await read_handoff(place) if work.turn.phase.produces is not None else None
        used = self.context.accounting.net_usage(finished.transcript, self.ledger.task(work.task).attempts)
        ended = EndedSession(commit, failed, file, work.handed_over, finished.answer, used)
        concluded = await self._conclude(work, finished, ended)
        if isinstance(concluded, Failed):
            return await self._failed(work, finished, concluded)
        failpoint("work.recorded")
        await self._clear_cooldown(work.adapter)
        match concluded.trigger:
            case Trigger.BUILD:
                return ReadyToLand()
            case Trigger.FINISH:
                return TaskDone()
            case Trigger.ASK:
                return AwaitingApproval()
            case Trigger.FAIL:
                return TaskEnded()
            case _:
                return RetryAfter(0.0)

    async def _conclude(
        self, work: ActiveAttempt, finished: SessionResult, ended: EndedSession
    ) -> PhaseCompletion | Failed:
        """Record what a session makes of its phase, and return it; nothing is recorded where the phase has failed."""
        try:
            concluded = await self.phase_handlers.completer.conclude(work.task, work.spec, work.turn, ended)
        except (RefusedError, HandoffCorrupted) as error:  # a condition, or what was handed over before, is at fault
            return Failed(FailureClass.INVALID, str(error))
        if isinstance(concluded, PhaseCompletion):
            if not work.turn.workflow.is_default:
                failpoint("handoff.taken")
            await self._end(
                work,
                concluded.trigger,
                finished,
                concluded.outcome,
                concluded.reason,
                concluded.details,
                writes=concluded.writes,
                events=concluded.events,
                tasks=concluded.tasks,
                **concluded.changes,
            )
        return concluded

    async def _until(self, work: ActiveAttempt, commit: str) -> CommandFailed | ChecksNotRun | Misconfigured | None:
        """Return why a session's work is not what its phase is to be done until; None if it is."""
        base, what = work.session.assignment.base, work.session.assignment.worktree
        work.checks = self.context.checks(
            self.pool, what.run, what.task, what.attempt, work.spec, commands=work.turn.phase.until
        )
        unrunnable = None
        try:
            result = await work.checks.run(commit, base)
            if isinstance(result, CommandFailed):
                commands = work.turn.phase.until
                unrunnable = await self.base_checks.explain_unrunnable(
                    what.task, work.spec, commands, result, base, "correct `until` in the file, then start a new run"
                )
        finally:
            work.checks = None
        failpoint("phase.checked")
        if unrunnable is not None:
            return Misconfigured(unrunnable)
        return None if isinstance(result, ChecksPassed) else result

    async def rest(self, task: str, rest: NoPhaseLeft) -> AttemptOutcome | ClaimedElsewhere:
        """Record what is left for a task without another session: its work waits to land, or it is done."""
        update, trigger = self.phase_handlers.starter.build_finish_update(rest)
        if await self.ledger.start(task, update, trigger=trigger) is not None:
            return ClaimedElsewhere()
        failpoint("phase.finished")
        return ReadyToLand() if trigger is Trigger.QUEUE else TaskDone()

    async def _failed(self, work: ActiveAttempt, finished: SessionResult, outcome: Failed) -> AttemptOutcome:
        failure, reason = outcome.failure, outcome.reason
        if failure is FailureClass.NO_CHANGE and work.turn.phase.produces is not None:
            reason += ": write `access: read` for a phase that is to change nothing"
        match get_failure_policy(failure, work.spec.retry_on):
            case FailurePolicy.PARK:
                await self._end(work, Trigger.HOLD, finished, failure, reason)
                return await self._park(work.adapter, outcome)
            case FailurePolicy.CLOSE:
                await self._end(work, Trigger.HOLD, finished, failure, reason)
                return await self._close(work, reason)
            case policy:
                failures = self.ledger.task(work.task).failures + 1
                if policy is FailurePolicy.RETRY and failures < work.spec.attempts and not work.is_budget_exhausted:
                    delay = round(retry_delay(work.spec.backoff.policy(), failures), 3)
                    facts = {"retry_in": delay}
                    await self._end(work, Trigger.RETRY, finished, failure, reason, facts, failures=failures)
                    return RetryAfter(delay)
                trigger = Trigger.IDLE if failure is FailureClass.NO_CHANGE else Trigger.FAIL
                await self._end(work, trigger, finished, failure, reason, failures=failures)
                return TaskEnded()

    async def _park(self, adapter: str, outcome: Failed) -> AdapterCoolingDown:
        now = self.clock.now()

        def judge(known: AdapterDocument) -> AdapterUpdate | None:
            # Sessions that run into one limit side by side are one park.
            cooldown_until = known.cooldown_until if _is_cooling_down(known, now) else None
            cooldowns = known.cooldowns + (cooldown_until is None)
            until = compute_cooldown_end(now, outcome.until, cooldowns)
            if cooldown_until is not None and (outcome.until is None or until - cooldown_until < _MIN_EXTENSION):
                return None
            learned = AdapterDocument(cooldown_until=until, cooldowns=cooldowns)
            return AdapterUpdate(learned, "adapter.cooling_down", {"until": until, "reason": outcome.reason})

        known, is_new = await self.ledger.update_adapter(adapter, judge)
        if is_new:
            failpoint("adapter.cooling_down")
        assert known.cooldown_until is not None, "else it would have been parked"
        return AdapterCoolingDown(adapter, known.cooldown_until)

    async def _close(self, work: ActiveAttempt, reason: str) -> AdapterDisabled | RetryAfter:
        closed = AdapterUpdate(AdapterDocument(disabled_reason=reason), "adapter.disabled", {"reason": reason})
        started = self.ledger.task(work.task).attempts[work.session.assignment.worktree.attempt - 1].started

        def judge(known: AdapterDocument) -> AdapterUpdate | None:
            return closed if known.disabled_reason is None and started >= (known.enabled_at or 0.0) else None

        known, _ = await self.ledger.update_adapter(work.adapter, judge)
        return (
            RetryAfter(0.0) if known.disabled_reason is None else AdapterDisabled(work.adapter, known.disabled_reason)
        )

    async def _clear_cooldown(self, adapter: str) -> None:
        """Forget that an adapter was parked: a session of it has ended well that did not begin before that."""
        opened, now = AdapterUpdate(AdapterDocument(), "adapter.enabled", {}), self.clock.now()
        await self.ledger.update_adapter(
            adapter, lambda known: opened if known.cooldowns and not _is_cooling_down(known, now) else None
        )

    async def _end(
        self,
        work: ActiveAttempt,
        trigger: Trigger,
        finished: SessionResult,
        outcome: str,
        reason: str | None,
        details: JsonObject | None = None,
        *,
        writes: Sequence[Write] = (),
        events: Sequence[tuple[str, JsonObject]] = (),
        tasks: Mapping[str, TaskSpec] = _NO_TASKS,
        **changes: Any,
    ) -> None:
        document = self.ledger.task(work.task)
        attempts = document.with_attempt(
            ended=self.clock.now(),
            branch=finished.branch,
            outcome=outcome,
            reason=reason,
            is_kept=not finished.collected,
            folder=None if finished.folder is None else str(finished.folder),
            resumed=work.session.assignment.earlier is not None,
            discarded=finished.discarded[:_MAX_DISCARDED_PATHS],
            denied=finished.transcript.denials,
            **self.context.accounting.recorded(finished.transcript, document.attempts),
        )
        branch = finished.branch if work.turn.phase.writes else document.branch
        facts = {"outcome": outcome, "reason": reason, "branch": finished.branch, **(details or {})}
        changes = {"attempts": attempts, "branch": branch, "reason": reason, **changes}
        await self.ledger.change_all(trigger, {work.task: TaskUpdate(facts, changes, writes, events, tasks)})


def _end_events(work: ActiveAttempt, finished: SessionResult) -> Iterator[tuple[str, JsonObject]]:
    """Yield what a session's end has to be told of beside the end itself: events, and what they say."""
    for ref in finished.salvaged:
        yield "task.salvaged", {"branch": ref}
    for fault in finished.faults:
        yield "task.after_run_failed", {"reason": fault}
    for fault in finished.session_api_faults:
        yield "task.session_api_failed", {"reason": fault}
    for host in finished.denied_hosts:
        yield "task.host_denied", {"host": host}
    if (denials := finished.transcript.denials).count:
        facts = {"count": denials.count, "tools": [*denials.tools], "reason": str(denials)}
        yield "task.tools_denied", {"attempt": work.session.assignment.worktree.attempt, **facts}
    if finished.discarded:
        number = work.session.assignment.worktree.attempt
        yield "task.changes_discarded", {"attempt": number, "paths": list(finished.discarded[:MAX_EVENT_PATHS])}
    if not finished.collected:
        reason = "; ".join(("it holds what is on no branch", *finished.notes))
        yield "task.worktree_preserved", {"worktree": str(work.session.assignment.worktree.tree), "reason": reason}


def _conversation(document: TaskDocument, number: int | None, adapter: str) -> Conversation | None:
    """Return what a task's next attempt can go on with: the conversation of the attempt of a number.

    It must have been with the same adapter.
    """
    if number is None:
        return None
    one = document.attempts[number - 1]
    if one.adapter != adapter or one.session is None or one.folder is None:
        return None
    return Conversation(one.session, Path(one.folder))


def _is_cooling_down(adapter: AdapterDocument, now: float) -> bool:
    return adapter.cooldown_until is not None and adapter.cooldown_until > now
