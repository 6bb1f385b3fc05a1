"""The composition root: opens a project's state and what is installed, and hands out all that can be done there."""

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
from orchestrator.config.store import folder_url, scheme_of, store_folder, to_store_url
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
from orchestrator.state.stores.file import open_file_store
from orchestrator.system.clock import Clock, SystemClock

# Looking at a run must be quick: what it takes to run one, or to read a file, is imported where that is asked for.
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
    from orchestrator.views.content import ViewPosition

#: The events behind which nothing more comes of a run, for now.
_LAST_EVENTS = frozenset({"run.finished", "run.interrupted", "run.imported", "run.removed"})
#: How runs stand that are not over.
_ACTIVE = frozenset({RunStatus.RUNNING, RunStatus.INTERRUPTED, RunStatus.HALTED})
#: The events that may come behind those without anybody being at work again.
_LATER_EVENTS = frozenset({"checkpoint.created", "checkpoint.restored", "run.taken_over"})


@dataclass(frozen=True, slots=True)
class ProjectPaths:
    """Where a project keeps things; the repositories are None before its first run."""

    repository: str | None
    state: str
    """The folder of the store; its URL if it is in none."""
    log: Path
    logs: Path
    """The output of sessions: a folder for each run."""
    hub: Path | None
    trusted: Path | None


class Council:
    """One project's runs: start them, resume them, look at them, steer them. Opened by `Council.open`.

    Its methods can be called side by side, by tasks of one event loop; a run can be executed once at a time, by
    whichever process. `run` names a run as `find_run` takes it; where it is left out, the newest run is meant.
    """

    notices: Sequence[str]
    """What a person is to be told of how the state was opened."""

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

        `source` is a YAML file, or the same as a `Config`, which `run` then runs (relative paths of a `Config` start
        from the current folder); or a folder, for the runs that were started in its repository; None is the
        current folder. `state` is the URL of the store (`file:///a/folder`, `memory:`, or what a plugin registers), or
        its folder; else `COUNCIL_STATE` of `environ` names it, else the file, or the file of the newest run; else it
        is `.council/state` of the project. What `state` or `COUNCIL_STATE` names can be looked at from any folder.
        `plugins` stand for what is installed; `environ` for the process's environment: sessions get what they may of
        it.

        Where the state is empty and `.worktrees` has that of an older layout, it is imported, and `notices` says so;
        not into a store that `state` names.

        Raises ConfigError with all that is wrong with the file, RefusedError where there is nothing to open, and for a
        store that was not made on this machine unless `adopt_state` has accepted it.
        """
        clock = clock or SystemClock()
        source = "." if source is None else source
        config, is_known = None, True
        chosen = to_store_url(state or environ.get("COUNCIL_STATE", "")) or None
        if isinstance(source, str | Path) and await anyio.to_thread.run_sync(os.path.isdir, source):
            project, is_known = await anyio.to_thread.run_sync(_find_source_project, Path(source), chosen)
        else:
            from orchestrator.api.loading import load_run

            plugins, config, project = await load_run(source, plugins, environ)
        await refuse_tracked_project_folder(project, environ)
        if is_known:  # from elsewhere a store is only looked at
            await anyio.to_thread.run_sync(project.create)
        url = await anyio.to_thread.run_sync(_resolve_store_url, project, config) if chosen is None else chosen
        is_named = chosen is not None or config is not None or url == folder_url(project.state_folder)
        if scheme_of(url) == "file" or not is_named:  # else a person has named it
            await anyio.to_thread.run_sync(partial(check_trusted, url, council_home(environ), is_named=is_named))
        async with _open_store(url, project, plugins, clock, environ) as store:
            notices = await _import_legacy_state(store, project, clock, environ) if state is None else ()
            runs = ProjectRuns(project, store, url, clock, environ, follows_file=chosen is None)
            yield cls(runs, await store.position(), plugins, config, notices)

    @property
    def plugins(self) -> Plugins:
        """What is installed, loaded at the first look unless a file was."""
        if self._plugins is None:
            from orchestrator.plugins import load_plugins

            self._plugins = load_plugins(self._runs.environ, [self.project.top])
        return self._plugins

    async def _load_plugins(self) -> Plugins:
        return await anyio.to_thread.run_sync(lambda: self.plugins) if self._plugins is None else self._plugins

    @property
    def store_url(self) -> str:
        """The URL of the store."""
        return self._runs.url

    def _check_project(self) -> None:
        """Refuse what writes beside the store where that is looked at from elsewhere. Blocks."""
        if not self.project.folder.is_dir():
            find_project(self.project.top)

    async def _get_execution(self) -> RunExecutor:
        from orchestrator.api.execution import RunExecutor

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
        """Run the tasks of the file that this was opened with, to their end.

        With `allow_deferred` it starts although the target's checkout has changes of the user's own; what can't land
        then lands on `resume`. What of `coordination` is given stands above the file's and above the environment.
        Raises RefusedError, with nothing started, if something stands in the way.
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
        """Check that the file can run, record it, and return the run's id; nothing is started yet.

        With `allow_failing_base` sessions start though checks fail on the base.

        RefusedError says what stands in the way, as `engine.diagnostics.preflight.run_preflight` does.
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
        """Take a run to its end, from wherever it stands: new, or cut off.

        What of `budget` is given replaces that limit of the run's; what of `coordination` is, stands above the run's
        and the environment for as long as this goes on, and `capacity` above the run's number of sessions. With
        `allow_failing_base` sessions start from now on though checks fail on the base. Only one process can do that at
        a time: RefusedError while another one does.
        """
        execution = await self._get_execution()
        name = await self.find_run(run)
        return await execution.resume(name, budget, coordination, capacity, allow_failing_base=allow_failing_base)

    async def land(self, run: str | None = None) -> RunReport:
        """Land what is built of a run, and start no session; return how the run then stands. Else as `resume`."""
        return await (await self._get_execution()).resume(await self.find_run(run), only_lands=True)

    async def create_merge(self, run: str | None = None) -> str:
        """Record a run whose one task is built already, and is all that landed on another run's branch.

        `resume` lands it on that run's base, with the checks of all of its tasks. Return its id, or that of an earlier
        one whose task still waits to land; NothingToMerge where there is nothing.
        """
        return await (await self._get_execution()).create_merge(await self.find_run(run))

    async def work(
        self, run: str, *, capacity: int | None = None, coordination: CoordinationOverrides | None = None
    ) -> RunReport:
        """Be at work in a run beside others, until nothing is left there to do; return how the run then stands.

        Tasks are claimed that are free and whose adapter works here, at most `capacity` at once (None: as many as the
        run has). Where nobody coordinates the run any more, this process does.
        """
        return await (await self._get_execution()).work(run, capacity, coordination)

    async def active_runs(self, *, follow: bool = False) -> AsyncGenerator[str]:
        """Yield the runs that somebody is at work in, the oldest first; with `follow` those that begin later, too."""
        position = await self._store.position()
        known = set()
        for run in await self._runs.ids():
            with suppress(UnreadableDocument):  # whoever asks for it is told
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
        """End tasks for good, all that are not over if none is named; return how the run then stands.

        Sessions are stopped, what they did is kept on branches. Whichever process is at work in the run does it. A task
        that has ended stays as it is.
        """
        return await self._ask(await self.find_run(run), RequestAction.CANCEL, tasks)

    async def ignore(self, *tasks: str, reason: str, run: str | None = None) -> RunReport:
        """End tasks as `cancel` does, and have nobody try them before `retry`; return how the run then stands."""
        from orchestrator.engine.scheduler.requests import check_reason

        check_reason(reason)
        return await self._ask(await self.find_run(run), RequestAction.IGNORE, tasks, reason)

    async def file_changes(self, run: str | None = None) -> FileChanges:
        """Return what the file of a run says now otherwise than the run's record, for the tasks that are not done.

        A run keeps what it recorded when it was made; `retry` with `reload` takes over what the file says of tasks.
        """
        return await (await self._get_execution()).file_changes(await self.find_run(run))

    async def retry(
        self,
        *tasks: str,
        run: str | None = None,
        from_phase: str | None = None,
        reload: FileChanges | None = None,
    ) -> RunReport:
        """Have tasks tried again that are over without having landed; return how the run then stands.

        Those with a workflow go on at the phase that they were at, or at `from_phase`: what came of the phases before
        that stays. A process that is at work in the run does so at once; otherwise the next `resume` does.

        With `reload`, from `file_changes`, the tasks first take over the prompts, limits and adapters of the file;
        RefusedError with the reason for each key that can't change.
        """
        return await self._ask(await self.find_run(run), RequestAction.RETRY, tasks, phase=from_phase, reload=reload)

    async def approve(self, *tasks: str, note: str | None = None, run: str | None = None) -> RunReport:
        """Approve what a phase of each task came to, so that it goes on; return how the run then stands.

        RefusedError where one waits for no approval. Whichever process is at work in the run goes on at once; otherwise
        the next `resume` does.
        """
        return await self._answer(RequestAction.APPROVE, tasks, note, run)

    async def reject(self, *tasks: str, note: str | None = None, run: str | None = None) -> RunReport:
        """Have the phases done again whose result waits to be approved; for the rest see `approve`.

        The note is what their sessions are told.
        """
        return await self._answer(RequestAction.REJECT, tasks, note, run)

    async def enable_adapters(self, *adapters: str, run: str | None = None) -> RunReport:
        """Have adapters used again that were stopped or paused, all of them if none is named.

        An active run uses them at once, whichever processes work on it; otherwise `resume` does. RefusedError for an
        adapter that can be used anyway, or is none of the run.
        """
        return await self._ask(await self.find_run(run), RequestAction.ENABLE, (), adapters=adapters)

    async def _answer(
        self, action: RequestAction, tasks: tuple[str, ...], note: str | None, run: str | None
    ) -> RunReport:
        from orchestrator.engine.scheduler.requests import check_note

        check_note(note)
        if not tasks:  # the engine would take all that are not over
            raise RefusedError("no task is named", "`council status` names those that wait for approval")
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

    async def checkpoint(self, run: str | None = None, *, reason: str = "by hand", whole: bool = False) -> Checkpoint:
        """Make a checkpoint of a run as it stands now, or with `whole` of all the project's runs."""
        from orchestrator.state.documents import checkpoints

        if whole:
            return await checkpoints.create_checkpoint(self._store, None, reason)
        run = await self.find_run(run)
        return await checkpoints.create_checkpoint(
            self._store, run, reason, is_live=await self._runs.has_live_process(run)
        )

    async def checkpoints(self, run: str | None = None) -> list[Checkpoint]:
        """Return the checkpoints of a run (`all`: those of all runs together), or all there are, the oldest first."""
        from orchestrator.state.documents import checkpoints

        return await checkpoints.list_checkpoints(self._store, run)

    async def restoration(self, checkpoint: str) -> RestorePlan:
        """Return what `restore` would change now. RefusedError where the log does not go back so far any more."""
        from orchestrator.state.documents import checkpoints

        return await checkpoints.plan_restore(self._store, checkpoint)

    async def restore(self, checkpoint: str, *, force: bool = False) -> RestoreResult:
        """Go back to a checkpoint, by its id; a new one is made of how things stand, and `resume` goes on from the old.

        What has landed stays landed. RefusedError while a process is at work in a run that this would change; with
        `force` it is taken over instead, and that process ends at its next step.
        """
        return await (await self._get_execution()).restore(checkpoint, force=force)

    async def document(self, key: Key) -> Document | None:
        """Return a document as it is now, whichever process wrote it; None if there is none."""
        return await self._store.get(key)

    async def update(
        self,
        key: Key,
        change: Callable[[JsonObject | None], JsonObject | None],
        *,
        expected_version: int | None = None,
        ttl: float | None = None,
    ) -> Document | None:
        """Replace a document's value by what `change` makes of it; return the document after that, None if it is gone.

        `change` gets a copy of its own, None where there is no document, and returns None to delete it. Where somebody
        else commits first it is called anew with the newer value, at most five times in all, after pauses that grow
        exponentially. VersionConflict says who wrote and when: behind the last time, or at once where the version is
        not the `expected_version` (0: there is none). After `ttl` seconds it is as if the document were not there.

        RefusedError for a document of a run that a process is at work in, for a value that would keep a document of
        council's own from being read, and for those that council alone writes (`state.documents.validation`).
        """
        from orchestrator.state.documents.update import update_document
        from orchestrator.state.documents.validation import check_manual_change

        await self._check_idle(key)
        return await update_document(
            self._store, key, change, expected_version=expected_version, ttl=ttl, check=check_manual_change
        )

    def subscribe(self, pattern: str, after: int | None = None) -> AsyncGenerator[DocumentChange]:
        """Yield each new version of the documents whose name, `kind/id`, matches a pattern, as any process writes it.

        In a pattern `*` stands for any characters, `/` too. It begins behind the position `after`: 0 is from the first
        that the log has, None from now on, which is when the first is asked for. It never ends by itself.
        """
        from orchestrator.state.documents.subscription import subscribe

        return subscribe(self._store, pattern, after)

    async def apply_updates(
        self, updates: Sequence[DocumentUpdate[Key]], strategy: str = "last_write_wins"
    ) -> UpdateResult:
        """Write what updates of documents amount to; those that compete are resolved by a strategy.

        That is `last_write_wins`, `first_write_wins`, `merge`, or `manual`, which keeps them for `settle`. RefusedError
        for documents of a run that a process is at work in, and for what would keep a run from being read.
        """
        from orchestrator.state.documents import (
            conflicts,
            validation,
        )

        for key in dict.fromkeys(update.key for update in updates):
            await self._check_idle(key)
        return await conflicts.apply_updates(self._store, updates, strategy, check=validation.check_manual_change)

    async def conflicts(self) -> list[Conflict]:
        """Return the conflicts of updates that wait for a person, the oldest first."""
        from orchestrator.state.documents import conflicts

        return await conflicts.list_pending(self._store)

    async def settle(self, conflict: str, choice: int | JsonObject, *, force: bool = False) -> ConflictResolution:
        """Settle a conflict, named by its id or its document: by the number of a candidate, from 1, or by a value.

        RefusedError where the document was changed since, unless that is forced, while a process is at work in the run
        that it is of, and for what would keep that run from being read.
        """
        from orchestrator.state.documents import (
            conflicts,
            validation,
        )

        newest = None
        with suppress(RefusedError):
            newest = await self.newest_run()
        found = await conflicts.find_conflict(self._store, conflict, newest)
        await self._check_idle(found.key)
        check = validation.check_manual_change
        return conflicts.ConflictResolution(
            found, await conflicts.resolve_conflict(self._store, found.id, choice, force=force, check=check)
        )

    async def _check_idle(self, key: Key) -> None:
        """Refuse to write a document of a run beside the process that is at work in it, which would not know."""
        run = next((run for run in await self.run_ids() if is_run_document(key, run)), None)
        if run is not None and await self._runs.has_live_process(run):
            raise RefusedError(f"{key} is of run {run}, which is at work", "stop it with SIGINT, or wait for its end")

    async def locks(self) -> list[LockStatus]:
        """Return what is locked in all three layers, with who holds it and who waits for it."""
        return await (await self._lock_overview()).locks()

    async def break_lock(self, name: str, reason: str) -> LockStatus:
        """Take a lock away from whoever holds it, by its name (`locks`); the reason is recorded. Returns it as it was.

        RefusedError where nobody holds it, and where only the process that does can give it back.
        """
        return await (await self._lock_overview()).break_lock(name, reason)

    async def _lock_overview(self) -> LockOverview:
        from orchestrator.locking.lock_overview import LockOverview

        return LockOverview(self._store, self._runs.clock, self.project.file_locks)

    @property
    def named_locks(self) -> NamedLocks:
        """Locks for programs: shared by readers or exclusive for a writer, with an owner, an expiry and a time-out."""
        from orchestrator.locking.named_locks import NamedLocks

        return NamedLocks(self._store, self._runs.clock)

    def stop(self) -> None:
        """End what is under way here cleanly: sessions are stopped, what they did is kept.

        `run` and `resume` then return soon; another council's `resume` goes on from there.
        """
        self._stopping = True
        if self._execution is not None:
            self._execution.stop()

    async def status(self, run: str | None = None) -> RunReport:
        """Describe a run as it stands now."""
        return await self._runs.status(await self.find_run(run))

    async def landed(self, run: str, commits: Mapping[str, str]) -> dict[str, Changes]:
        """Return by task how much each has changed; `commits` are those by which they landed."""
        return await self._runs.landed(run, commits)

    async def story(self, task: str, run: str | None = None) -> TaskDetails:
        """Return all that is known of a task: phases, sessions, handoffs, landing. RefusedError where there is none.

        Without `run` it is the task of the newest run.
        """
        run = await self.find_run(run)
        found = await self.history.story(run, task)
        if found.status != TaskStatus.RUNNING:
            return found
        from orchestrator.engine.reports.task_details import LatestActivity

        latest = await self.archive.latest(run, task, await self.adapters(run))
        return found if latest is None else replace(found, latest=LatestActivity(*latest))

    async def runs(self, *, active: bool = False) -> list[RunReport]:
        """Describe all runs of the project, or only the active ones, the oldest first.

        These are running or interrupted, or have ended with tasks that wait, such as after a retry.

        Runs that can't be read are left out: `damage` names the document.
        """
        found = await self._runs.all()
        return [report for report in found if not active or report.status in _ACTIVE or report.has_unfinished_tasks]

    async def run_ids(self) -> list[str]:
        """Return the ids of all runs of the project that can be read, the oldest first."""
        return await self._runs.ids()

    async def newest_run(self) -> str:
        """Return the id of the run that was started last, without those that merge another run's branch."""
        return await self._runs.newest()

    async def find_run(self, name: str | None = None) -> str:
        """Return the id of the run that a name means: an id, its beginning if no other begins so, or `latest`.

        Without a name it is the newest. RefusedError, with the nearest ids, where no run or several are meant.
        """
        return await self._runs.find(name)

    async def interrupted_runs(self) -> list[str]:
        """Return the ids of the runs that have not ended and that no process is running, the oldest first."""
        return await self._runs.interrupted()

    async def is_live(self, run: str) -> bool:
        """Whether a process is at work in a run."""
        return await self._runs.is_live(run)

    async def places(self) -> ProjectPaths:
        """Say where everything is kept."""
        folder = store_folder(self._runs.url)
        state = redact_urls(self._runs.url) if folder is None else str(folder)
        log, logs = self.project.log_file, self.project.logs_folder
        if not await self._store.list("run"):
            return ProjectPaths(None, state, log, logs, None, None)
        run = await read_run(self._store, await self.newest_run())
        hub = Hub(Path(run.hub))
        return ProjectPaths(redact_urls(run.repo), state, log, logs, hub.objects.parent, hub.trusted)

    async def events(self, run: str | None = None, *, after: int | None = None) -> AsyncGenerator[RecordedEvent]:
        """Yield what happens in a run, as it happens, until it is finished or interrupted.

        Without `run` it is the first that anything happens in since the council was opened. They come from the run's
        beginning, or from behind `after`, a position of the log; those that it has let go of are missing.
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
                # What was resumed has more behind its end.
                if is_over and record.position >= await self.position():
                    return

    def records(self, after: int) -> AsyncGenerator[CommitRecord]:
        """Yield what is recorded behind a position of the log, of every run, as it happens; never ends by itself.

        What the log has let go of is missing.
        """
        return follow_log(self._store, after)

    async def position(self) -> int:
        """Return the newest position of the log."""
        return await self._store.position()

    async def verify(self) -> VerificationReport:
        """Read all that is recorded anew, and tell whether it is sound."""
        from orchestrator.state.documents.validation import verify_store

        return await verify_store(self._store)

    async def repair(self) -> VerificationReport:
        """Settle for what can be read of what is recorded; return what `verify` finds then (see `Store.repair`).

        A document that is none of its kind gets its newest readable value again, but not while a process is at work in
        its run.
        """
        from orchestrator.state.documents.validation import repair_documents, verify_store

        await self._store.repair()
        found = await verify_store(self._store)
        live = [run for run in await self.run_ids() if await self._runs.has_live_process(run)]
        idle = [key for key in found.unreadable if not any(is_run_document(key, run) for run in live)]
        await repair_documents(self._store, idle)
        return await verify_store(self._store) if idle else found

    async def check(self, run: str | None = None) -> RunVerification:
        """Hold all that is recorded of a run's workflows against the rules, those of plugins with them.

        Nothing is changed, and a run may be at work meanwhile.
        """
        from orchestrator.engine.phases.verification import verify_run

        plugins, runs = await self._load_plugins(), self._runs
        kinds, name = plugins.checked_kinds(), await self.find_run(run)
        return await verify_run(self._store, name, kinds, plugins.constraints, runs.clock, runs.environ)

    async def health(self) -> list[Finding]:
        """Look at the health of the state: soundness, size, latency, what is cut off, silent or waits for a person.

        One durable commit is made, to see how long that takes.
        """
        from orchestrator.api.health import Health

        return await Health(self._runs).examine()

    async def compact(self, age: float | None = None, size: int | None = None) -> CompactionResult:
        """Delete what has expired, and let go of the past as the newest run's file says, or as is said here.

        Of what is older than `age` seconds, or more than `size` bytes of log, the last versions of each document stay.
        """
        from orchestrator.state.documents.maintenance import compact_log, delete_expired

        kept = await self._runs.retention()
        age, size = kept.age if age is None else age, kept.size if size is None else size
        await delete_expired(self._store, {})
        return await compact_log(self._store, self._runs.clock, age, size, {})

    async def export_state(self, file: str | Path | IO[bytes], *, force: bool = False) -> CopyResult:
        """Write all that is recorded, as it is now, to one file, which `import_state` and other stores take.

        RefusedError where not all can be trusted, and where the file is there already, unless `force` says to replace
        it. A stream is written to as it is.
        """
        from orchestrator.api.transfer import export_store

        return await export_store(self._store, file, force=force, clock=self._runs.clock)

    async def import_state(self, file: str | Path | IO[bytes]) -> CopyResult:
        """Load what `export_state` wrote, positions, versions and all, into a store that has nothing yet.

        RefusedError, with nothing changed, where it is not empty, and where the file is not whole.
        """
        from orchestrator.api.transfer import import_store

        return await import_store(file, self._store)

    async def refresh_views(self, *, anew: bool = False) -> ViewPosition:
        """Bring the readable copies of the state up to date, with `anew` from nothing; return how far they are.

        LockHeld where another process that writes them does not come to it.
        """
        from orchestrator.views.update import Views

        await anyio.to_thread.run_sync(self._check_project)
        return await Views(self._store, self._runs.clock, self.project).refresh(anew=anew)

    @property
    def damage(self) -> tuple[str, ...]:
        """What of the state could not be read since it was opened, in words."""
        return self._runs.damage

    @property
    def archive(self) -> Archive:
        """What the tasks of the project's runs left."""
        from orchestrator.api.archive import Archive

        return Archive(self.project, self._store, self._runs.environ, self.is_live)

    @property
    def history(self) -> StateHistory:
        """What is recorded, now and at any earlier moment."""
        from orchestrator.api.history import StateHistory

        return StateHistory(self._runs)

    async def activity(self, run: str) -> RunActivity:
        """Return how a run stands, and a way to see what its sessions do from then on."""
        from orchestrator.api.activity import RunActivity

        position, record = await self.position(), await self._runs.record(run)
        specs = await self._store.list("spec", f"{run}/")
        attempts = {found.key.id.partition("/")[2]: int(found.value["attempts"]) for found in specs}
        adapters = await self._adapters(record.run)
        return RunActivity(record, position, attempts, self._runs, self.archive, adapters, self.project.logs(run))

    async def adapters(self, run: str) -> Mapping[str, Adapter]:
        """Return the adapters of a run, by their names."""
        return await self._adapters(await read_run(self._store, run))

    async def _adapters(self, run: RunDocument) -> Mapping[str, Adapter]:
        from orchestrator.config.model import make_adapters, restore_adapters

        plugins = await self._load_plugins()
        return make_adapters(restore_adapters(run.adapters, plugins.adapters, plugins.explain), plugins.adapters)

    async def contexts(self, run: str | None = None) -> list[SessionContext]:
        """Return what the sessions of a run are at, whichever processes run them; the last half hour of each."""
        from orchestrator.engine.session_api.contexts import read_contexts

        return await read_contexts(self._store, await self.find_run(run))

    async def file_conflicts(self, run: str | None = None) -> dict[str, list[SessionContext]]:
        """Return the files that several sessions of a run are at work on or have locked, with these."""
        from orchestrator.domain.sessions.contexts import find_file_conflicts

        return find_file_conflicts(await self.contexts(run))

    async def task_summary(self, task: str, run: str | None = None) -> TaskSummary:
        """Return the sessions of a task at a glance. RefusedError where the run has no such task."""
        from orchestrator.domain.sessions.contexts import summarize_task

        run = await self.find_run(run)
        await check_task(self._store, await read_run(self._store, run), task)
        return summarize_task(task, await self.contexts(run))

    async def clean_contexts(self, after: float = 1800.0) -> list[str]:
        """Remove what sessions said that were not heard of for `after` seconds; return their names."""
        from orchestrator.engine.session_api.contexts import clean_contexts

        return await clean_contexts(self._store, self._runs.clock.now(), after)

    async def details(self, task: str, run: str | None = None) -> SessionDetails:
        """Return what the session of a task has done so far. RefusedError where it has none at work."""
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
        """Return the notes that sessions left for the target of a run, in whatever run, the oldest first.

        Only those of a task, of a topic and about paths (patterns that overlap), as far as these are given.
        """
        return await (await self._notes_service(run)).find(task=task, topic=topic, paths=paths)

    async def drop_note(self, note: str, run: str | None = None) -> None:
        """Delete a note by its id. RefusedError where there is none."""
        await (await self._notes_service(run)).drop(note)

    async def _notes_service(self, run: str | None) -> NoteStore:
        from orchestrator.domain.security.secrets import Redactor, secret_values
        from orchestrator.engine.session_api.notes import NoteStore
        from orchestrator.locking.ownership import ownership_scope

        document = await read_run(self._store, await self.find_run(run))
        redactor = Redactor(secret_values(self._runs.environ))
        return NoteStore(self._store, self._runs.clock, ownership_scope(document.repo, document.target), redactor)

    async def shared_values(self, run: str | None = None) -> SharedValues:
        """Return what the sessions of a run share: values by keys, to put, to get, to wait for and to list.

        RefusedError where there is no such run.
        """
        from orchestrator.domain.security.secrets import Redactor, secret_values
        from orchestrator.engine.session_api.shared_values import SharedValues

        document = await read_run(self._store, await self.find_run(run))
        redactor = Redactor(secret_values(self._runs.environ))
        return SharedValues(self._store, self._runs.clock, redactor, document.id)

    @property
    def cleaner(self) -> Cleaner:
        """What finds and removes what is left over, of the project and on the machine."""
        from orchestrator.api.cleanup import Cleaner

        environ = self._runs.environ
        return Cleaner(council_home(environ), environ, self._runs.clock, self.project, self._store, self._runs.url)


def _find_source_project(folder: Path, chosen: str | None) -> tuple[Project, bool]:
    """Return the project that a folder is in, and True; the folder, and False, in none if a store is chosen. Blocks.

    RefusedError where there is nothing to look at.
    """
    try:
        return find_project(folder), True
    except RefusedError:
        if chosen is None:
            raise
        return Project(folder.absolute()), False


def _resolve_store_url(project: Project, config: RunConfig | None) -> str:
    """Return the URL of the store that a file names; without a file, what that of the newest run named. Blocks."""
    if config is None:
        return project.store()
    return config.state.url or folder_url(project.state_folder)


async def _import_legacy_state(
    store: Store, project: Project, clock: Clock, environ: Mapping[str, str]
) -> Sequence[str]:
    """Import the state of an older layout into a store that is empty or not done with it; return what is to be told."""
    record = await store.get(LEGACY_RECORD)
    if await store.position() if record is None else is_import_complete(record):
        return ()
    if not await anyio.to_thread.run_sync(project.has_legacy):
        return ()
    from orchestrator.repo.git.command import Git
    from orchestrator.repo.source.user_checkouts import find_repository
    from orchestrator.state.legacy.importer import import_legacy_state

    with suppress(CouncilError, OSError):  # what is no repository needs no exclusion
        repository = await find_repository(project.top, Git(None, as_user=True, environ=environ))
        await anyio.to_thread.run_sync(exclude_from_git, repository.git_dir)
    return await import_legacy_state(store, project, clock.now())


@asynccontextmanager
async def _open_store(
    url: str, project: Project, plugins: Plugins | None, clock: Clock, environ: Mapping[str, str]
) -> AsyncIterator[Store]:
    """Open the store at a URL."""
    scheme = scheme_of(url)
    if scheme == "file":  # no plugin can bring another
        opened = open_file_store(url, clock)
    else:
        from orchestrator.plugins import load_plugins

        if plugins is None:
            plugins = await anyio.to_thread.run_sync(load_plugins, environ, [project.top])
        opened = plugins.open_store(url, clock)
    async with opened as store:
        yield store
