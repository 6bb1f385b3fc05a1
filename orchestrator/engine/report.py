"""What a run came to, as one object: what the shell prints last and Python gets back. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from orchestrator.domain.dispatch import Board, Entry
from orchestrator.domain.failures import FailureClass
from orchestrator.domain.model import AdapterDocument, RunDocument, TaskDocument, TaskStatus
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output import log_file


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
    failure: str | None
    """The class of the last attempt's failure."""
    reason: str | None
    paths: Sequence[str]
    log: str | None
    """What the check that did not pass printed, or else what the last attempt wrote to standard error."""


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """An adapter that can't be used now: until when (wall-clock seconds), or why not until a person has seen to it."""

    name: str
    parked_until: float | None
    closed: str | None


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run and its tasks in the order of the file; `repository` is where the tasks' branches are."""

    run: str
    status: RunStatus
    target: str
    repository: str
    tasks: Sequence[TaskReport]
    adapters: Sequence[AdapterReport]
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
class RunRecord:
    """All that is recorded of a run, its tasks and what they are to do in the order of the file."""

    run: RunDocument
    tasks: Mapping[str, TaskDocument]
    entries: Mapping[str, Entry]
    adapters: Mapping[str, AdapterDocument]


@dataclass(frozen=True, slots=True)
class ReportPlaces:
    """Where a run's output and branches are kept."""

    logs: Path
    repository: Path


def report(
    record: RunRecord, *, places: ReportPlaces, status: RunStatus | None, now: float, damage: Sequence[str] = ()
) -> RunReport:
    """Describe a run at `now` (wall-clock seconds).

    With `status` None nothing is at work in it, and its tasks say whether it is landed or incomplete.
    """
    board = Board.of(record.entries, {task: document.status for task, document in record.tasks.items()})
    adapters = [
        AdapterReport(name, learned.parked_until, learned.closed)
        for name, learned in record.adapters.items()
        if learned.closed is not None or (learned.parked_until or 0.0) > now
    ]
    closed = {one.name: one.closed for one in adapters if one.closed is not None}
    stuck = {} if status is RunStatus.RUNNING else _stuck(record, closed)
    reports = []
    for task in record.run.tasks:
        need = board.blocked.get(task)
        why = stuck.get(task) if need is None else f"needs {need!r}, which did not land"
        reports.append(_task(task, record.tasks[task], why, places.logs))
    if status is None:
        landed = all(document.status is TaskStatus.LANDED for document in record.tasks.values())
        status = RunStatus.LANDED if landed else RunStatus.INCOMPLETE
    return RunReport(record.run.id, status, record.run.target, str(places.repository), reports, adapters, damage)


def _stuck(record: RunRecord, closed: Mapping[str, str]) -> dict[str, str]:
    """Return the tasks that wait for an adapter that is stopped, themselves or by what they need, and why."""
    stuck = {
        task: f"the adapter {entry.adapter!r} is stopped: {closed[entry.adapter]}: mend it, then `council resume`"
        for task, entry in record.entries.items()
        if entry.adapter in closed and record.tasks[task].status is TaskStatus.PENDING
    }
    dependents = defaultdict(list)
    for task, entry in record.entries.items() if stuck else ():
        for need in entry.needs:
            dependents[need].append(task)
    waiting = list(stuck)
    while waiting:
        held = waiting.pop()
        for task in dependents[held]:
            if task not in stuck:
                stuck[task] = f"needs {held!r}, which waits for its adapter"
                waiting.append(task)
    return stuck


def _task(task: str, document: TaskDocument, why_blocked: str | None, logs: Path) -> TaskReport:
    state, reason = str(document.status), document.reason
    if why_blocked is not None and document.status is TaskStatus.PENDING:
        state, reason = "blocked", why_blocked
    outcome = document.attempt.outcome if document.attempts else None
    return TaskReport(
        id=task,
        state=state,
        attempts=len(document.attempts),
        landed=document.landed,
        branch=document.branch,
        failure=outcome if outcome in set(FailureClass) and document.landed is None else None,
        reason=reason,
        paths=document.paths,
        log=_log(task, document, logs),
    )


def _log(task: str, document: TaskDocument, logs: Path) -> str | None:
    if not document.attempts:
        return None
    return document.attempt.check_log or str(log_file(logs, task, document.attempt.number, "stderr"))
