"""Prepare and run single attempts of tasks.

An attempt is recorded before it starts, its session runs, and its outcome is recorded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.domain.events.tasks import TaskClaimLost, TaskFailed, TaskMessageDelivered, TaskStartDelayed
from orchestrator.domain.runs.model import PAUSED, Attempt, TaskDocument
from orchestrator.domain.runs.outcome import Failed, SessionLimits
from orchestrator.domain.runs.statuses import LANDING_STATUSES, SUCCESS_STATUSES, Trigger
from orchestrator.domain.scheduling.claims import ClaimVerdict, should_try
from orchestrator.domain.scheduling.path_ownership import OwnershipConflict
from orchestrator.domain.sessions.messages import due_messages, find_conversation_attempts, render_messages
from orchestrator.domain.sessions.notes import format_notes
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.names import entry_of_adapter
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.wording import join_names
from orchestrator.engine.attaching import no_conversation
from orchestrator.engine.phases.base_selection import BaseSelector
from orchestrator.engine.phases.completion import PhaseHandlers
from orchestrator.engine.phases.start import NextPhase
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.active_attempts import ActiveAttempt, AttemptEnd
from orchestrator.engine.scheduler.attempt_results import AttemptRecorder, end_events
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.session_api.details import SessionWorkspace
from orchestrator.engine.session_api.locks import StopChecks
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import message_write, read_messages
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import (
    ClaimLost,
    GitError,
    GitKilled,
    HandoffCorrupted,
    HubDamaged,
    RefusedError,
    TargetMissing,
    VersionConflict,
    WorkMissing,
)
from orchestrator.protocols import Capability, Guard, SessionEvent, ToolCall, UsageReport, Write
from orchestrator.repo.intake.diffs import diff_commits_bounded
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.repo.worktrees.preserved import try_to_preserve
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.assignment import Assignment, Conversation
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.sessions.output.log_files import log_path
from orchestrator.sessions.program import SessionProgram
from orchestrator.sessions.session import Session, SessionResult
from orchestrator.sessions.terminal import UserTerminal
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds after which commits that could not be fetched are fetched again.
_REMOTE_RETRY_DELAY = 5.0
#: Seconds between readings of the output of a session that probes an adapter.
_PROBE_INTERVAL = 1.0


@dataclass(frozen=True, slots=True)
class AttemptRunner:
    """Prepares and performs the attempts of one run."""

    ledger: Ledger
    context: RunContext
    pool: SlotPool
    budgets: Budgets
    base_selector: BaseSelector
    phase_handlers: PhaseHandlers
    recorder: AttemptRecorder

    async def prepare(
        self,
        task: str,
        spec: TaskSpec,
        next_phase: NextPhase,
        adapter: str,
        *,
        terminal: UserTerminal | None = None,
        is_probe: bool = False,
    ) -> ActiveAttempt:
        """Return the next attempt of a task, with one of its adapters.

        Nothing is created yet. With a `terminal`, its earlier conversation opens there, without a prompt.
        `is_probe`: its session probes the adapter after a cooldown.
        """
        document = self.ledger.task(task)
        notes = await self._notes(task, spec)
        diff = await self._diff(next_phase)
        can_resume = Capability.RESUME in self.context.adapters[adapter].capabilities()
        can_resume = can_resume and not _needs_new_conversation(document, next_phase)
        if can_resume:
            next_phase = replace(next_phase, new_conversation=_explain_new_conversation(document, next_phase, adapter))
        next_phase = await self.phase_handlers.starter.build_prompt(task, spec, next_phase, diff)
        assert next_phase.base is not None, "its start is selected"  # noqa: S101  the caller has selected it
        conversation = _conversation(document, next_phase.earlier, adapter) if can_resume else None
        received_by = find_conversation_attempts(document.attempts, None if conversation is None else conversation.id)
        messages = due_messages(await read_messages(self.ledger.writer.store, self.ledger.run.id, task), received_by)
        if terminal is not None:  # its stop hook delivers them
            messages = []
        rendered = render_messages(messages)
        timeout = next_phase.phase.timeout or spec.timeout
        assignment = Assignment(
            worktree=Worktree(self.context.hub, self.ledger.run.id, task, len(document.attempts) + 1),
            base=next_phase.base,
            start=next_phase.start,
            prompt=next_phase.prompt,
            context="\n\n".join(filter(None, (notes, next_phase.suffix, rendered))) or None,
            adapter=self.context.adapters[adapter],
            adapter_name=adapter,
            reach=self.context.configs[adapter].access,
            limits=SessionLimits(timeout, spec.idle_timeout),
            max_file=spec.max_file,
            instructions=spec.instructions,
            mcp_servers=self.context.mcp_servers,
            max_cost=self.budgets.cost_left(task, spec),
            earlier_conversation=conversation,
            follow_up="\n\n".join(filter(None, (notes, next_phase.follow_up, rendered))) or None,
            task_prompt=spec.prompt,
            phase=None if next_phase.workflow.is_default else next_phase.phase.name,
            writes=next_phase.phase.writes,
            terminal=terminal,
        )
        session = Session(self.context.tools, self.pool, assignment, partial(self.ledger.confirm_claims, task))
        messages_sent = tuple(message.id for message in messages)
        return ActiveAttempt(task, spec, adapter, session, next_phase, messages_sent, is_probe)

    async def _diff(self, next_phase: NextPhase) -> str | None:
        """Return the diff that a phase starts with, or that conflicts with the target.

        None if the phase's template can't show it.
        """
        base, commit = next_phase.base, next_phase.start if next_phase.phase.shows_diff else None
        if next_phase.conflicting is not None:
            base, commit = next_phase.conflicting.base, next_phase.conflicting.commit
        if base is None or commit is None:
            return None
        return self.context.tools.redactor.text(await diff_commits_bounded(self.context.git, base, commit))

    async def perform(self, active: ActiveAttempt) -> AttemptEnd | None:
        """Record the attempt, run it, record its end, and clean up.

        Return None if another orchestrator owns the task or its paths, or if its adapter is in cooldown for another
        run; the ledger then has the current state of the task.
        """
        if not await self._begin(active):
            return None
        failpoint("attempt.recorded")
        number = active.session.assignment.worktree.attempt
        if active.spec.checks or active.next_phase.phase.until:
            self.pool.prewarm_checks(active.session.assignment.base)
        finished = self._apply_budget(active, await self._run(active))
        work = finished.work
        if not work.complete:
            assignment = active.session.assignment
            notes = await try_to_preserve(self.context.git, assignment.worktree, assignment.start or assignment.base)
            finished = replace(finished, work=replace(work, notes=(*work.notes, *notes)))
        try:
            end = await self.recorder.record(active, finished)
        except ClaimLost as error:
            lost = TaskClaimLost(task=active.task, attempt=number, orchestrator=error.owner, branch=finished.branch)
            await self.ledger.note(lost)
            await active.session.release(saved=work.complete)
            return None
        failpoint("attempt.ended")
        await self.budgets.count(active.task, active.spec, self.ledger.task(active.task).attempts[number - 1])
        for event in end_events(active, finished):
            await self.ledger.note(event)
        await active.session.release(saved=work.complete)
        return end

    async def _begin(self, active: ActiveAttempt) -> bool:
        """Record an attempt with its claims.

        Return False if another orchestrator has the task or its paths, or if the state of its adapter has changed.
        """
        if await self.ledger.adapters.adopt_cooldown(active.adapter):
            return False
        assignment, conflicting = active.session.assignment, active.next_phase.conflicting
        attempt = Attempt(
            number=assignment.worktree.attempt,
            adapter=active.adapter,
            base=assignment.base,
            start=assignment.start,
            stacked_on=dict(active.next_phase.stacked_on),
            started=self.ledger.writer.clock.now(),
            secrets=SessionProgram(self.context.tools, assignment).secret_names(),
            phase=assignment.phase,
            restart_reason="" if conflicting is None else conflicting.describe(),
        )
        if assignment.terminal is not None and assignment.earlier_conversation is not None:
            attempt = attempt.model_copy(update={"attached": True, "session": assignment.earlier_conversation.id})
        active.began = self.ledger.writer.clock.monotonic()
        earlier = self.ledger.task(active.task).attempts
        if len(earlier) + 1 != attempt.number:  # another orchestrator has started an attempt since then
            return False
        update = self.phase_handlers.starter.build_start_update(
            active.task, active.next_phase, attempt, (*earlier, attempt)
        )
        has_writes = active.spec.owns or active.messages or active.is_probe
        writes = partial(self._start_writes, active) if has_writes else None
        if not await self.ledger.start(active.task, update, writes):
            return False
        for message in active.messages:
            await self.ledger.note(TaskMessageDelivered(task=active.task, attempt=attempt.number, message=message))
        return True

    async def _start_writes(self, active: ActiveAttempt, claim: Guard) -> Sequence[Write] | None:
        """Return writes that claim a task's paths and adapter, and deliver its messages.

        None if it can't start now, or if its prompt is outdated because a message was withdrawn.
        """
        probes = await self.ledger.adapters.plan_probe(active.adapter, active.task) if active.is_probe else []
        paths = None if probes is None else await self._paths(active, claim)
        if probes is None or paths is None:
            return None
        writes = [*paths, *probes]
        if not active.messages:
            return writes
        run, number = self.ledger.run.id, active.session.assignment.worktree.attempt
        messages = await read_messages(self.ledger.writer.store, run, active.task)
        due = [message.with_attempt(number) for message in messages if message.id in active.messages]
        if len(due) < len(active.messages):
            return None
        return [*writes, *(message_write(run, active.task, message) for message in due)]

    async def _run(self, active: ActiveAttempt) -> SessionResult:
        """Run the session of an attempt within its budget, with the session API served."""
        assignment, session_service = active.session.assignment, self.context.session_service
        log = log_path(self.context.tools.logs, active.task, assignment.worktree.attempt, "stdout")
        async with AsyncExitStack() as stack:
            watched = self.budgets.watched(
                active.task, assignment.worktree.attempt, active.spec, assignment.adapter, log, active.stop_for_budget
            )
            await stack.enter_async_context(watched)
            if active.is_probe:
                proven = partial(self.ledger.adapters.clear_cooldown, active.adapter)
                follower = OutputFollower(assignment.adapter, log)
                await stack.enter_async_context(_watch_probe(follower, self.context.tools.clock, proven))
            if session_service is None:
                return await active.session.run()
            check_handoff = self.phase_handlers.completer.make_handoff_checker(
                active.task, active.spec, active.next_phase.phase
            )
            is_gated = active.spec.stop_gate and active.next_phase.phase.writes and assignment.terminal is None
            service = session_service.serve_session(
                active.name,
                active.adapter,
                self._session_workspace(active),
                validate_handoff=check_handoff,
                stop_checks=StopChecks(active.spec.checks, active.spec.checks_timeout) if is_gated else None,
            )
            await stack.enter_async_context(service)
            finished = await active.session.run()
            active.handed_over = session_service.submitted_handoff(active.name)
        return finished

    def _session_workspace(self, active: ActiveAttempt) -> SessionWorkspace:
        assignment, tools = active.session.assignment, self.context.tools
        return SessionWorkspace(
            assignment.worktree,
            assignment.base,
            assignment.adapter,
            tools.logs,
            tools.intake_rules(assignment.max_file),
        )

    async def _notes(self, task: str, spec: TaskSpec) -> str | None:
        """Return the notes of earlier sessions for the next one.

        They are notes of the same task, or about paths that it owns.
        """
        if self.context.session_service is None:
            return None
        return format_notes(await self.context.session_service.notes.find_relevant(task, spec.owns))

    async def _paths(self, active: ActiveAttempt, claim: Guard) -> Sequence[Write] | None:
        """Return writes that claim a task's paths; None if its base is outdated."""
        owns, orchestrator = active.spec.owns, self.ledger.orchestrators.me.id
        planned = await self.context.registry.plan(active.name, owns, orchestrator=orchestrator, claim=claim)
        # The previous owner may have landed since the start point was read; from now on no other task can land there.
        base = active.session.assignment.base
        if isinstance(planned, OwnershipConflict) or (
            active.next_phase.is_newest and await self.base_selector.is_outdated(owns, base)
        ):
            return None
        return planned

    def _apply_budget(self, active: ActiveAttempt, finished: SessionResult) -> SessionResult:
        """Return the result of a session.

        If a limit stopped it, attribute that limit to the matching budget.
        """
        if not isinstance(finished.outcome, Failed) or finished.outcome.failure is not FailureClass.LIMIT:
            return finished
        reached = self.budgets.find_reached(active.task, active.spec, finished.transcript)
        if reached is None:
            return finished
        active.is_budget_exhausted = reached.scope == "task"
        return replace(finished, outcome=reached.outcome)


@dataclass(frozen=True, slots=True)
class AttemptPreparer:
    """Prepares the attempts of the tasks that the board starts."""

    local: LocalWork
    attempts: AttemptRunner

    async def prepare(self, task: str, tips: dict[bool, str]) -> ActiveAttempt | TaskUpdate | None:
        """Return the next attempt of a task; None if the task can no longer start.

        For a task that needs no further session, return an update instead, which queues its work to land or marks it
        done. `tips` caches commits for tasks that start together.
        """
        spec = await self.attempts.ledger.definitions.spec(task)
        if self.attempts.budgets.is_halted():
            return None
        if (merged := self.attempts.ledger.run.merges) is not None:  # its work is already built
            reason = f"merge runs start no sessions: `council merge {merged}` merges again"
            await self._refuse(task, Failed(FailureClass.INVALID, reason))
            return None
        if await self._waits(task, spec):
            return None
        obstacle = self.attempts.budgets.find_obstacle(task, spec) or await self._check_retry_limit(task)
        if obstacle is not None:
            await self._refuse(task, obstacle)
            return None
        try:
            next_phase = await self.attempts.phase_handlers.starter.next_phase(task, spec)
            if isinstance(next_phase, TaskUpdate):
                return next_phase
            based = await self._select_base(task, spec, next_phase, tips)
            if based is None or not self.local.board.adapters.is_running(task):  # cancelled in the meantime
                return None
            board = self.local.board
            is_probe = board.adapters.is_probe(task)
            return await self.attempts.prepare(task, spec, based, board.adapter_of(task), is_probe=is_probe)
        except (RefusedError, HandoffCorrupted) as error:  # an invalid template, condition or handoff
            await self._refuse(task, Failed(FailureClass.INVALID, str(error)))
            return None

    async def _select_base(
        self, task: str, spec: TaskSpec, next_phase: NextPhase, tips: dict[bool, str]
    ) -> NextPhase | None:
        """Return a phase with the commits that its session starts from; None if the task must wait for them."""
        ledger, context = self.attempts.ledger, self.attempts.context
        try:
            await ledger.fetch_work(task, next_phase.start, context.refs(f"work/{task}"))
            based = await self.attempts.base_selector.select(task, spec, next_phase, tips)
        except (GitKilled, HubDamaged, TargetMissing):  # a pause does not fix these
            raise
        except (GitError, WorkMissing) as error:
            await ledger.writer.note_once(TaskStartDelayed(task=task, reason=str(error)), task)
            self.local.board.wait(task, context.tools.clock.monotonic() + _REMOTE_RETRY_DELAY)
            return None
        ledger.writer.forget(TaskStartDelayed, task)
        if based is None:  # offered again when one of its needs has landed, or is built again
            self.local.board.pause(task, keeps_paths=False)
        return based

    async def _waits(self, task: str, spec: TaskSpec) -> bool:
        """Return True, and update the board, if a task must wait for others that changed since it was chosen."""
        ledger = self.attempts.ledger
        met = LANDING_STATUSES | SUCCESS_STATUSES
        missing = [need for need in spec.built_needs if ledger.task(need).status not in met]
        if self.local.has_open_subtasks(task):  # subtasks that another process created
            await ledger.tasks.load_new()
        elif not missing:
            return False
        for name in (*missing, task):
            self.local.show(name)
        self.local.wake()
        return True

    async def prepare_attached(self, task: str, terminal: UserTerminal) -> ActiveAttempt:
        """Return the attempt in which a user continues the last conversation of a task.

        It starts from the work of that conversation, as it is. Raises RefusedError if the task has no conversation, or
        no phase is left.
        """
        ledger, attempts = self.attempts.ledger, self.attempts
        spec, conversation = await ledger.definitions.spec(task), ledger.task(task).last_conversation
        next_phase = await attempts.phase_handlers.starter.next_phase(task, spec)
        if conversation is None or isinstance(next_phase, TaskUpdate):
            raise no_conversation(ledger.run.id, task)
        if next_phase.start is None or next_phase.base is None:
            based = await attempts.base_selector.select(task, spec, next_phase, {})
            if based is None:
                raise RefusedError(
                    f"task {task!r} starts on the work of {join_names(spec.built_needs)}, which can't be merged",
                    "wait until these tasks have landed",
                )
            next_phase = based
        else:
            next_phase = replace(next_phase, stacked_on=ledger.task(task).stack_of(next_phase.base))
        following = replace(next_phase, earlier=conversation.number, is_newest=False)
        return await attempts.prepare(task, spec, following, conversation.adapter, terminal=terminal)

    async def _check_retry_limit(self, task: str) -> Failed | None:
        """Return the failure if a task has no retries left, else None; takeovers count."""
        claims, timing = self.attempts.ledger.claims, self.attempts.ledger.orchestrators.timing
        if claims is None:
            return None
        claim = await claims.read(task)
        if claim is None or should_try(claim, None, timing, ignored_reason=None) is not ClaimVerdict.RETRIES_EXHAUSTED:
            return None
        reason = f"tried {claim.retries + 1} times, including by orchestrators that exited early"
        retry = f"`council retry {task} --run {self.attempts.ledger.run.id}`"
        return Failed(FailureClass.CRASHED, f"{reason}: find out why these exited, then {retry}")

    async def _refuse(self, task: str, failure: Failed) -> None:
        """Fail a task that must not have another session."""
        ledger, failed = self.attempts.ledger, TaskFailed(outcome=failure.failure, reason=failure.reason)
        try:
            await ledger.change(task, Trigger.FAIL, failed, reason=failure.reason, refused=failure.failure)
        except (ClaimLost, VersionConflict):  # another orchestrator was first
            await ledger.tasks.refresh(task)
            self.local.sync_task(task)
        else:
            self.local.board.ended(task)
        self.local.wake()


def _needs_new_conversation(document: TaskDocument, next_phase: NextPhase) -> bool:
    """Return whether a session repeats conflicting work without the conversation: that one ended, and wasn't paused."""
    if next_phase.conflicting is None:
        return False
    return next_phase.earlier is None or document.attempts[next_phase.earlier - 1].outcome != PAUSED


def _conversation(document: TaskDocument, number: int | None, adapter: str) -> Conversation | None:
    """Return the conversation of an attempt to resume.

    None if the attempt used another adapter.
    """
    if number is None:
        return None
    attempt = document.attempts[number - 1]
    if attempt.adapter != adapter or attempt.session is None or attempt.folder is None:
        return None
    return Conversation(attempt.session, Path(attempt.folder))


def _explain_new_conversation(document: TaskDocument, next_phase: NextPhase, adapter: str) -> str:
    """Return why a session can't continue a conversation that took place on another account; empty otherwise."""
    if next_phase.earlier is None:
        return ""
    earlier = document.attempts[next_phase.earlier - 1]
    if earlier.adapter == adapter or entry_of_adapter(earlier.adapter) != entry_of_adapter(adapter):
        return ""
    return f"new conversation, because that of session {earlier.number} is on {earlier.adapter}"


@asynccontextmanager
async def _watch_probe(
    follower: OutputFollower, clock: Clock, on_response: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Call `on_response` once, as soon as a session reports a response of its model during the body."""

    async def watch() -> None:
        while not any(map(_is_response, await anyio.to_thread.run_sync(follower.read) or ())):
            await clock.wait(anyio.Event(), clock.monotonic() + _PROBE_INTERVAL)
        await on_response()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        yield
        group.cancel_scope.cancel()


def _is_response(event: SessionEvent) -> bool:
    """Return whether only a response of the model causes an event; CLIs print their own errors as messages."""
    return isinstance(event, ToolCall) or (isinstance(event, UsageReport) and event.output_tokens > 0)
