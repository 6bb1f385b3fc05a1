"""Which phase of its workflow a task is at, and what follows. Pure: what came of a session is told, not looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.model import FINAL_STATUSES, TaskDocument, TaskStatus
from orchestrator.domain.runs.phases import (
    OPEN_STATUSES,
    PASSED_STATUSES,
    PHASE_EVENTS,
    PHASE_TRANSITIONS,
    PhaseRecord,
    PhaseStatus,
    PhaseTrigger,
    advance_phase,
)

_Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Expansion(BaseModel):
    """How the tasks of a plan become tasks of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    most: int = 20
    """How many there may be at most."""
    workflow: str | None = None
    """The workflow that each of them has; None: none."""


class Phase(BaseModel):
    """One step of a workflow, everything resolved but what a task says: its adapter, where this names none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    name: str
    adapter: str | None = None
    """Who does it; None: the task's own adapter."""
    fallback: _Strings = ()
    """Who stands in, where it names its adapter."""
    writes: bool = True
    """Whether what it changes counts; else that is discarded."""
    produces: str | None = None
    """The kind of its handoff; None: it hands nothing over but its work."""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """The JSON Schema of its handoff, where its kind is one of the user's own."""
    prompt: str | None = None
    """The template of what its session is told; None: the task's prompt as it is."""
    needs: _Strings | None = None
    """The names of the values that it is given; None: those that its kind of phase needs."""
    context: dict[str, Any] = {}
    """Values of its own, which later phases do not inherit."""
    when: str | None = None
    """The condition (an expression over the values that it could be given) without which it is skipped."""
    approve: bool = False
    """Whether a person is to approve its result before anything follows."""
    continues: str | None = None
    """The earlier phase with whose session it goes on, where its adapter can; None: with none."""
    handoff: Literal["direct", "mediated", "shared"] = "direct"
    """How its result gets to the next phase."""
    transform: str | None = None
    """The transformation that mediates; None: the one that is registered for the two kinds, or the default."""
    mediator: str | None = None
    """The phase that mediates, between this one and the next."""
    key: str | None = None
    """The key under which its result is shared."""
    until: _Strings = ()
    """Shell commands that must succeed on its work before it is complete."""
    on_reject: str | None = None
    """The phase that a review's rejection goes back to; None: the last one before it that writes."""
    max_rounds: int = 3
    """How often it may be sent back by `until`, or send back itself, before the task has failed."""
    expand: Expansion | None = None
    """How the tasks of its plan become tasks of the run; None: they do not."""
    timeout: float | None = None
    """Wall-clock seconds that one session of it may take; None: the task's limit."""

    @property
    def shows_diff(self) -> bool:
        """Whether its template may show the changes that it starts with."""
        return self.prompt is not None and "diff" in self.prompt


#: Ends of sessions that another turn of the same conversation is to mend.
_REPAIRABLE: Final = frozenset({FailureClass.INVALID_HANDOFF, FailureClass.CHECKS_FAILED})

#: The kind that says whether work is to go on, and how it says that it is not; nothing else sends work back.
REVIEW_KIND: Final = "review"
REJECT_VERDICT: Final = "reject"

#: What a task without a workflow does.
BUILD_PHASE: Final = Phase(name="build")
DEFAULT_PHASES: Final = (BUILD_PHASE,)


@dataclass(frozen=True, slots=True)
class Workflow:
    """The phases of a task, in their order; names are unique."""

    phases: Sequence[Phase] = DEFAULT_PHASES

    @property
    def is_default(self) -> bool:
        """Whether it is the one phase that a task without a workflow has, of which nothing is recorded."""
        return self.phases is DEFAULT_PHASES or tuple(self.phases) == DEFAULT_PHASES

    @property
    def has_work(self) -> bool:
        """Whether any phase writes: then its task is done only when it has landed."""
        return any(phase.writes for phase in self.phases)

    def phase(self, name: str) -> Phase:
        """Return a phase by its name; KeyError without one."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def index(self, name: str) -> int:
        """Return the place of a phase; KeyError without one."""
        return self.phases.index(self.phase(name))

    def before(self, name: str) -> Sequence[Phase]:
        """Return the phases before one."""
        return self.phases[: self.index(name)]

    def after(self, name: str) -> Sequence[Phase]:
        """Return the phases after one."""
        return self.phases[self.index(name) + 1 :]

    def find_rejection_target(self, name: str, task: TaskDocument) -> Phase:
        """Return the phase that a task's rejection by another goes back to.

        It is that which the other names, or the last one before it that writes. What was skipped can mend nothing.
        """
        reviewer, earlier = self.phase(name), self.before(name)
        if reviewer.on_reject is not None and not _is_skipped(task, reviewer.on_reject):
            return self.phase(reviewer.on_reject)
        made = [one for one in earlier if not _is_skipped(task, one.name)]
        return next((one for one in reversed(made) if one.writes), made[-1] if made else reviewer)

    def builders(self, task: TaskDocument) -> Sequence[Phase]:
        """Return the phases that write, but for those that a task has skipped."""
        return [one for one in self.phases if one.writes and not _is_skipped(task, one.name)]


def _is_skipped(task: TaskDocument, phase: str) -> bool:
    record = latest_visit(task, phase)
    return record is not None and record.status is PhaseStatus.SKIPPED


def latest_visit(task: TaskDocument, phase: str) -> PhaseRecord | None:
    """Return the last visit of a phase; None without one."""
    return next((one for one in reversed(task.phases) if one.phase == phase), None)


def find_next_phase(
    workflow: Workflow, phases: Sequence[PhaseRecord], start: int, holds: Callable[[str, str], bool], now: float
) -> tuple[tuple[PhaseRecord, ...], Phase | None]:
    """Return the next phase from a place on whose condition holds, if any, and the visits with those skipped.

    `holds` judges the condition of a phase, by its name and its words.
    """
    found = tuple(phases)
    for phase in workflow.phases[start:]:
        if phase.when is None or holds(phase.name, phase.when):
            return found, phase
        found = skip_phase(found, phase, f"its condition does not hold: {phase.when}", now)
    return found, None


def has_open_visit(task: TaskDocument) -> bool:
    """Whether the last visit is not over."""
    return bool(task.phases) and task.phases[-1].status in OPEN_STATUSES


def read_verdict(phase: Phase, data: Mapping[str, Any]) -> str | None:
    """Return what a phase says of the work by what it hands over; None where it is no review."""
    return data.get("verdict") if phase.produces == REVIEW_KIND else None


def current_phase(workflow: Workflow, task: TaskDocument) -> Phase | None:
    """Return the phase that a task is at, or that it is to enter next; None where none is left."""
    if has_open_visit(task):
        return workflow.phase(task.phases[-1].phase)
    if task.phase is not None:
        return workflow.phase(task.phase)
    return None if task.phases else workflow.phases[0]


def completed_visits(workflow: Workflow, task: TaskDocument) -> Mapping[str, PhaseRecord]:
    """Return the last complete visit of each phase that precedes the one that a task is at, in the workflow's order.

    What was complete and is to be done again does not count, nor does what followed it.
    """
    at = current_phase(workflow, task)
    found: dict[str, PhaseRecord] = {}
    for phase in workflow.phases if at is None else workflow.before(at.name):
        record = latest_visit(task, phase.name)
        if record is not None and record.status is PhaseStatus.COMPLETED:
            found[phase.name] = record
    return found


def enter_phase(
    workflow: Workflow, task: TaskDocument, phase: Phase, attempt: int, now: float, **given: Any
) -> dict[str, Any]:
    """Return the changes to a task whose attempt begins at a phase: a visit is begun, or goes on."""
    if workflow.is_default:
        return {}
    last = task.phases[-1] if has_open_visit(task) else None
    if last is not None:
        record = last.model_copy(update={"attempts": (*last.attempts, attempt), **given})
        return {"phases": (*task.phases[:-1], record)}
    record = advance_phase(
        phase.name, None, PhaseTrigger.ENTER, phase=phase.name, started=now, attempts=(attempt,), **given
    )
    return {"phases": (*task.phases, record), "phase": phase.name}


def skip_phase(phases: Sequence[PhaseRecord], phase: Phase, reason: str, now: float) -> tuple[PhaseRecord, ...]:
    """Return the visits with one more that was none."""
    return (
        *phases,
        advance_phase(phase.name, None, PhaseTrigger.SKIP, phase=phase.name, started=now, ended=now, reason=reason),
    )


def change_last_visit(task: TaskDocument, trigger: PhaseTrigger | None, **changes: Any) -> tuple[PhaseRecord, ...]:
    """Return the visits with the last one after `trigger` (None: where it is), and with `changes` to it."""
    last = task.phases[-1]
    if trigger is None:
        return (*task.phases[:-1], last.model_copy(update=changes))
    return (*task.phases[:-1], advance_phase(last.phase, last, trigger, **changes))


def close_open_visit(task: TaskDocument, now: float) -> TaskDocument:
    """Return a task without an open visit where the task is over."""
    if task.status not in FINAL_STATUSES or not has_open_visit(task):
        return task
    trigger = PhaseTrigger.CANCEL if task.status is TaskStatus.CANCELLED else PhaseTrigger.FAIL
    if (task.phases[-1].status, trigger) not in PHASE_TRANSITIONS:  # it was over, and waited for a person
        trigger = PhaseTrigger.CANCEL
    return task.model_copy(update={"phases": change_last_visit(task, trigger, ended=now, reason=task.reason)})


def phase_events(before: Sequence[PhaseRecord], after: Sequence[PhaseRecord]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield an event for each visit that has come to another status: its type, and what it says."""
    for index, record in enumerate(after):
        was = before[index] if index < len(before) and before[index].phase == record.phase else None
        if was is None or was.status is not record.status:
            facts = {
                "phase": record.phase,
                "visit": sum(one.phase == record.phase for one in after[: index + 1]),
                "handoff": record.handoff,
                "verdict": record.verdict,
                "reason": record.reason,
            }
            told = {name: value for name, value in facts.items() if value is not None}
            yield PHASE_EVENTS[record.status], told


@dataclass(frozen=True, slots=True)
class BuiltWork:
    """What a task has built so far: the commit, what it is judged against, and the number of the attempt."""

    commit: str
    base: str
    attempt: int


def find_earlier_work(workflow: Workflow, task: TaskDocument) -> BuiltWork | None:
    """Return what was built before the phase that a task is at; None where nothing was."""
    found = None
    for record in completed_visits(workflow, task).values():
        if record.commit is not None and record.base is not None:
            found = BuiltWork(record.commit, record.base, record.attempts[-1])
    return found


def find_continued_attempt(workflow: Workflow, task: TaskDocument, phase: Phase) -> int | None:
    """Return the number of the attempt whose conversation the next one of a phase is to go on with; None: of none."""
    if workflow.is_default:
        mends = task.start is not None and task.attempts and task.attempt.outcome == FailureClass.CHECKS_FAILED
        return task.attempt.number if mends else None
    if has_open_visit(task):
        last = task.phases[-1].attempts[-1]
        return last if task.attempts[last - 1].outcome in _REPAIRABLE else None
    before = latest_visit(task, phase.name)
    if task.start is not None and before is not None and before.attempts:
        return before.attempts[-1]
    record = None if phase.continues is None else latest_visit(task, phase.continues)
    return record.attempts[-1] if record is not None and record.attempts else None


def restart_task(workflow: Workflow, task: TaskDocument, phase: str | None = None) -> dict[str, Any]:
    """Return the changes to a task that is to be tried again from a phase on; KeyError if there is none of the name.

    Without a name it is the one that it was at, or, where all were complete, the last that writes. What is not complete
    of those before it is done first.
    """
    if workflow.is_default:
        return {}
    if phase is not None:
        return {
            "phase": find_first_incomplete([one.name for one in workflow.phases], workflow.phase(phase).name, task)
            or phase
        }
    if task.expanded and task.phase is None and task.commit is None and not has_open_visit(task):
        return {}  # it waits for what its plan became
    if task.phases and task.phases[-1].status in PASSED_STATUSES and task.phase is None:
        return {"phase": [*workflow.phases, *workflow.builders(task)][-1].name}
    return {"phase": task.phases[-1].phase if task.phases and task.phase is None else task.phase}


def find_first_incomplete(phases: Sequence[str], phase: str, task: TaskDocument) -> str | None:
    """Return the first phase before one of these that a task has not behind it; None where it has all of them."""
    records = ((name, latest_visit(task, name)) for name in phases[: phases.index(phase)])
    return next((name for name, record in records if record is None or record.status not in PASSED_STATUSES), None)


def restart_work(workflow: Workflow, task: TaskDocument) -> dict[str, Any]:
    """Return the changes to a task whose work is to be done anew, by all phases that made it."""
    return restart_task(workflow, task, workflow.builders(task)[0].name)


def count_rejections(task: TaskDocument, phase: str) -> int:
    """Return how often a phase has rejected a task's work, since a person last had that tried again."""
    return sum(one.phase == phase and one.verdict == REJECT_VERDICT for one in task.phases[task.revived :])


def compute_next_start(workflow: Workflow, task: TaskDocument, phase: Phase) -> dict[str, Any]:
    """Return where the next session begins once a phase is complete, where that is not what those before it built.

    What a review has sent back to a phase that only reads is still what the next one that writes is to mend.
    """
    if phase.writes or not any(one.writes for one in workflow.after(phase.name)):
        return {"start": None, "base": None}
    return {"start": task.start, "base": task.base}


def has_built_work(task: TaskDocument) -> bool:
    """Whether a task that waits goes on with what it has built, so that its paths are to stay its own."""
    return task.start is not None or any(one.commit is not None for one in task.phases)


def current_adapters(workflow: Workflow, task: TaskDocument, adapter: str, fallback: Sequence[str]) -> tuple[str, ...]:
    """Return the adapters of the phase that a task is at, the best first; `adapter` and `fallback` are the task's."""
    phase = current_phase(workflow, task)
    if phase is None or phase.adapter is None:
        return (adapter, *fallback)
    return (phase.adapter, *phase.fallback)
