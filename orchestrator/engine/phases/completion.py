"""What a session that ended well makes of its task: what it handed over, and what follows from that.

Which phase follows which is decided in `domain.workflow.routing`; here its facts are brought together, and what is to be
written with the change of the task.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, NamedTuple

from orchestrator.config.model import TaskSpec
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.lifecycle import Trigger
from orchestrator.domain.runs.model import TaskDocument, sum_known_cost
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.runs.phases import PhaseTrigger
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.workflow.handoff_kinds import HandoffKind
from orchestrator.domain.workflow.handoffs import Delivery, Handoff, find_last_json_block, make_handoff
from orchestrator.domain.workflow.mediation import Transformation, mediate
from orchestrator.domain.workflow.routing import (
    REJECT_VERDICT,
    Phase,
    Workflow,
    change_last_visit,
    compute_next_start,
    count_rejections,
    find_earlier_work,
    find_next_phase,
    read_verdict,
)
from orchestrator.domain.workflow.violations import HandoffFacts, Violation
from orchestrator.engine.phases.expansion import describe_expansion, expand_task, expansion_changes
from orchestrator.engine.phases.prompts import (
    is_condition_met,
    render_command_failure,
    render_findings,
    render_handoff_errors,
)
from orchestrator.engine.phases.start import NextPhase, PhaseStarter
from orchestrator.engine.phases.values import PhaseInputs
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject, Write
from orchestrator.repo.git.checksums import compute_checksums
from orchestrator.repo.git.command import Git
from orchestrator.sessions.output.transcript import Transcript
from orchestrator.sessions.setup.handoff_file import HandoffData, MalformedHandoff
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.system.clock import Clock

#: How often a session is asked to mend what it handed over.
MAX_HANDOFF_REPAIRS: Final = 1
#: Findings that a reason names.
_MAX_NAMED_FINDINGS: Final = 3


@dataclass(frozen=True, slots=True)
class EndedSession:
    """What a session that ended well left for its phase."""

    commit: str | None
    """What it built, where it was to change anything."""
    failed: CommandFailed | None
    """The command that its work is not done until."""
    file: HandoffData | MalformedHandoff | None
    """What it wrote into the file for that."""
    tool: JsonObject | None
    """What it gave to the tool for that."""
    answer: str
    used: Transcript


@dataclass(frozen=True, slots=True)
class _CheckedHandoff:
    """What was handed over, as its kind has it."""

    kind: HandoffKind
    data: dict[str, Any]
    by: Delivery


@dataclass(frozen=True, slots=True)
class PhaseCompletion:
    """What a session that ended well makes of its task: the trigger, and what is recorded with it."""

    trigger: Trigger
    outcome: str
    reason: str | None = None
    details: JsonObject = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    writes: Sequence[Write] = ()
    events: Sequence[tuple[str, JsonObject]] = ()
    tasks: Mapping[str, TaskSpec] = field(default_factory=dict)
    """What its plan became."""


@dataclass(frozen=True, slots=True)
class PhaseCompleter:
    """Concludes the phases of one run's tasks; `git` runs in the trusted repository."""

    ledger: Ledger
    inputs: PhaseInputs
    git: Git
    clock: Clock
    transformations: Mapping[str, Transformation]

    def make_handoff_checker(
        self, task: str, spec: TaskSpec, phase: Phase
    ) -> Callable[[JsonObject], Awaitable[Sequence[str]]] | None:
        """Return what judges a result that a session hands over while it runs; None: it is to hand over nothing."""
        if phase.produces is None:
            return None

        async def check(data: JsonObject) -> Sequence[str]:
            # What it names of its work can be judged only when that is done.
            kind = self.inputs.kind(phase)
            checked = kind.check(self.ledger.redact(data), HandoffFacts())
            found = checked.violations
            if checked.data is not None:
                planned = await self._expand_plan(task, spec, phase, _CheckedHandoff(kind, checked.data, "tool"))
                found = planned if isinstance(planned, Sequence) else ()
            return [str(one) for one in found]

        return check

    async def conclude(
        self, task: str, spec: TaskSpec, turn: NextPhase, session: EndedSession
    ) -> PhaseCompletion | Failed:
        """Return what a session that ended well makes of its task; Failed where its phase has failed by that."""
        document, phase = self.ledger.task(task), turn.phase
        base = document.attempt.base
        if turn.workflow.is_default:
            changes = {"commit": session.commit, "built": None, "start": None, "base": None, "feedback": None}
            return PhaseCompletion(Trigger.BUILD, "built", changes=changes)
        if session.failed is not None:
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
        return await self._complete_phase(task, spec, turn, session, checked, record, tasks)

    async def _expand_plan(
        self, task: str, spec: TaskSpec, phase: Phase, checked: _CheckedHandoff | None
    ) -> Mapping[str, TaskSpec] | Sequence[Violation]:
        """Return the tasks that what was handed over becomes, or why it can't."""
        if phase.expand is None or checked is None:
            return {}
        return await expand_task(self.ledger, task, spec, phase, checked.data, self.ledger.task(task).attempt.number)

    def _repeat_after_failed_command(
        self, document: TaskDocument, phase: Phase, session: EndedSession, base: str
    ) -> PhaseCompletion | Failed:
        """Have a phase's work mended that is not what it is to be done until."""
        failed, visit = session.failed, document.phases[-1]
        assert failed is not None, "there is something to mend"
        reason = failed.describe(f"on the work of phase {phase.name!r}")
        if visit.rounds >= phase.max_rounds:
            return Failed(FailureClass.CHECKS_FAILED, f"{reason}; no round is left of `max_rounds: {phase.max_rounds}`")
        told = render_command_failure(failed.command, failed.ended, failed.said, secrets.token_hex(8))
        return _repeat_phase(document, session, base, FailureClass.CHECKS_FAILED, reason, told, rounds=visit.rounds + 1)

    def _request_repair(
        self, task: str, phase: Phase, session: EndedSession, base: str, violations: Sequence[Violation]
    ) -> PhaseCompletion | Failed:
        """Have mended what a phase hands over."""
        document = self.ledger.task(task)
        visit = document.phases[-1]
        reason = f"what phase {phase.name!r} handed over is not valid: {'; '.join(map(str, violations))}"
        if visit.repairs >= MAX_HANDOFF_REPAIRS:
            return Failed(FailureClass.INVALID_HANDOFF, reason)
        errors = render_handoff_errors([str(one) for one in violations], secrets.token_hex(8))
        repeated = _repeat_phase(
            document, session, base, FailureClass.INVALID_HANDOFF, reason, errors, repairs=visit.repairs + 1
        )
        facts = {"task": task, "phase": phase.name, "violations": [one.to_json() for one in violations]}
        return replace(repeated, events=[("handoff.invalid", facts)])

    async def _complete_phase(
        self,
        task: str,
        spec: TaskSpec,
        turn: NextPhase,
        session: EndedSession,
        checked: _CheckedHandoff | None,
        record: dict[str, Any],
        tasks: Mapping[str, TaskSpec],
    ) -> PhaseCompletion | Failed:
        document, workflow, phase = self.ledger.task(task), turn.workflow, turn.phase
        verdict = None if checked is None else read_verdict(phase, checked.data)
        if verdict is not None:
            record["verdict"] = verdict
        outcome = "built" if session.commit is not None else "completed"
        handoff, following = None, None
        if verdict != REJECT_VERDICT:
            following = await self._find_next_phase(task, spec, workflow, phase, checked)
        if checked is not None:
            made = await self._build_handoff(task, phase, following, session, checked)
            if isinstance(made, Violation):
                return Failed(FailureClass.INVALID_HANDOFF, str(made))
            handoff = made
            record["handoff"] = handoff.id
        writes = [] if handoff is None else [self.ledger.handed_over(handoff)]
        events = [] if handoff is None else [_delivered_event(handoff)]
        carried = compute_next_start(workflow, document, phase)
        fresh: dict[str, Any] = {"failures": document.bounces, "feedback": None, **carried}
        if verdict == REJECT_VERDICT and checked is not None:
            return self._send_back(task, turn, checked, record, writes, events)
        if phase.approve:
            phases = change_last_visit(document, PhaseTrigger.ASK, **record)
            return PhaseCompletion(Trigger.ASK, outcome, None, {}, {**fresh, "phases": phases}, writes, events)
        after = document.model_copy(
            update={"phases": change_last_visit(document, PhaseTrigger.COMPLETE, **record), "phase": None}
        )
        concluded = replace(self._advance(workflow, phase, after, following), outcome=outcome)
        if tasks:  # it goes on, or lands or is done, only once they have landed
            at = {name: concluded.changes[name] for name in ("phases", "phase")}
            changes = {**at, **expansion_changes(self.ledger, task, tasks)}
            details = describe_expansion(phase, tasks)
            concluded = replace(concluded, trigger=Trigger.EXPAND, details=details, changes=changes, tasks=tasks)
        return replace(concluded, changes={**fresh, **concluded.changes}, writes=writes, events=events)

    def _advance(
        self, workflow: Workflow, phase: Phase, after: TaskDocument, following: Phase | None
    ) -> PhaseCompletion:
        """Return what a task comes to whose phase is complete: another follows, its work lands, or it is done."""
        if following is not None:
            changes = {"phases": after.phases, "phase": workflow.after(phase.name)[0].name}
            return PhaseCompletion(Trigger.ADVANCE, "", details={"next": following.name}, changes=changes)
        # The condition of what is left does not hold, or nothing is left.
        place = workflow.index(phase.name) + 1
        phases, _ = find_next_phase(workflow, after.phases, place, lambda *_: False, self.clock.now())
        work = find_earlier_work(workflow, after)
        if work is None:
            return PhaseCompletion(Trigger.FINISH, "", changes={"phases": phases, "phase": None})
        built = {"phases": phases, "phase": None, "commit": work.commit, "built": work.attempt}
        return PhaseCompletion(Trigger.BUILD, "", changes=built)

    async def _find_next_phase(
        self, task: str, spec: TaskSpec, workflow: Workflow, phase: Phase, checked: _CheckedHandoff | None
    ) -> Phase | None:
        """Return the phase that follows one which is complete; None where none is left."""
        values = await self.inputs.values(task, spec, workflow, phase)
        if checked is not None:
            values = values.with_produced(checked.kind.exports(checked.data), phase.name, checked.data)
        condition = partial(is_condition_met, values=values.known)
        try:
            return find_next_phase(workflow, (), workflow.index(phase.name) + 1, condition, self.clock.now())[1]
        except RefusedError:  # what can't be judged is the matter of the phase that it is about
            return workflow.after(phase.name)[0]

    def _send_back(
        self,
        task: str,
        turn: NextPhase,
        checked: _CheckedHandoff,
        record: dict[str, Any],
        writes: Sequence[Write],
        events: Sequence[tuple[str, JsonObject]],
    ) -> PhaseCompletion | Failed:
        """Send work back to the phase that a review names, with what it found."""
        document, phase = self.ledger.task(task), turn.phase
        findings = checked.data.get("findings") or checked.data.get("summary") or ""
        phases = change_last_visit(document, PhaseTrigger.COMPLETE, **record)
        reason = f"phase {phase.name!r} rejected the work: {summarize_findings(findings)}"
        if count_rejections(document, phase.name) >= phase.max_rounds:
            changes: dict[str, Any] = {"phases": phases, "phase": None, "failures": document.failures + 1}
            return PhaseCompletion(Trigger.FAIL, FailureClass.REJECTED, reason, {}, changes, writes, events)
        back = turn.workflow.find_rejection_target(phase.name, document)
        changes = {
            "phases": phases,
            "phase": back.name,
            "start": turn.start,
            "base": turn.base,
            "feedback": render_findings(phase.name, findings, secrets.token_hex(8)),
            "failures": document.bounces,
        }
        details = {"next": back.name, "verdict": REJECT_VERDICT}
        return PhaseCompletion(Trigger.REPEAT, "completed", reason, details, changes, writes, events)

    async def _build_handoff(
        self, task: str, phase: Phase, following: Phase | None, session: EndedSession, checked: _CheckedHandoff
    ) -> Handoff | Violation:
        document, mediation = self.ledger.task(task), None
        if phase.handoff == "mediated" and phase.mediator is None:
            to_kind = None if following is None else following.produces or following.name
            named = phase.transform
            made = mediate(checked.data, checked.kind.name, to_kind, self.transformations, named)
            if isinstance(made, Violation):
                return made
            mediation = made
        attempts = [one for one in document.attempts if one.number != document.attempt.number]
        costs = sum_known_cost(attempts)
        used = session.used
        version = None
        if phase.handoff == "shared" and phase.key is not None:
            claims = self.ledger.claims
            guard = None if claims is None else claims.guard(task)
            writer = SessionName(self.ledger.run.id, task, document.attempt.number)
            version = (await self.inputs.shared_values.put(phase.key, checked.data, writer=writer, claim=guard)).version
        tokens = sum(one.input_tokens + one.output_tokens for one in attempts) + used.input_tokens + used.output_tokens
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
            summary=used.words or "",
            tokens=tokens,
            cost=None if costs is None and used.cost is None else (costs or 0.0) + (used.cost or 0.0),
            by=checked.by,
            key=phase.key,
            version=version,
        )

    async def _read_handoff(self, phase: Phase, session: EndedSession) -> _CheckedHandoff | Sequence[Violation] | None:
        """Return what a session handed over, or what is wrong with it; None where nothing is to be."""
        if phase.produces is None:
            return None
        kind = self.inputs.kind(phase)
        found = select_delivery(session.file, session.tool, session.answer)
        if isinstance(found, Violation):
            return [found]
        data, by = found
        said = self.ledger.redact(data)
        checked = kind.check(said, await self._facts(kind, said, session.commit))
        if checked.data is None:
            return checked.violations
        return _CheckedHandoff(kind, checked.data, by)

    async def _facts(self, kind: HandoffKind, data: JsonObject, commit: str | None) -> HandoffFacts:
        paths = kind.paths(data)
        if commit is None or not paths:
            return HandoffFacts()
        return HandoffFacts(await compute_checksums(self.git, commit, paths))


class PhaseHandlers(NamedTuple):
    """How the phases of one run's tasks begin, and how they end."""

    starter: PhaseStarter
    completer: PhaseCompleter


def select_delivery(
    file: HandoffData | MalformedHandoff | None, tool: JsonObject | None, answer: str
) -> tuple[JsonObject, Delivery] | Violation:
    """Return what a session handed over, and how; or why that is nothing. The file counts first, then the tool."""
    match file:
        case HandoffData(data):
            return data, "file"
        case MalformedHandoff(why, remedy):
            return Violation("handoff.file", "the result", why, remedy)
    if tool is not None:
        return tool, "tool"
    block = find_last_json_block(answer)
    if block.data is not None:
        return block.data, "answer"
    why = "; ".join(("nothing was handed over", *block.skipped))
    return Violation("handoff.missing", "the result", why, "write it to $COUNCIL_HANDOFF, as one JSON object")


def summarize_findings(findings: Any) -> str:
    """Return the findings of a review on one line, or the first of them."""
    if not isinstance(findings, list | tuple):
        return str(findings)
    told = []
    for one in findings[:_MAX_NAMED_FINDINGS]:
        place = ":".join(str(part) for part in (one.get("path"), one.get("line")) if part)
        told.append(f"{place} {one.get('message', '')}".strip())
    left = len(findings) - len(told)
    return "; ".join([*told, *([f"and {left} more"] if left > 0 else [])])


def _delivered_event(handoff: Handoff) -> tuple[str, JsonObject]:
    names = ("task", "kind", "protocol", "phase", "to", "digest", "by")
    return "handoff.delivered", {"handoff": handoff.id, **{name: getattr(handoff, name) for name in names}}


def _repeat_phase(
    document: TaskDocument,
    session: EndedSession,
    base: str,
    outcome: FailureClass,
    reason: str,
    feedback: str,
    **visit: int,
) -> PhaseCompletion:
    changes: dict[str, Any] = {"phases": change_last_visit(document, None, **visit), "feedback": feedback}
    if session.commit is not None:
        changes |= {"start": session.commit, "base": base}
    return PhaseCompletion(Trigger.REPEAT, outcome, reason, {}, changes)
