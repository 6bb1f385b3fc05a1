"""Determine the current and next phase of a task in its workflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orchestrator.domain.events.phases import PhaseEvent
from orchestrator.domain.runs.model import PAUSED, TaskDocument
from orchestrator.domain.runs.outcome import PAUSE_NOTE
from orchestrator.domain.runs.phases import (
    OPEN_STATUSES,
    PASSED_STATUSES,
    PHASE_TRANSITIONS,
    PhaseRecord,
    PhaseStatus,
    PhaseTrigger,
    advance_phase,
)
from orchestrator.domain.runs.statuses import FINAL_STATUSES, TaskStatus
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.names import entry_of_adapter
from orchestrator.domain.settings.phase_settings import Phase

#: Outcomes after which a follow-up message continues the same conversation.
_REPAIRABLE: Final = frozenset({FailureClass.INVALID_HANDOFF, FailureClass.CHECKS_FAILED, PAUSED})

#: The kind and the verdict that reject work; only these send work back.
REVIEW_KIND: Final = "review"
REJECT_VERDICT: Final = "reject"

#: The single phase of a task without a workflow.
BUILD_PHASE: Final = Phase(name="build")
DEFAULT_PHASES: Final = (BUILD_PHASE,)


@dataclass(frozen=True, slots=True)
class Workflow:
    """The phases of a task, in order; names are unique."""

    phases: Sequence[Phase] = DEFAULT_PHASES

    @property
    def is_default(self) -> bool:
        """Whether it is the only phase of a task without workflow; visits aren't recorded."""
        return self.phases is DEFAULT_PHASES or tuple(self.phases) == DEFAULT_PHASES

    def phase(self, name: str) -> Phase:
        """Return a phase by name; raise KeyError if there is none."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def index(self, name: str) -> int:
        """Return the index of a phase; raise KeyError if there is none."""
        return self.phases.index(self.phase(name))

    def before(self, name: str) -> Sequence[Phase]:
        """Return the phases before a phase."""
        return self.phases[: self.index(name)]

    def after(self, name: str) -> Sequence[Phase]:
        """Return the phases after a phase."""
        return self.phases[self.index(name) + 1 :]

    def find_rejection_target(self, name: str, task: TaskDocument) -> Phase:
        """Return the phase to return to after a rejection by the phase `name`.

        It is the phase named by `on_reject`, or the last earlier one that writes. Skipped phases do not count.
        """
        reviewer, earlier = self.phase(name), self.before(name)
        if reviewer.on_reject is not None and not _is_skipped(task, reviewer.on_reject):
            return self.phase(reviewer.on_reject)
        visited = [phase for phase in earlier if not _is_skipped(task, phase.name)]
        return next((phase for phase in reversed(visited) if phase.writes), visited[-1] if visited else reviewer)

    def builders(self, task: TaskDocument) -> Sequence[Phase]:
        """Return the phases that write, except those that the task skipped."""
        return [phase for phase in self.phases if phase.writes and not _is_skipped(task, phase.name)]


def _is_skipped(task: TaskDocument, phase: str) -> bool:
    record = latest_visit(task, phase)
    return record is not None and record.status is PhaseStatus.SKIPPED


def latest_visit(task: TaskDocument, phase: str) -> PhaseRecord | None:
    """Return the last visit of a phase; None if there is none."""
    return next((record for record in reversed(task.phases) if record.phase == phase), None)


def find_next_phase(
    workflow: Workflow, phases: Sequence[PhaseRecord], start: int, holds: Callable[[str, str], bool], now: float
) -> tuple[tuple[PhaseRecord, ...], Phase | None]:
    """Return visits, including skipped phases, and the next phase that may start.

    The search begins at index `start`. `holds` evaluates the condition of a phase, given its name and the expression.
    """
    visits = tuple(phases)
    for phase in workflow.phases[start:]:
        if phase.when is None or holds(phase.name, phase.when):
            return visits, phase
        visits = skip_phase(visits, phase, f"its condition is false: {phase.when}", now)
    return visits, None


def has_open_visit(task: TaskDocument) -> bool:
    """Return whether the last visit is unfinished."""
    return bool(task.phases) and task.phases[-1].status in OPEN_STATUSES


def read_verdict(phase: Phase, data: Mapping[str, Any]) -> str | None:
    """Return the verdict of a review handoff; None if the phase is not a review."""
    return data.get("verdict") if phase.kind == REVIEW_KIND else None


def current_phase(workflow: Workflow, task: TaskDocument) -> Phase | None:
    """Return the current or next phase of a task; None if no phase remains."""
    if has_open_visit(task):
        return workflow.phase(task.phases[-1].phase)
    if task.phase is not None:
        return workflow.phase(task.phase)
    return None if task.phases else workflow.phases[0]


def completed_visits(workflow: Workflow, task: TaskDocument) -> Mapping[str, PhaseRecord]:
    """Return the last completed visit of each earlier phase, in workflow order.

    Completed phases that will be repeated do not count, nor do the phases after them.
    """
    current = current_phase(workflow, task)
    completed: dict[str, PhaseRecord] = {}
    for phase in workflow.phases if current is None else workflow.before(current.name):
        record = latest_visit(task, phase.name)
        if record is not None and record.status is PhaseStatus.COMPLETED:
            completed[phase.name] = record
    return completed


def enter_phase(
    workflow: Workflow, task: TaskDocument, phase: Phase, attempt: int, now: float, **given: Any
) -> dict[str, Any]:
    """Return the changes to a task whose attempt starts or continues a visit."""
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
    """Return the visits with a skipped one added."""
    return (
        *phases,
        advance_phase(phase.name, None, PhaseTrigger.SKIP, phase=phase.name, started=now, ended=now, reason=reason),
    )


def change_last_visit(task: TaskDocument, trigger: PhaseTrigger | None, **changes: Any) -> tuple[PhaseRecord, ...]:
    """Return the visits with the last one changed by `trigger` and `changes`.

    If `trigger` is None, its status stays the same.
    """
    last = task.phases[-1]
    if trigger is None:
        return (*task.phases[:-1], last.model_copy(update=changes))
    return (*task.phases[:-1], advance_phase(last.phase, last, trigger, **changes))


def close_open_visit(task: TaskDocument, now: float) -> TaskDocument:
    """Close the open visit of a finished task."""
    if task.status not in FINAL_STATUSES or not has_open_visit(task):
        return task
    trigger = PhaseTrigger.CANCEL if task.status is TaskStatus.CANCELLED else PhaseTrigger.FAIL
    if (task.phases[-1].status, trigger) not in PHASE_TRANSITIONS:  # complete, but waiting for approval
        trigger = PhaseTrigger.CANCEL
    return task.model_copy(update={"phases": change_last_visit(task, trigger, ended=now, reason=task.reason)})


def phase_events(before: Sequence[PhaseRecord], after: Sequence[PhaseRecord]) -> Iterator[PhaseEvent]:
    """Yield an event for each visit with a new status."""
    for index, record in enumerate(after):
        was = before[index] if index < len(before) and before[index].phase == record.phase else None
        if was is None or was.status is not record.status:
            visit = sum(visit.phase == record.phase for visit in after[: index + 1])
            facts = {
                "handoff": record.handoff,
                "verdict": record.verdict,
                "reason": record.reason,
            }
            given = {name: value for name, value in facts.items() if value is not None}
            yield record.status.record.event(phase=record.phase, visit=visit).replace(**given)


@dataclass(frozen=True, slots=True)
class BuiltWork:
    """A task's work so far: the commit, the base for comparison, the attempt number."""

    commit: str
    base: str
    attempt: int


def find_earlier_work(workflow: Workflow, task: TaskDocument) -> BuiltWork | None:
    """Return the work built before the current phase; None if there is none."""
    work = None
    for record in completed_visits(workflow, task).values():
        if record.commit is not None and record.base is not None:
            work = BuiltWork(record.commit, record.base, record.attempts[-1])
    return work


def find_continued_attempt(workflow: Workflow, task: TaskDocument, phase: Phase) -> int | None:
    """Return the attempt number whose conversation the next one continues, or None."""
    if workflow.is_default:
        outcome = task.attempt.outcome if task.attempts else None
        # With work to start from, it fixes failed checks, or has received a message after it was built.
        continues = task.start is not None and outcome in {"built", FailureClass.CHECKS_FAILED}
        return task.attempt.number if continues or outcome == PAUSED else None
    if has_open_visit(task):
        last = task.phases[-1].attempts[-1]
        return last if task.attempts[last - 1].outcome in _REPAIRABLE else None
    before = latest_visit(task, phase.name)
    if task.start is not None and before is not None and before.attempts:
        return before.attempts[-1]
    record = None if phase.continues is None else latest_visit(task, phase.continues)
    return record.attempts[-1] if record is not None and record.attempts else None


def pause_task(task: TaskDocument, commit: str | None, base: str | None, note: str = PAUSE_NOTE) -> dict[str, Any]:
    """Return the changes to a task whose next session continues its conversation and its work.

    The work is `commit`, compared with `base`; None if there is none. Its feedback ends with `note`.
    """
    feedback = task.feedback or note
    if note not in feedback:
        feedback += f"\n\n{note}"
    return {"feedback": feedback, "start": commit, "base": None if commit is None else base}


def restart_task(workflow: Workflow, task: TaskDocument, phase: str | None = None) -> dict[str, Any]:
    """Return the changes to retry a task from a phase; raise KeyError if unknown.

    The default is the current phase, or the last one that writes if all are complete. Incomplete earlier phases run
    first.
    """
    if workflow.is_default:
        return {}
    if phase is not None:
        return {
            "phase": find_first_incomplete([each.name for each in workflow.phases], workflow.phase(phase).name, task)
            or phase
        }
    if task.subtasks and task.phase is None and task.commit is None and not has_open_visit(task):
        return {}  # it waits for the tasks of its plan
    if task.phases and task.phases[-1].status in PASSED_STATUSES and task.phase is None:
        return {"phase": [*workflow.phases, *workflow.builders(task)][-1].name}
    return {"phase": task.phases[-1].phase if task.phases and task.phase is None else task.phase}


def find_first_incomplete(phases: Sequence[str], phase: str, task: TaskDocument) -> str | None:
    """Return the first phase before `phase` that is neither completed nor skipped.

    None if there is none.
    """
    records = ((name, latest_visit(task, name)) for name in phases[: phases.index(phase)])
    return next((name for name, record in records if record is None or record.status not in PASSED_STATUSES), None)


def restart_work(workflow: Workflow, task: TaskDocument) -> dict[str, Any]:
    """Return the changes to repeat a task's work from its first writing phase."""
    return restart_task(workflow, task, workflow.builders(task)[0].name)


def count_rejections(task: TaskDocument, phase: str) -> int:
    """Return the number of rejections by a phase since a user's last retry."""
    return sum(
        visit.phase == phase and visit.verdict == REJECT_VERDICT for visit in task.phases[task.visits_before_retry :]
    )


def compute_next_start(workflow: Workflow, task: TaskDocument, phase: Phase) -> dict[str, Any]:
    """Return the start of the session after a phase, unless it is the work built so far.

    Work that a review sent back to a read-only phase remains the start for the next phase that writes.
    """
    if phase.writes or not any(each.writes for each in workflow.after(phase.name)):
        return {"start": None, "base": None}
    return {"start": task.start, "base": task.base}


def has_built_work(task: TaskDocument) -> bool:
    """Return whether a waiting task continues built work, and so must keep its paths."""
    return task.start is not None or any(record.commit is not None for record in task.phases)


def current_adapters(workflow: Workflow, task: TaskDocument, adapter: str, fallback: Sequence[str]) -> tuple[str, ...]:
    """Return the adapters of the current phase, in order of preference.

    `adapter` and `fallback` are the task's. The account of its last session precedes the others of its adapter, because
    conversations can only be continued there.
    """
    phase = current_phase(workflow, task)
    adapters = (adapter, *fallback)
    if phase is not None and phase.adapter is not None:
        adapters = (phase.adapter, *phase.fallback)
    return prefer_account(task, adapters)


def prefer_account(task: TaskDocument, adapters: tuple[str, ...]) -> tuple[str, ...]:
    """Return adapters with the account of a task's last session before the others of its adapter."""
    accounts = [one for one in adapters if one != entry_of_adapter(one)]
    last = next((one.adapter for one in reversed(task.attempts) if one.adapter in accounts), None)
    if last is None:
        return adapters
    first = next(index for index, one in enumerate(adapters) if entry_of_adapter(one) == entry_of_adapter(last))
    others = [one for one in adapters[first:] if one != last]
    return (*adapters[:first], last, *others)
