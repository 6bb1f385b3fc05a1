"""Create and execute runs, and perform requests on them: assembles the parts of a run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.api.runs import ProjectRuns
from orchestrator.api.tracked_tasks import add_open_tracked_tasks
from orchestrator.config.coordination import (
    ENVIRONMENT_VARIABLES,
    CoordinationOverrides,
    apply_max_retries,
    read_environment,
    resolve_coordination,
)
from orchestrator.config.inline import InlineTasks, load_inline
from orchestrator.config.load import load_config
from orchestrator.config.model import (
    BudgetConfig,
    CoordinationConfig,
    RunConfig,
    make_adapters,
    restore_adapters,
    used_adapters,
)
from orchestrator.config.store import MEMORY
from orchestrator.domain.runs.model import (
    FINAL_STATUSES,
    SUCCESS_STATUSES,
    CheckpointOrigin,
    HaltCause,
    RequestAction,
    RunDocument,
    TaskStatus,
)
from orchestrator.domain.scheduling.claims import OrchestratorIdentity, Role
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry, with_subtasks
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.engine.cleanup.imported_tasks import write_unfinished_tasks
from orchestrator.engine.diagnostics.preflight import (
    check_branches,
    check_checkout,
    check_programs,
    delete_run_refs,
    fetch_base_and_target,
    run_preflight,
)
from orchestrator.engine.diagnostics.programs import find_unusable_adapters
from orchestrator.engine.phases.completion import PhaseCompleter, PhaseHandlers
from orchestrator.engine.phases.start import PhaseStarter
from orchestrator.engine.phases.values import PhaseInputs
from orchestrator.engine.reports.report import RunRecord, RunReport
from orchestrator.engine.run_context import RunContext, open_run_context, with_session_service
from orchestrator.engine.scheduler.capacity import Capacity
from orchestrator.engine.scheduler.loop import Scheduler
from orchestrator.engine.scheduler.monitor import Monitor
from orchestrator.engine.scheduler.reconciliation import Reconciler, has_unlanded_work
from orchestrator.engine.scheduler.recovery import has_active_peers, recover
from orchestrator.engine.scheduler.requests import (
    RequestHandler,
    check_adapters_to_enable,
    check_phase,
    check_request,
    is_handled,
    submit_request,
)
from orchestrator.engine.scheduler.restore import RestoreResult, restore_checkpoint
from orchestrator.engine.session_api.shared_values import SharedValues
from orchestrator.engine.sinks import EventSubscriber, forward_events
from orchestrator.engine.state.leader import take_leadership
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.merge_run import MERGE_TASK, build_merge_run
from orchestrator.engine.state.records import (
    check_task,
    new_run_id,
    read_entries,
    read_requests,
    read_run,
    read_spec,
    read_specs,
    read_task,
    record_new_run,
    run_key,
    spec_key,
)
from orchestrator.engine.state.reload import TASKS_KEY, FileChanges, build_reload, compare_with_file
from orchestrator.errors import (
    REQUEST_RECORDED,
    ConfigError,
    CouncilError,
    LockHeld,
    NothingToMerge,
    RefusedError,
    RequestTimeout,
    RunActive,
    StoreUnavailable,
)
from orchestrator.locking.merge_permit import MergePermitQueue
from orchestrator.locking.orchestrators import RunMembership, create_owner
from orchestrator.plugins import Plugins
from orchestrator.project import council_home, exclude_from_git
from orchestrator.protocols import Commit, Event, Guard
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.worktrees.hub import Hub, internal_ref_name, work_branch_name
from orchestrator.repo.worktrees.origin import StoreLocation
from orchestrator.sessions.supervision.supervisor_client import open_fork_server
from orchestrator.state.documents.checkpoints import create_checkpoint, plan_restore
from orchestrator.state.log.identity import record_store_use
from orchestrator.state.offline.outage import survive_outages
from orchestrator.state.offline.retry import is_full, is_outage
from orchestrator.system import slow_waits
from orchestrator.system.file_lock import HeldLock, LockHolder
from orchestrator.system.process_table import process_stat
from orchestrator.views.export import export_views

#: Seconds to wait for the last git commands of a killed leader before a resume fails.
LOCK_HANDOVER_TIMEOUT = 60.0

#: Seconds between two checks whether a request was performed.
_REQUEST_POLL_INTERVAL = 0.1
#: Seconds to wait for a request; the leader needs half of that if a session has to stop first.
_REQUEST_TIMEOUT = 120.0
#: Seconds to wait for the end of cancelled sessions before the command reports the status.
_STOP_TIMEOUT = 15.0

#: Seconds to update the views at the end of a run.
_VIEWS_TIMEOUT = 10.0
_NONE: Mapping[str, str] = {}

_log = logging.getLogger("orchestrator.outage")
#: Messages that are printed at once; the events are recorded when the store is back.
_OUTAGE_MESSAGES: Mapping[str, str] = {
    "outage.began": "the state can't be read or written: {reason} (retrying until it can)",
    "outage.ended": "the state can be read and written again",
    "outage.commit_rejected": "not recorded after the outage: {keys}: {reason}",
    "outage.preserved": "the state can't be reached: local commits are preserved in {folder}",
}


class RunExecutor:
    """Executes runs of a project in this process."""

    def __init__(self, runs: ProjectRuns, plugins: Plugins) -> None:
        self._runs, self._plugins = runs, plugins
        self._schedulers: set[Scheduler] = set()
        self._stopping = False

    async def create_run(
        self,
        config: RunConfig,
        *,
        allow_deferred: bool,
        allow_failing_base: bool = False,
        coordination: CoordinationOverrides | None = None,
    ) -> str:
        """See `Council.create_run`."""
        runs = self._runs
        coordinated = resolve_coordination(config.coordination, runs.environ, coordination)
        config = await add_open_tracked_tasks(apply_max_retries(config, coordinated), self._plugins)
        run = new_run_id(runs.clock.now())
        site = await find_run_repository(config.repo, is_url=config.is_url, environ=runs.environ)
        if site.repository is not None and site.repository.top is not None:
            await anyio.to_thread.run_sync(exclude_from_git, site.repository.git_dir)
        location = None
        if runs.url != MEMORY:
            location = await anyio.to_thread.run_sync(StoreLocation.of, runs.url, runs.store.local_paths())
        cleared = await run_preflight(
            config,
            site,
            run,
            used_adapters(config, self._plugins.adapters),
            runs.environ,
            store=location,
            allow_deferred=allow_deferred,
        )
        document = RunDocument(
            id=run,
            config=str(config.path),
            repo=config.repo,
            is_url=config.is_url,
            base=config.base,
            target=cleared.target,
            capacity=config.capacity,
            session_memory=config.session_memory,
            adapters={name: entry.to_stored() for name, entry in config.adapters.items()},
            workflows={
                name: [phase.model_dump(mode="json", by_alias=True) for phase in phases]
                for name, phases in config.workflows.items()
            },
            fence=config.fence.model_dump(mode="json"),
            worktrees=config.worktrees.model_dump(mode="json"),
            retention=config.state.retention.model_dump(mode="json"),
            mcp_servers={name: one.model_dump(mode="json") for name, one in config.mcp_servers.items()},
            budget=config.budget.model_dump(mode="json"),
            coordination=coordinated.model_dump(mode="json"),
            prices={name: one.model_dump(mode="json") for name, one in config.prices.items()},
            sinks={name: sink.to_stored() for name, sink in config.sinks.items()},
            trackers={name: tracker.to_stored() for name, tracker in config.trackers.items()},
            given=config.given,
            tasks=tuple(task.id for task in config.tasks),
            start=cleared.start,
            has_target=cleared.has_target,
            allow_failing_base=allow_failing_base,
            hub=str(cleared.hub.root),
            started=runs.clock.now(),
        )
        if runs.follows_file:
            await anyio.to_thread.run_sync(_use_store, runs, config.state.url)
        await record_new_run(runs.store, document, {task.id: task for task in config.tasks})
        return run

    async def create_merge(self, run: str) -> str:
        """See `Council.create_merge`."""
        runs, name = self._runs, new_run_id(self._runs.clock.now())
        if (queued := await runs.queued_merge(run)) is not None:
            return queued
        record = await runs.record(run)
        document, environ = record.run, runs.environ
        document.check_not_imported()
        site = await find_run_repository(document.repo, is_url=document.is_url, environ=environ)
        hub = await runs.hub(document)
        git = Git(hub.trusted, environ=environ)
        source, base = site.source(git), document.base
        await check_branches(source, base, base)
        await check_checkout(site.repository, base, environ, remedy="commit or stash them, then `council merge`")
        start = await fetch_base_and_target(site, hub, name, (base, base), environ)
        if await source.tip(document.target) is None:
            await delete_run_refs(hub, name, environ)
            raise await _explain_missing_branch(git, record, start)
        commit, branch = (
            await source.fetch(document.target, internal_ref_name(name, "work")),
            work_branch_name(name, MERGE_TASK, "1"),
        )
        if await git.is_ancestor(commit, start):
            await delete_run_refs(hub, name, environ)
            raise NothingToMerge(f"{base!r} has all of {document.target!r} already", "there is nothing to merge")
        specs = [*(await read_specs(runs.store, run, document.tasks)).values()]
        built = build_merge_run(
            document, specs, name, commit=commit, branch=branch, start=start, now=runs.clock.now(),
            common=await git.line("merge-base", commit, start),
        )  # fmt: skip
        await git("update-ref", f"refs/heads/{branch}", commit)
        await record_new_run(runs.store, built.run, {MERGE_TASK: built.spec}, {MERGE_TASK: built.task})
        return name

    def _outlets(self, run: RunDocument) -> list[EventSubscriber]:
        """Return the subscribers for a run's sinks and trackers; opening one reports a missing plugin."""
        return [
            EventSubscriber(kind, name, one.get("events", ("*",)), partial(self._plugins.open, kind, name, one))
            for kind, stored in (("sink", run.sinks), ("tracker", run.trackers))
            for name, one in stored.items()
        ]

    async def resume(
        self,
        run: str,
        budget: BudgetConfig | None = None,
        coordination: CoordinationOverrides | None = None,
        capacity: int | None = None,
        *,
        only_lands: bool = False,
        allow_failing_base: bool = False,
    ) -> RunReport:
        """See `Council.resume`."""
        document = await read_run(self._runs.store, run, validate=True)
        if document.imported is not None:
            raise await write_unfinished_tasks(self._runs.store, document, self._runs.project.legacy)
        settings = self._settings(document, coordination)
        hub = await self._runs.hub(document)
        try:
            async with self._ownership(hub, run) as lock, self._background_services(document):
                before = await self._runs.record(run)
                is_over = before.is_over and not await read_requests(self._runs.store, run)
                if is_over and not has_unlanded_work(before.tasks.values()):
                    return await self._runs.status(run)
                async with (
                    self._with_outage_handling(run, settings) as runs,
                    self._lead(runs, document, hub, lock, settings) as (ledger, context),
                ):
                    if is_over:  # only the user may have landed something since
                        if not await Reconciler(ledger, context).adopt_landings(frozenset()):
                            await ledger.finish(runs.describe(before, is_live=False, has_ended=True).status)
                            return await runs.status(run)
                        before = await runs.record(run)
                    if budget is not None:
                        await ledger.set_budget(budget.model_dump(mode="json", exclude_none=True))
                    if allow_failing_base and not ledger.run.allow_failing_base:
                        await ledger.allow_failing_base()
                    if before.orchestrators:  # an earlier process executed the run
                        await self._note_file_changes(ledger)
                    return await self._work(runs, before, ledger, context, capacity=capacity, only_lands=only_lands)
        except LockHeld as held:
            raise _run_active_error(run, held) from None

    async def file_changes(self, run: str) -> FileChanges:
        """See `Council.file_changes`."""
        document = await read_run(self._runs.store, run)
        statuses = {task: one.status for task, one in (await self._runs.record(run, whole=False)).tasks.items()}
        return await self._compare_file(document, statuses)

    async def _note_file_changes(self, ledger: Ledger) -> None:
        changes = await self._compare_file(ledger.run, ledger.statuses())
        if changes:
            await ledger.note("run.file_changed", changes.to_json())

    async def _compare_file(self, run: RunDocument, statuses: Mapping[str, TaskStatus]) -> FileChanges:
        """Compare a run with its file, if that exists, without the tasks that have succeeded."""
        path = anyio.Path(run.config)
        if run.imported is not None or not await path.is_file():
            return FileChanges(run.config, unreadable="there is no such file")
        kinds = self._plugins.adapters, self._plugins.extensions()
        inline = await self._inline(run)
        try:
            if inline is None:
                config = await anyio.to_thread.run_sync(load_config, Path(run.config), *kinds)
            else:
                file = Path(run.config)
                config = await anyio.to_thread.run_sync(load_inline, inline, file, file.parent, *kinds)
        except ConfigError as error:
            return FileChanges(run.config, unreadable=str(error.problems[0]))
        except RefusedError as error:
            return FileChanges(run.config, unreadable=str(error))
        settings = resolve_coordination(config.coordination, self._runs.environ, None)
        recorded = run.coordination.get("max_retries", settings.max_retries)
        if recorded != settings.max_retries:  # it was set on the command line
            settings = settings.model_copy(update={"max_retries": recorded})
        left = [task for task, status in statuses.items() if status not in SUCCESS_STATUSES]
        specs = await read_specs(self._runs.store, run.id, left)
        return compare_with_file(run, specs, apply_max_retries(config, settings))

    async def _inline(self, run: RunDocument) -> InlineTasks | None:
        """Return the tasks of the command line with their settings; None if the tasks are from the file."""
        if TASKS_KEY not in run.given:
            return None
        specs = (await read_specs(self._runs.store, run.id, run.tasks)).values()
        own = [spec for spec in specs if spec.plan is None]
        adapter = own[0].adapter if "adapter" in run.given else None
        return InlineTasks([one.prompt for one in own], adapter, checks=own[0].checks if "checks" in run.given else ())

    async def _reload(self, run: str, tasks: Sequence[str], changes: FileChanges) -> None:
        """Apply the settings of the file to tasks."""
        store, is_live = self._runs.store, await self._runs.is_live(run)
        found, specs = await store.get(run_key(run)), {}
        for task in tasks:
            document = await store.get(spec_key(run, task))
            specs[task] = (0 if document is None else document.version), await read_spec(store, run, task)
        if found is None:
            raise RefusedError(f"there is no run {run!r}", "`council runs` lists them")
        writes, events = build_reload(found, specs, changes, is_live=is_live)
        if changes.config is not None:
            tasks_now = tuple(task for task in changes.config.tasks if task.id in specs)
            config = changes.config.model_copy(update={"tasks": tasks_now})
            check_programs(used_adapters(config, self._plugins.adapters), self._runs.environ)
        if writes:
            await store.commit(Commit(writes, events))

    async def work(
        self, run: str, capacity: int | None = None, coordination: CoordinationOverrides | None = None
    ) -> RunReport:
        """See `Council.work`."""
        document = await read_run(self._runs.store, run, validate=True)
        settings = self._settings(document, coordination)
        if not settings.enabled:
            raise RefusedError(f"run {run} is not shared", _how_to_share(run, self._runs.environ, coordination))
        hub = await self._runs.hub(document)
        async with (
            anyio.create_task_group() as group,
            self._with_outage_handling(run, settings) as runs,
            self._join_run(runs, document, hub, settings) as (ledger, context),
        ):
            ended = anyio.Event()
            group.start_soon(self._run_services_as_leader, document, ledger, ended)
            disabled = await find_unusable_adapters(context.adapters, self._runs.environ)
            report = await self._work(
                runs, await runs.record(run), ledger, context, capacity=capacity, disabled=disabled
            )
            ended.set()
            if not ledger.became_leader.is_set():
                group.cancel_scope.cancel()
        return report

    async def _run_services_as_leader(self, run: RunDocument, ledger: Ledger, ended: anyio.Event) -> None:
        await ledger.became_leader.wait()
        async with self._background_services(run):  # the services need the event of the run's end
            await ended.wait()

    @asynccontextmanager
    async def _background_services(self, run: RunDocument) -> AsyncIterator[None]:
        """Forward events to a run's sinks and trackers during the body, and update existing views after it."""
        redactor = Redactor(secret_values(self._runs.environ))
        forwarding = forward_events(self._runs.store, self._runs.clock, redactor, run.id, self._outlets(run))
        async with forwarding:
            yield
        await self._update_views(run.id)

    async def _update_views(self, run: str) -> None:
        """Export the state again if it was exported before; a failure is an event."""
        store, project, now = self._runs.store, self._runs.project, self._runs.clock.now()
        if not await anyio.to_thread.run_sync(os.path.lexists, project.views):
            return
        try:
            with anyio.fail_after(_VIEWS_TIMEOUT):
                await export_views(store, project, now)
        except (CouncilError, OSError, TimeoutError) as error:
            reason = str(error) or f"not finished within {_VIEWS_TIMEOUT:g} s"
            with suppress(CouncilError, OSError):
                await store.commit(Commit([], [Event("views.failing", {"run": run, "reason": reason})]))

    @asynccontextmanager
    async def _with_outage_handling(self, run: str, settings: CoordinationConfig) -> AsyncIterator[ProjectRuns]:
        """Yield the runs with a store that waits, or continues offline, while the store can't be reached.

        A store on this machine only waits while its disk is full.
        """
        if self._runs.url == MEMORY:
            yield self._runs
            return
        store, clock = self._runs.store, self._runs.clock
        is_local = bool(store.local_paths())

        async def record_event(event: Event) -> None:
            _log.warning(_OUTAGE_MESSAGES[event.type].format(**event.data))
            await survived.commit(Commit([], [Event(event.type, {"run": run, **event.data})]))

        folder = self._runs.project.folder / "outage"
        mode = "pause" if is_local else settings.when_unreachable
        is_temporary = is_full if is_local else is_outage
        async with survive_outages(
            store, mode, clock, folder, record_event, is_temporary=is_temporary, gives_up=lambda: self._stopping
        ) as survived:
            yield replace(self._runs, store=survived)

    def _settings(self, run: RunDocument, coordination: CoordinationOverrides | None) -> CoordinationConfig:
        return resolve_coordination(
            CoordinationConfig.model_validate(run.coordination), self._runs.environ, coordination
        )

    @asynccontextmanager
    async def _ownership(self, hub: Hub, run: str) -> AsyncIterator[HeldLock]:
        """Hold the run's lock; wait for it only while git commands of a dead leader still run."""
        lock = hub.run_lock(run)
        async with AsyncExitStack() as stack:
            try:
                held = await stack.enter_async_context(lock.hold(0))
            except LockHeld as taken:
                if taken.owner_lives:
                    raise
                held = await stack.enter_async_context(lock.hold(LOCK_HANDOVER_TIMEOUT, awaited="a git command"))
            yield held

    async def _work(
        self,
        runs: ProjectRuns,
        before: RunRecord,
        ledger: Ledger,
        context: RunContext,
        *,
        capacity: int | None = None,
        disabled: Mapping[str, str] = _NONE,
        only_lands: bool = False,
    ) -> RunReport:
        """Execute tasks of a run until none is left for this process, with all adapters that are not `disabled`."""
        run = before.run.id
        capacities = {name: one.capacity for name, one in context.configs.items() if one.capacity is not None}
        statuses = ledger.statuses()
        entries = await _entries(runs, before, ledger)
        board = DispatchBoard.of(entries, statuses, capacities)
        for task, status in statuses.items():
            if ledger.is_claimed_elsewhere(task):
                board.sync_task(task, status, runs.clock.monotonic())
        for name, reason in disabled.items():
            board.close(name, reason)
        wanted = capacity or before.run.capacity
        room = await Capacity.measure(wanted, ledger, runs.clock)
        async with context.pool(sessions=_max_sessions(wanted, before.run)) as pool:
            monitor = Monitor(ledger, runs.store, runs.clock)
            permits = MergePermitQueue(
                runs.store, runs.clock, ledger.orchestrators, context.source.location, before.run.target
            )
            sharing = SharedValues(runs.store, runs.clock, context.tools.redactor, run)
            inputs = PhaseInputs(ledger, self._plugins.checked_kinds(), sharing)
            phasing = PhaseHandlers(
                PhaseStarter(ledger, inputs, runs.clock, has_tools=context.session_service is not None),
                PhaseCompleter(ledger, inputs, context.git, runs.clock, self._plugins.transformations),
            )
            scheduler = Scheduler(
                ledger,
                context,
                pool,
                board,
                room,
                monitor,
                permits,
                phasing,
                entries=entries,
                unavailable_adapters=disabled,
                only_lands=only_lands,
            )
            await scheduler.remember(before.adapters)
            self._schedulers.add(scheduler)
            if self._stopping:
                scheduler.stop()
            try:
                async with _raise_if_fenced(ledger), open_fork_server():
                    finished = await scheduler.run()
            finally:
                self._schedulers.discard(scheduler)
        coordinates = ledger.became_leader.is_set()
        if scheduler.halted is not None and coordinates:
            await ledger.halt(*scheduler.halted)
        elif scheduler.halted is not None and scheduler.halted[0] is not HaltCause.BUDGET:
            await ledger.note("run.worker_left", {"pid": ledger.orchestrators.me.pid, "reason": scheduler.halted[1]})
        elif not finished and coordinates:
            await ledger.note("run.interrupted", {})
        if not finished and not coordinates:
            return await runs.status(run)
        result = runs.describe(await runs.record(run), is_live=False, has_ended=finished)
        if finished and coordinates:
            await ledger.finish(result.status)
        return await runs.with_merge_state(result, ledger.run) if finished else result

    @asynccontextmanager
    async def _lead(
        self, runs: ProjectRuns, run: RunDocument, hub: Hub, lock: HeldLock, settings: CoordinationConfig
    ) -> AsyncIterator[tuple[Ledger, RunContext]]:
        """Lead a run during the body: recover the tasks of an earlier leader, and apply pending requests."""
        role = Role.WORKER if settings.role == "worker" else Role.LEADER
        me = create_owner(role, shares=settings.enabled)
        async with hub.liveness_locks.of(run.id, me.id).hold(0) as life:
            others = _orchestrators(runs, run, hub, me, settings)
            context = await self._open_run_context(runs, run, hub, [lock.fd, life.fd], None)
            facts = {"sandbox": str(context.tools.sandbox.kind)}
            store, clock, redactor = runs.store, runs.clock, context.tools.redactor
            ledger = await Ledger.take(store, clock, redactor, others, facts, is_shared=settings.enabled)
            async with _leave_on_exit(others):
                await _check_sharing(others)
                for left_out in self._plugins.left_out:
                    facts = {"plugin": left_out.plugin.name, "reason": str(left_out)}
                    await ledger.note("plugin.skipped", facts)
                context = _with_session_service(runs, context, ledger, settings)
                await recover(ledger, context, clock)
                for request in await ledger.requests():
                    await RequestHandler(ledger).apply(request)
                yield ledger, context

    @asynccontextmanager
    async def _join_run(
        self, runs: ProjectRuns, run: RunDocument, hub: Hub, settings: CoordinationConfig
    ) -> AsyncIterator[tuple[Ledger, RunContext]]:
        """Join a run as an additional worker during the body."""
        me = create_owner(Role.LEADER if settings.role == "leader" else Role.WORKER)
        async with hub.liveness_locks.of(run.id, me.id).hold(0) as life:
            others = _orchestrators(runs, run, hub, me, settings)
            context = await self._open_run_context(runs, run, hub, [life.fd], me.id)
            facts = {"sandbox": str(context.tools.sandbox.kind)}
            store, clock = runs.store, runs.clock
            await _check_sharing(others)  # before and after joining, because another process may join in between
            ledger = await Ledger.join(store, clock, context.tools.redactor, others, facts)
            async with _leave_on_exit(others):
                await _check_sharing(others)
                yield ledger, _with_session_service(runs, context, ledger, settings)

    async def _open_run_context(
        self, runs: ProjectRuns, run: RunDocument, hub: Hub, lock_fds: Sequence[int], worker: str | None
    ) -> RunContext:
        types = self._plugins.adapters
        configs = restore_adapters(run.adapters, types, self._plugins.explain)
        return await open_run_context(
            run,
            hub,
            runs.project,
            configs,
            make_adapters(configs, types),
            store=runs.store,
            lock_fds=lock_fds,
            worker=worker,
            environ=runs.environ,
            clock=runs.clock,
        )

    async def ask(
        self,
        run: str,
        action: RequestAction,
        tasks: Sequence[str],
        reason: str | None = None,
        phase: str | None = None,
        reload: FileChanges | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        """Submit a request to the run's leader, or apply it here if there is none; `resume` continues from there.

        Without `tasks` it applies to all unfinished ones; without `adapters`, to all that can't be used now. With
        `reload`, the settings of the file are applied to the tasks first.
        """
        runs = self._runs
        record = await runs.record(run)
        record.run.check_not_imported()
        for task in tasks:
            await check_task(runs.store, record.run, task)
        even_waiting = reload is not None and phase is None
        check_request(action, tasks, record, even_waiting=even_waiting, is_live=await runs.has_live_process(run))
        await self._check_phase(record, tasks, phase)
        adapters = (
            check_adapters_to_enable(record, adapters, runs.clock.now()) if action is RequestAction.ENABLE else ()
        )
        requested = _requested_tasks(record, action, tasks)
        if action in {RequestAction.CANCEL, RequestAction.IGNORE}:
            is_live = await runs.is_live(run)
            await create_checkpoint(
                runs.store, run, f"before {action}", maker=CheckpointOrigin.COUNCIL, is_live=is_live
            )
        if reload is not None:
            await self._reload(run, requested, reload)
        request = await submit_request(runs.store, runs.clock, run, action, requested, reason, phase, adapters)
        hub = await runs.hub(record.run)
        waiting = _RequestWait()
        while not await is_handled(runs.store, run, request):
            try:
                settings = self._settings(record.run, None)
                async with (
                    self._ownership(hub, run) as lock,
                    self._lead(runs, record.run, hub, lock, settings) as (ledger, context),
                ):
                    now, statuses = await runs.record(run), ledger.statuses()
                    is_over = record.run.ended is not None or DispatchBoard.of(now.entries, statuses).is_over(statuses)
                    if is_over and not await has_active_peers(ledger):
                        await ledger.finish(runs.describe(now, is_live=False, has_ended=True).status)
                    async with context.pool(sessions=0):
                        pass  # cleans up: the run may never be resumed
            except RunActive as other:
                await waiting.pause(other.pid, other.host)
            except LockHeld as held:
                if not held.owner_lives:
                    raise _run_active_error(run, held) from None
                holder = await anyio.to_thread.run_sync(LockHolder.read, held.path)
                await waiting.pause(None if holder is None else holder.pid, socket.gethostname())
        if action in {RequestAction.CANCEL, RequestAction.IGNORE} and await runs.is_live(run):
            await self._wait_until_ended(run, requested)

    async def _check_phase(self, record: RunRecord, tasks: Sequence[str], phase: str | None) -> None:
        for task in tasks if phase is not None else ():
            workflow = (await read_spec(self._runs.store, record.run.id, task)).workflow
            phases = [] if workflow is None else record.run.workflows[workflow]
            check_phase(task, phase or "", [one["name"] for one in phases], record.tasks[task])

    async def _wait_until_ended(self, run: str, tasks: Sequence[str]) -> None:
        """Wait until cancelled tasks have ended, at most as long as a session may take to stop."""
        store = self._runs.store
        with anyio.move_on_after(_STOP_TIMEOUT):
            for task in tasks:
                while (await read_task(store, run, task)).status not in FINAL_STATUSES:  # noqa: ASYNC110  another process
                    await anyio.sleep(_REQUEST_POLL_INTERVAL)

    async def restore(self, checkpoint: str, *, force: bool) -> RestoreResult:
        """See `Council.restore`."""
        store, guards = self._runs.store, dict[str, Guard]()
        async with AsyncExitStack() as stack:
            # Until this process leads a run, the run may continue, and others may change that needed no restore.
            while True:
                plan = await plan_restore(store, checkpoint)
                new = [run for run in plan.runs.values() if run.id not in guards]
                if not new:
                    return await restore_checkpoint(store, plan, list(guards.values()), self._runs.environ)
                for run in new:
                    await self._hold(stack, run, force=force)
                for run in new:
                    me = create_owner(Role.LEADER)
                    guards[run.id] = await take_leadership(store, self._runs.clock, run.id, me)

    async def _hold(self, stack: AsyncExitStack, run: RunDocument, *, force: bool) -> None:
        """Keep processes from becoming active in a run; with `force`, one may already be active."""
        hub = Hub(Path(run.hub))
        if not await anyio.to_thread.run_sync(hub.trusted.is_dir):  # no process can be active without it
            return
        try:
            await stack.enter_async_context(self._ownership(hub, run.id))
            if (living := await hub.liveness_locks.held(run.id)) and not force:
                raise await living[0].held_error()
        except LockHeld as held:
            if not force:
                raise _run_active_error(run.id, held, or_else="take it over with --force") from None

    def stop(self) -> None:
        """See `Council.stop`."""
        self._stopping = True
        for scheduler in self._schedulers:
            scheduler.stop()


class _RequestWait:
    """The wait until a run's leader has performed a request."""

    def __init__(self) -> None:
        self._began, self._is_noticed = anyio.current_time(), False

    async def pause(self, pid: int | None, host: str) -> None:
        """Sleep until the next check; RequestTimeout after the limit, and a notice after some seconds."""
        waited = anyio.current_time() - self._began
        if waited >= _REQUEST_TIMEOUT:
            raise RequestTimeout(_describe_process(pid, host), _REQUEST_TIMEOUT)
        if waited >= slow_waits.NOTICE_AFTER and not self._is_noticed:
            self._is_noticed = True
            slow_waits.logger.warning("waiting for %s: %s", _describe_process(pid, host), REQUEST_RECORDED)
        await anyio.sleep(_REQUEST_POLL_INTERVAL)


def _describe_process(pid: int | None, host: str) -> str:
    """Return a description of a process that does not answer. Blocks."""
    if pid is None:
        return "the run's process, which has not answered yet"
    if host != socket.gethostname():
        return f"process {pid} on {host}, which has not answered yet"
    stat = process_stat(pid)
    return f"process {pid}, which {'is stopped' if stat is not None and stat.state in 'Tt' else 'has not answered yet'}"


async def _explain_missing_branch(git: Git, record: RunRecord, start: str) -> RefusedError:
    """Return why a run's own branch that does not exist can't be merged into its base, which is at `start`."""
    run = record.run
    what = f"the branch {run.target!r} does not exist"
    commits = [task.landed for task in record.tasks.values() if task.landed is not None]
    tip = (await git.line("merge-base", "--independent", *commits)).split("\n")[0]
    is_merged = await git.is_ancestor(tip, start)
    if not is_merged:  # its commits may have been squashed
        tree, conflicts = await git.merge_tree(start, tip)
        is_merged = not conflicts and tree == await git.line("rev-parse", f"{start}^{{tree}}")
    if is_merged:
        return NothingToMerge(f"{what}, and {run.base!r} has all of it already", "there is nothing to merge")
    remedy = f"`git branch {run.target} {tip}` restores it, then `council merge {run.id}`"
    return RefusedError(f"{what}, and {run.base!r} does not have all of it", remedy)


async def _entries(runs: ProjectRuns, before: RunRecord, ledger: Ledger) -> dict[str, DispatchEntry]:
    """Return the dispatch entries of all tasks in the ledger, including those that plans have added."""
    known = before.entries
    if ledger.run.tasks != before.run.tasks:
        known = await read_entries(runs.store, ledger.run)
    return with_subtasks({task: known[task] for task in ledger.run.tasks}, ledger.documents())


def _max_sessions(wanted: int, run: RunDocument) -> int:
    """Return the maximum number of concurrent sessions: at most one per task, unless plans may add tasks."""
    can_grow = any(phase.get("expand") is not None for phases in run.workflows.values() for phase in phases)
    return wanted if can_grow else min(wanted, len(run.tasks))


def _orchestrators(
    runs: ProjectRuns, run: RunDocument, hub: Hub, me: OrchestratorIdentity, settings: CoordinationConfig
) -> RunMembership:
    return RunMembership(runs.store, runs.clock, run.id, me, settings.timing(), hub.liveness_locks.is_dead)


def _with_session_service(
    runs: ProjectRuns, context: RunContext, ledger: Ledger, settings: CoordinationConfig
) -> RunContext:
    if not (settings.enabled and settings.tools):
        return context
    return with_session_service(context, ledger, runs.store, runs.clock, runs.project, settings.lock_timeout)


@asynccontextmanager
async def _leave_on_exit(others: RunMembership) -> AsyncIterator[None]:
    """Record at the end of the body, even after errors, that this orchestrator has left."""
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True), suppress(StoreUnavailable):
            await others.leave()


def _requested_tasks(record: RunRecord, action: RequestAction, tasks: Sequence[str]) -> Sequence[str]:
    """Return the tasks of a request: the named ones, or all unfinished ones."""
    if action is RequestAction.ENABLE:
        return ()
    return tasks or [task for task, one in record.tasks.items() if one.status not in FINAL_STATUSES]


@asynccontextmanager
async def _raise_if_fenced(ledger: Ledger) -> AsyncIterator[None]:
    """Raise OrchestratorFenced instead of an error of the body if this process was removed from the run."""
    try:
        yield
    except Exception as error:
        if (lost := await ledger.orchestrators.find_fencing_error()) is not None:
            raise lost from error
        raise


async def _check_sharing(others: RunMembership) -> None:
    """Raise RefusedError if another process is active, and it or this process does not share the run."""
    peer = await others.find_exclusive_peer()
    if peer is None:
        return
    what = f"process {peer.owner.pid} on {peer.owner.host} is active in run {others.run}"
    if peer.owner.shares:
        raise RefusedError(what, "wait for it to end, stop it with SIGINT, or enable sharing for this process")
    command = f"`{ENVIRONMENT_VARIABLES['enabled']}=true council resume {others.run}`"
    raise RefusedError(f"{what} and does not share it", f"wait for it to end, or stop it with SIGINT, then {command}")


def _how_to_share(run: str, environ: Mapping[str, str], options: CoordinationOverrides | None) -> str:
    """Return the remedy for joining a run whose settings disable sharing."""
    if options is not None and options.enabled is False:
        return "remove the option that disables sharing for this process"
    name = ENVIRONMENT_VARIABLES["enabled"]
    if read_environment(environ).enabled is False:
        return f"unset {name}, or set it to true"
    command = f"stop it, then `{name}=true council resume {run}`"
    return f"{command}; `coordination: {{enabled: true}}` in the file applies to new runs"


def _run_active_error(run: str, held: LockHeld, *, or_else: str = "") -> RefusedError:
    remedy = ", or ".join(filter(None, ("wait for it to end", "stop it with SIGINT", or_else)))
    if not held.owner_lives:
        remedy = f"end the processes that it left: `fuser {held.path}` lists them"
    return RefusedError(f"run {run} is active in {held.holder}", remedy)


def _use_store(runs: ProjectRuns, url: str | None) -> None:
    if url is not None:
        record_store_use(url, council_home(runs.environ))
    runs.project.set_store_url(url)
