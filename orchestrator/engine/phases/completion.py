"""Complete a phase after its session: check its handoff, and choose the next step.

`domain.workflow.routing` decides which phase follows; this module collects its inputs, and the writes that accompany
the change of the task.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from orchestrator.domain.events.base import TaskEvent
from orchestrator.domain.events.phases import HandoffInvalid, HandoffSubmitted
from orchestrator.domain.events.tasks import (
    TaskAdvanced,
    TaskAwaitingApproval,
    TaskDone,
    TaskFailed,
    TaskPhaseRepeated,
    TaskQueued,
)
from orchestrator.domain.runs.model import TaskDocument, sum_known_cost
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.runs.phases import PhaseTrigger
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.wording import join_names
from orchestrator.domain.workflow.handoff_kinds import HandoffKind
from orchestrator.domain.workflow.handoffs import Delivery, Handoff, find_last_json_block, make_handoff
from orchestrator.domain.workflow.mediation import Transformation, mediate
from orchestrator.domain.workflow.routing import (
    REJECT_VERDICT,
    Workflow,
    change_last_visit,
    compute_next_start,
    count_rejections,
    find_earlier_work,
    find_next_phase,
    read_verdict,
)
from orchestrator.domain.workflow.violations import HandoffContext, Violation
from orchestrator.engine.phases.expansion import expand_task, expansion_changes, expansion_event
from orchestrator.engine.phases.prompts import (
    is_condition_met,
    render_command_failure,
    render_findings,
    render_handoff_errors,
)
from orchestrator.engine.phases.start import NextPhase, PhaseStarter
from orchestrator.engine.phases.values import PhaseInputs
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.tasks import handoff_write
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject, Write
from orchestrator.repo.git.blobs import compute_checksums
from orchestrator.repo.git.command import Git
from orchestrator.sessions.session import SessionResult
from orchestrator.sessions.setup.handoff_file import HandoffData, MalformedHandoff
from orchestrator.system.clock import Clock

#: How many times a session is asked to fix an invalid handoff.
MAX_HANDOFF_REPAIRS: Final = 1
#: The number of findings in a reason.
_MAX_NAMED_FINDINGS: Final = 3


@dataclass(frozen=True, slots=True)
class _CheckedHandoff:
    """A handoff that is valid for its kind."""

    kind: HandoffKind
    data: dict[str, Any]
    via: Delivery


@dataclass(frozen=True, slots=True)
class PhaseCompleter:
    """Completes the phases of one run's tasks; `git` runs in the trusted repository."""

    ledger: Ledger
    inputs: PhaseInputs
    git: Git
    clock: Clock
    transformations: Mapping[str, Transformation]

    def make_handoff_checker(
        self, task: str, spec: TaskSpec, phase: Phase
    ) -> Callable[[JsonObject], Awaitable[Sequence[str]]] | None:
        """Return a validator of a running session's result; None if its phase has none."""
        if phase.kind is None:
            return None

        async def check(data: JsonObject) -> Sequence[str]:
            # Without checksums: the files in a result are final only when the session has ended.
            kind = self.inputs.kind(phase)
            checked = kind.check(self.ledger.writer.redactor.json(data), HandoffContext())
            violations = checked.violations
            if checked.data is not None:
                planned = await self._expand_plan(task, spec, phase, _CheckedHandoff(kind, checked.data, "tool"))
                violations = planned if isinstance(planned, Sequence) else ()
            return [str(violation) for violation in violations]

        return check

    async def complete(
        self, task: str, spec: TaskSpec, current: NextPhase, session: SessionResult
    ) -> TaskUpdate | Failed:
        """Return the outcome of a phase whose session succeeded, which may be a failure."""
        document, phase = self.ledger.task(task), current.phase
        base = document.attempt.base
        if current.workflow.is_default:
            changes = {"commit": session.commit, "built_by": None, "start": None, "base": None, "feedback": None}
            return TaskUpdate(Trigger.BUILD, TaskQueued(outcome="built"), changes)
        if session.failed_command is not None:
            return self._repeat_after_failed_command(document, phase, session, base)
        checked = await self._read_handoff(phase, session)
        if isinstance(checked, Sequence):
            return self._request_repair(task, phase, session, base, checked)
        tasks = await self._expand_plan(task, spec, phase, checked)
        if isinstance(tasks, Sequence):
            return self._request_repair(task, phase, session, base, tasks)
        record: dict[str, Any] = {"ended": self.clock.now(), "reason": None}
        if session.commit is not None:
            record |= {"commit": session.commit, "base": base}
        return await self._complete_phase(task, spec, current, session, checked, record, tasks)

    async def _expand_plan(
        self, task: str, spec: TaskSpec, phase: Phase, checked: _CheckedHandoff | None
    ) -> Mapping[str, TaskSpec] | Sequence[Violation]:
        """Return the tasks created from a plan, or the violations that prevent it."""
        if phase.expand is None or checked is None:
            return {}
        return await expand_task(self.ledger, task, spec, phase, checked.data, self.ledger.task(task).attempt.number)

    def _repeat_after_failed_command(
        self, document: TaskDocument, phase: Phase, session: SessionResult, base: str
    ) -> TaskUpdate | Failed:
        """Repeat a phase whose `until` command failed, with its output as feedback."""
        failed, visit = session.failed_command, document.phases[-1]
        assert failed is not None, "only called if a command failed"  # noqa: S101  the caller has seen it
        reason = failed.describe(f"on the work of phase {phase.name!r}")
        if visit.rounds >= phase.max_rounds:
            return Failed(FailureClass.CHECKS_FAILED, f"{reason}; no rounds left (`max_rounds: {phase.max_rounds}`)")
        feedback = render_command_failure(failed.command, failed.how_it_ended, failed.output, secrets.token_hex(8))
        return _repeat_phase(
            document, session, base, FailureClass.CHECKS_FAILED, reason, feedback, rounds=visit.rounds + 1
        )

    def _request_repair(
        self, task: str, phase: Phase, session: SessionResult, base: str, violations: Sequence[Violation]
    ) -> TaskUpdate | Failed:
        """Repeat a phase whose handoff is invalid, with its errors as feedback."""
        document = self.ledger.task(task)
        visit = document.phases[-1]
        reason = f"invalid handoff from phase {phase.name!r}: {'; '.join(map(str, violations))}"
        if visit.repairs >= MAX_HANDOFF_REPAIRS:
            return Failed(FailureClass.INVALID_HANDOFF, reason)
        errors = render_handoff_errors([str(violation) for violation in violations], secrets.token_hex(8))
        repeated = _repeat_phase(
            document, session, base, FailureClass.INVALID_HANDOFF, reason, errors, repairs=visit.repairs + 1
        )
        listed = [violation.to_json() for violation in violations]
        return repeated._replace(events=[HandoffInvalid(phase=phase.name, violations=listed)])

    async def _complete_phase(
        self,
        task: str,
        spec: TaskSpec,
        current: NextPhase,
        session: SessionResult,
        checked: _CheckedHandoff | None,
        record: dict[str, Any],
        tasks: Mapping[str, TaskSpec],
    ) -> TaskUpdate | Failed:
        document, workflow, phase = self.ledger.task(task), current.workflow, current.phase
        verdict = None if checked is None else read_verdict(phase, checked.data)
        if verdict is not None:
            record["verdict"] = verdict
        outcome = "built" if session.commit is not None else "completed"
        handoff, following = None, None
        if verdict != REJECT_VERDICT:
            following = await self._find_next_phase(task, spec, workflow, phase, checked)
        if checked is not None:
            built = await self._build_handoff(task, phase, following, session, checked)
            if isinstance(built, Violation):
                return Failed(FailureClass.INVALID_HANDOFF, str(built))
            handoff = built
            record["handoff"] = handoff.id
        writes = [] if handoff is None else [handoff_write(handoff)]
        events = [] if handoff is None else [_submitted_event(handoff)]
        start = compute_next_start(workflow, document, phase)
        reset: dict[str, Any] = {"failures": document.bounces, "feedback": None, **start}
        if verdict == REJECT_VERDICT and checked is not None:
            return self._reject(task, current, checked, record, writes, events)
        if phase.approve:
            phases = change_last_visit(document, PhaseTrigger.REQUEST_APPROVAL, **record)
            asked = TaskAwaitingApproval(outcome=outcome)
            return TaskUpdate(Trigger.REQUEST_APPROVAL, asked, {**reset, "phases": phases}, writes, events)
        after = document.model_copy(
            update={"phases": change_last_visit(document, PhaseTrigger.COMPLETE, **record), "phase": None}
        )
        update = self._advance(workflow, phase, after, following, outcome)
        trigger, event, changes = update.trigger, update.event, update.changes
        if tasks:  # the task advances, lands or finishes only after these have landed
            position = {name: changes[name] for name in ("phases", "phase")}
            trigger, event = Trigger.EXPAND, expansion_event(phase, tasks).replace(outcome=outcome)
            changes = {**position, **expansion_changes(self.ledger, task, tasks)}
        return TaskUpdate(trigger, event, {**reset, **changes}, writes, events, tasks)

    def _advance(
        self, workflow: Workflow, phase: Phase, after: TaskDocument, following: Phase | None, outcome: str
    ) -> TaskUpdate:
        """Return a completed phase's outcome: next phase, queued landing or finished task."""
        if following is not None:
            changes = {"phases": after.phases, "phase": workflow.after(phase.name)[0].name}
            return TaskUpdate(Trigger.ADVANCE, TaskAdvanced(outcome=outcome, next=following.name), changes)
        # Record the remaining phases, if any, as skipped: their conditions are not met.
        index = workflow.index(phase.name) + 1
        phases, _ = find_next_phase(workflow, after.phases, index, lambda *_: False, self.clock.now())
        work = find_earlier_work(workflow, after)
        if work is None:
            return TaskUpdate(Trigger.FINISH, TaskDone(outcome=outcome), {"phases": phases, "phase": None})
        built = {"phases": phases, "phase": None, "commit": work.commit, "built_by": work.attempt}
        return TaskUpdate(Trigger.BUILD, TaskQueued(outcome=outcome), built)

    async def _find_next_phase(
        self, task: str, spec: TaskSpec, workflow: Workflow, phase: Phase, checked: _CheckedHandoff | None
    ) -> Phase | None:
        """Return the phase that follows a completed one; None if it was the last."""
        values = await self.inputs.values(task, spec, workflow, phase)
        if checked is not None:
            values = values.with_produced(checked.kind.exports(checked.data), phase.name, checked.data)
        condition = partial(is_condition_met, values=values.known)
        try:
            return find_next_phase(workflow, (), workflow.index(phase.name) + 1, condition, self.clock.now())[1]
        except RefusedError:  # reported when the phase with the failing condition starts
            return workflow.after(phase.name)[0]

    def _reject(
        self,
        task: str,
        current: NextPhase,
        checked: _CheckedHandoff,
        record: dict[str, Any],
        writes: Sequence[Write],
        events: Sequence[TaskEvent],
    ) -> TaskUpdate | Failed:
        """Send rejected work back to its `on_reject` phase, with the review's findings."""
        document, phase = self.ledger.task(task), current.phase
        findings = checked.data.get("findings") or checked.data.get("summary") or ""
        phases = change_last_visit(document, PhaseTrigger.COMPLETE, **record)
        reason = f"phase {phase.name!r} rejected the work: {summarize_findings(findings)}"
        if count_rejections(document, phase.name) >= phase.max_rounds:
            changes: dict[str, Any] = {"phases": phases, "phase": None, "failures": document.failures + 1}
            failed = TaskFailed(outcome=FailureClass.REJECTED, reason=reason)
            return TaskUpdate(Trigger.FAIL, failed, changes, writes, events)
        target = current.workflow.find_rejection_target(phase.name, document)
        changes = {
            "phases": phases,
            "phase": target.name,
            "start": current.start,
            "base": current.base,
            "feedback": render_findings(phase.name, findings, secrets.token_hex(8)),
            "failures": document.bounces,
        }
        repeated = TaskPhaseRepeated(outcome="completed", reason=reason, phase=target.name, verdict=REJECT_VERDICT)
        return TaskUpdate(Trigger.REPEAT, repeated, changes, writes, events)

    async def _build_handoff(
        self, task: str, phase: Phase, following: Phase | None, session: SessionResult, checked: _CheckedHandoff
    ) -> Handoff | Violation:
        document, mediation = self.ledger.task(task), None
        if phase.handoff == "mediated" and phase.mediator is None:
            to_kind = None if following is None else following.kind or following.name
            mediated = mediate(checked.data, checked.kind.name, to_kind, self.transformations, phase.transform)
            if isinstance(mediated, Violation):
                return mediated
            mediation = mediated
        earlier = [attempt for attempt in document.attempts if attempt.number != document.attempt.number]
        earlier_cost = sum_known_cost(earlier)
        used = session.transcript
        version = None
        if phase.handoff == "shared" and phase.key is not None:
            claims = self.ledger.claims
            guard = None if claims is None else claims.guard(task)
            writer = SessionName(self.ledger.run.id, task, document.attempt.number)
            version = (await self.inputs.shared_values.put(phase.key, checked.data, writer=writer, claim=guard)).version
        tokens = sum(one.input_tokens + one.output_tokens for one in earlier) + used.input_tokens + used.output_tokens
        return make_handoff(
            self.ledger.run.id,
            task,
            document.attempt.number,
            checked.data,
            mediation=mediation,
            kind=checked.kind.name,
            protocol=phase.handoff,
            phase=phase.name,
            to=None if following is None else following.name,
            time=self.clock.now(),
            summary=used.last_message or "",
            tokens=tokens,
            cost=None if earlier_cost is None and used.cost is None else (earlier_cost or 0.0) + (used.cost or 0.0),
            via=checked.via,
            key=phase.key,
            version=version,
        )

    async def _read_handoff(self, phase: Phase, session: SessionResult) -> _CheckedHandoff | Sequence[Violation] | None:
        """Return a session's handoff, or its violations; None if the phase has no result."""
        if phase.kind is None:
            return None
        kind = self.inputs.kind(phase)
        delivery = select_delivery(session.handoff_file, session.submitted, session.message)
        if isinstance(delivery, Violation):
            return [delivery]
        data, via = delivery
        redacted = self.ledger.writer.redactor.json(data)
        checked = kind.check(redacted, await _facts(self.git, kind, redacted, session.commit))
        if checked.data is None:
            return checked.violations
        return _CheckedHandoff(kind, checked.data, via)


class PhaseHandlers(NamedTuple):
    """Starts and completes the phases of one run's tasks."""

    starter: PhaseStarter
    completer: PhaseCompleter


async def _facts(git: Git, kind: HandoffKind, data: JsonObject, commit: str | None) -> HandoffContext:
    paths = kind.paths(data)
    if commit is None or not paths:
        return HandoffContext()
    return HandoffContext(await compute_checksums(git, commit, paths))


def select_delivery(
    file: HandoffData | MalformedHandoff | None, tool: JsonObject | None, message: str
) -> tuple[JsonObject, Delivery] | Violation:
    """Return a session's result and its means of delivery, or a violation.

    The file takes precedence over the tool.
    """
    match file:
        case HandoffData(data):
            return data, "file"
        case MalformedHandoff(reason, remedy):
            return Violation("handoff.file", "the result", reason, remedy)
    if tool is not None:
        return tool, "tool"
    block = find_last_json_block(message)
    if block.data is not None:
        return block.data, "message"
    problem = "; ".join(("no result was submitted", *block.skipped))
    return Violation("handoff.missing", "the result", problem, "write it to $COUNCIL_HANDOFF as one JSON object")


def summarize_findings(findings: Any) -> str:
    """Return the first findings of a review on one line."""
    if not isinstance(findings, list | tuple):
        return str(findings)
    return join_names([_summarize_finding(finding) for finding in findings], _MAX_NAMED_FINDINGS, "; ")


def _summarize_finding(finding: Any) -> str:
    if not isinstance(finding, dict):
        return str(finding)
    location = ":".join(str(part) for part in (finding.get("path"), finding.get("line")) if part)
    return f"{location} {finding.get('message', '')}".strip()


def _submitted_event(handoff: Handoff) -> HandoffSubmitted:
    return HandoffSubmitted(
        task=handoff.task,
        handoff=handoff.id,
        kind=handoff.kind,
        protocol=handoff.protocol,
        phase=handoff.phase,
        to=handoff.to,
        digest=handoff.digest,
        via=handoff.via,
    )


def _repeat_phase(
    document: TaskDocument,
    session: SessionResult,
    base: str,
    outcome: FailureClass,
    reason: str,
    feedback: str,
    **visit: int,
) -> TaskUpdate:
    changes: dict[str, Any] = {"phases": change_last_visit(document, None, **visit), "feedback": feedback}
    if session.commit is not None:
        changes |= {"start": session.commit, "base": base}
    repeated = TaskPhaseRepeated(outcome=outcome, reason=reason, phase=document.phases[-1].phase)
    return TaskUpdate(Trigger.REPEAT, repeated, changes)
