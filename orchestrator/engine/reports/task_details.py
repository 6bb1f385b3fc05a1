"""Describe a task in full: prompt, phases, sessions, handoffs and landing. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter

from orchestrator.domain.runs.model import Attempt, TaskDocument
from orchestrator.domain.runs.phases import OPEN_STATUSES, PhaseRecord, PhaseStatus
from orchestrator.domain.runs.statuses import FINAL_STATUSES, LANDING_STATUSES
from orchestrator.domain.runs.usage import Usage, sum_usage
from orchestrator.domain.sessions.messages import UserMessage
from orchestrator.domain.workflow.handoffs import Handoff, is_intact
from orchestrator.domain.workflow.routing import DEFAULT_PHASES
from orchestrator.engine.reports.task_report import TaskReport
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output.log_files import log_file_name

#: Fields with defaults are always present in the JSON.
_WITH_DEFAULTS = ConfigDict(json_schema_serialization_defaults_required=True)


class PhaseVisitDetails(PhaseRecord):
    """One visit of a phase; restarting a phase from scratch is a new visit."""

    model_config = _WITH_DEFAULTS

    status: str  # type: ignore[assignment]  # an imported phase has a status of its own
    """`in_progress`, `awaiting_approval`, `completed`, `rejected` (by a user), `failed`, `skipped` or `cancelled`."""
    visit: int
    """The number of the visit of this phase, from 1."""
    adapters: tuple[str, ...]
    """The adapters of its sessions."""
    usage: Usage
    findings: tuple[dict[str, Any], ...]
    """The findings of a review: `path`, `line`, `severity`, `message`."""
    discarded: tuple[str, ...]
    """The paths whose changes were discarded, because the phase is read-only."""


class AttemptDetails(Attempt):
    """One attempt and its session."""

    model_config = _WITH_DEFAULTS

    phase: str
    """The phase that it ran."""
    seconds: float
    """Its duration until now or its end."""
    log: str | None
    """The file with its standard output; `.stderr` is in the same folder. Null: the session ended during setup."""
    secrets: tuple[str, ...] = Field(default=(), exclude=True)


class HandoffDetails(Handoff):
    """One handoff between phases."""

    model_config = _WITH_DEFAULTS

    is_intact: bool
    """Whether its data matches its digest."""


@dataclass(frozen=True, slots=True)
class LandingDetails:
    """The landing of a task's work on the target."""

    target: str
    time: float | None
    """The time when it landed (seconds since the epoch)."""
    waiting: str | None
    """The commit that is queued to land."""
    attempt: int | None
    """The attempt that built it."""


@dataclass(frozen=True, slots=True)
class LatestActivity:
    """The latest activity of a running session."""

    text: str
    """The last line of its last message, or its last tool call."""
    time: float
    """The time of its last output (seconds since the epoch)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDetails(TaskReport):
    """A task in full, as shown by `council show`."""

    run: str
    prompt: str | None
    """Its prompt; null if unknown, as for an imported task."""
    tracker: str | None
    """The tracker that it came from."""
    plan: str | None
    """The id of the handoff with the plan that created it."""
    subtasks: Sequence[str]
    """The tasks that its plan created."""
    needs: Sequence[str]
    built_needs: Sequence[str]
    """The needs whose built work it starts on."""
    workflow: str | None
    """The name of its workflow."""
    phases: Sequence[PhaseVisitDetails]
    """All visits of its phases, in order."""
    remaining_phases: Sequence[str]
    """The remaining phases, if none is rejected or skipped."""
    sessions: Sequence[AttemptDetails]
    messages: Sequence[UserMessage]
    """The user's messages to its agents, oldest first."""
    handoffs: Sequence[HandoffDetails]
    landing: LandingDetails
    usage: Usage
    damage: Sequence[str]
    """Unreadable parts of the state log."""
    latest_activity: LatestActivity | None = None
    """The latest activity of its session; null unless a session is running and its output is on this machine."""

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        value: JsonObject = TypeAdapter(TaskDetails).dump_python(self, mode="json")
        return value


@dataclass(frozen=True, slots=True)
class TaskDefinition:
    """The prompt of a task, and its workflow."""

    prompt: str | None = None
    tracker: str | None = None
    needs: Sequence[str] = ()
    workflow: str | None = None
    phases: Sequence[str] = (DEFAULT_PHASES[0].name,)
    plan: str | None = None
    messages: Sequence[UserMessage] = ()
    """The user's messages to its agents, oldest first."""
    built_needs: Sequence[str] = ()
    """The needs whose built work it starts on."""


def build_task_details(
    run: str,
    report: TaskReport,
    document: TaskDocument,
    definition: TaskDefinition,
    handoffs: Mapping[str, Handoff],
    *,
    target: str,
    landed_at: float | None,
    logs: str,
    now: float,
    damage: Sequence[str] = (),
) -> TaskDetails:
    """Return a task's details; `logs` is the folder with the logs of its run.

    Sessions without an end are running at `now` (wall-clock seconds).
    """
    attempts = () if report.adapter is None else document.attempts
    ordered = sorted(handoffs.values(), key=lambda handoff: handoff.attempt)
    return TaskDetails(
        **report.fields(),
        run=run,
        prompt=definition.prompt,
        tracker=definition.tracker,
        plan=definition.plan,
        subtasks=document.subtasks,
        needs=definition.needs,
        built_needs=definition.built_needs,
        workflow=definition.workflow,
        phases=_visits(document, attempts, definition, handoffs, now),
        remaining_phases=_remaining_phases(document, definition),
        sessions=[_attempt(report.id, attempt, logs, now) for attempt in attempts],
        messages=definition.messages,
        handoffs=[HandoffDetails(**dict(handoff), is_intact=is_intact(handoff)) for handoff in ordered],
        landing=_landing(document, target, landed_at),
        usage=sum_usage(attempts, now),
        damage=damage,
    )


def phase_of(attempt: Attempt) -> str:
    """Return the phase of an attempt; without a workflow, that of the default one."""
    return attempt.phase or DEFAULT_PHASES[0].name


def phase_statuses(task: TaskDocument) -> dict[str, str]:
    """Return the phases that a task has entered, with the status of the last visit.

    Those of an imported task have their original status, or `unknown`.
    """
    if task.imported is not None:
        original = {
            phase: value.get("status") if isinstance(value, dict) else value
            for phase, value in task.imported.phases.items()
        }
        return {phase: status if isinstance(status, str) else "unknown" for phase, status in original.items()}
    if task.phases:
        return {visit.phase: str(visit.status) for visit in task.phases}
    return {phase_of(task.attempt): str(task.status.record.plain_phase)} if task.attempts else {}


def _visits(
    task: TaskDocument,
    attempts: Sequence[Attempt],
    definition: TaskDefinition,
    handoffs: Mapping[str, Handoff],
    now: float,
) -> list[PhaseVisitDetails]:
    if task.imported is not None:
        return [_visit(_record(phase), status, 1, (), None, now) for phase, status in phase_statuses(task).items()]
    if definition.workflow is None:
        return [_plain_visit(task, attempts, now)] if attempts else []
    counts: dict[str, int] = {}
    visits = []
    for record in task.phases:
        visit = counts[record.phase] = counts.get(record.phase, 0) + 1
        own = [attempts[number - 1] for number in record.attempts if number <= len(attempts)]
        visits.append(_visit(record, record.status, visit, own, handoffs.get(record.handoff or ""), now))
    return visits


def _record(phase: str, **changes: Any) -> PhaseRecord:
    return PhaseRecord(phase=phase, **{"status": PhaseStatus.COMPLETED, **changes})


def _plain_visit(task: TaskDocument, attempts: Sequence[Attempt], now: float) -> PhaseVisitDetails:
    """Return the single phase of a task without workflow, which records only attempts."""
    status = task.status.record.plain_phase
    is_open = status in OPEN_STATUSES
    built = [attempt for attempt in attempts if attempt.outcome == "built"]
    record = _record(
        DEFAULT_PHASES[0].name,
        status=status,
        started=attempts[0].started,
        ended=None if is_open else attempts[-1].ended,
        attempts=tuple(attempt.number for attempt in attempts),
        commit=task.commit,
        base=task.base_of(task.commit, built[-1]) if built else None,
        reason=None if status in {PhaseStatus.COMPLETED, PhaseStatus.IN_PROGRESS} else task.reason,
    )
    return _visit(record, status, 1, attempts, None, now)


def _visit(
    record: PhaseRecord, status: str, number: int, attempts: Sequence[Attempt], handoff: Handoff | None, now: float
) -> PhaseVisitDetails:
    findings = () if handoff is None else handoff.data.get("findings", ())
    added = {
        "status": str(status),
        "visit": number,
        "adapters": tuple(dict.fromkeys(attempt.adapter for attempt in attempts)),
        "usage": sum_usage(attempts, now),
        "findings": tuple(each for each in findings if isinstance(each, dict))
        if isinstance(findings, list | tuple)
        else (),
        "discarded": tuple(dict.fromkeys(path for attempt in attempts for path in attempt.discarded)),
    }
    return PhaseVisitDetails.model_validate({**dict(record), **added})


def _remaining_phases(task: TaskDocument, definition: TaskDefinition) -> list[str]:
    """Return the phases after the current one."""
    if task.imported is not None or task.status in FINAL_STATUSES | LANDING_STATUSES:
        return []
    names = list(definition.phases)
    if definition.workflow is None:
        return [] if task.attempts else names
    last = task.phases[-1] if task.phases else None
    if (
        last is not None
        and last.status in {PhaseStatus.IN_PROGRESS, PhaseStatus.AWAITING_APPROVAL}
        and last.phase in names
    ):
        return names[names.index(last.phase) + 1 :]
    if task.phase in names:
        return names[names.index(task.phase) :]
    return [] if task.phases else names


def _attempt(task: str, attempt: Attempt, logs: str, now: float) -> AttemptDetails:
    added = {
        "phase": phase_of(attempt),
        "seconds": attempt.duration(now),
        "log": f"{logs}/{log_file_name(task, attempt.number, 'stdout')}",
    }
    return AttemptDetails.model_validate({**dict(attempt), **added})


def _landing(task: TaskDocument, target: str, landed_at: float | None) -> LandingDetails:
    builder = task.building_attempt if task.commit is not None and task.attempts else None
    return LandingDetails(
        target=target,
        time=landed_at,
        waiting=task.commit if task.landed is None else None,
        attempt=None if builder is None else builder.number,
    )
