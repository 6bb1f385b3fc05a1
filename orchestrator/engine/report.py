"""What a run came to, as one object: what the shell prints last and Python gets back. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from orchestrator.domain.dispatch import Board
from orchestrator.domain.model import RunDocument, TaskDocument, TaskStatus
from orchestrator.protocols import JsonObject


class RunStatus(StrEnum):
    """How a run stands; the exit code follows from it."""

    LANDED = "landed"  #: every task is on the target
    INCOMPLETE = "incomplete"  #: over, but some tasks are not on the target
    INTERRUPTED = "interrupted"  #: stopped or killed before its end; `council resume` goes on
    RUNNING = "running"


EXIT_CODES: Mapping[RunStatus, int] = {
    RunStatus.LANDED: 0,
    RunStatus.INCOMPLETE: 1,
    RunStatus.RUNNING: 1,
    RunStatus.INTERRUPTED: 130,
}


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One task: `landed` is its commit on the target, `branch` keeps work that is not there, `reason` says why not."""

    id: str
    state: str
    attempts: int
    landed: str | None
    branch: str | None
    reason: str | None
    paths: Sequence[str]
    log: str | None
    """What the last attempt wrote to standard error; its standard output is beside it."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run and its tasks in the order of the file; `repository` is where the tasks' branches are."""

    run: str
    status: RunStatus
    target: str
    repository: str
    tasks: Sequence[TaskReport]
    damage: Sequence[str]
    """Places in the state log that could not be read; tasks that they hit say so."""

    @property
    def exit_code(self) -> int:
        """What the shell gets."""
        return EXIT_CODES[self.status]

    def to_json(self) -> JsonObject:
        """Return the result object."""
        return {**asdict(self), "exit": self.exit_code}


@dataclass(frozen=True, slots=True)
class ReportPlaces:
    """Where a run's output and branches are kept."""

    logs: Path
    repository: Path


def report(
    run: RunDocument,
    tasks: Mapping[str, TaskDocument],
    needs: Mapping[str, Sequence[str]],
    *,
    places: ReportPlaces,
    status: RunStatus | None,
    damage: Sequence[str] = (),
) -> RunReport:
    """Describe a run; with `status` None it is over, and its tasks say whether it is landed or incomplete."""
    board = Board.of(needs, {task: document.status for task, document in tasks.items()})
    reports = [_task(task, tasks[task], board.blocked.get(task), places.logs) for task in run.tasks]
    if status is None:
        landed = all(document.status is TaskStatus.LANDED for document in tasks.values())
        status = RunStatus.LANDED if landed else RunStatus.INCOMPLETE
    return RunReport(run.id, status, run.target, str(places.repository), reports, damage)


def _task(task: str, document: TaskDocument, blocked_by: str | None, logs: Path) -> TaskReport:
    state, reason = str(document.status), document.reason
    if blocked_by is not None and document.status is TaskStatus.PENDING:
        state, reason = "blocked", f"needs {blocked_by!r}, which did not land"
    log = str(logs / f"{task}.{document.attempt.number}.stderr") if document.attempts else None
    return TaskReport(
        id=task,
        state=state,
        attempts=len(document.attempts),
        landed=document.landed,
        branch=document.branch,
        reason=reason,
        paths=document.paths,
        log=log,
    )
