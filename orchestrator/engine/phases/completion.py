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
from orchestrator.domain.runs.model import TaskDocument, known_cost
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.runs.phases import PhaseTrigger
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.workflow.handoff_kinds import Facts, Kind
from orchestrator.domain.workflow.handoffs import Delivery, Handoff, handed_over, last_json_block
from orchestrator.domain.workflow.mediation import Transformation, mediate
from orchestrator.domain.workflow.routing import (
    REJECTED,
    Phase,
    Workflow,
    carried_on,
    changed,
    onward,
    rejections,
    verdict_of,
    work_before,
)
from orchestrator.domain.workflow.violations import Violation
from orchestrator.engine.phases.expansion import expanded, told, waiting_for
from orchestrator.engine.phases.prompts import holds, told_errors, told_failure, told_findings
from orchestrator.engine.phases.start import Briefing, Turn
from orchestrator.engine.phases.values import PhaseInputs
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject, Write
from orchestrator.repo.git.checksums import checksums
from orchestrator.repo.git.runner import Git
from orchestrator.sessions.output.transcript import Transcript
from orchestrator.sessions.setup.handoff_file import Delivered, Malformed
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.system.clock import Clock

#: How often a session is asked to mend what it handed over.
REPAIRS: Final = 1
#: Findings that a reason names.
_NAMED: Final = 3


@dataclass(frozen=True, slots=True)
class Ended:
    """What a session that ended well left for its phase."""

    commit: str | None
    """What it built, where it was to change anything."""
    failed: CommandFailed | None
    """The command that its work is not done until."""
    file: Delivered | Malformed | None
    """What it wrote into the file for that."""
    tool: JsonObject | None
    """What it gave to the tool for that."""
    answer: str
    used: Transcript


@dataclass(frozen=True, slots=True)
class _Checked:
    """What was handed over, as its kind has it."""

    kind: Kind
    data: dict[str, Any]
    by: Delivery


@dataclass(frozen=True, slots=True)
class Concluded:
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
class Concluding:
    """Concludes the phases of one run's tasks; `git` runs in the trusted repository."""

    ledger: Ledger
    inputs: PhaseInputs
    git: Git
    clock: Clock
    transformations: Mapping[str, Transformation]

    def checker(
        self, task: str, spec: TaskSpec, phase: Phase
    ) -> Callable[[JsonObject], Awaitable[Sequence[str]]] | None:
        """Return what judges a result that a session hands over while it runs; None: it is to hand over nothing."""
        if phase.produces is None:
            return None

        async def check(data: JsonObject) -> Sequence[str]:
            # What it names of its work can be judged only when that is done.
            kind = self.inputs.kind(phase)
            checked = kind.check(self.ledger.redacted(data), Facts())
            found = checked.violations
            if checked.data is not None:
                planned = await self._planned(task, spec, phase, _Checked(kind, checked.data, "tool"))
                found = planned if isinstance(planned, Sequence) else ()
            return [str(one) for one in found]

        return check

    async def conclude(self, task: str, spec: TaskSpec, turn: Turn, session: Ended) -> Concluded | Failed:
        """Return what a session that ended well makes of its task; Failed where its phase has failed by that."""
        document, phase = self.ledger.task(task), turn.phase
        base = document.attempt.base
        if turn.workflow.is_plain:
            changes = {"commit": session.commit, "built": None, "start": None, "base": None, "feedback": None}
            return Concluded(Trigger.BUILD, "built", changes=changes)
        if session.failed is not None:
            return self._once_more(document, phase, session, base)
        checked = await self._handed_over(phase, session)
        if isinstance(checked, Sequence):
            return self._repaired(task, phase, session, base, checked)
        tasks = await self._planned(task, spec, phase, checked)
        if isinstance(tasks, Sequence):
            return self._repaired(task, phase, session, base, tasks)
        record: dict[str, Any] = {"ended": self.clock.now(), "reason": None}
        if session.commit is not None:
            record |= {"commit": session.commit, "base": base}
        return await self._completed(task, spec, turn, session, checked, record, tasks)

    async def _planned(
        self, task: str, spec: TaskSpec, phase: Phase, checked: _Checked | None
    ) -> Mapping[str, TaskSpec] | Sequence[Violation]:
        """Return the tasks that what was handed over becomes, or why it can't."""
        if phase.expand is None or checked is None:
            return {}
        return await expanded(self.ledger, task, spec, phase, checked.data, self.ledger.task(task).attempt.number)

    def _once_more(self, document: TaskDocument, phase: Phase, session: Ended, base: str) -> Concluded | Failed:
        """Have a phase's work mended that is not what it is to be done until."""
        failed, visit = session.failed, document.phases[-1]
        assert failed is not None, "there is something to mend"  # noqa: S101  the caller has seen it
        reason = failed.describe(f"on the work of phase {phase.name!r}")
        if visit.rounds >= phase.max_rounds:
            return Failed(FailureClass.CHECKS_FAILED, f"{reason}; no round is left of `max_rounds: {phase.max_rounds}`")
        told = told_failure(failed.command, failed.ended, failed.said, secrets.token_hex(8))
        return _repeated(document, session, base, FailureClass.CHECKS_FAILED, reason, told, rounds=visit.rounds + 1)

    def _repaired(
        self, task: str, phase: Phase, session: Ended, base: str, violations: Sequence[Violation]
    ) -> Concluded | Failed:
        """Have mended what a phase hands over."""
        document = self.ledger.task(task)
        visit = document.phases[-1]
        reason = f"what phase {phase.name!r} handed over is not valid: {'; '.join(map(str, violations))}"
        if visit.repairs >= REPAIRS:
            return Failed(FailureClass.INVALID_HANDOFF, reason)
        errors = told_errors([str(one) for one in violations], secrets.token_hex(8))
        repeated = _repeated(
            document, session, base, FailureClass.INVALID_HANDOFF, reason, errors, repairs=visit.repairs + 1
        )
        facts = {"task": task, "phase": phase.name, "violations": [one.to_json() for one in violations]}
        return replace(repeated, events=[("handoff.invalid", facts)])

    async def _completed(
        self,
        task: str,
        spec: TaskSpec,
        turn: Turn,
        session: Ended,
        checked: _Checked | None,
        record: dict[str, Any],
        tasks: Mapping[str, TaskSpec],
    ) -> Concluded | Failed:
        document, workflow, phase = self.ledger.task(task), turn.workflow, turn.phase
        verdict = None if checked is None else verdict_of(phase, checked.data)
        if verdict is not None:
            record["verdict"] = verdict
        outcome = "built" if session.commit is not None else "completed"
        handoff, following = None, None
        if verdict != REJECTED:
            following = await self._following(task, spec, workflow, phase, checked)
        if checked is not None:
            made = await self._handoff(task, phase, following, session, checked)
            if isinstance(made, Violation):
                return Failed(FailureClass.INVALID_HANDOFF, str(made))
            handoff = made
            record["handoff"] = handoff.id
        writes = [] if handoff is None else [self.ledger.handed_over(handoff)]
        events = [] if handoff is None else [_delivered(handoff)]
        carried = carried_on(workflow, document, phase)
        fresh: dict[str, Any] = {"failures": document.bounces, "feedback": None, **carried}
        if verdict == REJECTED and checked is not None:
            return self._rejected(task, turn, checked, record, writes, events)
        if phase.approve:
            phases = changed(document, PhaseTrigger.ASK, **record)
            return Concluded(Trigger.ASK, outcome, None, {}, {**fresh, "phases": phases}, writes, events)
        after = document.model_copy(
            update={"phases": changed(document, PhaseTrigger.COMPLETE, **record), "phase": None}
        )
        concluded = replace(self._onward(workflow, phase, after, following), outcome=outcome)
        if tasks:  # it goes on, or lands or is done, only once they have landed
            at = {name: concluded.changes[name] for name in ("phases", "phase")}
            changes = {**at, **waiting_for(self.ledger, task, tasks)}
            details = told(phase, tasks)
            concluded = replace(concluded, trigger=Trigger.EXPAND, details=details, changes=changes, tasks=tasks)
        return replace(concluded, changes={**fresh, **concluded.changes}, writes=writes, events=events)

    def _onward(self, workflow: Workflow, phase: Phase, after: TaskDocument, following: Phase | None) -> Concluded:
        """Return what a task comes to whose phase is complete: another follows, its work lands, or it is done."""
        if following is not None:
            changes = {"phases": after.phases, "phase": workflow.after(phase.name)[0].name}
            return Concluded(Trigger.ADVANCE, "", details={"next": following.name}, changes=changes)
        # The condition of what is left does not hold, or nothing is left.
        place = workflow.index(phase.name) + 1
        phases, _ = onward(workflow, after.phases, place, lambda *_: False, self.clock.now())
        work = work_before(workflow, after)
        if work is None:
            return Concluded(Trigger.FINISH, "", changes={"phases": phases, "phase": None})
        built = {"phases": phases, "phase": None, "commit": work.commit, "built": work.attempt}
        return Concluded(Trigger.BUILD, "", changes=built)

    async def _following(
        self, task: str, spec: TaskSpec, workflow: Workflow, phase: Phase, checked: _Checked | None
    ) -> Phase | None:
        """Return the phase that follows one which is complete; None where none is left."""
        values = await self.inputs.values(task, spec, workflow, phase)
        if checked is not None:
            values = values.with_produced(checked.kind.exports(checked.data), phase.name, checked.data)
        condition = partial(holds, values=values.known)
        try:
            return onward(workflow, (), workflow.index(phase.name) + 1, condition, self.clock.now())[1]
        except RefusedError:  # what can't be judged is the matter of the phase that it is about
            return workflow.after(phase.name)[0]

    def _rejected(
        self,
        task: str,
        turn: Turn,
        checked: _Checked,
        record: dict[str, Any],
        writes: Sequence[Write],
        events: Sequence[tuple[str, JsonObject]],
    ) -> Concluded | Failed:
        """Send work back to the phase that a review names, with what it found."""
        document, phase = self.ledger.task(task), turn.phase
        findings = checked.data.get("findings") or checked.data.get("summary") or ""
        phases = changed(document, PhaseTrigger.COMPLETE, **record)
        reason = f"phase {phase.name!r} rejected the work: {in_words(findings)}"
        if rejections(document, phase.name) >= phase.max_rounds:
            changes: dict[str, Any] = {"phases": phases, "phase": None, "failures": document.failures + 1}
            return Concluded(Trigger.FAIL, FailureClass.REJECTED, reason, {}, changes, writes, events)
        back = turn.workflow.sent_back_to(phase.name, document)
        changes = {
            "phases": phases,
            "phase": back.name,
            "start": turn.start,
            "base": turn.base,
            "feedback": told_findings(phase.name, findings, secrets.token_hex(8)),
            "failures": document.bounces,
        }
        details = {"next": back.name, "verdict": REJECTED}
        return Concluded(Trigger.REPEAT, "completed", reason, details, changes, writes, events)

    async def _handoff(
        self, task: str, phase: Phase, following: Phase | None, session: Ended, checked: _Checked
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
        costs = known_cost(attempts)
        used = session.used
        version = None
        if phase.handoff == "shared" and phase.key is not None:
            claims = self.ledger.claims
            guard = None if claims is None else claims.guard(task)
            writer = SessionName(self.ledger.run.id, task, document.attempt.number)
            version = (await self.inputs.sharing.put(phase.key, checked.data, writer=writer, claim=guard)).version
        tokens = sum(one.input_tokens + one.output_tokens for one in attempts) + used.input_tokens + used.output_tokens
        return handed_over(
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

    async def _handed_over(self, phase: Phase, session: Ended) -> _Checked | Sequence[Violation] | None:
        """Return what a session handed over, or what is wrong with it; None where nothing is to be."""
        if phase.produces is None:
            return None
        kind = self.inputs.kind(phase)
        found = delivered(session.file, session.tool, session.answer)
        if isinstance(found, Violation):
            return [found]
        data, by = found
        said = self.ledger.redacted(data)
        checked = kind.check(said, await self._facts(kind, said, session.commit))
        if checked.data is None:
            return checked.violations
        return _Checked(kind, checked.data, by)

    async def _facts(self, kind: Kind, data: JsonObject, commit: str | None) -> Facts:
        paths = kind.paths(data)
        if commit is None or not paths:
            return Facts()
        return Facts(await checksums(self.git, commit, paths))


class Phasing(NamedTuple):
    """How the phases of one run's tasks begin, and how they end."""

    briefing: Briefing
    concluding: Concluding


def delivered(
    file: Delivered | Malformed | None, tool: JsonObject | None, answer: str
) -> tuple[JsonObject, Delivery] | Violation:
    """Return what a session handed over, and how; or why that is nothing. The file counts first, then the tool."""
    match file:
        case Delivered(data):
            return data, "file"
        case Malformed(why, remedy):
            return Violation("handoff.file", "the result", why, remedy)
    if tool is not None:
        return tool, "tool"
    block = last_json_block(answer)
    if block.data is not None:
        return block.data, "answer"
    why = "; ".join(("nothing was handed over", *block.skipped))
    return Violation("handoff.missing", "the result", why, "write it to $COUNCIL_HANDOFF, as one JSON object")


def in_words(findings: Any) -> str:
    """Return the findings of a review on one line, or the first of them."""
    if not isinstance(findings, list | tuple):
        return str(findings)
    told = []
    for one in findings[:_NAMED]:
        place = ":".join(str(part) for part in (one.get("path"), one.get("line")) if part)
        told.append(f"{place} {one.get('message', '')}".strip())
    left = len(findings) - len(told)
    return "; ".join([*told, *([f"and {left} more"] if left > 0 else [])])


def _delivered(handoff: Handoff) -> tuple[str, JsonObject]:
    names = ("task", "kind", "protocol", "phase", "to", "digest", "by")
    return "handoff.delivered", {"handoff": handoff.id, **{name: getattr(handoff, name) for name in names}}


def _repeated(
    document: TaskDocument, session: Ended, base: str, outcome: FailureClass, reason: str, feedback: str, **visit: int
) -> Concluded:
    changes: dict[str, Any] = {"phases": changed(document, None, **visit), "feedback": feedback}
    if session.commit is not None:
        changes |= {"start": session.commit, "base": base}
    return Concluded(Trigger.REPEAT, outcome, reason, {}, changes)
