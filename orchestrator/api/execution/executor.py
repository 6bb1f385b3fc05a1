"""The execution of runs in this process, assembled from the parts of a run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import anyio

from orchestrator.api.context import ProjectContext, StopSignal
from orchestrator.api.execution.file_comparison import compare_with_config_file, has_same_config_file
from orchestrator.api.execution.leadership import (
    RunEntry,
    hold_run_lock,
    run_active_error,
    sharing_disabled_error,
)
from orchestrator.api.execution.services import background_services, survive_store_outages
from orchestrator.api.run_index import RunIndex
from orchestrator.api.run_reader import RunReader
from orchestrator.config.coordination import CoordinationOverrides, check_labels, read_labels, resolve_coordination
from orchestrator.domain.events.runs import RunFileChanged, RunInterrupted, RunWorkerLeft
from orchestrator.domain.runs.model import HaltCause, RunDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry, with_subtasks
from orchestrator.domain.settings.run_settings import Budget, CoordinationSettings
from orchestrator.domain.wording import join_names
from orchestrator.engine.attaching import (
    AttachedTask,
    check_attachable,
    find_conversation,
    record_attachment,
    wait_until_free,
)
from orchestrator.engine.cleanup.imported_tasks import write_unfinished_tasks
from orchestrator.engine.diagnostics.programs import find_unusable_adapters
from orchestrator.engine.landing.reconciliation import Reconciler, has_unlanded_work
from orchestrator.engine.phases.completion import PhaseCompleter, PhaseHandlers
from orchestrator.engine.phases.start import PhaseStarter
from orchestrator.engine.phases.values import PhaseInputs
from orchestrator.engine.reports.report import RunRecord, RunReport
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.capacity import Capacity
from orchestrator.engine.scheduler.loop import Scheduler
from orchestrator.engine.session_api.shared_values import SharedValues
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import check_task, read_entries, read_requests, read_run, read_task
from orchestrator.engine.state.reload import is_adoptable_while_active
from orchestrator.errors import LockHeld
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.sessions.supervision.supervisor_client import open_fork_server
from orchestrator.sessions.terminal import UserTerminal

_NONE: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class RunExecutor:
    """The execution of a project's runs in this process."""

    _context: ProjectContext
    _stop: StopSignal

    async def resume(
        self,
        run: str,
        budget: Budget | None = None,
        coordination: CoordinationOverrides | None = None,
        capacity: int | None = None,
        *,
        only_lands: bool = False,
        allow_failing_base: bool = False,
    ) -> RunReport:
        """Lead a run to its end; see `Runs.resume` and `Runs.land`."""
        document = await read_run(self._context.store, run)
        if document.imported is not None:
            raise await write_unfinished_tasks(self._context.store, document, self._context.project.legacy)
        settings = resolve_coordination(document.coordination, self._context.environ, coordination)
        hub = await RunIndex(self._context).hub(document)
        try:
            async with (
                hold_run_lock(hub, run) as lock,
                self._entry(document, hub, settings) as entry,
                background_services(entry.context, document),
            ):
                reader = RunReader(entry.context)
                before = await reader.record(run)
                has_ended = before.is_finished and not await read_requests(entry.context.store, run)
                may_be_landed = has_unlanded_work(before.tasks.values())
                if has_ended and not may_be_landed:
                    return await reader.status(run)
                async with entry.lead(lock) as (ledger, run_context):
                    disabled = _NONE
                    if document.hub is None:  # other machines may have the programs that this one lacks
                        disabled = await find_unusable_adapters(run_context.adapters, self._context.environ)
                    if may_be_landed and await Reconciler(ledger, run_context).adopt_landings(frozenset()):
                        before = await reader.record(run)  # the user has landed something since
                    elif has_ended:
                        await ledger.run_state.finish(reader.describe(before, is_live=False, has_ended=True).status)
                        return await reader.status(run)
                    if budget is not None:
                        await ledger.run_state.set_budget(budget.limits)
                    if allow_failing_base and not ledger.run.allow_failing_base:
                        await ledger.run_state.allow_failing_base()
                    if before.orchestrators:  # an earlier process executed the run
                        await self._note_file_changes(ledger)
                    return await self._execute(
                        reader, before, ledger, run_context, capacity=capacity, disabled=disabled, only_lands=only_lands
                    )
        except LockHeld as held:
            join = f"join it with `council work {run}`" if settings.enabled else ""
            raise run_active_error(run, held, or_else=join) from None

    async def work(
        self,
        run: str,
        capacity: int | None = None,
        coordination: CoordinationOverrides | None = None,
        labels: Sequence[str] | None = None,
    ) -> RunReport:
        """Join a run as an additional worker; see `Runs.work`."""
        context = self._context
        document = await read_run(context.store, run)
        settings = resolve_coordination(document.coordination, context.environ, coordination)
        if not settings.enabled:
            raise sharing_disabled_error(run, context.environ, coordination)
        hub = await RunIndex(context).hub(document)
        async with self._entry(document, hub, settings, labels) as entry, _join(entry) as (ledger, run_context):
            disabled = await find_unusable_adapters(run_context.adapters, context.environ)
            reader = RunReader(entry.context)
            return await self._execute(
                reader, await reader.record(run), ledger, run_context, capacity=capacity, disabled=disabled
            )

    async def attach(self, run: str, task: str, terminal: UserTerminal) -> RunReport:
        """Open a task's conversation in a user's terminal; see `Runs.attach`."""
        context = self._context
        document = await read_run(context.store, run)
        document.check_not_imported()
        await check_task(context.store, document, task)
        # Before this process leads the run, which would mark a finished one as interrupted.
        find_conversation(run, task, await read_task(context.store, run, task))
        settings = resolve_coordination(document.coordination, context.environ)
        if not settings.enabled:
            raise sharing_disabled_error(run, context.environ, None)
        hub = await RunIndex(context).hub(document)
        async with self._entry(document, hub, settings) as entry:
            reader = RunReader(entry.context)
            if not await reader.index.has_live_process(run):
                async with (
                    hold_run_lock(hub, run) as lock,
                    entry.lead(lock) as (_, run_context),
                    run_context.pool(sessions=0),
                ):
                    pass  # what a killed process was doing is recorded as interrupted
            report = await reader.status(run)
            async with _join(entry) as (ledger, run_context):
                adapters = run_context.adapters
                check_attachable(run, task, ledger.task(task), adapters)
                async with record_attachment(ledger, task):
                    attached = AttachedTask(task, terminal)
                    while await wait_until_free(ledger, task, adapters, lambda: self._stop.is_set):
                        earlier, before = len(ledger.task(task).attempts), await reader.record(run)
                        report = await self._execute(reader, before, ledger, run_context, capacity=1, attached=attached)
                        if any(attempt.attached for attempt in ledger.task(task).attempts[earlier:]):
                            break  # otherwise, another process has started a session just before it saw the attachment
            return report

    @asynccontextmanager
    async def _entry(
        self, run: RunDocument, hub: Hub, settings: CoordinationSettings, labels: Sequence[str] | None = None
    ) -> AsyncIterator[RunEntry]:
        """Yield the entry into a run, with a store that survives outages during the body."""
        own = read_labels(self._context.environ) if labels is None else check_labels(labels)
        async with survive_store_outages(
            self._context, run.id, settings, gives_up=lambda: self._stop.is_set
        ) as context:
            yield RunEntry(context, run, hub, settings, own)

    async def _note_file_changes(self, ledger: Ledger) -> None:
        if await has_same_config_file(ledger.run):
            return
        statuses = ledger.statuses()
        changes = await compare_with_config_file(self._context, ledger.run, statuses)
        if changes:
            stop_first = [
                task
                for task, keys in changes.tasks.items()
                if statuses[task] not in FINAL_STATUSES or not is_adoptable_while_active(keys)
            ]
            await ledger.note(
                RunFileChanged(file=changes.file, tasks=changes.tasks, keys=changes.keys, stop_first=stop_first)
            )

    async def _execute(
        self,
        reader: RunReader,
        before: RunRecord,
        ledger: Ledger,
        run_context: RunContext,
        *,
        capacity: int | None = None,
        disabled: Mapping[str, str] = _NONE,
        only_lands: bool = False,
        attached: AttachedTask | None = None,
    ) -> RunReport:
        """Execute tasks until none is left for this process, or only the `attached` one; omit `disabled` adapters."""
        context, run = reader.context, before.run.id
        entries = await _entries(context, before, ledger)
        wanted = capacity or before.run.capacity
        room = await Capacity.measure(wanted, ledger, context.clock)
        # The pool is closed first: it ends setups that are no longer needed, for which the fork server would wait.
        async with (
            open_fork_server(run_context.tools.redactor.bytes_pattern),
            run_context.pool(sessions=_max_sessions(wanted, before.run)) as pool,
        ):
            worker = 0 if ledger.writer.became_leader.is_set() else _number_of(ledger.orchestrators.me.id, before)
            board = _board(context, ledger, run_context, entries, disabled, worker)
            handlers = await self._phase_handlers(context, ledger, run_context)
            scheduler = Scheduler(ledger, run_context, pool, board, room, handlers, disabled)
            self._stop.add(scheduler.stop)
            try:
                async with _raise_if_fenced(ledger):
                    finished = await scheduler.run(before.adapters, only_lands=only_lands, attached=attached)
            finally:
                self._stop.remove(scheduler.stop)
        why = "it was stopped" if attached is None else f"a user was attached to task {attached.task!r}"
        if not self._stop.is_set and (missing := scheduler.find_unavailable()):
            why = f"its machine lacks {join_names(dict.fromkeys(missing.values()))} for the remaining tasks"
        return await _record_end(reader, ledger, scheduler, run, why, finished=finished)

    async def _phase_handlers(self, context: ProjectContext, ledger: Ledger, run_context: RunContext) -> PhaseHandlers:
        plugins = await context.plugins.load()
        values = SharedValues(context.store, context.clock, run_context.tools.redactor, ledger.run.id)
        inputs = PhaseInputs(ledger, plugins.checked_kinds(), values)
        return PhaseHandlers(
            PhaseStarter(ledger, inputs, context.clock, has_tools=run_context.session_service is not None),
            PhaseCompleter(ledger, inputs, run_context.git, context.clock, plugins.transformations),
        )


@asynccontextmanager
async def _join(entry: RunEntry) -> AsyncIterator[tuple[Ledger, RunContext]]:
    """Join a run during the body; if this process becomes its leader, with the services of a leader."""
    async with anyio.create_task_group() as group, entry.join() as (ledger, run_context):
        ended = anyio.Event()
        group.start_soon(_run_services_as_leader, entry, ledger, ended)
        yield ledger, run_context
        ended.set()
        if not ledger.writer.became_leader.is_set():
            group.cancel_scope.cancel()


async def _run_services_as_leader(entry: RunEntry, ledger: Ledger, ended: anyio.Event) -> None:
    await ledger.writer.became_leader.wait()
    async with background_services(entry.context, entry.run):  # sinks need the event of the run's end
        await ended.wait()


async def _record_end(
    reader: RunReader, ledger: Ledger, scheduler: Scheduler, run: str, why: str, *, finished: bool
) -> RunReport:
    """Record why this process has no more tasks of a run, and return the report.

    `why` is the reason if the run continues in other processes.
    """
    is_leader, me = ledger.writer.became_leader.is_set(), ledger.orchestrators.me
    active = [] if finished else await RunIndex(reader.context).active_processes(ledger.run)
    others = [one.owner for one in active if one.owner.id != me.id]
    if scheduler.halted is not None and is_leader:
        await ledger.run_state.halt(*scheduler.halted)
    elif scheduler.halted is not None and scheduler.halted[0] is not HaltCause.BUDGET:
        await ledger.note(RunWorkerLeft(orchestrator=me.id, pid=me.pid, reason=scheduler.halted[1]))
    elif others and scheduler.halted is None:
        continued = ", ".join(f"process {one.pid} on {one.host}" for one in others)
        reason = f"{why}; the run continues in {continued}"
        await ledger.note(RunWorkerLeft(orchestrator=me.id, pid=me.pid, reason=reason))
    elif not finished and is_leader:
        await ledger.note(RunInterrupted())
    if others and (scheduler.halted is None or not is_leader):
        running, now = reader.describe(await reader.record(run), is_live=True), reader.context.clock.now()
        orchestrators = [replace(one, ended=now) if one.id == me.id else one for one in running.orchestrators]
        return replace(running, orchestrators=orchestrators)
    result = reader.describe(await reader.record(run), is_live=False, has_ended=finished)
    if finished and is_leader:
        await ledger.run_state.finish(result.status)
    return await reader.with_merge_state(result, ledger.run) if finished else result


async def _entries(context: ProjectContext, before: RunRecord, ledger: Ledger) -> dict[str, DispatchEntry]:
    """Return the dispatch entries of all tasks, including those added by plans."""
    known = before.entries
    if ledger.run.tasks != before.run.tasks:
        known = await read_entries(context.store, ledger.run)
    return with_subtasks({task: known[task] for task in ledger.run.tasks}, ledger.tasks.documents())


def _number_of(worker: str, run: RunRecord) -> int:
    """Return the number of active processes that joined a run before a worker, at least 1 for its leader."""
    active = sorted((one.since, one.owner.id) for one in run.orchestrators if one.ended is None)
    return max(1, [name for _, name in active].index(worker))


def _board(
    context: ProjectContext,
    ledger: Ledger,
    run_context: RunContext,
    entries: Mapping[str, DispatchEntry],
    disabled: Mapping[str, str],
    worker: int,
) -> DispatchBoard:
    capacities = {name: one.capacity for name, one in run_context.configs.items() if one.capacity is not None}
    statuses = ledger.statuses()
    board = DispatchBoard.of(entries, statuses, capacities, worker, ledger.orchestrators.me.labels)
    for task, status in statuses.items():
        if ledger.is_claimed_elsewhere(task):
            board.sync_task(task, status, context.clock.monotonic())
    for name, reason in disabled.items():
        board.adapters.disable(name, reason)
    return board


def _max_sessions(wanted: int, run: RunDocument) -> int:
    """Return the maximum number of concurrent sessions.

    At most one per task, unless plans may add tasks.
    """
    can_grow = any(phase.expand is not None for phases in run.workflows.values() for phase in phases)
    return wanted if can_grow else min(wanted, len(run.tasks))


@asynccontextmanager
async def _raise_if_fenced(ledger: Ledger) -> AsyncIterator[None]:
    """Replace an error of the body with OrchestratorFenced if the run removed us."""
    try:
        yield
    except Exception as error:  # any error may be a consequence of the takeover
        if (lost := await ledger.orchestrators.find_fencing_error()) is not None:
            raise lost from error
        raise
