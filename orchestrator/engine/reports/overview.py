"""Summarize a run: its options, tasks with attempts, live sessions, newest events, metrics. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from orchestrator.domain.runs.metrics import ActiveTime, Metrics, compute_metrics, compute_minutes_to_land
from orchestrator.domain.runs.model import Attempt, ImportedTask, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.reports.report import RunRecord, RunReport, RunStatus, TaskReport, imported_phase_statuses
from orchestrator.protocols import Document, JsonObject, RecordedEvent
from orchestrator.repo.worktrees.hub import work_branch_name

#: Fields of a run's document that are not options.
_NOT_OPTIONS = {"id", "tasks", "started", "ended", "imported"}


@dataclass(frozen=True, slots=True)
class PhaseOverview:
    """A phase of a task and its attempts; a task without a workflow has one phase, `build`.

    `status` is `pending`, `running`, `interrupted`, or the newest attempt's outcome; with a workflow, the status of the
    last visit; for imported tasks, the imported status.
    """

    name: str
    status: str
    attempts: Sequence[Attempt]


@dataclass(frozen=True, slots=True)
class TaskOverview:
    """The status of one task, with the location of its work and its usage."""

    report: TaskReport
    worktree: str | None
    """The worktree of its newest attempt, if it exists."""
    phases: Sequence[PhaseOverview]
    minutes: float | None
    """Minutes from its first start to its landing."""
    branch: str | None = None
    """The branch with its work; for imported tasks, the former branch."""
    pull_request: int | None = None

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        report = self.report
        phases = [
            {
                "name": phase.name,
                "status": phase.status,
                "attempts": [attempt.model_dump(mode="json", exclude={"secrets"}) for attempt in phase.attempts],
            }
            for phase in self.phases
        ]
        usage = {"input_tokens": report.input_tokens, "output_tokens": report.output_tokens, "cost": report.cost}
        return {
            "id": report.id,
            "status": report.status,
            "reason": report.reason,
            "attempts": report.attempts,
            "landed": report.landed,
            "branch": self.branch,
            "worktree": self.worktree,
            "pull_request": self.pull_request,
            "phases": phases,
            "metrics": {"time_minutes": self.minutes, **usage},
        }


@dataclass(frozen=True, slots=True)
class LiveSession:
    """An attempt with a running session."""

    task: str
    attempt: int
    adapter: str
    started: float
    branch: str
    worktree: str | None


@dataclass(frozen=True, slots=True)
class RunOverview:
    """The current state of a run."""

    record: RunRecord
    report: RunReport
    tasks: Sequence[TaskOverview]
    sessions: Sequence[LiveSession]
    events: Sequence[RecordedEvent]
    """The newest events, in chronological order."""
    metrics: Metrics

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        run = self.record.run
        return {
            "run": run.id,
            "status": self.report.status,
            "started": run.started,
            "ended": run.ended,
            "imported": run.imported and run.imported.model_dump(mode="json", exclude={"options"}),
            "options": run.imported.options if run.imported else run.model_dump(mode="json", exclude=_NOT_OPTIONS),
            "tasks": [task.to_json() for task in self.tasks],
            "sessions": [asdict(session) for session in self.sessions],
            "events": [
                {"event": record.event.type, "position": record.position, "time": record.time, **record.event.data}
                for record in self.events
            ],
            "metrics": asdict(self.metrics),
            "damage": list(self.report.damage),
        }


def landing_times(tasks: Mapping[str, TaskDocument], documents: Mapping[str, Document]) -> dict[str, float]:
    """Return the times when tasks landed (wall-clock seconds); imported tasks have the imported completion time.

    The document of a landed task never changes again, so its time is the time of the landing.
    """
    times = {
        name: documents[name].time if task.imported is None else task.imported.completed
        for name, task in tasks.items()
        if task.status is TaskStatus.LANDED and not documents[name].damaged
    }
    return {task: time for task, time in times.items() if time is not None}


def build_overview(
    record: RunRecord,
    report: RunReport,
    landed_at: Mapping[str, float],
    worktrees: Mapping[str, str],
    events: Sequence[RecordedEvent],
    active: ActiveTime,
) -> RunOverview:
    """Summarize a run; `worktrees` has the existing worktrees of newest attempts, by task."""
    is_live = report.status is RunStatus.RUNNING
    tasks = []
    for task in report.tasks:
        document = record.tasks[task.id]
        imported = document.imported
        tasks.append(
            TaskOverview(
                report=task,
                worktree=worktrees.get(task.id) if imported is None else imported.worktree,
                phases=_phases(document, is_live=is_live) if imported is None else _imported_phases(imported),
                minutes=compute_minutes_to_land(document, landed_at.get(task.id), active),
                branch=task.branch if imported is None else imported.branch,
                pull_request=document.pull_request,
            )
        )
    sessions = _live_sessions(record, worktrees) if is_live else []
    return RunOverview(record, report, tasks, sessions, events, compute_metrics(record.tasks, landed_at, active))


def _phases(task: TaskDocument, *, is_live: bool) -> list[PhaseOverview]:
    """Return the phases that a task has visited, each once, or the single phase of a task without a workflow."""
    if task.phases:
        statuses = {visit.phase: visit.status for visit in task.phases}
        return [
            PhaseOverview(phase, str(status), [attempt for attempt in task.attempts if attempt.phase == phase])
            for phase, status in statuses.items()
        ]
    status = "pending"
    if task.attempts:
        status = task.attempt.outcome or ("running" if is_live else "interrupted")
    return [PhaseOverview("build", status, task.attempts)]


def _imported_phases(imported: ImportedTask) -> list[PhaseOverview]:
    return [PhaseOverview(phase, status, ()) for phase, status in imported_phase_statuses(imported).items()]


def _live_sessions(record: RunRecord, worktrees: Mapping[str, str]) -> list[LiveSession]:
    running = {name: task.attempt for name, task in record.tasks.items() if task.status is TaskStatus.RUNNING}
    return [
        LiveSession(
            task=task,
            attempt=attempt.number,
            adapter=attempt.adapter,
            started=attempt.started,
            branch=work_branch_name(record.run.id, task, attempt.number),
            worktree=worktrees.get(task),
        )
        for task, attempt in running.items()
        if attempt.ended is None
    ]
