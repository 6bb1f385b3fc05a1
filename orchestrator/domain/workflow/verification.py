"""Whether what is recorded of a task's way through its workflow agrees with itself: rules over all of it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from orchestrator.domain.documents.json_values import says_nothing
from orchestrator.domain.runs.model import FINAL, TaskDocument, TaskStatus
from orchestrator.domain.runs.phases import OPEN, PASSED, PhaseRecord, PhaseStatus
from orchestrator.domain.sessions.contexts import SessionContext, SessionStatus
from orchestrator.domain.workflow.handoff_kinds import KINDS, Facts, Kind
from orchestrator.domain.workflow.handoffs import Handoff, handoff_id, is_intact
from orchestrator.domain.workflow.phase_context import kind_of
from orchestrator.domain.workflow.routing import Phase, Workflow, latest, verdict_of
from orchestrator.domain.workflow.violations import Violation, found_by

#: Seconds that a session may still run after it has said that it is done.
IDLE_AFTER: Final = 300.0

_MENDED: Final = "`council retry TASK --from PHASE` does it once more"
_EDITED: Final = "something else than `council` has written it: `council checkpoint restore` goes back to how it was"


@dataclass(frozen=True, slots=True)
class WorkflowFacts:
    """All that is recorded of one task and its workflow."""

    run: str
    task: str
    workflow: Workflow
    document: TaskDocument
    handoffs: Mapping[str, Handoff] = field(default_factory=dict)
    """All of the task, by id."""
    sessions: Sequence[SessionContext] = ()
    """What its sessions say of themselves."""
    kinds: Mapping[str, Kind] = field(default_factory=lambda: KINDS)
    now: float = 0.0
    """Wall-clock seconds."""
    checksums: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    """By the id of a handoff: the checksums of files as `Facts` has them, in the tree that it is about."""

    @property
    def visits(self) -> Sequence[tuple[str, Phase, PhaseRecord]]:
        """The visits of phases that the workflow has, each with how it is called, and its phase."""
        known = {phase.name: phase for phase in self.workflow.phases}
        counted: dict[str, int] = {}
        found = []
        for record in self.document.phases:
            counted[record.phase] = counted.get(record.phase, 0) + 1
            name = f"task {self.task!r}, phase {record.phase!r}, visit {counted[record.phase]}"
            if record.phase in known:
                found.append((name, known[record.phase], record))
        return found

    @property
    def place(self) -> str:
        """How the task is called."""
        return f"task {self.task!r}"


#: A rule over one task's whole way: yields what breaks it.
Constraint = Callable[[WorkflowFacts], Iterable[Violation]]


def check_workflow(facts: WorkflowFacts, constraints: Mapping[str, Constraint]) -> list[Violation]:
    """Return what breaks a rule: one of ours, or one of the `constraints` that plugins bring, by name."""
    found = [violation for rule in _RULES for violation in rule(facts)]
    for name, constraint in constraints.items():
        found += found_by(f"constraint.{name}", f"constraint {name!r}", partial(constraint, facts))
    return found


def _records_fit(facts: WorkflowFacts) -> Iterator[Violation]:
    """Visits are of phases that there are, one after the other, and stand as the task does."""
    known = {phase.name for phase in facts.workflow.phases}
    task = facts.document
    for number, record in enumerate(task.phases):
        place = f"{facts.place}, phase {record.phase!r}"
        if record.phase not in known:
            yield Violation("phases.unknown", place, "the workflow has no such phase", _EDITED)
        is_last = number == len(task.phases) - 1
        if record.status in OPEN and not is_last:
            yield Violation("phases.open", place, "it goes on, and another was begun after it", _EDITED)
        if record.status not in OPEN and record.ended is None:
            yield Violation("phases.time", place, f"it is {record.status} and has no end", _EDITED)
        if record.started is not None and record.ended is not None and record.ended < record.started:
            yield Violation("phases.time", place, "it ended before it began", _EDITED)
    if task.phases:
        last = task.phases[-1]
        place = f"{facts.place}, phase {last.phase!r}"
        if last.status in OPEN and task.status in FINAL:
            yield Violation("phases.open", place, f"it goes on, and the task is {task.status}", _EDITED)
        if (last.status is PhaseStatus.AWAITING) != (task.status is TaskStatus.WAITING):
            what = f"it is {last.status}, and the task is {task.status}"
            yield Violation("phases.approval", place, what, "only a phase that waits for a person lets its task wait")


#: Where a task has all of its phases behind it. What has landed may have been found on the target before.
_THROUGH: Final = frozenset({TaskStatus.QUEUED, TaskStatus.CHECKING, TaskStatus.LANDING, TaskStatus.DONE})


def _end_fits(facts: WorkflowFacts) -> Iterator[Violation]:
    """A task is through when its phases are; one that has work is done only when that has landed."""
    task = facts.document
    if facts.workflow.is_plain or task.status not in _THROUGH:
        return
    for phase in facts.workflow.phases:
        record = latest(task, phase.name)
        if record is None or record.status not in PASSED:
            what = f"it is {'not begun' if record is None else record.status}, and the task is {task.status}"
            yield Violation("phases.end", f"{facts.place}, phase {phase.name!r}", what, _MENDED)
        elif phase.writes and record.status is PhaseStatus.COMPLETED and task.status is TaskStatus.DONE:
            what = "it writes, and the task is done without having landed"
            yield Violation("phases.landing", f"{facts.place}, phase {phase.name!r}", what, _MENDED)


def _attempts_fit(facts: WorkflowFacts) -> Iterator[Violation]:
    """Each attempt is part of one visit at most, as a checkpoint takes visits back, and of the phase that it says."""
    attempts = {one.number: one for one in facts.document.attempts}
    seen: set[int] = set()
    for place, phase, record in facts.visits:
        for number in record.attempts:
            if number not in attempts:
                yield Violation("attempts.missing", place, f"its attempt {number} is not recorded", _EDITED)
            elif attempts[number].phase != phase.name:
                what = f"its attempt {number} says that it was made at {attempts[number].phase!r}"
                yield Violation("attempts.phase", place, what, _EDITED)
            if number in seen:
                yield Violation("attempts.twice", place, f"its attempt {number} is another visit's, too", _EDITED)
            seen.add(number)


def _outputs_are_there(facts: WorkflowFacts) -> Iterator[Violation]:
    """What is complete has handed over what it is to, and that is valid."""
    for place, phase, record in facts.visits:
        if record.status not in {PhaseStatus.COMPLETED, PhaseStatus.AWAITING}:
            continue
        if phase.produces is None:
            if record.handoff is not None:
                yield Violation("outputs.extra", place, "it handed something over, and is to produce nothing", _EDITED)
            continue
        handoff = None if record.handoff is None else facts.handoffs.get(record.handoff)
        if handoff is None:
            what = f"it is {record.status}, and the {phase.produces} that it is to produce is not there"
            yield Violation("outputs.missing", place, what, _MENDED)
            continue
        if record.verdict != (verdict := verdict_of(phase, handoff.data)):
            what = f"its verdict is {record.verdict!r}, that of what it handed over {verdict!r}"
            yield Violation("outputs.verdict", place, what, _EDITED)
        yield from _data_fits(facts, place, phase, handoff)


def _data_fits(facts: WorkflowFacts, place: str, phase: Phase, handoff: Handoff) -> Iterator[Violation]:
    if handoff.kind != phase.produces:
        what = f"it is to produce {phase.produces!r}, and handed over {handoff.kind!r}"
        yield Violation("outputs.kind", place, what, _MENDED)
        return
    kind = kind_of(phase, facts.kinds)
    if kind is None:
        what = f"nothing knows the kind {phase.produces!r}"
        yield Violation("outputs.unknown", place, what, "install the plugin that brings it")
        return
    for one in kind.check(handoff.data, Facts(facts.checksums.get(handoff.id, {}))).violations:
        yield Violation(one.rule, f"{place}, {one.place}", one.what, one.remedy)


def _chain_holds(facts: WorkflowFacts) -> Iterator[Violation]:
    """Each handoff is what it was, comes from where it says, and was received as both ends say."""
    came = {record.handoff: record for _, _, record in facts.visits if record.handoff is not None}
    for name, handoff in facts.handoffs.items():
        place = f"handoff {name}"
        if not is_intact(handoff):
            yield Violation("chain.digest", place, "its digest does not match what it holds", _MENDED)
        if name != handoff.id or handoff.id != handoff_id(facts.run, facts.task, handoff.attempt):
            yield Violation("chain.name", place, f"it says that it is {handoff.id}", _EDITED)
        record = came.get(name)
        if record is None:
            if facts.document.current is None:
                yield Violation("chain.source", place, "no visit of a phase names it as its own", _EDITED)
        elif handoff.phase != record.phase or handoff.attempt not in record.attempts:
            what = f"it says that it comes from attempt {handoff.attempt} at {handoff.phase!r}"
            yield Violation("chain.source", place, f"{what}, and phase {record.phase!r} has it as its own", _EDITED)
        if handoff.to is not None and handoff.to not in {phase.name for phase in facts.workflow.phases}:
            yield Violation(
                "chain.target", place, f"it is for {handoff.to!r}, which the workflow does not have", _EDITED
            )
        yield from _receipts_hold(facts, place, handoff)
    for number, (place, _, record) in enumerate(facts.visits):
        yield from _received_fits(facts, place, record)
        yield from _lost(facts, number, place, record)


def _lost(facts: WorkflowFacts, number: int, place: str, record: PhaseRecord) -> Iterator[Violation]:
    """A visit that was given values of what was handed over to it has received that."""
    last: dict[str, tuple[Phase, Handoff]] = {}
    for _, phase, earlier in facts.visits[:number]:
        handoff = facts.handoffs.get(earlier.handoff or "")
        if earlier.status is PhaseStatus.COMPLETED and handoff is not None:
            last[phase.name] = phase, handoff
    for phase, handoff in last.values():
        kind = kind_of(phase, facts.kinds)
        if kind is None or handoff.to != record.phase or handoff.id in record.received or handoff.mediation is not None:
            continue
        # What a plugin's kind exports is its own code.
        yield from found_by("chain.lost", place, partial(_given_of, place, record, handoff, kind))


def _given_of(place: str, record: PhaseRecord, handoff: Handoff, kind: Kind) -> Iterator[Violation]:
    said = {name for name, value in kind.exports(handoff.data).items() if not says_nothing(value)}
    if record.given is not None and said & set(record.given.keys):
        what = f"it was given values of handoff {handoff.id}, and has not received it"
        yield Violation("chain.lost", place, what, _EDITED)


def _receipts_hold(facts: WorkflowFacts, place: str, handoff: Handoff) -> Iterator[Violation]:
    for receipt in handoff.receipts:
        if receipt.digest != handoff.digest:
            what = f"phase {receipt.phase!r} received something else: {receipt.digest}"
            yield Violation("chain.received", place, what, _MENDED)
        is_known = any(
            record.phase == receipt.phase
            and record.attempts[:1] == (receipt.attempt,)
            and handoff.id in record.received
            for record in facts.document.phases
        )
        if not is_known and facts.document.current is None:
            what = (
                f"attempt {receipt.attempt} at {receipt.phase!r} is said to have received it, and knows nothing of it"
            )
            yield Violation("chain.received", place, what, _EDITED)


def _received_fits(facts: WorkflowFacts, place: str, record: PhaseRecord) -> Iterator[Violation]:
    for name in record.received:
        handoff = facts.handoffs.get(name)
        if handoff is None:
            yield Violation("chain.missing", place, f"it received handoff {name}, which is not there", _MENDED)
            continue
        if not any((one.phase, one.attempt) == (record.phase, *record.attempts[:1]) for one in handoff.receipts):
            what = f"it received handoff {name}, which nobody has acknowledged"
            yield Violation("chain.received", place, what, _EDITED)
        if record.attempts and handoff.attempt >= record.attempts[0]:
            what = f"it received handoff {name}, which was made after it began"
            yield Violation("chain.order", place, what, _EDITED)


def _nobody_idles(facts: WorkflowFacts) -> Iterator[Violation]:
    """No session is at rest whose task waits for it, or at work at what is over."""
    attempts = {one.number: one for one in facts.document.attempts}
    for session in facts.sessions:
        if session.task != facts.task or session.run != facts.run:
            continue
        place = f"session {session.session}"
        attempt = attempts.get(session.attempt)
        is_done = session.status is SessionStatus.DONE
        if attempt is None:
            yield Violation(
                "sessions.stray", place, "its task has no such attempt", "`council clean` removes what is left"
            )
        elif attempt.ended is None and is_done and facts.now - session.updated > IDLE_AFTER:
            what = "it is done and has ended nothing: its task still waits for it"
            yield Violation(
                "sessions.idle", place, what, f"`council cancel {facts.task}` ends it, `council retry` begins anew"
            )


_RULES: Final[Sequence[Constraint]] = (
    _records_fit,
    _end_fits,
    _attempts_fit,
    _outputs_are_there,
    _chain_holds,
    _nobody_idles,
)
