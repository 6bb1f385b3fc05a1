"""A run at a glance: its options, its tasks with their attempts, what is live, its newest events, figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from orchestrator.domain.runs.metrics import ActiveTime, Metrics, compute_metrics, compute_minutes_to_land
from orchestrator.domain.runs.model import Attempt, ImportedTask, TaskDocument, TaskStatus
from orchestrator.engine.reports.report import RunRecord, RunReport, RunStatus, TaskReport
from orchestrator.protocols import Document, JsonObject, RecordedEvent
from orchestrator.repo.worktrees.hub import work_branch_name

#: Fields of a run's document that are no options.
_NO_OPTIONS = {"id", "tasks", "started", "ended", "imported"}


@dataclass(frozen=True, slots=True)
class PhaseOverview:
    """A part of a task's work and the attempts at it; without a workflow there is one, `build`.

    `status` is `pending`, `running`, `interrupted`, or the newest attempt's outcome; with a workflow that of the last
    visit, of imported tasks what it said.
    """

    name: str
    status: str
    attempts: Sequence[Attempt]


@dataclass(frozen=True, slots=True)
class TaskOverview:
    """One task: how it stands, where its work is, and what it took."""

    report: TaskReport
    worktree: str | None
    """The checkout that its newest attempt has; None where there is none."""
    phases: Sequence[PhaseOverview]
    minutes: float | None
    """From its first start to its landing."""
    branch: str | None = None
    """Where its work is; of imported tasks where it was."""
    pull_request: int | None = None

    def to_json(self) -> JsonObject:
        """Return the object that programs get."""
        one = self.report
        phases = [
            {"name": phase.name, "status": phase.status, "attempts": [_attempt(try_) for try_ in phase.attempts]}
            for phase in self.phases
        ]
        tokens = {"input_tokens": one.input_tokens, "output_tokens": one.output_tokens, "cost": one.cost}
        return {
            "id": one.id,
            "status": one.status,
            "reason": one.reason,
            "attempts": one.attempts,
            "landed": one.landed,
            "branch": self.branch,
            "worktree": self.worktree,
            "pull_request": self.pull_request,
            "phases": phases,
            "metrics": {"time_minutes": self.minutes, **tokens},
        }


@dataclass(frozen=True, slots=True)
class LiveSession:
    """An attempt whose session is at work."""

    task: str
    attempt: int
    adapter: str
    started: float
    branch: str
    worktree: str | None


@dataclass(frozen=True, slots=True)
class RunOverview:
    """A run as it stands."""

    record: RunRecord
    report: RunReport
    tasks: Sequence[TaskOverview]
    sessions: Sequence[LiveSession]
    events: Sequence[RecordedEvent]
    """The newest, the oldest of them first."""
    metrics: Metrics

    def to_json(self) -> JsonObject:
        """Return the object that programs get."""
        run = self.record.run
        return {
            "run": run.id,
            "status": self.report.status,
            "started": run.started,
            "ended": run.ended,
            "imported": run.imported and run.imported.model_dump(mode="json", exclude={"options"}),
            "options": run.imported.options if run.imported else run.model_dump(mode="json", exclude=_NO_OPTIONS),
            "tasks": [task.to_json() for task in self.tasks],
            "sessions": [asdict(session) for session in self.sessions],
            "events": [
                {"event": one.event.type, "position": one.position, "time": one.time, **one.event.data}
                for one in self.events
            ],
            "metrics": asdict(self.metrics),
            "damage": list(self.report.damage),
        }


def landing_times(tasks: Mapping[str, TaskDocument], documents: Mapping[str, Document]) -> dict[str, float]:
    """Return when tasks landed (wall-clock seconds): nothing changes a task's document behind that.

    Of those that were imported it is when they were said to be completed.
    """
    found = {
        task: documents[task].time if one.imported is None else one.imported.completed
        for task, one in tasks.items()
        if one.status is TaskStatus.LANDED and not documents[task].damaged
    }
    return {task: time for task, time in found.items() if time is not None}


def build_overview(
    record: RunRecord,
    report: RunReport,
    landed_at: Mapping[str, float],
    worktrees: Mapping[str, str],
    events: Sequence[RecordedEvent],
    active: ActiveTime,
) -> RunOverview:
    """Describe a run; `worktrees` has the checkouts of newest attempts that are there, by task."""
    is_live = report.status is RunStatus.RUNNING
    tasks = []
    for one in report.tasks:
        document = record.tasks[one.id]
        was = document.imported
        tasks.append(
            TaskOverview(
                report=one,
                worktree=worktrees.get(one.id) if was is None else was.worktree,
                phases=_imported(was) if was is not None else _phases(document, is_live=is_live),
                minutes=compute_minutes_to_land(document, landed_at.get(one.id), active),
                branch=one.branch if was is None else was.branch,
                pull_request=document.pull_request,
            )
        )
    sessions = _live_sessions(record, worktrees) if is_live else []
    return RunOverview(record, report, tasks, sessions, events, compute_metrics(record.tasks, landed_at, active))


def _phases(task: TaskDocument, *, is_live: bool) -> list[PhaseOverview]:
    """Return the phases that a task has been at, each once, or the one of a task without a workflow."""
    if task.phases:
        last = {one.phase: one.status for one in task.phases}
        return [
            PhaseOverview(name, str(word), [one for one in task.attempts if one.phase == name])
            for name, word in last.items()
        ]
    status = "pending"
    if task.attempts:
        status = task.attempt.outcome or ("running" if is_live else "interrupted")
    return [PhaseOverview("build", status, task.attempts)]


def _imported(was: ImportedTask) -> list[PhaseOverview]:
    words = {name: one.get("status") if isinstance(one, dict) else one for name, one in was.phases.items()}
    return [PhaseOverview(name, word if isinstance(word, str) else "unknown", ()) for name, word in words.items()]


def _live_sessions(record: RunRecord, worktrees: Mapping[str, str]) -> list[LiveSession]:
    working = {task: one.attempt for task, one in record.tasks.items() if one.status is TaskStatus.RUNNING}
    return [
        LiveSession(
            task=task,
            attempt=attempt.number,
            adapter=attempt.adapter,
            started=attempt.started,
            branch=work_branch_name(record.run.id, task, str(attempt.number)),
            worktree=worktrees.get(task),
        )
        for task, attempt in working.items()
        if attempt.ended is None
    ]


def _attempt(attempt: Attempt) -> JsonObject:
    return attempt.model_dump(mode="json", exclude={"secrets"})
