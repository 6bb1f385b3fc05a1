"""Verify the consistency of a task's workflow records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from orchestrator.domain.documents.json_values import is_empty_value
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.phases import OPEN_STATUSES, PASSED_STATUSES, PhaseRecord, PhaseStatus
from orchestrator.domain.runs.statuses import FINAL_STATUSES, LANDING_STATUSES, TaskStatus
from orchestrator.domain.sessions.contexts import SessionContext, SessionStatus
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS, HandoffKind
from orchestrator.domain.workflow.handoffs import Handoff, handoff_id, is_intact
from orchestrator.domain.workflow.phase_context import get_handoff_kind
from orchestrator.domain.workflow.routing import Workflow, latest_visit, read_verdict
from orchestrator.domain.workflow.violations import HandoffContext, Violation, run_check

#: Seconds that a session may continue to run after it reported to be done.
IDLE_LIMIT: Final = 300.0

_RETRY_REMEDY: Final = "repeat the phase with `council retry TASK --from PHASE`"
_RESTORE_REMEDY: Final = "written by another program: restore a checkpoint with `council checkpoint restore CHECKPOINT`"


@dataclass(frozen=True, slots=True)
class WorkflowRecord:
    """All records of one task and its workflow."""

    run: str
    task: str
    workflow: Workflow
    document: TaskDocument
    handoffs: Mapping[str, Handoff] = field(default_factory=dict)
    """All handoffs of the task, by id."""
    sessions: Sequence[SessionContext] = ()
    """The contexts that its sessions reported."""
    kinds: Mapping[str, HandoffKind] = field(default_factory=lambda: HANDOFF_KINDS)
    now: float = 0.0
    """Wall-clock seconds."""
    checksums: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    """By handoff id: file checksums in its tree, as in `HandoffContext`."""

    @property
    def visits(self) -> Sequence[tuple[str, Phase, PhaseRecord]]:
        """The visits of known phases, each with its description and its phase."""
        known = {phase.name: phase for phase in self.workflow.phases}
        counted: dict[str, int] = {}
        visits = []
        for record in self.document.phases:
            counted[record.phase] = counted.get(record.phase, 0) + 1
            name = f"task {self.task!r}, phase {record.phase!r}, visit {counted[record.phase]}"
            if record.phase in known:
                visits.append((name, known[record.phase], record))
        return visits

    @property
    def location(self) -> str:
        """The description of the task."""
        return f"task {self.task!r}"


#: A rule over all records of one task: yields its violations.
Constraint = Callable[[WorkflowRecord], Iterable[Violation]]


def check_workflow(facts: WorkflowRecord, constraints: Mapping[str, Constraint]) -> list[Violation]:
    """Return violations of the built-in rules and of plugin `constraints`, by name."""
    violations = [violation for rule in _RULES for violation in rule(facts)]
    for name, constraint in constraints.items():
        violations += run_check(f"constraint.{name}", f"constraint {name!r}", partial(constraint, facts))
    return violations


def _check_visits(facts: WorkflowRecord) -> Iterator[Violation]:
    """Check that visits have known phases, in sequence, and match the task's status."""
    known = {phase.name for phase in facts.workflow.phases}
    task = facts.document
    for number, record in enumerate(task.phases):
        location = f"{facts.location}, phase {record.phase!r}"
        if record.phase not in known:
            yield Violation("phases.unknown", location, "the workflow has no such phase", _RESTORE_REMEDY)
        is_last = number == len(task.phases) - 1
        if record.status in OPEN_STATUSES and not is_last:
            yield Violation("phases.open", location, "unfinished, but a later visit was started", _RESTORE_REMEDY)
        if record.status not in OPEN_STATUSES and record.ended is None:
            yield Violation("phases.time", location, f"{record.status}, but without an end time", _RESTORE_REMEDY)
    if task.phases:
        last = task.phases[-1]
        location = f"{facts.location}, phase {last.phase!r}"
        if last.status in OPEN_STATUSES and task.status in FINAL_STATUSES:
            yield Violation("phases.open", location, f"unfinished, but the task is {task.status}", _RESTORE_REMEDY)
        if (last.status is PhaseStatus.AWAITING_APPROVAL) != (task.status is TaskStatus.AWAITING_APPROVAL):
            message = f"{last.status}, but the task is {task.status}"
            yield Violation(
                "phases.approval", location, message, "a task waits if and only if its phase awaits approval"
            )


#: Statuses after the last phase. Not LANDED: the work may have been found on the target earlier.
_AFTER_LAST_PHASE: Final = LANDING_STATUSES | {TaskStatus.DONE}


def _check_end(facts: WorkflowRecord) -> Iterator[Violation]:
    """Check that a finished task has finished phases and has landed its work."""
    task = facts.document
    if facts.workflow.is_default or task.status not in _AFTER_LAST_PHASE:
        return
    for phase in facts.workflow.phases:
        record = latest_visit(task, phase.name)
        if record is None or record.status not in PASSED_STATUSES:
            message = f"{'not started' if record is None else record.status}, but the task is {task.status}"
            yield Violation("phases.end", f"{facts.location}, phase {phase.name!r}", message, _RETRY_REMEDY)
        elif phase.writes and record.status is PhaseStatus.COMPLETED and task.status is TaskStatus.DONE:
            message = "the phase writes, but the task is done without a landing"
            yield Violation("phases.landing", f"{facts.location}, phase {phase.name!r}", message, _RETRY_REMEDY)


def _check_attempts(facts: WorkflowRecord) -> Iterator[Violation]:
    """Check that each attempt is in at most one visit, of its own phase.

    Checkpoints remove visits.
    """
    attempts = {attempt.number: attempt for attempt in facts.document.attempts}
    seen: set[int] = set()
    for location, phase, record in facts.visits:
        for number in record.attempts:
            if number not in attempts:
                yield Violation("attempts.missing", location, f"its attempt {number} is not recorded", _RESTORE_REMEDY)
            elif attempts[number].phase != phase.name:
                message = f"its attempt {number} belongs to {attempts[number].phase!r}"
                yield Violation("attempts.phase", location, message, _RESTORE_REMEDY)
            if number in seen:
                yield Violation(
                    "attempts.twice", location, f"its attempt {number} also belongs to another visit", _RESTORE_REMEDY
                )
            seen.add(number)


def _check_outputs(facts: WorkflowRecord) -> Iterator[Violation]:
    """Check that completed visits have a valid handoff if required."""
    for location, phase, record in facts.visits:
        if record.status not in {PhaseStatus.COMPLETED, PhaseStatus.AWAITING_APPROVAL}:
            continue
        if phase.kind is None:
            if record.handoff is not None:
                yield Violation("outputs.extra", location, "unexpected handoff", _RESTORE_REMEDY)
            continue
        handoff = None if record.handoff is None else facts.handoffs.get(record.handoff)
        if handoff is None:
            message = f"{record.status}, but its {phase.kind} handoff is missing"
            yield Violation("outputs.missing", location, message, _RETRY_REMEDY)
            continue
        if record.verdict != (verdict := read_verdict(phase, handoff.data)):
            message = f"its verdict is {record.verdict!r}, but its handoff has {verdict!r}"
            yield Violation("outputs.verdict", location, message, _RESTORE_REMEDY)
        yield from _check_data(facts, location, phase, handoff)


def _check_data(facts: WorkflowRecord, location: str, phase: Phase, handoff: Handoff) -> Iterator[Violation]:
    if handoff.kind != phase.kind:
        message = f"expected a handoff of kind {phase.kind!r}, got {handoff.kind!r}"
        yield Violation("outputs.kind", location, message, _RETRY_REMEDY)
        return
    kind = get_handoff_kind(phase, facts.kinds)
    if kind is None:
        message = f"unknown kind {phase.kind!r}"
        yield Violation("outputs.unknown", location, message, "install the plugin that provides it")
        return
    checked = kind.check(handoff.data, HandoffContext(facts.checksums.get(handoff.id, {})))
    for violation in checked.violations:
        yield replace(violation, location=f"{location}, {violation.location}")


def _check_handoffs(facts: WorkflowRecord) -> Iterator[Violation]:
    """Check that handoffs are intact, and match their sources and receipts."""
    sources = {record.handoff: record for _, _, record in facts.visits if record.handoff is not None}
    for name, handoff in facts.handoffs.items():
        location = f"handoff {name}"
        if not is_intact(handoff):
            yield Violation("chain.digest", location, "its digest does not match its contents", _RETRY_REMEDY)
        if name != handoff.id or handoff.id != handoff_id(facts.run, facts.task, handoff.attempt):
            yield Violation("chain.name", location, f"its id is {handoff.id}", _RESTORE_REMEDY)
        record = sources.get(name)
        if record is None:
            if facts.document.current is None:
                yield Violation("chain.source", location, "no visit refers to this handoff", _RESTORE_REMEDY)
        elif handoff.phase != record.phase or handoff.attempt not in record.attempts:
            message = f"its source is attempt {handoff.attempt} at {handoff.phase!r}"
            yield Violation(
                "chain.source",
                location,
                f"{message}, but phase {record.phase!r} refers to this handoff",
                _RESTORE_REMEDY,
            )
        if handoff.to is not None and handoff.to not in {phase.name for phase in facts.workflow.phases}:
            yield Violation(
                "chain.target", location, f"its receiver {handoff.to!r} is not in the workflow", _RESTORE_REMEDY
            )
        yield from _check_receipts(facts, location, handoff)
    for number, (location, _, record) in enumerate(facts.visits):
        yield from _check_received(facts, location, record)
        yield from _check_lost_values(facts, number, location, record)


def _check_lost_values(facts: WorkflowRecord, number: int, location: str, record: PhaseRecord) -> Iterator[Violation]:
    """Check that a visit with values from a handoff has received that handoff."""
    last: dict[str, tuple[Phase, Handoff]] = {}
    for _, phase, earlier in facts.visits[:number]:
        handoff = facts.handoffs.get(earlier.handoff or "")
        if earlier.status is PhaseStatus.COMPLETED and handoff is not None:
            last[phase.name] = phase, handoff
    for phase, handoff in last.values():
        kind = get_handoff_kind(phase, facts.kinds)
        if kind is None or handoff.to != record.phase or handoff.id in record.received or handoff.mediation is not None:
            continue
        # The exports of a plugin's kind run plugin code.
        yield from run_check("chain.lost", location, partial(_check_given_values, location, record, handoff, kind))


def _check_given_values(location: str, record: PhaseRecord, handoff: Handoff, kind: HandoffKind) -> Iterator[Violation]:
    exported = {name for name, value in kind.exports(handoff.data).items() if not is_empty_value(value)}
    if record.inputs is not None and exported & set(record.inputs.keys):
        message = f"has values of handoff {handoff.id}, but no record of its receipt"
        yield Violation("chain.lost", location, message, _RESTORE_REMEDY)


def _check_receipts(facts: WorkflowRecord, location: str, handoff: Handoff) -> Iterator[Violation]:
    for receipt in handoff.receipts:
        if receipt.digest != handoff.digest:
            message = f"phase {receipt.phase!r} received different contents: {receipt.digest}"
            yield Violation("chain.received", location, message, _RETRY_REMEDY)
        is_known = any(
            record.phase == receipt.phase
            and record.attempts[:1] == (receipt.attempt,)
            and handoff.id in record.received
            for record in facts.document.phases
        )
        if not is_known and facts.document.current is None:
            message = f"attempt {receipt.attempt} at {receipt.phase!r} has a receipt, but does not list this handoff"
            yield Violation("chain.received", location, message, _RESTORE_REMEDY)


def _check_received(facts: WorkflowRecord, location: str, record: PhaseRecord) -> Iterator[Violation]:
    for name in record.received:
        handoff = facts.handoffs.get(name)
        if handoff is None:
            yield Violation("chain.missing", location, f"received handoff {name}, which does not exist", _RETRY_REMEDY)
            continue
        if not any(
            (receipt.phase, receipt.attempt) == (record.phase, *record.attempts[:1]) for receipt in handoff.receipts
        ):
            message = f"received handoff {name}, which has no receipt for it"
            yield Violation("chain.received", location, message, _RESTORE_REMEDY)
        if record.attempts and handoff.attempt >= record.attempts[0]:
            message = f"received handoff {name}, which was created after its start"
            yield Violation("chain.order", location, message, _RESTORE_REMEDY)


def _check_sessions(facts: WorkflowRecord) -> Iterator[Violation]:
    """Check that awaited sessions are not idle, and that each has an attempt."""
    attempts = {attempt.number: attempt for attempt in facts.document.attempts}
    for session in facts.sessions:
        if session.task != facts.task or session.run != facts.run:
            continue
        location = f"session {session.session}"
        attempt = attempts.get(session.attempt)
        is_done = session.status is SessionStatus.DONE
        if attempt is None:
            yield Violation(
                "sessions.stray", location, "its task has no such attempt", "remove leftovers with `council clean`"
            )
        elif attempt.ended is None and is_done and facts.now - session.updated > IDLE_LIMIT:
            message = "reported to be done but has not ended, and its task still waits for it"
            task = f"{facts.task} --run {facts.run}"
            remedy = f"stop it with `council cancel {task}`, then `council retry {task}`"
            yield Violation("sessions.idle", location, message, remedy)


_RULES: Final[Sequence[Constraint]] = (
    _check_visits,
    _check_end,
    _check_attempts,
    _check_outputs,
    _check_handoffs,
    _check_sessions,
)
