"""Describe one task in full: its prompt, phases, sessions, handoffs and landing. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from orchestrator.domain.runs.model import Attempt, TaskDocument, TaskStatus, sum_known_cost
from orchestrator.domain.runs.outcome import ToolDenials
from orchestrator.domain.runs.phases import GivenValues, PhaseRecord, PhaseStatus
from orchestrator.domain.workflow.handoffs import Handoff, Receipt, is_intact
from orchestrator.domain.workflow.mediation import Mediation
from orchestrator.domain.workflow.routing import DEFAULT_PHASES
from orchestrator.engine.reports.report import TaskReport, imported_phase_statuses
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output.log_files import log_file_name

_DESCRIBED = ConfigDict(use_attribute_docstrings=True)

#: The status of the single phase of a task without a workflow, by the status of the task.
_PLAIN_STATUS: Mapping[TaskStatus, PhaseStatus] = {
    TaskStatus.PENDING: PhaseStatus.IN_PROGRESS,
    TaskStatus.RUNNING: PhaseStatus.IN_PROGRESS,
    TaskStatus.FAILED: PhaseStatus.FAILED,
    TaskStatus.NO_CHANGE: PhaseStatus.FAILED,
    TaskStatus.CANCELLED: PhaseStatus.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class UsageTotals:
    """The total usage of sessions."""

    __pydantic_config__: ClassVar = _DESCRIBED

    sessions: int
    """The number of sessions."""
    seconds: float
    """Their total duration, including that of running sessions so far."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    """The part of the input that was read from a cache."""
    cost: float | None
    """US dollars, of the sessions whose CLIs reported it; null: none did."""


@dataclass(frozen=True, slots=True)
class PhaseVisitDetails:
    """One visit of a phase; each restart of the phase from its beginning is a new visit."""

    __pydantic_config__: ClassVar = _DESCRIBED

    phase: str
    """Its name; `build` for a task without a workflow."""
    visit: int
    """The number of the visit of this phase, from 1."""
    status: str
    """`in_progress`, `awaiting`, `completed`, `rejected` (by a person), `failed`, `skipped` or `cancelled`."""
    started: float | None
    """Seconds since the epoch."""
    ended: float | None
    attempts: Sequence[int]
    """The numbers of its sessions."""
    adapters: Sequence[str]
    """The adapters of its sessions."""
    usage: UsageTotals
    given: GivenValues | None
    """The values that it was given out of all known values; null: values are not filtered for it."""
    received: Sequence[str]
    """The ids of the handoffs that it received."""
    handoff: str | None
    """The id of its own handoff."""
    verdict: str | None
    """The verdict of a review: `approve` or `reject`."""
    findings: Sequence[JsonObject]
    """The findings of a review: `path`, `line`, `severity`, `message`."""
    note: str | None
    """The note of the person who approved or rejected it."""
    reason: str | None
    """Why it failed, or was rejected or skipped."""
    rounds: int
    """How often it was repeated because its `until` command failed."""
    repairs: int
    """How often its session was asked to fix its handoff."""
    commit: str | None
    """The commit with the task's work at the end of the phase, if the phase writes."""
    base: str | None
    """The commit that this work is compared with."""
    discarded: Sequence[str]
    """The paths whose changes were discarded, because the phase is read-only."""


@dataclass(frozen=True, slots=True)
class AttemptDetails:
    """One attempt and its session."""

    __pydantic_config__: ClassVar = _DESCRIBED

    attempt: int
    """Its number."""
    phase: str
    """The phase that it ran."""
    adapter: str
    model: str | None
    """The model's name, if the CLI reported it."""
    outcome: str | None
    """`built`, `completed`, `interrupted`, `cancelled`, or the failure class; null while it runs."""
    reason: str | None
    """Why it failed, or was followed by another."""
    started: float
    """Seconds since the epoch."""
    ended: float | None
    seconds: float
    """Its duration, so far if it is running."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    """The part of the input that was read from a cache."""
    cost: float | None
    """US dollars."""
    is_estimated: bool
    """Whether the cost is computed from the price of the model, and not reported by the CLI."""
    session: str | None
    """The CLI's own id of the conversation."""
    resumed: bool
    """Whether it continued the conversation of an earlier attempt."""
    base: str
    """The commit that its work is compared with."""
    start: str | None
    """The commit that its worktree started from, if other than the base."""
    branch: str | None
    """The branch with its preserved work."""
    last_message: str | None
    """The last message of the CLI, or its result."""
    log: str | None
    """The file with its standard output; `.stderr` is in the same folder. Null: setup ended the session."""
    check_log: str | None
    """The file with the output of the failed check."""
    discarded: Sequence[str]
    """The paths whose changes were discarded, because the phase is read-only."""
    denied_tools: ToolDenials
    """The tool calls that its CLI denied: how many, the first of them, and how to allow them."""


@dataclass(frozen=True, slots=True)
class HandoffDetails:
    """One handoff between phases."""

    __pydantic_config__: ClassVar = _DESCRIBED

    id: str
    kind: str
    """Its kind, such as `plan`."""
    phase: str
    """The phase that produced it."""
    attempt: int
    """The attempt that produced it."""
    to: str | None
    """The phase that it is for; null: none follows."""
    protocol: str
    """`direct`, `mediated` or `shared`."""
    by: str
    """Its means of delivery: `file`, `tool` or `answer`."""
    time: float
    """Seconds since the epoch."""
    digest: str
    is_intact: bool
    """Whether its data matches its digest."""
    receipts: Sequence[Receipt]
    """The phases that received it."""
    summary: str
    tokens: int
    """Input and output tokens of the whole task up to this point."""
    cost: float | None
    """US dollars of the whole task up to this point."""
    key: str | None
    """The key of its shared value."""
    version: int | None
    data: JsonObject
    """The result itself."""
    mediation: Mediation | None
    """The mediated data, if it was mediated."""


@dataclass(frozen=True, slots=True)
class LandingDetails:
    """The landing of a task's work on the target, or what prevents it."""

    __pydantic_config__: ClassVar = _DESCRIBED

    target: str
    landed: str | None
    """The commit that landed it."""
    time: float | None
    """The time when it landed (seconds since the epoch)."""
    waiting: str | None
    """The commit that is queued to land."""
    attempt: int | None
    """The attempt that built it."""
    branch: str | None
    """The branch with its unmerged work."""
    paths: Sequence[str]
    """The paths in conflict."""
    pull_request: int | None
    """The number of its pull request."""


@dataclass(frozen=True, slots=True)
class LatestActivity:
    """The latest activity of a running session."""

    __pydantic_config__: ClassVar = _DESCRIBED

    text: str
    """The last line of its last message, or its last tool call."""
    time: float
    """The time of its last output (seconds since the epoch)."""


@dataclass(frozen=True, slots=True)
class TaskDetails:
    """A task in full, as shown by `council show`."""

    __pydantic_config__: ClassVar = _DESCRIBED

    run: str
    task: str
    status: str
    """Its status; `blocked` means that a task that it needs will not land."""
    reason: str | None
    """Why it has not landed, or what is special about it."""
    prompt: str | None
    """Its prompt; null if not known, as for an imported task."""
    tracker: str | None
    """The tracker that it came from."""
    plan: str | None
    """The id of the handoff with the plan that created it."""
    expanded: Sequence[str]
    """The tasks that its plan created."""
    adapter: str | None
    """Null for a merge, which runs no session."""
    attempts: int
    """The number of attempts, without interrupted ones."""
    needs: Sequence[str]
    workflow: str | None
    """The name of its workflow."""
    phases: Sequence[PhaseVisitDetails]
    """The phases that it has visited, visit by visit."""
    remaining_phases: Sequence[str]
    """The phases that are left, if none is rejected or skipped."""
    sessions: Sequence[AttemptDetails]
    handoffs: Sequence[HandoffDetails]
    landing: LandingDetails
    usage: UsageTotals
    damage: Sequence[str]
    """Unreadable parts of the state log."""
    latest_activity: LatestActivity | None = None
    """The latest activity of its session; null unless one is running and its output is on this machine."""

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
    is_merge: bool = False,
    damage: Sequence[str] = (),
) -> TaskDetails:
    """Describe a task from its documents; `logs` is the folder with the logs of its run.

    At `now` (wall-clock seconds) sessions without an end are running. The first attempt of a merge has no session.
    """
    attempts = document.attempts[1:] if is_merge else document.attempts
    ordered = sorted(handoffs.values(), key=lambda handoff: handoff.attempt)
    return TaskDetails(
        run=run,
        task=report.id,
        status=report.status,
        reason=report.reason,
        prompt=definition.prompt,
        tracker=definition.tracker,
        plan=definition.plan,
        expanded=document.expanded,
        adapter=report.adapter if attempts or not is_merge else None,
        attempts=report.attempts,
        needs=definition.needs,
        workflow=definition.workflow,
        phases=_visits(document, attempts, definition, handoffs, now),
        remaining_phases=_remaining_phases(document, definition),
        sessions=[_attempt(report.id, attempt, logs, now) for attempt in attempts],
        handoffs=[_handoff(handoff) for handoff in ordered],
        landing=_landing(document, target, landed_at),
        usage=_usage(attempts, now),
        damage=damage,
    )


def _visits(
    task: TaskDocument,
    attempts: Sequence[Attempt],
    definition: TaskDefinition,
    handoffs: Mapping[str, Handoff],
    now: float,
) -> list[PhaseVisitDetails]:
    if task.imported is not None:
        statuses = imported_phase_statuses(task.imported)
        return [_visit(_record(phase), status, 1, (), None, now) for phase, status in statuses.items()]
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
    """Return the single phase of a task without a workflow; only its attempts are recorded."""
    status = _PLAIN_STATUS.get(task.status, PhaseStatus.COMPLETED)
    is_open = status is PhaseStatus.IN_PROGRESS
    built = [attempt for attempt in attempts if attempt.outcome == "built"]
    record = _record(
        DEFAULT_PHASES[0].name,
        status=status,
        started=attempts[0].started,
        ended=None if is_open else attempts[-1].ended,
        attempts=tuple(attempt.number for attempt in attempts),
        commit=task.commit,
        base=built[-1].base if built else None,
        reason=None if status in {PhaseStatus.COMPLETED, PhaseStatus.IN_PROGRESS} else task.reason,
    )
    return _visit(record, status, 1, attempts, None, now)


def _visit(
    record: PhaseRecord, status: str, number: int, attempts: Sequence[Attempt], handoff: Handoff | None, now: float
) -> PhaseVisitDetails:
    findings = () if handoff is None else handoff.data.get("findings", ())
    return PhaseVisitDetails(
        phase=record.phase,
        visit=number,
        status=str(status),
        started=record.started,
        ended=record.ended,
        attempts=record.attempts,
        adapters=list(dict.fromkeys(attempt.adapter for attempt in attempts)),
        usage=_usage(attempts, now),
        given=record.given,
        received=record.received,
        handoff=record.handoff,
        verdict=record.verdict,
        findings=[each for each in findings if isinstance(each, dict)] if isinstance(findings, list | tuple) else [],
        note=record.note,
        reason=record.reason,
        rounds=record.rounds,
        repairs=record.repairs,
        commit=record.commit,
        base=record.base,
        discarded=list(dict.fromkeys(path for attempt in attempts for path in attempt.discarded)),
    )


def _remaining_phases(task: TaskDocument, definition: TaskDefinition) -> list[str]:
    """Return the phases after the current one."""
    if task.imported is not None or task.status not in {TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.WAITING}:
        return []
    names = list(definition.phases)
    if definition.workflow is None:
        return [] if task.attempts else names
    last = task.phases[-1] if task.phases else None
    if last is not None and last.status in {PhaseStatus.IN_PROGRESS, PhaseStatus.AWAITING} and last.phase in names:
        return names[names.index(last.phase) + 1 :]
    if task.phase in names:
        return names[names.index(task.phase) :]
    return [] if task.phases else names


def _attempt(task: str, attempt: Attempt, logs: str, now: float) -> AttemptDetails:
    return AttemptDetails(
        attempt=attempt.number,
        phase=attempt.phase or DEFAULT_PHASES[0].name,
        adapter=attempt.adapter,
        model=attempt.model,
        outcome=attempt.outcome,
        reason=attempt.reason,
        started=attempt.started,
        ended=attempt.ended,
        seconds=_seconds(attempt, now),
        input_tokens=attempt.input_tokens,
        output_tokens=attempt.output_tokens,
        cached_tokens=attempt.cached_tokens,
        cost=attempt.cost,
        is_estimated=attempt.is_estimated,
        session=attempt.session,
        resumed=attempt.resumed,
        base=attempt.base,
        start=attempt.start,
        branch=attempt.branch,
        last_message=attempt.words,
        log=f"{logs}/{log_file_name(task, attempt.number, 'stdout')}",
        check_log=attempt.check_log,
        discarded=attempt.discarded,
        denied_tools=attempt.denied,
    )


def _handoff(handoff: Handoff) -> HandoffDetails:
    return HandoffDetails(
        id=handoff.id,
        kind=handoff.kind,
        phase=handoff.phase,
        attempt=handoff.attempt,
        to=handoff.to,
        protocol=handoff.protocol,
        by=handoff.by,
        time=handoff.time,
        digest=handoff.digest,
        is_intact=is_intact(handoff),
        receipts=handoff.receipts,
        summary=handoff.summary,
        tokens=handoff.tokens,
        cost=handoff.cost,
        key=handoff.key,
        version=handoff.version,
        data=handoff.data,
        mediation=handoff.mediation,
    )


def _landing(task: TaskDocument, target: str, landed_at: float | None) -> LandingDetails:
    builder = task.building_attempt if task.commit is not None and task.attempts else None
    return LandingDetails(
        target=target,
        landed=task.landed,
        time=landed_at,
        waiting=task.commit if task.landed is None else None,
        attempt=None if builder is None else builder.number,
        branch=task.branch,
        paths=task.paths,
        pull_request=task.pull_request,
    )


def _seconds(attempt: Attempt, now: float) -> float:
    """Return the duration of a session, so far if it is running; never negative, even if the clock was set back."""
    return max((now if attempt.ended is None else attempt.ended) - attempt.started, 0.0)


def _usage(attempts: Sequence[Attempt], now: float) -> UsageTotals:
    return UsageTotals(
        sessions=len(attempts),
        seconds=sum(_seconds(one, now) for one in attempts),
        input_tokens=sum(one.input_tokens for one in attempts),
        output_tokens=sum(one.output_tokens for one in attempts),
        cached_tokens=sum(one.cached_tokens for one in attempts),
        cost=sum_known_cost(attempts),
    )
