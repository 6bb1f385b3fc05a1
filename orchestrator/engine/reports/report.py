"""Report the state of a run as one object, for `--json` and the Python API. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from orchestrator.domain.runs.model import AdapterDocument, HaltCause, RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import (
    FINAL_STATUSES,
    UNSUCCESSFUL_STATUSES,
    TaskStatus,
    run_state,
)
from orchestrator.domain.scheduling.claims import ClaimCounters, OrchestratorLease, sum_counters
from orchestrator.domain.scheduling.conflict_reactions import describe_conflict_hold, find_conflict_holds
from orchestrator.domain.scheduling.dependencies import DependencyGraph
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.scheduling.landing_order import describe_hold
from orchestrator.domain.scheduling.stacked_work import describe_stack_wait, find_stack_waits
from orchestrator.domain.wording import join_names
from orchestrator.engine.reports.task_report import (
    FAILURE_CLASSES,
    TaskReport,
    describe_failed_need,
    describe_missing_needs,
    report_task,
)
from orchestrator.protocols import JsonObject
from orchestrator.system.clock import format_local_time


class RunStatus(StrEnum):
    """The status of a run; it determines the exit code."""

    LANDED = "landed"  #: all tasks have landed, or are done without changes
    INCOMPLETE = "incomplete"  #: ended, but some tasks have neither landed nor are done
    INTERRUPTED = "interrupted"  #: stopped or killed before it finished; continued by `council resume`
    HALTED = "halted"  #: stopped by its budget or by failing checks; `halted` has the reason
    RUNNING = "running"

    @property
    def is_stopped(self) -> bool:
        """Whether the run has not ended, and no process is active in it."""
        return self in {RunStatus.INTERRUPTED, RunStatus.HALTED}


EXIT_CODES: Mapping[RunStatus, int] = {
    RunStatus.LANDED: 0,
    RunStatus.INCOMPLETE: 1,
    RunStatus.HALTED: 1,
    RunStatus.RUNNING: 1,
    RunStatus.INTERRUPTED: 130,
}


_INTERRUPTED = "session interrupted: to retry, run `council resume {run}`"
_PAUSED = "waits until the run continues: run `council resume {run}`"
_DAMAGED = "its record in the state log is damaged, so an earlier state is shown: run `council state verify`"


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """An adapter that is unavailable."""

    name: str
    """Its name in the configuration."""
    cooldown_until: float | None
    """The end of its cooldown (seconds since the epoch)."""
    disabled_reason: str | None
    """The reason for disabling it; only a user can enable it."""


@dataclass(frozen=True, slots=True)
class AdapterFailure:
    """The last failed session of an adapter."""

    failure: str
    """The failure class."""
    reason: str
    """The error and its remedy."""
    time: float
    """Seconds since the epoch."""
    task: str


@dataclass(frozen=True, slots=True)
class SessionReport:
    """The status of a running session."""

    task: str
    """The task's id."""
    attempt: int
    """The attempt's number."""
    adapter: str
    """The adapter that runs it."""
    orchestrator: str
    """The orchestrator that runs it, by its id in the run."""
    status: str
    """The status that it reported: `working`, `blocked`, `waiting` for files, or `done`."""
    file: str | None
    """The file that it works on."""
    progress: str | None
    """The progress that it reported."""
    message: str | None
    """The activity that it reported, or else the one observed in its output."""
    blocked_on: str | None
    """The reported reason that it is blocked."""
    files: Sequence[str]
    """The files that it has locked."""
    updated: float
    """The time of its last update (seconds since the epoch)."""
    conflicts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The paths of its predicted merge conflicts, by other task."""


@dataclass(frozen=True, slots=True)
class OrchestratorReport:
    """A process that runs or has run tasks of a run."""

    id: str
    """Its id in the run."""
    host: str
    """The machine that it runs on."""
    pid: int
    """Its process id on that machine."""
    role: str
    """`leader` (may reclaim the tasks of other processes) or `worker`."""
    since: float
    """The time when it joined (seconds since the epoch)."""
    heartbeat: float
    """The time of its last heartbeat (seconds since the epoch)."""
    ended: float | None
    """The time when it ended, or was declared dead (seconds since the epoch)."""
    reason: str | None
    """The reason for an abnormal end."""

    @classmethod
    def from_lease(cls, lease: OrchestratorLease) -> OrchestratorReport:
        """Return the report of an orchestrator, given its lease."""
        owner = lease.owner
        return cls(owner.id, owner.host, owner.pid, owner.role, lease.since, lease.heartbeat, lease.ended, lease.reason)


@dataclass(frozen=True, slots=True)
class RunReport:
    """The state of a run: the last object printed by commands with `--json`."""

    run: str
    """The run's id."""
    status: RunStatus
    """The run's status."""
    target: str
    """The branch that it lands on."""
    repository: str
    """The repository with the tasks' branches."""
    tasks: Sequence[TaskReport]
    """The tasks in the order of the file."""
    adapters: Sequence[AdapterReport]
    """The unavailable adapters."""
    damage: Sequence[str]
    """Unreadable parts of the state log; affected tasks have a `reason`."""
    imported: str | None = None
    """The file that the run was imported from, relative to the project; such a run can't be resumed."""
    halted: str | None = None
    """The reason for the halt, with the remedy."""
    halt_cause: HaltCause | None = None
    """The cause of the stop: the `budget`, a failing check on the `base`, or `commands` that can't run."""
    file: str | None = None
    """The file that defines its tasks, as read by `council retry TASK --reload`; null: no file."""
    merges: str | None = None
    """The run whose branch this run merges into the base, for `council merge`."""
    merged_by: str | None = None
    """The run that merged its branch into its base, by `council merge`."""
    awaits_merge: bool = False
    """Whether its branch has commits that are missing on its base, so that `council merge` can merge them."""
    background: str | None = None
    """The error of its background process, if it failed."""
    sessions: Sequence[SessionReport] = ()
    """The running sessions, while a process is active in the run."""
    orchestrators: Sequence[OrchestratorReport] = ()
    """All processes that ever joined the run, in order of joining."""
    claims: ClaimCounters = field(default_factory=ClaimCounters)
    """The counters of all their claims, as of their last heartbeats."""

    @property
    def exit_code(self) -> int:
        """The exit code for the run's status."""
        return EXIT_CODES[self.status]

    @property
    def has_unfinished_tasks(self) -> bool:
        """Whether a resume or a merge could continue any of its tasks."""
        if self.imported is not None:
            return False
        return self.has_stuck_tasks or any(task.status not in {*FINAL_STATUSES, "blocked"} for task in self.tasks)

    @property
    def has_stuck_tasks(self) -> bool:
        """Whether a task is blocked only by a disabled adapter, which a resume enables."""
        return any(task.status == "blocked" and task.blocked_by is None for task in self.tasks)

    def to_json(self) -> JsonObject:
        """Return the result object."""
        # `asdict` copies recursively, which is slow for thousands of tasks.
        tasks = [task.to_json() for task in self.tasks]
        claims = self.claims.model_dump()
        return {**asdict(replace(self, tasks=())), "tasks": tasks, "claims": claims, "exit": self.exit_code}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The documents of a run; tasks and dispatch entries are in the order of the file."""

    run: RunDocument
    tasks: Mapping[str, TaskDocument]
    entries: Mapping[str, DispatchEntry]
    adapters: Mapping[str, AdapterDocument]
    damaged: Collection[str] = ()
    """The tasks whose newest state is unreadable."""
    orchestrators: Sequence[OrchestratorLease] = ()
    """All orchestrators that ever joined it."""

    def adapters_of(self, task: str) -> tuple[str, ...]:
        """Return the adapters for the current phase of a task, in order of preference."""
        entry = self.entries[task]
        if entry.workflow is None:
            return entry.adapters
        from orchestrator.domain.workflow.routing import Workflow, current_adapters  # noqa: PLC0415  seldom needed

        workflow = Workflow(self.run.workflows[entry.workflow])
        return current_adapters(workflow, self.tasks[task], entry.adapter, entry.fallback)

    def blocked(self) -> dict[str, str]:
        """Return the tasks that can no longer start, each with a need that will not land."""
        return self.dependents_of(
            [task for task, document in self.tasks.items() if document.status in UNSUCCESSFUL_STATUSES]
        )

    def dependents_of(self, needs: Iterable[str]) -> dict[str, str]:
        """Return all pending dependents of the given tasks, each with its direct need."""
        graph = DependencyGraph(lambda task: self.tasks[task].status is TaskStatus.PENDING)
        for task, entry in self.entries.items():
            graph.set_needs(task, entry.needs)
        for need in needs:
            graph.end(need)
        return graph.blocked

    def failed_needs(self, task: str) -> tuple[str, ...]:
        """Return the direct and indirect needs of a task that ended without landing."""
        stack, known = [task], {task}
        while stack:
            for need in self.entries[stack.pop()].needs:
                if need not in known and need in self.entries:
                    known.add(need)
                    stack.append(need)
        known.discard(task)
        return tuple(
            need for need in self.entries if need in known and self.tasks[need].status in UNSUCCESSFUL_STATUSES
        )

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended and no task in it can continue."""
        return self.run.ended is not None and not self.has_open_tasks

    @property
    def has_open_tasks(self) -> bool:
        """Whether a task can continue."""
        blocked = self.blocked()
        return any(task not in blocked and one.status not in FINAL_STATUSES for task, one in self.tasks.items())


def build_report(
    record: RunRecord,
    *,
    logs: Path,
    repository: Path,
    has_ended: bool,
    is_live: bool,
    now: float,
    damage: Sequence[str] = (),
) -> RunReport:
    """Return the report of a run at `now` (wall-clock seconds).

    `logs` and `repository` have its logs and branches. `is_live`: a process is active in the run.
    """
    state = run_state(
        {document.status for document in record.tasks.values()},
        has_ended=has_ended,
        is_halted=record.run.halted is not None,
        is_live=is_live,
    )
    status = RunStatus(state)
    blocked = record.blocked()
    adapters = [
        AdapterReport(name, adapter.cooldown_until, adapter.disabled_reason)
        for name, adapter in record.adapters.items()
        if adapter.disabled_reason is not None or adapter.is_cooling_down(now)
    ]
    disabled = {adapter.name: adapter.disabled_reason for adapter in adapters if adapter.disabled_reason is not None}
    stuck = {} if status is RunStatus.RUNNING else _tasks_without_adapter(record, disabled)
    waiting = _tasks_in_cooldown(record, adapters) | _waiting_to_land(record)
    if status is RunStatus.RUNNING:
        waiting |= _waiting_for_machine(record)
    file = None if record.run.imported is not None or "tasks" in record.run.overrides else record.run.config
    reports, roots = [], dict[str, str]()
    for task, blocker in blocked.items():  # needs come before their dependents
        roots[task] = roots.get(blocker, blocker)
    interrupted = _INTERRUPTED.format(run=record.run.id) if status.is_stopped else None
    paused = _PAUSED.format(run=record.run.id) if status is RunStatus.INTERRUPTED else None
    is_merge, folder = record.run.merges is not None, str(logs)
    for task in record.run.tasks:
        need = blocked.get(task)
        waits = [
            _describe_missing_needs(task, record) if need is None and paused is None and task not in stuck else "",
            waiting.get(task),
        ]
        reports.append(
            report_task(
                task,
                record.tasks[task],
                None if is_merge else record.entries[task].adapter,
                folder,
                obstacle=stuck.get(task) if need is None else describe_failed_need(need),
                blocked_by=roots.get(task),
                interrupted=interrupted,
                paused=paused,
                is_reloadable=file is not None and record.entries[task].is_from_file,
                remark=_DAMAGED if task in record.damaged else "; ".join(filter(None, waits)) or None,
            )
        )
    run, source = record.run, record.run.imported.source if record.run.imported else None
    halted = run.halted if status is RunStatus.HALTED else None
    leases = sorted(record.orchestrators, key=lambda lease: (lease.since, lease.owner.id))
    return RunReport(
        run=run.id,
        status=status,
        target=run.target,
        # The branches of an imported run, if they still exist, are in the user's own repository.
        repository=str(repository) if source is None else run.repo,
        tasks=reports,
        adapters=adapters,
        damage=damage,
        imported=source,
        halted=halted,
        halt_cause=None if halted is None else run.halt_cause or HaltCause.BUDGET,
        file=file,
        merges=run.merges,
        awaits_merge=run.target == f"council/{run.id}" and any(report.landed is not None for report in reports),
        orchestrators=[OrchestratorReport.from_lease(lease) for lease in leases],
        claims=sum_counters(lease.counters for lease in leases),
    )


def _describe_missing_needs(task: str, record: RunRecord) -> str:
    """Return which needs a pending task waits for; empty if none, or if another reason is recorded."""
    if record.tasks[task].status is not TaskStatus.PENDING or record.tasks[task].reason is not None:
        return ""
    return describe_missing_needs(record.entries[task].missing_needs(record.tasks))


def _waiting_to_land(record: RunRecord) -> dict[str, str]:
    """Return the unfinished tasks that wait for another one to land, or that a user holds, with the reasons."""
    stacked = find_stack_waits(record.tasks)
    if not (record.run.held or record.run.predicted_conflicts or stacked):
        return {}
    statuses = {task: one.status for task, one in record.tasks.items()}
    priorities = {task: entry.priority for task, entry in record.entries.items()}
    waits = find_conflict_holds(record.run, record.tasks, priorities)
    held = {
        task: describe_hold(reason, task)
        for task, reason in record.run.held.items()
        if task in statuses and statuses[task] not in {*FINAL_STATUSES, TaskStatus.LANDING}
    }
    behind = {task: describe_stack_wait(task, need, record.tasks) for task, need in stacked.items()}
    return behind | {task: describe_conflict_hold(task, other) for task, other in waits.items()} | held


def _waiting_for_machine(record: RunRecord) -> dict[str, str]:
    """Return the tasks with labels that no machine of the run has, with the reasons."""
    offered = [{*lease.owner.labels} for lease in record.orchestrators if lease.ended is None]
    return {
        task: f"waits for a machine with the labels {join_names(entry.labels)} (`council work --label`)"
        for task, entry in record.entries.items()
        if entry.labels
        and record.tasks[task].status is TaskStatus.PENDING
        and not any(labels.issuperset(entry.labels) for labels in offered)
    }


def last_failures(record: RunRecord) -> dict[str, AdapterFailure]:
    """Return the last failed session of each adapter of a run, by adapter."""
    failures: dict[str, AdapterFailure] = {}
    for task, document in record.tasks.items():
        for attempt in document.attempts:
            if attempt.outcome is None or attempt.outcome not in FAILURE_CLASSES or attempt.ended is None:
                continue
            previous = failures.get(attempt.adapter)
            if previous is None or previous.time <= attempt.ended:
                failures[attempt.adapter] = AdapterFailure(attempt.outcome, attempt.reason or "", attempt.ended, task)
    return failures


def _tasks_without_adapter(record: RunRecord, disabled: Mapping[str, str]) -> dict[str, str]:
    """Return tasks whose adapters are all disabled, and dependents, with reasons."""
    stuck = {
        task: _describe_disabled({name: disabled[name] for name in record.adapters_of(task)}, record.run.id)
        for task in record.entries
        if disabled
        and record.tasks[task].status is TaskStatus.PENDING
        and disabled.keys() >= set(record.adapters_of(task))
    }
    for task, need in record.dependents_of(stuck).items() if stuck else ():
        stuck[task] = f"needs {need!r}, which waits for its adapter"
    return stuck


def _describe_disabled(disabled: Mapping[str, str], run: str) -> str:
    """Return a message that all adapters of a task are disabled, with the reasons."""
    if len(disabled) == 1:
        [(name, reason)] = disabled.items()
        return f"adapter {name!r} is disabled: {reason}: fix it, then run `council resume {run}`"
    each = "; ".join(f"{name!r}: {reason}" for name, reason in disabled.items())
    return f"all its adapters are disabled ({each}): fix one of them, then run `council resume {run}`"


def _tasks_in_cooldown(record: RunRecord, unavailable: Sequence[AdapterReport]) -> dict[str, str]:
    """Return tasks that only wait for the cooldown of adapters, with reasons."""
    if all(adapter.cooldown_until is None for adapter in unavailable):
        return {}
    by_name, reasons = {adapter.name: adapter for adapter in unavailable}, dict[tuple[str, ...], str]()
    waiting = {}
    for task, entry in record.entries.items():
        if record.tasks[task].status is not TaskStatus.PENDING:
            continue
        adapters = record.adapters_of(task)
        if not by_name.keys() >= set(adapters):
            continue
        if not entry.missing_needs(record.tasks):
            if adapters not in reasons:
                reasons[adapters] = _describe_cooldown([by_name[name] for name in dict.fromkeys(adapters)])
            waiting[task] = reasons[adapters]
    return {task: reason for task, reason in waiting.items() if reason}


def _describe_cooldown(adapters: Sequence[AdapterReport]) -> str:
    """Return a message with the adapters that a task waits for, by time.

    Empty if all are disabled.
    """
    ends = sorted(
        (one.cooldown_until, one.name) for one in adapters if one.disabled_reason is None and one.cooldown_until
    )
    disabled = "".join(
        f"; {one.name!r} is disabled: {one.disabled_reason}" for one in adapters if one.disabled_reason is not None
    )
    each = ", or for ".join(f"{name!r} until {format_local_time(until)}" for until, name in ends)
    return f"waits for adapter {each}{disabled}" if ends else ""
