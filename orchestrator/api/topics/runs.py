"""The topic `runs`: starting, resuming, finding and following runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.api import execution
from orchestrator.api.context import StopSignal
from orchestrator.api.run_index import RunIndex
from orchestrator.api.run_reader import RunReader
from orchestrator.domain.events.runs import (
    ForgeChanged,
    RunFinished,
    RunImported,
    RunInterrupted,
    RunLeaderElected,
    RunRemoved,
    RunTakenOver,
)
from orchestrator.domain.events.state import CheckpointCreated, CheckpointRestored
from orchestrator.domain.runs.model import RequestAction, RunDocument
from orchestrator.domain.scheduling.conflict_reactions import find_conflict_holds
from orchestrator.domain.scheduling.landing_order import QueuedTask, QueueFacts, describe_queue
from orchestrator.domain.scheduling.stacked_work import find_stack_waits
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.engine.state.records import read_queue_windows, read_run
from orchestrator.errors import RefusedError, UnreadableDocument
from orchestrator.protocols import Commit, Event, RecordedEvent
from orchestrator.state.documents.log_reader import follow_log

if TYPE_CHECKING:
    from orchestrator.config.coordination import CoordinationOverrides
    from orchestrator.config.model import RunConfig
    from orchestrator.domain.settings.run_settings import Budget
    from orchestrator.engine.tracker_sync import SyncReport, TrackerStatus
    from orchestrator.sessions.terminal import UserTerminal

#: The events that end a run's event stream, until the run is resumed.
_LAST_EVENTS = frozenset({RunFinished.type, RunInterrupted.type, RunImported.type, RunRemoved.type})
#: The events that may follow a last event while no process is active in the run.
_LATER_EVENTS = frozenset({CheckpointCreated.type, CheckpointRestored.type, RunTakenOver.type})
#: The statuses of unfinished runs.
_ACTIVE = frozenset({RunStatus.RUNNING, RunStatus.INTERRUPTED, RunStatus.HALTED})


@dataclass(frozen=True, slots=True)
class Runs(RunIndex):
    """The runs of a project. Available as `council.runs`.

    Only one process at a time can execute a run; `work` joins it as an additional worker. `run` is an id, a unique
    prefix of one, or `latest`; None is the newest run.
    """

    _stop: StopSignal
    _config: RunConfig | None
    _opened_at: int
    """The position of the log at which the council was opened."""

    async def run(
        self, *, allow_deferred: bool = False, coordination: CoordinationOverrides | None = None
    ) -> RunReport:
        """Run all tasks of the council's file, and return the report.

        With `allow_deferred`, the run starts even if the target's checkout has uncommitted changes; tasks that can't
        land because of them land on `resume`. Settings in `coordination` override the file and the environment. Raises
        RefusedError, with nothing started, if a check fails.
        """
        run = await self.create(allow_deferred=allow_deferred, coordination=coordination)
        return await self.resume(run, coordination=coordination)

    async def create(
        self,
        *,
        allow_deferred: bool = False,
        allow_failing_base: bool = False,
        coordination: CoordinationOverrides | None = None,
        follow: bool = False,
    ) -> str:
        """Check that the file can run, record a run, and return its id.

        With `allow_failing_base`, sessions start even if checks fail on the base. With `follow`, new tasks of the
        trackers join the run, which has no end: it runs until it is stopped. Raises RefusedError if a check of
        `engine.diagnostics.preflight.run_preflight` fails.
        """
        if self._config is None:
            raise RefusedError("no file was opened", "open the council with a YAML file")
        await self.context.check_writable()
        return await execution.create_run(
            self.context,
            self._config,
            allow_deferred=allow_deferred,
            allow_failing_base=allow_failing_base,
            coordination=coordination,
            follow=follow,
        )

    async def create_merge(self, run: str | None = None) -> str:
        """Record a run that merges the target branch of another run into that run's base.

        Its only task is already built and consists of everything that landed on the branch. `resume` lands it, with the
        checks of all tasks of the other run. Returns its id, or that of an earlier merge that is still queued to land.
        Raises NothingToMerge if the base has all commits.
        """
        await self.context.check_writable()
        return await execution.create_merge_run(self.context, await self.find(run))

    async def resume(
        self,
        run: str | None = None,
        *,
        budget: Budget | None = None,
        capacity: int | None = None,
        allow_failing_base: bool = False,
        coordination: CoordinationOverrides | None = None,
    ) -> RunReport:
        """Execute a new or interrupted run to its end, and return the report.

        Limits in `budget` replace those of the run. For this call, settings in `coordination` override those of the run
        and the environment, and `capacity` overrides the run's number of concurrent sessions. With
        `allow_failing_base`, sessions start from now on even if checks fail on the base. Raises RefusedError if another
        process leads the run.
        """
        executor = await self._executor()
        name = await self.find(run)
        return await executor.resume(name, budget, coordination, capacity, allow_failing_base=allow_failing_base)

    async def start(
        self,
        run: str | None = None,
        *,
        budget: Budget | None = None,
        capacity: int | None = None,
        allow_failing_base: bool = False,
    ) -> execution.BackgroundProcess:
        """Execute a new or interrupted run like `resume`, in a process that outlives this one.

        Returns as soon as the process is active in the run, or has ended. Raises RefusedError if another process
        executes the run, or if the store is in memory.
        """
        await self.context.check_writable()
        name = await self.find(run)
        return await execution.start_in_background(
            self.context, name, budget, capacity, allow_failing_base=allow_failing_base
        )

    async def land(self, run: str | None = None) -> RunReport:
        """Land the queued tasks of a run like `resume`, without starting sessions."""
        return await (await self._executor()).resume(await self.find(run), only_lands=True)

    async def work(
        self,
        run: str,
        *,
        capacity: int | None = None,
        coordination: CoordinationOverrides | None = None,
        labels: Sequence[str] | None = None,
    ) -> RunReport:
        """Join a run as an additional worker until no task is left; return the report.

        Claims free tasks whose adapter works on this machine, and whose labels are all in `labels` (None: those in
        `COUNCIL_LABELS`), at most `capacity` at once (None: the run's capacity).
        If the run no longer has a leader, this process becomes the leader. With a store on a server, a folder outside
        any project becomes one of this store.
        """
        await self.context.join_project()
        return await (await self._executor()).work(run, capacity, coordination, labels)

    async def attach(self, task: str, terminal: UserTerminal, *, run: str | None = None) -> RunReport:
        """Open the conversation of a task in a terminal, in its worktree and sandbox; return the report.

        A running session of the task is stopped first, and no other one starts. When the user leaves the conversation,
        the work lands if `terminal.is_complete()`; otherwise the next session continues the work and the conversation.
        Raises RefusedError if the task has no conversation, or if its adapter can't open it.
        """
        return await (await self._executor()).attach(await self.find(run), task, terminal)

    async def enable_adapters(self, *adapters: str, run: str | None = None) -> RunReport:
        """Enable disabled adapters and those in cooldown, by default all of them.

        Returns the report. All processes of an active run use the adapters immediately; otherwise the next `resume`
        does. Raises RefusedError if an adapter is already enabled, or if the run does not have it.
        """
        await self.context.check_writable()
        controller = execution.RunController(self.context)
        name = await self.find(run)
        await controller.perform(name, RequestAction.ENABLE, (), adapters=adapters)
        return await self.status(name)

    async def status(self, run: str | None = None) -> RunReport:
        """Return the current report of a run."""
        return await RunReader(self.context).status(await self.find(run))

    async def queue(self, run: str | None = None) -> Sequence[QueuedTask]:
        """Return the merge queue of a run: its built tasks in landing order, held ones last, with the reasons to wait.

        The state is recorded, so it includes the checks of other processes, as long as these are active in the run.
        """
        name, store = await self.find(run), self.context.store
        record = await RunReader(self.context).record(name)
        is_live = record.run.ended is None and await self.has_live_process(name)
        ended = {one.owner.id for one in record.orchestrators if one.ended is not None}
        windows = await read_queue_windows(store, name)
        priorities = {task: entry.priority for task, entry in record.entries.items()}
        active = [window for process, window in windows.items() if process not in ended]
        holds = find_conflict_holds(record.run, record.tasks, priorities)
        held, bumped, stacked = record.run.held, record.run.bumped, find_stack_waits(record.tasks)
        facts = QueueFacts(
            name, record.tasks, priorities, held, holds, stacked, bumped, active, is_live,
            has_ended=record.run.ended is not None,
        )  # fmt: skip
        return describe_queue(facts)

    async def sync(self, run: str | None = None) -> Sequence[SyncReport]:
        """Synchronize a run with its trackers once: show the states of tasks, and record what people request there.

        The leader of the run performs the requests, or the next `resume`. Raises RefusedError if the run has no
        trackers, or if one fails.
        """
        document = await self._with_trackers(run)
        await self.context.check_writable()
        return await execution.sync_with_trackers(self.context, document)

    async def sync_status(self, run: str | None = None) -> Sequence[TrackerStatus]:
        """Return what is recorded about the trackers of a run, without asking them.

        Raises RefusedError if the run has no trackers.
        """
        return await execution.read_sync_status(self.context, await self._with_trackers(run))

    async def report_forge_change(self) -> Sequence[str]:
        """Let the active runs read their boards and pull requests now; return their ids."""
        live = [run async for run in self.live()]
        if live:
            events = [Event.of(ForgeChanged(run=run)) for run in live]
            await self.context.store.commit(Commit([], events))
        return live

    async def _with_trackers(self, run: str | None) -> RunDocument:
        document = await read_run(self.context.store, await self.find(run))
        if not document.trackers:
            raise RefusedError(f"run {document.id} has no trackers", "add some to the file, and start a new run")
        return document

    async def list(self, *, active: bool = False) -> Sequence[RunReport]:
        """Return the reports of all runs of the project, oldest first.

        With `active`, only those that are running, interrupted or halted, or have ended with waiting tasks, for example
        after a retry. Unreadable runs are skipped: `Council.damage` names the document.
        """
        reports = await RunReader(self.context).all()
        return [report for report in reports if not active or report.status in _ACTIVE or report.has_unfinished_tasks]

    async def live(self, *, follow: bool = False) -> AsyncGenerator[str]:
        """Yield the ids of runs with an active process, oldest first.

        With `follow`, also yields runs that start later.
        """
        store = self.context.store
        position = await store.position()
        known = set()
        for run in await self.ids():
            with suppress(UnreadableDocument):  # commands that name the run report this
                if (await read_run(store, run)).ended is not None:
                    continue
            if await self.has_live_process(run):
                known.add(run)
                yield run
        if follow:
            async for record in self.context.followed_store.watch(position):
                for event in record.events:
                    run = event.data.get("run", "")
                    if event.type == RunLeaderElected.type and run not in known:
                        known.add(run)
                        yield run

    async def events(self, run: str | None = None, *, after: int | None = None) -> AsyncGenerator[RecordedEvent]:
        """Yield the events of a run, live, until it is finished or interrupted.

        By default, `run` is the first run with an event since the council was opened. Events start at the run's
        beginning, or after the log position `after`; pruned ones are omitted.
        """
        if after is None:
            after = 0 if run is not None else self._opened_at
        has_ended = False
        store = self.context.followed_store
        async with aclosing(follow_log(store, after)) as records:
            async for record in records:
                for event in record.events:
                    run = run or event.data.get("run")
                    if run is not None and event.data.get("run") == run:
                        yield RecordedEvent(record.position, record.time, event)
                        has_ended = event.type in _LAST_EVENTS or (has_ended and event.type in _LATER_EVENTS)
                # A resumed run continues with more events.
                if has_ended and record.position >= await store.position():
                    return

    async def _executor(self) -> execution.RunExecutor:
        await self.context.check_writable()
        return execution.RunExecutor(self.context, self._stop)
