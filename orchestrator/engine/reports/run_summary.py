"""Summarize a run: tasks, attempts, live sessions, newest events, metrics. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from orchestrator.domain.runs.metrics import ActiveTime, Metrics, compute_metrics, compute_minutes_to_land
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.reports.report import RunRecord, RunReport, RunStatus
from orchestrator.engine.reports.task_details import phase_of, phase_statuses
from orchestrator.engine.reports.task_report import RunningSession, TaskReport, report_session
from orchestrator.protocols import Document, JsonObject, RecordedEvent

#: Fields of a run's document that are not options.
_NOT_OPTIONS = {"id", "tasks", "started", "ended", "imported"}


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The current state of a run."""

    record: RunRecord
    report: RunReport
    worktrees: Mapping[str, str]
    """The existing worktrees of the newest attempts, by task."""
    minutes: Mapping[str, float]
    """The active minutes of landed tasks from their first start to their landing, by task, as far as known."""
    sessions: Sequence[RunningSession]
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
            "tasks": [self._task_json(task) for task in self.report.tasks],
            "sessions": [asdict(session) for session in self.sessions],
            "events": [
                {"event": record.event.type, "position": record.position, "time": record.time, **record.event.data}
                for record in self.events
            ],
            "metrics": asdict(self.metrics),
            "damage": list(self.report.damage),
        }

    def phase_statuses(self, task: str) -> dict[str, str]:
        """Return the phases that a task has entered, with the status of the last visit."""
        return phase_statuses(self.record.tasks[task])

    def _task_json(self, task: TaskReport) -> JsonObject:
        document = self.record.tasks[task.id]
        phases = [
            {
                "name": phase,
                "status": status,
                "attempts": [
                    attempt.model_dump(mode="json", exclude={"secrets"})
                    for attempt in document.attempts
                    if phase_of(attempt) == phase
                ],
            }
            for phase, status in self.phase_statuses(task.id).items()
        ]
        found = {"worktree": self.worktrees.get(task.id), "time_minutes": self.minutes.get(task.id), "phases": phases}
        return {**task.to_json(), **found}


def landing_times(tasks: Mapping[str, TaskDocument], documents: Mapping[str, Document]) -> dict[str, float]:
    """Return the landing times of tasks (wall-clock seconds).

    The document of a landed task never changes again, so its time is the time of the landing. Imported tasks have the
    imported completion time.
    """
    times = {
        name: documents[name].time if task.imported is None else task.imported.completed
        for name, task in tasks.items()
        if task.status is TaskStatus.LANDED and not documents[name].damaged
    }
    return {task: time for task, time in times.items() if time is not None}


def build_run_summary(
    record: RunRecord,
    report: RunReport,
    landed_at: Mapping[str, float],
    worktrees: Mapping[str, str],
    events: Sequence[RecordedEvent],
    active: ActiveTime,
) -> RunSummary:
    """Summarize a run; `landed_at` has the landing times (wall-clock seconds) by task."""
    minutes = {
        task: taken
        for task, document in record.tasks.items()
        if (taken := compute_minutes_to_land(document, landed_at.get(task), active)) is not None
    }
    reported = [
        report_session(record.run.id, task, document, worktrees.get(task)) for task, document in record.tasks.items()
    ]
    sessions = [one for one in reported if one is not None] if report.status is RunStatus.RUNNING else []
    metrics = compute_metrics(record.tasks, landed_at, active)
    return RunSummary(record, report, worktrees, minutes, sessions, events, metrics)
