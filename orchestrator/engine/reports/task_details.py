"""The whole story of one task: what it was asked, what it went through, what came of each step. Pure."""

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
from orchestrator.engine.reports.report import TaskReport
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output.log_files import log_file_name

_DESCRIBED = ConfigDict(use_attribute_docstrings=True)

#: What the one phase of a task without a workflow came to, by where the task is.
_PLAIN_STATUS: Mapping[TaskStatus, PhaseStatus] = {
    TaskStatus.PENDING: PhaseStatus.IN_PROGRESS,
    TaskStatus.RUNNING: PhaseStatus.IN_PROGRESS,
    TaskStatus.FAILED: PhaseStatus.FAILED,
    TaskStatus.NO_CHANGE: PhaseStatus.FAILED,
    TaskStatus.CANCELLED: PhaseStatus.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class UsageTotals:
    """What sessions used up."""

    __pydantic_config__: ClassVar = _DESCRIBED

    sessions: int
    """How many there were."""
    seconds: float
    """How long they ran, all together; those that run by now count so far."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    """Of the input, what was read from a cache."""
    cost: float | None
    """US dollars, as far as the CLIs told; null where none did."""


@dataclass(frozen=True, slots=True)
class PhaseVisitDetails:
    """One visit of a phase: it is entered anew each time that it has to be done again from its beginning."""

    __pydantic_config__: ClassVar = _DESCRIBED

    phase: str
    """Its name; `build` of a task without a workflow."""
    visit: int
    """Which visit of this phase it is, from 1."""
    status: str
    """`in_progress`, `awaiting`, `completed`, `rejected` (by a person), `failed`, `skipped` or `cancelled`."""
    started: float | None
    """When (seconds since the epoch)."""
    ended: float | None
    attempts: Sequence[int]
    """The numbers of its sessions."""
    adapters: Sequence[str]
    """Those that ran them."""
    usage: UsageTotals
    given: GivenValues | None
    """What it was given of all that was known; null: nothing is filtered for it."""
    received: Sequence[str]
    """The ids of the handoffs that it was given."""
    handoff: str | None
    """The id of what it handed over."""
    verdict: str | None
    """Of a review: `approve` or `reject`."""
    findings: Sequence[JsonObject]
    """What a review found: `path`, `line`, `severity`, `message`."""
    note: str | None
    """What the person said who approved or rejected it."""
    reason: str | None
    """Why it failed, was rejected or skipped."""
    rounds: int
    """How often its work was sent back because of what it is to be done `until`."""
    repairs: int
    """How often its session was asked to mend what it handed over."""
    commit: str | None
    """The commit that holds the task's work up to its end, where it writes."""
    base: str | None
    """The commit that this is judged against."""
    discarded: Sequence[str]
    """The paths that it changed though it is to change nothing; that was discarded."""


@dataclass(frozen=True, slots=True)
class AttemptDetails:
    """One session: an attempt."""

    __pydantic_config__: ClassVar = _DESCRIBED

    attempt: int
    """Its number."""
    phase: str
    """What it was at."""
    adapter: str
    model: str | None
    """By its name, if the CLI told."""
    outcome: str | None
    """`built`, `completed`, `interrupted`, `cancelled`, or the failure's class; null while it runs."""
    reason: str | None
    """Why it failed, or was followed by another."""
    started: float
    """When (seconds since the epoch)."""
    ended: float | None
    seconds: float
    """How long it took, or has taken so far."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    """Of the input, what was read from a cache."""
    cost: float | None
    """US dollars."""
    is_estimated: bool
    """Whether that is by the price of its model, and not what the CLI told."""
    session: str | None
    """The CLI's own id of its conversation."""
    resumed: bool
    """Whether it went on with the conversation of an earlier one."""
    base: str
    """The commit that its work is judged against."""
    start: str | None
    """The commit that its worktree began at, where that is another."""
    branch: str | None
    """The branch that keeps what it left."""
    last_message: str | None
    """What the CLI said last, or its result."""
    log: str
    """The file with what it wrote to standard output; `.stderr` is beside it."""
    check_log: str | None
    """The file with what the check printed that did not pass."""
    discarded: Sequence[str]
    """The paths that it changed though it was to change nothing."""
    denied_tools: ToolDenials
    """The tools that its CLI denied it: how many calls, the first of them, and what allows them."""


@dataclass(frozen=True, slots=True)
class HandoffDetails:
    """What a session handed over."""

    __pydantic_config__: ClassVar = _DESCRIBED

    id: str
    kind: str
    """What it is, such as `plan`."""
    phase: str
    """The phase that it comes from."""
    attempt: int
    """The session that it comes from."""
    to: str | None
    """The phase that it is for; null: none follows."""
    protocol: str
    """How it got there: `direct`, `mediated` or `shared`."""
    by: str
    """How it was delivered: by a `file`, a `tool`, or the `answer`."""
    time: float
    """When (seconds since the epoch)."""
    digest: str
    is_intact: bool
    """Whether it holds what its digest says."""
    receipts: Sequence[Receipt]
    """Who has received it."""
    summary: str
    tokens: int
    """Input and output, of all of the task up to then."""
    cost: float | None
    """US dollars, the same."""
    key: str | None
    """The key under which it is shared."""
    version: int | None
    data: JsonObject
    """The result itself."""
    mediation: Mediation | None
    """What was made of it on the way."""


@dataclass(frozen=True, slots=True)
class LandingDetails:
    """How its work came onto the target, or why it is not there."""

    __pydantic_config__: ClassVar = _DESCRIBED

    target: str
    landed: str | None
    """The commit that brought it in."""
    time: float | None
    """When it landed (seconds since the epoch)."""
    waiting: str | None
    """The commit that waits to land."""
    attempt: int | None
    """The session that built it."""
    branch: str | None
    """What keeps work that is not on the target."""
    paths: Sequence[str]
    """The paths in conflict."""
    pull_request: int | None
    """The number of the pull request that is about it."""


@dataclass(frozen=True, slots=True)
class LatestActivity:
    """The latest activity of a running session."""

    __pydantic_config__: ClassVar = _DESCRIBED

    text: str
    """The last line of its words, or its last tool call."""
    time: float
    """When it printed anything last (seconds since the epoch)."""


@dataclass(frozen=True, slots=True)
class TaskDetails:
    """What `council show` tells of a task."""

    __pydantic_config__: ClassVar = _DESCRIBED

    run: str
    task: str
    status: str
    """Where it is; `blocked` means that something that it needs will not land."""
    reason: str | None
    """Why it is not landed, or what is special about it."""
    prompt: str | None
    """What it was asked to do; null where that is not known, as of an imported task."""
    tracker: str | None
    """The tracker that it came from."""
    plan: str | None
    """The id of the handoff with the plan that it came of."""
    expanded: Sequence[str]
    """The tasks that its plan became."""
    adapter: str | None
    """Null of a merge: no session makes it."""
    attempts: int
    """How many were made; one that was interrupted is none."""
    needs: Sequence[str]
    workflow: str | None
    """The name of its workflow."""
    phases: Sequence[PhaseVisitDetails]
    """The phases that it was at, visit by visit."""
    remaining_phases: Sequence[str]
    """The phases that are still to come, if nothing is sent back or skipped."""
    sessions: Sequence[AttemptDetails]
    handoffs: Sequence[HandoffDetails]
    landing: LandingDetails
    usage: UsageTotals
    damage: Sequence[str]
    """Places in the state log that could not be read."""
    latest_activity: LatestActivity | None = None
    """The latest activity of its session; null unless one runs and its output is on this machine."""

    def to_json(self) -> JsonObject:
        """Return the object that programs get."""
        told: JsonObject = TypeAdapter(TaskDetails).dump_python(self, mode="json")
        return told


@dataclass(frozen=True, slots=True)
class TaskDefinition:
    """What a task was to do, and by which steps."""

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
    asked: TaskDefinition,
    handoffs: Mapping[str, Handoff],
    *,
    target: str,
    landed_at: float | None,
    logs: str,
    now: float,
    is_merge: bool = False,
    damage: Sequence[str] = (),
) -> TaskDetails:
    """Return the story of a task, of the documents that are about it; `logs` is the folder of its run's output.

    At `now` (wall-clock seconds) sessions without an end are running. The first attempt of a merge had no session.
    """
    attempts = document.attempts[1:] if is_merge else document.attempts
    ordered = sorted(handoffs.values(), key=lambda one: one.attempt)
    return TaskDetails(
        run=run,
        task=report.id,
        status=report.status,
        reason=report.reason,
        prompt=asked.prompt,
        tracker=asked.tracker,
        plan=asked.plan,
        expanded=document.expanded,
        adapter=report.adapter if attempts or not is_merge else None,
        attempts=report.attempts,
        needs=asked.needs,
        workflow=asked.workflow,
        phases=_visits(document, attempts, asked, handoffs, now),
        remaining_phases=_remaining_phases(document, asked),
        sessions=[_session(report.id, one, logs, now) for one in attempts],
        handoffs=[_handoff(one) for one in ordered],
        landing=_landing(document, target, landed_at),
        usage=_usage(attempts, now),
        damage=damage,
    )


def _visits(
    task: TaskDocument, sessions: Sequence[Attempt], asked: TaskDefinition, handoffs: Mapping[str, Handoff], now: float
) -> list[PhaseVisitDetails]:
    if task.imported is not None:
        words = {
            name: one.get("status") if isinstance(one, dict) else one for name, one in task.imported.phases.items()
        }
        named = [(name, word if isinstance(word, str) else "unknown") for name, word in words.items()]
        return [_visit(_record(name), word, 1, (), None, now) for name, word in named]
    if asked.workflow is None:
        return [_plain_visit(task, sessions, now)] if sessions else []
    counts: dict[str, int] = {}
    found = []
    for record in task.phases:
        number = counts[record.phase] = counts.get(record.phase, 0) + 1
        attempts = [sessions[one - 1] for one in record.attempts if one <= len(sessions)]
        found.append(_visit(record, record.status, number, attempts, handoffs.get(record.handoff or ""), now))
    return found


def _record(phase: str, **changes: Any) -> PhaseRecord:
    return PhaseRecord(phase=phase, **{"status": PhaseStatus.COMPLETED, **changes})


def _plain_visit(task: TaskDocument, sessions: Sequence[Attempt], now: float) -> PhaseVisitDetails:
    """Return the one phase of a task without a workflow, of which nothing is recorded but its attempts."""
    status = _PLAIN_STATUS.get(task.status, PhaseStatus.COMPLETED)
    is_open = status is PhaseStatus.IN_PROGRESS
    built = [one for one in sessions if one.outcome == "built"]
    record = _record(
        DEFAULT_PHASES[0].name,
        status=status,
        started=sessions[0].started,
        ended=None if is_open else sessions[-1].ended,
        attempts=tuple(one.number for one in sessions),
        commit=task.commit,
        base=built[-1].base if built else None,
        reason=None if status in {PhaseStatus.COMPLETED, PhaseStatus.IN_PROGRESS} else task.reason,
    )
    return _visit(record, status, 1, sessions, None, now)


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
        adapters=list(dict.fromkeys(one.adapter for one in attempts)),
        usage=_usage(attempts, now),
        given=record.given,
        received=record.received,
        handoff=record.handoff,
        verdict=record.verdict,
        findings=[one for one in findings if isinstance(one, dict)] if isinstance(findings, list | tuple) else [],
        note=record.note,
        reason=record.reason,
        rounds=record.rounds,
        repairs=record.repairs,
        commit=record.commit,
        base=record.base,
        discarded=list(dict.fromkeys(path for one in attempts for path in one.discarded)),
    )


def _remaining_phases(task: TaskDocument, asked: TaskDefinition) -> list[str]:
    """Return the phases that are still to come."""
    if task.imported is not None or task.status not in {TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.WAITING}:
        return []
    names = list(asked.phases)
    if asked.workflow is None:
        return [] if task.attempts else names
    last = task.phases[-1] if task.phases else None
    if last is not None and last.status in {PhaseStatus.IN_PROGRESS, PhaseStatus.AWAITING} and last.phase in names:
        return names[names.index(last.phase) + 1 :]
    if task.phase in names:
        return names[names.index(task.phase) :]
    return [] if task.phases else names


def _session(task: str, one: Attempt, logs: str, now: float) -> AttemptDetails:
    return AttemptDetails(
        attempt=one.number,
        phase=one.phase or DEFAULT_PHASES[0].name,
        adapter=one.adapter,
        model=one.model,
        outcome=one.outcome,
        reason=one.reason,
        started=one.started,
        ended=one.ended,
        seconds=_seconds(one, now),
        input_tokens=one.input_tokens,
        output_tokens=one.output_tokens,
        cached_tokens=one.cached_tokens,
        cost=one.cost,
        is_estimated=one.is_estimated,
        session=one.session,
        resumed=one.resumed,
        base=one.base,
        start=one.start,
        branch=one.branch,
        last_message=one.words,
        log=f"{logs}/{log_file_name(task, one.number, 'stdout')}",
        check_log=one.check_log,
        discarded=one.discarded,
        denied_tools=one.denied,
    )


def _handoff(one: Handoff) -> HandoffDetails:
    return HandoffDetails(
        id=one.id,
        kind=one.kind,
        phase=one.phase,
        attempt=one.attempt,
        to=one.to,
        protocol=one.protocol,
        by=one.by,
        time=one.time,
        digest=one.digest,
        is_intact=is_intact(one),
        receipts=one.receipts,
        summary=one.summary,
        tokens=one.tokens,
        cost=one.cost,
        key=one.key,
        version=one.version,
        data=one.data,
        mediation=one.mediation,
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


def _seconds(one: Attempt, now: float) -> float:
    """Return how long a session took, or has taken so far; a wall clock may have been set back meanwhile."""
    return max((now if one.ended is None else one.ended) - one.started, 0.0)


def _usage(attempts: Sequence[Attempt], now: float) -> UsageTotals:
    return UsageTotals(
        sessions=len(attempts),
        seconds=sum(_seconds(one, now) for one in attempts),
        input_tokens=sum(one.input_tokens for one in attempts),
        output_tokens=sum(one.output_tokens for one in attempts),
        cached_tokens=sum(one.cached_tokens for one in attempts),
        cost=sum_known_cost(attempts),
    )
