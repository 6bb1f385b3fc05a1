"""What a run came to, as one object: what the shell prints last and Python gets back. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.lifecycle import run_state
from orchestrator.domain.runs.model import (
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    SUCCESS_STATUSES,
    AdapterDocument,
    HaltCause,
    RunDocument,
    TaskDocument,
    TaskStatus,
)
from orchestrator.domain.runs.phases import OPEN_STATUSES
from orchestrator.domain.scheduling.claims import ClaimCounters, OrchestratorLease, sum_counters
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output.log_files import log_file_name
from orchestrator.system.instants import format_local_time

#: `result_schema` takes the docstrings of fields for their descriptions.
_DESCRIBED = ConfigDict(use_attribute_docstrings=True)


class RunStatus(StrEnum):
    """How a run stands; the exit code follows from it."""

    LANDED = "landed"  #: every task is on the target, or done without that
    INCOMPLETE = "incomplete"  #: over, but some tasks are neither
    INTERRUPTED = "interrupted"  #: stopped or killed before its end; `council resume` goes on
    HALTED = "halted"  #: stopped before its end by its budget, or by checks that can't pass; `halted` says why
    RUNNING = "running"


EXIT_CODES: Mapping[RunStatus, int] = {
    RunStatus.LANDED: 0,
    RunStatus.INCOMPLETE: 1,
    RunStatus.HALTED: 1,
    RunStatus.RUNNING: 1,
    RunStatus.INTERRUPTED: 130,
}


_FAILURES = frozenset(FailureClass)
_INTERRUPTED = "its session was interrupted: `council resume {run}` tries it again"
_DAMAGED = "its record in the state log is damaged: this is how it stood before, `council state verify` tells more"


@dataclass(slots=True)  # not frozen, which would take three times as long for each of thousands
class TaskReport:
    """One task."""

    __pydantic_config__: ClassVar = _DESCRIBED

    id: str
    """The task's name within the run."""
    status: str
    """Where it is; `blocked` means that something that it needs will not land."""
    attempts: int
    """How many count towards its limit: each phase, and each retry by a person, starts again with all of them."""
    landed: str | None
    """The commit that brought it onto the target, or was found to hold the same change there."""
    branch: str | None
    """The branch that keeps work that is not on the target."""
    failure: str | None
    """The class of the last attempt's failure."""
    reason: str | None
    """Why it is not landed, or what is special about it."""
    paths: Sequence[str]
    """The paths in conflict."""
    log: str | None
    """What the check that did not pass printed, or else what the last attempt wrote to standard error."""
    adapter: str
    words: str | None
    """What the CLI said last, or its result."""
    input_tokens: int
    output_tokens: int
    cost: float | None
    """US dollars of all attempts, as far as their CLIs told."""
    phase: str | None = None
    """The phase of its workflow that it is at, or is to enter next; null: none is left, or it has no workflow."""
    denied: str | None = None
    """The tools that its newest session with any was denied, and what allows them; null: none was."""
    blocked_by: str | None = None
    """The task that did not land and that it needs, directly or not; null: an adapter, or nothing, blocks it."""


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """An adapter that can't be used now."""

    __pydantic_config__: ClassVar = _DESCRIBED

    name: str
    """What tasks call it by."""
    parked_until: float | None
    """Until when (seconds since the epoch)."""
    closed: str | None
    """Why not until a person has seen to it."""


@dataclass(frozen=True, slots=True)
class AdapterFailure:
    """The last session of an adapter that failed."""

    failure: str
    """Its class."""
    reason: str
    """What happened, and what to do."""
    time: float
    """When (seconds since the epoch)."""
    task: str
    """Of which task."""


@dataclass(frozen=True, slots=True)
class SessionReport:
    """What a session is at that is at work now."""

    __pydantic_config__: ClassVar = _DESCRIBED

    task: str
    """Of which task."""
    attempt: int
    """Its attempt's number."""
    adapter: str
    """What runs it."""
    orchestrator: str
    """The process that it is of, by its name in the run."""
    status: str
    """How it says that it does: `working`, `blocked`, `waiting` for files, or `done`."""
    file: str | None
    """The file that it is at."""
    progress: str | None
    """How far it is, in its own words."""
    message: str | None
    """What it does, in its own words; of one that does not say, what it was seen to do."""
    blocked_on: str | None
    """What it waits for."""
    files: Sequence[str]
    """The files that it has locked."""
    updated: float
    """When it was heard of last (seconds since the epoch)."""


@dataclass(frozen=True, slots=True)
class OrchestratorReport:
    """A process that is at work in a run, or was."""

    __pydantic_config__: ClassVar = _DESCRIBED

    id: str
    """Its name in the run."""
    host: str
    """The machine that it is on."""
    pid: int
    """Its process id there."""
    role: str
    """What it may do about the claims of others: `coordinator` or `worker`."""
    since: float
    """When it joined (seconds since the epoch)."""
    heartbeat: float
    """Its last sign of life (seconds since the epoch)."""
    ended: float | None
    """When it ended, or was taken for gone (seconds since the epoch)."""
    reason: str | None
    """Why it ended, where that was not of its own doing."""

    @classmethod
    def of(cls, one: OrchestratorLease) -> OrchestratorReport:
        """Return what is told of an orchestrator by its record."""
        owner = one.owner
        return cls(owner.id, owner.host, owner.pid, owner.role, one.since, one.heartbeat, one.ended, one.reason)


@dataclass(frozen=True, slots=True)
class RunReport:
    """How a run stands: what the commands that take `--json` print last."""

    __pydantic_config__: ClassVar = _DESCRIBED

    run: str
    """The run's id."""
    status: RunStatus
    """How it stands."""
    target: str
    """The branch that it lands on."""
    repository: str
    """Where the tasks' branches are."""
    tasks: Sequence[TaskReport]
    """The tasks in the order of the file."""
    adapters: Sequence[AdapterReport]
    """Those that can't be used now."""
    damage: Sequence[str]
    """Places in the state log that could not be read; tasks that they hit say so."""
    imported: str | None = None
    """The file that the run's record was imported from, by the name it has in the project; nobody can work in it."""
    halted: str | None = None
    """Why it was stopped before its end, and what to do."""
    halted_by: HaltCause | None = None
    """What stopped it: its `budget`, a check that fails on the `base`, or `commands` that can't be run."""
    file: str | None = None
    """The file that its tasks are from, which `council retry TASK --reload` reads; null: they are from none."""
    merges: str | None = None
    """The run whose own branch it merges into the base, for `council merge`."""
    merged_by: str | None = None
    """The run that merged its own branch into its base, by `council merge`."""
    awaits_merge: bool = False
    """Whether its own branch exists and has commits that its base does not have: `council merge` merges them."""
    background: str | None = None
    """Why the process ended that ran it in the background, where that failed."""
    sessions: Sequence[SessionReport] = ()
    """What sessions are at, while a process is at work in the run."""
    orchestrators: Sequence[OrchestratorReport] = ()
    """The processes that were ever at work in it, by the time when they joined."""
    claims: ClaimCounters = field(default_factory=ClaimCounters)
    """What became of the claims of all of them, as each told with its last sign of life."""

    @property
    def exit_code(self) -> int:
        """What the shell gets."""
        return EXIT_CODES[self.status]

    @property
    def has_unfinished_tasks(self) -> bool:
        """Whether a resume or a merge could continue one of its tasks."""
        if self.imported is not None:
            return False
        return self.has_stuck_tasks or any(task.status not in {*FINAL_STATUSES, "blocked"} for task in self.tasks)

    @property
    def has_stuck_tasks(self) -> bool:
        """Whether a stopped adapter alone blocks one of its tasks: a resume tries that again."""
        return any(task.status == "blocked" and task.blocked_by is None for task in self.tasks)

    def to_json(self) -> JsonObject:
        """Return the result object."""
        # `asdict` copies all that it meets, which takes long for thousands of tasks.
        tasks = [{name: getattr(task, name) for name in TaskReport.__slots__} for task in self.tasks]
        claims = self.claims.model_dump()
        return {**asdict(replace(self, tasks=())), "tasks": tasks, "claims": claims, "exit": self.exit_code}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that is recorded of a run, its tasks and what they are to do in the order of the file."""

    run: RunDocument
    tasks: Mapping[str, TaskDocument]
    entries: Mapping[str, DispatchEntry]
    adapters: Mapping[str, AdapterDocument]
    damaged: Collection[str] = ()
    """The tasks of which a newer state was recorded than can be read."""
    orchestrators: Sequence[OrchestratorLease] = ()
    """Those that are at work in it, or were."""

    def adapters_of(self, task: str) -> tuple[str, ...]:
        """Return the adapters that may run what a task is at, the best first."""
        entry = self.entries[task]
        if entry.workflow is None:
            return entry.adapters
        from orchestrator.domain.workflow.routing import Phase, Workflow, current_adapters

        workflow = Workflow(tuple(map(Phase.model_validate, self.run.workflows[entry.workflow])))
        return current_adapters(workflow, self.tasks[task], entry.adapter, entry.fallback)

    def blocked(self) -> dict[str, str]:
        """Return the tasks that can't start any more, each with a need that will not land."""
        return self.dependents_of(
            [task for task, document in self.tasks.items() if document.status in RETRYABLE_STATUSES]
        )

    def dependents_of(self, by: Iterable[str]) -> dict[str, str]:
        """Return the tasks that wait for any of these, directly or not, each with the need next to it."""
        dependents = defaultdict(list)
        for task, entry in self.entries.items():
            for need in entry.needs:
                dependents[need].append(task)
        found: dict[str, str] = {}
        waiting = list(by)[::-1]
        known = set(waiting)
        while waiting:
            need = waiting.pop()
            for task in dependents.get(need, ()):
                if task not in known and self.tasks[task].status is TaskStatus.PENDING:
                    known.add(task)
                    found[task] = need
                    waiting.append(task)
        return found

    def failed_needs(self, task: str) -> tuple[str, ...]:
        """Return the tasks that have ended without landing and that a task needs, directly or not."""
        found: dict[str, None] = {}
        waiting, known = [task], {task}
        while waiting:
            for need in self.entries[waiting.pop()].needs:
                if need not in known and need in self.entries:
                    known.add(need)
                    waiting.append(need)
                    if self.tasks[need].status in RETRYABLE_STATUSES:
                        found[need] = None
        return tuple(one for one in self.entries if one in found)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended and nothing is left that could be done in it."""
        if self.run.ended is None:
            return False
        blocked = self.blocked()
        return all(document.status in FINAL_STATUSES or task in blocked for task, document in self.tasks.items())


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """Where a run's output and branches are kept."""

    logs: Path
    repository: Path


def build_report(
    record: RunRecord,
    *,
    places: ReportPaths,
    has_ended: bool,
    is_live: bool,
    now: float,
    damage: Sequence[str] = (),
) -> RunReport:
    """Describe a run at `now` (wall-clock seconds); `is_live`: a process is active on it."""
    state = run_state(
        {document.status for document in record.tasks.values()},
        has_ended=has_ended,
        is_halted=record.run.halted is not None,
        is_live=is_live,
    )
    status = RunStatus(state)
    blocked = record.blocked()
    adapters = [
        AdapterReport(name, learned.parked_until, learned.closed)
        for name, learned in record.adapters.items()
        if learned.closed is not None or (learned.parked_until or 0.0) > now
    ]
    closed = {one.name: one.closed for one in adapters if one.closed is not None}
    stuck = {} if status is RunStatus.RUNNING else _tasks_without_adapter(record, closed)
    waiting = _tasks_in_cooldown(record, adapters)
    reports, logs, roots = [], str(places.logs), dict[str, str]()
    for name, by in blocked.items():  # a task that blocks others comes before them
        roots[name] = roots.get(by, by)
    for task in record.run.tasks:
        need = blocked.get(task)
        why = stuck.get(task) if need is None else f"needs {need!r}, which did not land"
        told = _task(task, record.tasks[task], record.entries[task].adapter, why, logs)
        told = replace(told, reason=waiting[task]) if task in waiting else told
        told = replace(told, blocked_by=roots[task]) if task in roots else told
        if status in {RunStatus.INTERRUPTED, RunStatus.HALTED} and told.status == TaskStatus.RUNNING:
            reason = _INTERRUPTED.format(run=record.run.id)
            told = replace(told, reason=reason, attempts=told.attempts - 1)  # as it is once that is recorded
        reports.append(replace(told, reason=_DAMAGED) if task in record.damaged else told)
    run, source = record.run, record.run.imported.source if record.run.imported else None
    # Its branches, if they are still there, are in the user's own repository.
    repository = str(places.repository) if source is None else run.repo
    halted = run.halted if status is RunStatus.HALTED else None
    others = sorted(record.orchestrators, key=lambda one: (one.since, one.owner.id))
    return RunReport(
        run=run.id,
        status=status,
        target=run.target,
        repository=repository,
        tasks=reports,
        adapters=adapters,
        damage=damage,
        imported=source,
        halted=halted,
        halted_by=None if halted is None else run.halted_by or HaltCause.BUDGET,
        file=None if run.imported is not None or "tasks" in run.given else run.config,
        merges=run.merges,
        awaits_merge=run.target == f"council/{run.id}" and any(one.landed is not None for one in reports),
        orchestrators=[OrchestratorReport.of(one) for one in others],
        claims=sum_counters(one.counters for one in others),
    )


def last_failures(record: RunRecord) -> dict[str, AdapterFailure]:
    """Return of each adapter of a run the last session that failed, if there is one."""
    found: dict[str, AdapterFailure] = {}
    for name, document in record.tasks.items():
        for one in document.attempts:
            if one.outcome is None or one.outcome not in _FAILURES or one.ended is None:
                continue
            before = found.get(one.adapter)
            if before is None or before.time <= one.ended:
                found[one.adapter] = AdapterFailure(one.outcome, one.reason or "", one.ended, name)
    return found


def _tasks_without_adapter(record: RunRecord, closed: Mapping[str, str]) -> dict[str, str]:
    """Return the tasks that wait for an adapter that is stopped, themselves or by what they need, and why."""
    stuck = {
        task: _describe_disabled({name: closed[name] for name in record.adapters_of(task)})
        for task in record.entries
        if closed and record.tasks[task].status is TaskStatus.PENDING and closed.keys() >= set(record.adapters_of(task))
    }
    for task, held in record.dependents_of(stuck).items() if stuck else ():
        stuck[task] = f"needs {held!r}, which waits for its adapter"
    return stuck


def _describe_disabled(closed: Mapping[str, str]) -> str:
    """Say that all adapters of a task are stopped, and why each of them."""
    if len(closed) == 1:
        [(name, why)] = closed.items()
        return f"the adapter {name!r} is stopped: {why}: fix it, then `council resume`"
    each = "; ".join(f"{name!r}: {why}" for name, why in closed.items())
    return f"all of its adapters are stopped ({each}): fix one of them, then `council resume`"


def _tasks_in_cooldown(record: RunRecord, out: Sequence[AdapterReport]) -> dict[str, str]:
    """Return the tasks that only the park of an adapter keeps from starting, and until when."""
    if all(one.parked_until is None for one in out):
        return {}
    known, told = {one.name: one for one in out}, dict[tuple[str, ...], str]()
    waiting = {}
    for task, entry in record.entries.items():
        if record.tasks[task].status is not TaskStatus.PENDING:
            continue
        adapters = record.adapters_of(task)
        if not known.keys() >= set(adapters):
            continue
        if all(record.tasks[need].status in SUCCESS_STATUSES for need in entry.needs):
            if adapters not in told:
                told[adapters] = _describe_cooldown([known[name] for name in dict.fromkeys(adapters)])
            waiting[task] = told[adapters]
    return {task: words for task, words in waiting.items() if words}


def _describe_cooldown(adapters: Sequence[AdapterReport]) -> str:
    """Say which of a task's adapters it waits for, the first to open first, and which won't open; else nothing."""
    ends = sorted((one.parked_until, one.name) for one in adapters if one.closed is None and one.parked_until)
    stopped = "".join(f"; {one.name!r} is stopped: {one.closed}" for one in adapters if one.closed is not None)
    each = ", or for ".join(f"{name!r} until {format_local_time(until)}" for until, name in ends)
    return f"waits for the adapter {each}{stopped}" if ends else ""


def _task(task: str, document: TaskDocument, adapter: str, why_blocked: str | None, logs: str) -> TaskReport:
    state, reason = document.status.value, document.reason
    if why_blocked is not None and document.status is TaskStatus.PENDING:
        state, reason = "blocked", why_blocked
    if document.status is TaskStatus.RUNNING:
        reason = None  # it is that of an earlier attempt
    at = current_phase(document)
    if document.status is TaskStatus.WAITING:
        reason = f"phase {at!r} waits for a person to approve it"
    attempts = document.attempts
    newest = document.attempt if attempts else None
    outcome = document.refused or (None if newest is None else newest.outcome)
    return TaskReport(
        id=task,
        status=state,
        attempts=document.counted_attempts,
        landed=document.landed,
        branch=document.branch,
        failure=outcome if outcome in _FAILURES and document.landed is None else None,
        reason=reason,
        paths=document.paths,
        log=None if newest is None else newest.check_log or f"{logs}/{log_file_name(task, newest.number, 'stderr')}",
        adapter=adapter if newest is None else newest.adapter,
        words=None if newest is None else newest.words,
        # Lists, because generators would take longer than all the rest.
        input_tokens=sum([one.input_tokens for one in attempts]),
        output_tokens=sum([one.output_tokens for one in attempts]),
        cost=document.cost,
        phase=at,
        denied=next((str(one.denied) for one in reversed(attempts) if one.denied.count), None),
    )


def current_phase(task: TaskDocument) -> str | None:
    """Return the phase that a task is at, or is to enter next; None: none is left, or it has no workflow."""
    last = task.phases[-1] if task.phases else None
    return last.phase if last is not None and last.status in OPEN_STATUSES else task.phase
