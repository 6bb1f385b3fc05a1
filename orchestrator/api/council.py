"""The public entry point: opens a project's state and plugins, and offers all operations on its runs."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import anyio.to_thread

from orchestrator.api.runs import ProjectRuns
from orchestrator.config.store import folder_url, to_store_url
from orchestrator.domain.runs.model import RequestAction, TaskStatus
from orchestrator.domain.security.secrets import redact_urls
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.engine.state.records import check_task, read_run
from orchestrator.errors import CouncilError, RefusedError, UnreadableDocument
from orchestrator.project import (
    LEGACY_RECORD,
    Project,
    council_home,
    exclude_from_git,
    find_project,
    is_import_complete,
)
from orchestrator.protocols import (
    Adapter,
    CommitRecord,
    CompactionResult,
    Document,
    JsonObject,
    Key,
    RecordedEvent,
    Store,
    VerificationReport,
)
from orchestrator.repo.source.user_checkouts import refuse_tracked_project_folder
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.state.documents.log_reader import follow_log, is_run_document
from orchestrator.state.log.identity import check_trusted
from orchestrator.state.stores.file import open_without_plugins
from orchestrator.system.clock import Clock, SystemClock

# Showing a run must be quick: imports that only executing a run or loading a file needs are made on first use.
if TYPE_CHECKING:
    from orchestrator.api.activity import RunActivity
    from orchestrator.api.archive import Archive
    from orchestrator.api.cleanup import Cleaner
    from orchestrator.api.execution import RunExecutor
    from orchestrator.api.history import StateHistory
    from orchestrator.config.coordination import CoordinationOverrides
    from orchestrator.config.model import BudgetConfig, RunConfig
    from orchestrator.config.schema import Config
    from orchestrator.domain.documents.conflicts import DocumentUpdate
    from orchestrator.domain.runs.model import RunDocument
    from orchestrator.domain.sessions.contexts import SessionContext, TaskSummary
    from orchestrator.domain.sessions.notes import Note
    from orchestrator.engine.diagnostics.findings import Finding
    from orchestrator.engine.phases.verification import RunVerification
    from orchestrator.engine.reports.task_details import TaskDetails
    from orchestrator.engine.scheduler.restore import RestoreResult
    from orchestrator.engine.session_api.details import SessionDetails
    from orchestrator.engine.session_api.notes import NoteStore
    from orchestrator.engine.session_api.shared_values import SharedValues
    from orchestrator.engine.state.reload import FileChanges
    from orchestrator.locking.lock_overview import LockOverview, LockStatus
    from orchestrator.locking.named_locks import NamedLocks
    from orchestrator.plugins import Plugins
    from orchestrator.repo.git.change_counts import Changes
    from orchestrator.state.documents.checkpoints import Checkpoint, RestorePlan
    from orchestrator.state.documents.conflicts import Conflict, ConflictResolution, UpdateResult
    from orchestrator.state.documents.subscription import DocumentChange
    from orchestrator.state.transfer.copying import CopyResult
    from orchestrator.views.export import ViewPosition

#: The events that end a run's event stream, until the run is resumed.
_LAST_EVENTS = frozenset({"run.finished", "run.interrupted", "run.imported", "run.removed"})
#: The statuses of unfinished runs.
_ACTIVE = frozenset({RunStatus.RUNNING, RunStatus.INTERRUPTED, RunStatus.HALTED})
#: The events that may follow those while no process is active in the run.
_LATER_EVENTS = frozenset({"checkpoint.created", "checkpoint.restored", "run.taken_over"})


@dataclass(frozen=True, slots=True)
class ProjectPaths:
    """The paths of a project's files; the repositories are None before its first run."""

    repository: str | None
    state: str
    """The folder of the store, or its URL if it has no folder."""
    log: Path
    logs: Path
    """The output of sessions, in one folder per run."""
    hub: Path | None
    trusted: Path | None


class Council:
    """The runs of one project: start, resume, inspect and control them. Opened by `Council.open`.

    Tasks of one event loop can call its methods concurrently; only one process at a time can execute a run (`work`
    joins it). `run` is a name that `find_run` accepts; without it, methods use the newest run.
    """

    notices: Sequence[str]
    """Messages for the user about how the state was opened."""

    def __init__(
        self,
        runs: ProjectRuns,
        opened_at: int,
        plugins: Plugins | None,
        config: RunConfig | None,
        notices: Sequence[str] = (),
    ) -> None:
        self.project, self.config, self.notices = runs.project, config, notices
        self._runs, self._store, self._opened_at = runs, runs.store, opened_at
        self._plugins = plugins
        self._execution: RunExecutor | None = None
        self._stopping = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        source: str | Path | Config | RunConfig | None = None,
        *,
        plugins: Plugins | None = None,
        state: str | None = None,
        clock: Clock | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> AsyncIterator[Self]:
        """Open a project's state for the body of the `async with`.

        `source` is a YAML file or a `Config` for `run` (relative paths of a `Config` start from the current folder); or
        a folder, for the runs that were started in its repository; None is the current folder.

        `state` is the URL of the store (`file:///a/folder`, `memory:`, or a scheme that a plugin registers), or its
        folder. The default is, in this order: `COUNCIL_STATE` of `environ`, the store in the YAML file, the store of
        the newest run, and `.council/state` of the project. A store from `state` or `COUNCIL_STATE` can be read from
        any folder. `plugins` replaces the installed plugins, and `environ` the process's environment, of which
        sessions get the allowed variables.

        If the state is empty and `.worktrees` has the state of an older layout, it is imported, and `notices` reports
        that; but not into a store from `state`.

        Raises ConfigError with all problems of the file; RefusedError if there is nothing to open, or for a store that
        was not made on this machine unless `adopt_state` has accepted it.
        """
        clock = clock or SystemClock()
        source = "." if source is None else source
        config, is_known = None, True
        chosen = to_store_url(state or environ.get("COUNCIL_STATE", "")) or None
        if isinstance(source, str | Path) and await anyio.to_thread.run_sync(os.path.isdir, source):
            project, is_known = await anyio.to_thread.run_sync(_find_source_project, Path(source), chosen)
        else:
            from orchestrator.api.loading import load_run  # noqa: PLC0415

            plugins, config, project = await load_run(source, plugins, environ)
        await refuse_tracked_project_folder(project, environ)
        if is_known:  # from another folder a store is only read
            await anyio.to_thread.run_sync(project.create)
        url = await anyio.to_thread.run_sync(_resolve_store_url, project, config) if chosen is None else chosen
        is_named = chosen is not None or config is not None or url == folder_url(project.state_folder)
        await anyio.to_thread.run_sync(partial(check_trusted, url, council_home(environ), is_named=is_named))
        async with _open_store(url, project, plugins, clock, environ) as store:
            notices = await _import_legacy_state(store, project, clock, environ) if state is None else ()
            runs = ProjectRuns(project, store, url, clock, environ, follows_file=chosen is None)
            yield cls(runs, await store.position(), plugins, config, notices)

    @property
    def plugins(self) -> Plugins:
        """The installed plugins, loaded on first use unless a file was opened."""
        if self._plugins is None:
            from orchestrator.plugins import load_plugins  # noqa: PLC0415

            self._plugins = load_plugins(self._runs.environ, [self.project.top])
        return self._plugins

    async def _load_plugins(self) -> Plugins:
        return await anyio.to_thread.run_sync(lambda: self.plugins) if self._plugins is None else self._plugins

    @property
    def store_url(self) -> str:
        """The URL of the store."""
        return self._runs.url

    def _check_project(self) -> None:
        """Refuse to write to a project folder if the store is only read from another folder. Blocks."""
        if not self.project.folder.is_dir():
            find_project(self.project.top)

    async def _get_execution(self) -> RunExecutor:
        from orchestrator.api.execution import RunExecutor  # noqa: PLC0415

        await anyio.to_thread.run_sync(self._check_project)
        plugins = await self._load_plugins()
        if self._execution is None:
            self._execution = RunExecutor(self._runs, plugins)
            if self._stopping:
                self._execution.stop()
        return self._execution

    async def run(
        self, *, allow_deferred: bool = False, coordination: CoordinationOverrides | None = None
    ) -> RunReport:
        """Run all tasks of the file that the council was opened with, and return the report.

        With `allow_deferred` the run starts even if the target's checkout has uncommitted changes of the user; tasks
        that can't land because of them land on `resume`. Settings in `coordination` override the file and the
        environment. Raises RefusedError, with nothing started, if a check fails.
        """
        run = await self.create_run(allow_deferred=allow_deferred, coordination=coordination)
        return await self.resume(run, coordination=coordination)

    async def create_run(
        self,
        *,
        allow_deferred: bool = False,
        allow_failing_base: bool = False,
        coordination: CoordinationOverrides | None = None,
    ) -> str:
        """Check that the file can run, record a run without starting it, and return its id.

        With `allow_failing_base` sessions start even if checks fail on the base. Raises RefusedError if a check of
        `engine.diagnostics.preflight.run_preflight` fails.
        """
        if self.config is None:
            raise RefusedError("no file was opened", "open the council with a YAML file")
        execution = await self._get_execution()
        return await execution.create_run(
            self.config,
            allow_deferred=allow_deferred,
            allow_failing_base=allow_failing_base,
            coordination=coordination,
        )

    async def resume(
        self,
        run: str | None = None,
        *,
        budget: BudgetConfig | None = None,
        capacity: int | None = None,
        allow_failing_base: bool = False,
        coordination: CoordinationOverrides | None = None,
    ) -> RunReport:
        """Run a new or interrupted run to its end, and return the report.

        Limits in `budget` replace those of the run. For this call, settings in `coordination` override those of the run
        and the environment, and `capacity` overrides the run's number of concurrent sessions. With `allow_failing_base`
        sessions start from now on even if checks fail on the base. RefusedError while another process leads the run.
        """
        execution = await self._get_execution()
        name = await self.find_run(run)
        return await execution.resume(name, budget, coordination, capacity, allow_failing_base=allow_failing_base)

    async def land(self, run: str | None = None) -> RunReport:
        """Land the tasks of a run that are queued to land, without starting sessions; otherwise like `resume`."""
        return await (await self._get_execution()).resume(await self.find_run(run), only_lands=True)

    async def create_merge(self, run: str | None = None) -> str:
        """Record a run that merges the target branch of another run into that run's base.

        It has one task, which is already built: all that landed on the branch. `resume` lands it, with the checks of
        all tasks of the other run. Return its id, or that of an earlier merge that is still queued to land.
        NothingToMerge if the base has all commits.
        """
        return await (await self._get_execution()).create_merge(await self.find_run(run))

    async def work(
        self, run: str, *, capacity: int | None = None, coordination: CoordinationOverrides | None = None
    ) -> RunReport:
        """Join a run as an additional worker until no task is left; return the report.

        Claims free tasks whose adapter works on this machine, at most `capacity` at once (None: the run's capacity).
        If the run has no leader any more, this process becomes the leader.
        """
        return await (await self._get_execution()).work(run, capacity, coordination)

    async def active_runs(self, *, follow: bool = False) -> AsyncGenerator[str]:
        """Yield the ids of active runs, the oldest first; with `follow` also those that start later."""
        position = await self._store.position()
        known = set()
        for run in await self._runs.ids():
            with suppress(UnreadableDocument):  # commands that name it report that
                if (await read_run(self._store, run)).ended is not None:
                    continue
            if await self._runs.has_live_process(run):
                known.add(run)
                yield run
        if follow:
            async for record in self._store.watch(position):
                for event in record.events:
                    run = event.data.get("run", "")
                    if event.type == "run.leader_elected" and run not in known:
                        known.add(run)
                        yield run

    async def cancel(self, *tasks: str, run: str | None = None) -> RunReport:
        """Cancel tasks, by default all unfinished ones, and return the report.

        Their sessions are stopped, and their work is preserved on branches. The active process of the run does that, if
        there is one. Ended tasks do not change.
        """
        return await self._ask(await self.find_run(run), RequestAction.CANCEL, tasks)

    async def ignore(self, *tasks: str, reason: str, run: str | None = None) -> RunReport:
        """Cancel tasks like `cancel`, and exclude them until `retry`; return the report."""
        from orchestrator.engine.scheduler.requests import check_reason  # noqa: PLC0415  seldom needed

        check_reason(reason)
        return await self._ask(await self.find_run(run), RequestAction.IGNORE, tasks, reason)

    async def file_changes(self, run: str | None = None) -> FileChanges:
        """Return the differences between a run's file and its record, for tasks that have not succeeded.

        A run uses the settings recorded at its creation; `retry` with `reload` applies those of the file to tasks.
        """
        return await (await self._get_execution()).file_changes(await self.find_run(run))

    async def retry(
        self,
        *tasks: str,
        run: str | None = None,
        from_phase: str | None = None,
        reload: FileChanges | None = None,
    ) -> RunReport:
        """Retry tasks that ended without landing, and return the report.

        Tasks with a workflow continue at their last phase, or at `from_phase`; results of earlier phases are kept. The
        active process of the run starts them at once; otherwise the next `resume` does.

        With `reload`, from `file_changes`, the prompts, limits and adapters of the file are applied to the tasks first;
        RefusedError with the reason for each key that can't change.
        """
        return await self._ask(await self.find_run(run), RequestAction.RETRY, tasks, phase=from_phase, reload=reload)

    async def approve(self, *tasks: str, note: str | None = None, run: str | None = None) -> RunReport:
        """Approve the phase result of each task, so that the task continues; return the report.

        RefusedError if a task is not waiting for approval. The active process of the run continues the tasks at once;
        otherwise the next `resume` does.
        """
        return await self._answer(RequestAction.APPROVE, tasks, note, run)

    async def reject(self, *tasks: str, note: str | None = None, run: str | None = None) -> RunReport:
        """Repeat the phases whose result waits for approval; otherwise like `approve`.

        The note is passed to the sessions of the repeated phases.
        """
        return await self._answer(RequestAction.REJECT, tasks, note, run)

    async def enable_adapters(self, *adapters: str, run: str | None = None) -> RunReport:
        """Enable adapters that are disabled or in cooldown, by default all of them; return the report.

        All processes of an active run use them at once; otherwise the next `resume` does. RefusedError for an adapter
        that is in use, or that the run does not have.
        """
        return await self._ask(await self.find_run(run), RequestAction.ENABLE, (), adapters=adapters)

    async def _answer(
        self, action: RequestAction, tasks: tuple[str, ...], note: str | None, run: str | None
    ) -> RunReport:
        from orchestrator.engine.scheduler.requests import check_note  # noqa: PLC0415  seldom needed

        check_note(note)
        if not tasks:  # the engine would select all unfinished tasks
            raise RefusedError("no task is named", "`council status` lists the tasks that wait for approval")
        return await self._ask(await self.find_run(run), action, tasks, note)

    async def _ask(
        self,
        run: str,
        action: RequestAction,
        tasks: tuple[str, ...],
        reason: str | None = None,
        phase: str | None = None,
        reload: FileChanges | None = None,
        adapters: tuple[str, ...] = (),
    ) -> RunReport:
        await (await self._get_execution()).ask(run, action, tasks, reason, phase, reload, adapters)
        return await self.status(run)

    async def checkpoint(self, run: str | None = None, *, reason: str = "manual", whole: bool = False) -> Checkpoint:
        """Create a checkpoint of a run, or with `whole` of all runs of the project."""
        from orchestrator.state.documents import checkpoints  # noqa: PLC0415  seldom needed

        if whole:
            return await checkpoints.create_checkpoint(self._store, None, reason)
        run = await self.find_run(run)
        return await checkpoints.create_checkpoint(
            self._store, run, reason, is_live=await self._runs.has_live_process(run)
        )

    async def checkpoints(self, run: str | None = None) -> list[Checkpoint]:
        """Return the checkpoints of a run (`all`: those of all runs together) or every one, the oldest first."""
        from orchestrator.state.documents import checkpoints  # noqa: PLC0415  seldom needed

        return await checkpoints.list_checkpoints(self._store, run)

    async def plan_restore(self, checkpoint: str) -> RestorePlan:
        """Return the changes that `restore` would make now; RefusedError if the log does not go back that far."""
        from orchestrator.state.documents import checkpoints  # noqa: PLC0415  seldom needed

        return await checkpoints.plan_restore(self._store, checkpoint)

    async def restore(self, checkpoint: str, *, force: bool = False) -> RestoreResult:
        """Restore a checkpoint by its id, after a new checkpoint of the current state; `resume` continues from it.

        Landed commits stay on their targets. RefusedError if a process is active in a run that this would change; with
        `force` the run is taken over instead, and that process ends at its next step.
        """
        return await (await self._get_execution()).restore(checkpoint, force=force)

    async def document(self, key: Key) -> Document | None:
        """Return the newest version of a document, or None."""
        return await self._store.get(key)

    async def update(
        self,
        key: Key,
        change: Callable[[JsonObject | None], JsonObject | None],
        *,
        expected_version: int | None = None,
        ttl: float | None = None,
    ) -> Document | None:
        """Replace a document's value by the result of `change`; return the new document, None if it was deleted.

        `change` gets a copy of the value (None: no document), and returns None to delete it. If another process commits
        first, it is called again with the newer value, at most five times in all, after pauses that grow exponentially.
        VersionConflict, with the other writer and its time, after the last attempt, or at once if the version is not
        `expected_version` (0: no document). The document expires after `ttl` seconds.

        RefusedError for a document of a run with an active process, for a value that would make a document of council's
        own unreadable, and for documents that only council writes (`state.documents.validation`).
        """
        from orchestrator.state.documents.update import update_document  # noqa: PLC0415  the same
        from orchestrator.state.documents.validation import check_manual_change  # noqa: PLC0415  seldom needed

        await self._check_idle(key)
        return await update_document(
            self._store, key, change, expected_version=expected_version, ttl=ttl, check=check_manual_change
        )

    def subscribe(self, pattern: str, after: int | None = None) -> AsyncGenerator[DocumentChange]:
        """Yield each new version, by any process, of the documents whose name (`kind/id`) matches a pattern.

        In a pattern `*` matches any characters, including `/`. It starts after the position `after`: 0 is the beginning
        of the log, None is the time of the first iteration. The stream never ends on its own.
        """
        from orchestrator.state.documents.subscription import subscribe  # noqa: PLC0415  the same

        return subscribe(self._store, pattern, after)

    async def apply_updates(
        self, updates: Sequence[DocumentUpdate[Key]], strategy: str = "last_write_wins"
    ) -> UpdateResult:
        """Apply updates of documents; resolve competing ones by a strategy.

        Strategies are `last_write_wins`, `first_write_wins`, `merge`, and `manual`, which records the conflict for
        `resolve_conflict`. RefusedError for documents of a run with an active process, and for values that would make a
        run unreadable.
        """
        from orchestrator.state.documents import conflicts, validation  # noqa: PLC0415  the same

        for key in dict.fromkeys(update.key for update in updates):
            await self._check_idle(key)
        return await conflicts.apply_updates(self._store, updates, strategy, check=validation.check_manual_change)

    async def conflicts(self) -> list[Conflict]:
        """Return the update conflicts that a person has to resolve, the oldest first."""
        from orchestrator.state.documents import conflicts  # noqa: PLC0415  the same

        return await conflicts.list_pending(self._store)

    async def resolve_conflict(
        self, conflict: str, choice: int | JsonObject, *, force: bool = False
    ) -> ConflictResolution:
        """Resolve a conflict, named by its id or its document, with a candidate's number (from 1) or with a value.

        RefusedError if the document was changed since (unless `force`), if a process is active in its run, and for a
        value that would make the run unreadable.
        """
        from orchestrator.state.documents import conflicts, validation  # noqa: PLC0415  the same

        newest = None
        with suppress(RefusedError):
            newest = await self.newest_run()
        pending = await conflicts.find_conflict(self._store, conflict, newest)
        await self._check_idle(pending.key)
        check = validation.check_manual_change
        document = await conflicts.resolve_conflict(self._store, pending.id, choice, force=force, check=check)
        return conflicts.ConflictResolution(pending, document)

    async def _check_idle(self, key: Key) -> None:
        """Refuse to write a document of a run with an active process, which would not notice the change."""
        run = next((run for run in await self.run_ids() if is_run_document(key, run)), None)
        if run is not None and await self._runs.has_live_process(run):
            what = f"{key} belongs to run {run}, which is active"
            raise RefusedError(what, "stop it with SIGINT, or wait for its end")

    async def locks(self) -> list[LockStatus]:
        """Return the locks of all three layers, with their holders and waiters."""
        return await (await self._lock_overview()).locks()

    async def break_lock(self, name: str, reason: str) -> LockStatus:
        """Revoke a lock by its name (`locks`) and record the reason; return its previous status.

        RefusedError if the lock is free, or if only the process that holds it can release it.
        """
        return await (await self._lock_overview()).break_lock(name, reason)

    async def _lock_overview(self) -> LockOverview:
        from orchestrator.locking.lock_overview import LockOverview  # noqa: PLC0415  seldom needed

        return LockOverview(self._store, self._runs.clock, self.project.file_locks)

    @property
    def named_locks(self) -> NamedLocks:
        """Named locks for programs: shared by readers or exclusive to a writer, with owner, expiry and timeout."""
        from orchestrator.locking.named_locks import NamedLocks  # noqa: PLC0415  the same

        return NamedLocks(self._store, self._runs.clock)

    def stop(self) -> None:
        """Stop this council's active runs cleanly: stop sessions, and preserve their work.

        `run` and `resume` return soon after; a later `resume` continues the runs.
        """
        self._stopping = True
        if self._execution is not None:
            self._execution.stop()

    async def status(self, run: str | None = None) -> RunReport:
        """Return the current report of a run."""
        return await self._runs.status(await self.find_run(run))

    async def landed(self, run: str, commits: Mapping[str, str]) -> dict[str, Changes]:
        """Return the size of each task's changes; `commits` maps tasks to the commits by which they landed."""
        return await self._runs.landed(run, commits)

    async def task_details(self, task: str, run: str | None = None) -> TaskDetails:
        """Return a task in full: phases, sessions, handoffs, landing. RefusedError if there is no such task."""
        run = await self.find_run(run)
        details = await self.history.task_details(run, task)
        if details.status != TaskStatus.RUNNING:
            return details
        from orchestrator.engine.reports.task_details import LatestActivity  # noqa: PLC0415  seldom needed

        latest = await self.archive.latest(run, task, await self.adapters(run))
        return details if latest is None else replace(details, latest_activity=LatestActivity(*latest))

    async def runs(self, *, active: bool = False) -> list[RunReport]:
        """Return the reports of all runs of the project, or only of active ones, the oldest first.

        Active runs are running or interrupted, or have ended with waiting tasks, such as after a retry. Unreadable runs
        are skipped: `damage` names the document.
        """
        reports = await self._runs.all()
        return [report for report in reports if not active or report.status in _ACTIVE or report.has_unfinished_tasks]

    async def run_ids(self) -> list[str]:
        """Return the ids of all readable runs of the project, the oldest first."""
        return await self._runs.ids()

    async def newest_run(self) -> str:
        """Return the id of the newest run, ignoring runs that merge another run's branch."""
        return await self._runs.newest()

    async def find_run(self, name: str | None = None) -> str:
        """Return the id of the run with a name: an id, a unique prefix of one, or `latest`; None is the newest run.

        RefusedError, with the closest ids, if no run or several match.
        """
        return await self._runs.find(name)

    async def interrupted_runs(self) -> list[str]:
        """Return the ids of unfinished runs without an active process, the oldest first."""
        return await self._runs.interrupted()

    async def is_live(self, run: str) -> bool:
        """Return True if a process is active in a run."""
        return await self._runs.is_live(run)

    async def paths(self) -> ProjectPaths:
        """Return the paths of the project's files."""
        local = self._store.local_paths()
        state = str(local[0]) if local else redact_urls(self._runs.url)
        log, logs = self.project.log_file, self.project.logs_folder
        if not await self._store.list("run"):
            return ProjectPaths(None, state, log, logs, None, None)
        run = await read_run(self._store, await self.newest_run())
        hub = Hub(Path(run.hub))
        return ProjectPaths(redact_urls(run.repo), state, log, logs, hub.objects.parent, hub.trusted)

    async def events(self, run: str | None = None, *, after: int | None = None) -> AsyncGenerator[RecordedEvent]:
        """Yield the events of a run, live, until it is finished or interrupted.

        Without `run` it is the first run with an event since the council was opened. Events start at the run's
        beginning, or after the log position `after`; pruned ones are missing.
        """
        if after is None:
            after = 0 if run is not None else self._opened_at
        is_over = False
        async with aclosing(self.records(after)) as records:
            async for record in records:
                for event in record.events:
                    run = run or event.data.get("run")
                    if run is not None and event.data.get("run") == run:
                        yield RecordedEvent(record.position, record.time, event)
                        is_over = event.type in _LAST_EVENTS or (is_over and event.type in _LATER_EVENTS)
                # A resumed run has more events after that.
                if is_over and record.position >= await self.position():
                    return

    def records(self, after: int) -> AsyncGenerator[CommitRecord]:
        """Yield the commits after a log position, of all runs, live; never ends on its own.

        Pruned commits are missing.
        """
        return follow_log(self._store, after)

    async def position(self) -> int:
        """Return the position of the newest commit."""
        return await self._store.position()

    async def verify(self) -> VerificationReport:
        """Verify the whole log and all documents."""
        from orchestrator.state.documents.validation import verify_store  # noqa: PLC0415  seldom needed

        return await verify_store(self._store)

    async def repair(self) -> VerificationReport:
        """Restore the readable state, and return the report of `verify` after that (see `Store.repair`).

        A document with the wrong shape for its kind gets its newest readable value, but not while a process is active
        in its run.
        """
        from orchestrator.state.documents.validation import repair_documents, verify_store  # noqa: PLC0415  seldom needed

        await self._store.repair()
        report = await verify_store(self._store)
        live = [run for run in await self.run_ids() if await self._runs.has_live_process(run)]
        idle = [key for key in report.unreadable if not any(is_run_document(key, run) for run in live)]
        await repair_documents(self._store, idle)
        return await verify_store(self._store) if idle else report

    async def check(self, run: str | None = None) -> RunVerification:
        """Verify a run's workflow records against all rules, including those of plugins.

        Changes nothing, and works on active runs.
        """
        from orchestrator.engine.phases.verification import verify_run  # noqa: PLC0415  seldom needed

        plugins, runs = await self._load_plugins(), self._runs
        kinds, name = plugins.checked_kinds(), await self.find_run(run)
        return await verify_run(self._store, name, kinds, plugins.constraints, runs.clock, runs.environ)

    async def health(self) -> list[Finding]:
        """Check the state: integrity, size, latency, interrupted runs, silent sessions and open conflicts.

        Makes one durable commit, to measure the latency.
        """
        from orchestrator.api.health import Health  # noqa: PLC0415

        return await Health(self._runs).examine()

    async def compact(self, age: float | None = None, size: int | None = None) -> CompactionResult:
        """Delete expired documents, and prune the log by the newest run's retention, or by the arguments.

        Of commits older than `age` seconds, or beyond `size` bytes of log, only the last versions of each document
        remain.
        """
        from orchestrator.state.documents.maintenance import compact_log, delete_expired  # noqa: PLC0415

        retention = await self._runs.retention()
        age, size = retention.age if age is None else age, retention.size if size is None else size
        await delete_expired(self._store, {})
        return await compact_log(self._store, self._runs.clock, age, size, {})

    async def export_state(self, file: str | Path | IO[bytes], *, force: bool = False) -> CopyResult:
        """Write the whole state to one file, for `import_state`.

        RefusedError if the state is damaged, and if the file exists, unless `force`. A stream is written directly.
        """
        from orchestrator.api.transfer import export_store  # noqa: PLC0415

        return await export_store(self._store, file, force=force, clock=self._runs.clock)

    async def import_state(self, file: str | Path | IO[bytes]) -> CopyResult:
        """Load a file of `export_state` into an empty store, with all positions and versions.

        RefusedError, with nothing changed, if the store is not empty or the file is incomplete.
        """
        from orchestrator.api.transfer import import_store  # noqa: PLC0415

        return await import_store(file, self._store)

    async def export_views(self) -> ViewPosition:
        """Write readable copies of the state to `project.views`, replacing earlier ones; return their position.

        From then on each run updates them when it ends. LockHeld if another process writes them and does not finish in
        time.
        """
        from orchestrator.views.export import export_views  # noqa: PLC0415

        await anyio.to_thread.run_sync(self._check_project)
        return await export_views(self._store, self.project, self._runs.clock.now())

    @property
    def damage(self) -> tuple[str, ...]:
        """Descriptions of the damage found since the state was opened."""
        return self._runs.damage

    @property
    def archive(self) -> Archive:
        """The logs, changes and preserved work of tasks."""
        from orchestrator.api.archive import Archive  # noqa: PLC0415

        return Archive(self.project, self._store, self._runs.environ, self.is_live)

    @property
    def history(self) -> StateHistory:
        """The recorded state, now and at earlier positions."""
        from orchestrator.api.history import StateHistory  # noqa: PLC0415

        return StateHistory(self._runs)

    async def activity(self, run: str) -> RunActivity:
        """Return a snapshot of a run, which can be followed by the live activity of its sessions."""
        from orchestrator.api.activity import RunActivity  # noqa: PLC0415

        position, record = await self.position(), await self._runs.record(run)
        specs = await self._store.list("spec", f"{run}/")
        attempts = {spec.key.id.partition("/")[2]: int(spec.value["attempts"]) for spec in specs}
        adapters = await self._adapters(record.run)
        return RunActivity(record, position, attempts, self._runs, self.archive, adapters, self.project.logs(run))

    async def adapters(self, run: str) -> Mapping[str, Adapter]:
        """Return the adapters of a run by name."""
        return await self._adapters(await read_run(self._store, run))

    async def _adapters(self, run: RunDocument) -> Mapping[str, Adapter]:
        from orchestrator.config.model import make_adapters, restore_adapters  # noqa: PLC0415

        plugins = await self._load_plugins()
        return make_adapters(restore_adapters(run.adapters, plugins.adapters, plugins.explain), plugins.adapters)

    async def contexts(self, run: str | None = None) -> list[SessionContext]:
        """Return the contexts of a run's sessions, in all processes; each covers the last half hour."""
        from orchestrator.engine.session_api.contexts import read_contexts  # noqa: PLC0415  seldom needed

        return await read_contexts(self._store, await self.find_run(run))

    async def file_conflicts(self, run: str | None = None) -> dict[str, list[SessionContext]]:
        """Return the files that several sessions of a run edit or have locked, with these sessions."""
        from orchestrator.domain.sessions.contexts import find_file_conflicts  # noqa: PLC0415  the same

        return find_file_conflicts(await self.contexts(run))

    async def task_summary(self, task: str, run: str | None = None) -> TaskSummary:
        """Return a summary of a task's sessions. RefusedError if the run has no such task."""
        from orchestrator.domain.sessions.contexts import summarize_task  # noqa: PLC0415  the same

        run = await self.find_run(run)
        await check_task(self._store, await read_run(self._store, run), task)
        return summarize_task(task, await self.contexts(run))

    async def clean_contexts(self, after: float = 1800.0) -> list[str]:
        """Remove the contexts of sessions without an update for `after` seconds; return their names."""
        from orchestrator.engine.session_api.contexts import clean_contexts  # noqa: PLC0415  the same

        return await clean_contexts(self._store, self._runs.clock.now(), after)

    async def details(self, task: str, run: str | None = None) -> SessionDetails:
        """Return what the running session of a task has done so far. RefusedError if none is running."""
        run = await self.find_run(run)
        return await self.archive.details(run, task, await self.adapters(run))

    async def notes(
        self,
        run: str | None = None,
        *,
        task: str | None = None,
        topic: str | None = None,
        paths: Sequence[str] = (),
    ) -> list[Note]:
        """Return the notes of sessions, of all runs with the same target, the oldest first.

        Filtered by task, topic and paths (overlapping patterns), as far as these are given.
        """
        return await (await self._notes_service(run)).find(task=task, topic=topic, paths=paths)

    async def drop_note(self, note: str, run: str | None = None) -> None:
        """Delete a note by its id. RefusedError if there is none."""
        await (await self._notes_service(run)).drop(note)

    async def _notes_service(self, run: str | None) -> NoteStore:
        from orchestrator.domain.security.secrets import Redactor, secret_values  # noqa: PLC0415  the same
        from orchestrator.engine.session_api.notes import NoteStore  # noqa: PLC0415  the same
        from orchestrator.locking.ownership import ownership_scope  # noqa: PLC0415  the same

        document = await read_run(self._store, await self.find_run(run))
        redactor = Redactor(secret_values(self._runs.environ))
        return NoteStore(self._store, self._runs.clock, ownership_scope(document.repo, document.target), redactor)

    async def shared_values(self, run: str | None = None) -> SharedValues:
        """Return the key-value store that the sessions of a run share. RefusedError if there is no such run."""
        from orchestrator.domain.security.secrets import Redactor, secret_values  # noqa: PLC0415  the same
        from orchestrator.engine.session_api.shared_values import SharedValues  # noqa: PLC0415  the same

        document = await read_run(self._store, await self.find_run(run))
        redactor = Redactor(secret_values(self._runs.environ))
        return SharedValues(self._store, self._runs.clock, redactor, document.id)

    @property
    def cleaner(self) -> Cleaner:
        """Finds and removes leftovers of the project's runs and of this machine."""
        from orchestrator.api.cleanup import Cleaner  # noqa: PLC0415

        environ = self._runs.environ
        return Cleaner(council_home(environ), environ, self._runs.clock, self.project, self._store, self._runs.url)


def _find_source_project(folder: Path, chosen: str | None) -> tuple[Project, bool]:
    """Return the project that contains a folder, and True; or the folder itself, and False. Blocks.

    The latter needs a `chosen` store: RefusedError if there is neither a project nor a chosen store.
    """
    try:
        return find_project(folder), True
    except RefusedError:
        if chosen is None:
            raise
        return Project(folder.absolute()), False


def _resolve_store_url(project: Project, config: RunConfig | None) -> str:
    """Return the URL of the store in a file; without a file, that of the newest run. Blocks."""
    if config is None:
        return project.store()
    return config.state.url or folder_url(project.state_folder)


async def _import_legacy_state(
    store: Store, project: Project, clock: Clock, environ: Mapping[str, str]
) -> Sequence[str]:
    """Import the state of an older layout into an empty store, or complete an import; return notices."""
    record = await store.get(LEGACY_RECORD)
    if await store.position() if record is None else is_import_complete(record):
        return ()
    if not await anyio.to_thread.run_sync(project.has_legacy):
        return ()
    from orchestrator.repo.git.command import Git  # noqa: PLC0415  the same
    from orchestrator.repo.source.user_checkouts import find_repository  # noqa: PLC0415  seldom needed
    from orchestrator.state.legacy.importer import import_legacy_state  # noqa: PLC0415  the same

    with suppress(CouncilError, OSError):  # a folder without a repository needs no exclusion
        repository = await find_repository(project.top, Git(None, as_user=True, environ=environ))
        await anyio.to_thread.run_sync(exclude_from_git, repository.git_dir)
    return await import_legacy_state(store, project, clock.now())


@asynccontextmanager
async def _open_store(
    url: str, project: Project, plugins: Plugins | None, clock: Clock, environ: Mapping[str, str]
) -> AsyncIterator[Store]:
    """Open the store at a URL."""
    opened = open_without_plugins(url, clock)
    if opened is None:
        from orchestrator.plugins import load_plugins  # noqa: PLC0415

        if plugins is None:
            plugins = await anyio.to_thread.run_sync(load_plugins, environ, [project.top])
        opened = plugins.open_store(url, clock)
    async with opened as store:
        yield store
