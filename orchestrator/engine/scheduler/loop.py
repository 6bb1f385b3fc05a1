"""The run loop of one orchestrator: choose tasks, start them, apply outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import anyio
from anyio.abc import TaskGroup

from orchestrator.domain.events.runs import RunTargetUnreachable, RunWaiting
from orchestrator.domain.runs.model import AdapterDocument, HaltCause
from orchestrator.domain.runs.statuses import SUCCESS_STATUSES, TaskStatus
from orchestrator.domain.scheduling.dispatch import DispatchBoard
from orchestrator.engine.attaching import AttachedTask
from orchestrator.engine.checks.base_checks import BaseChecks
from orchestrator.engine.checks.base_commands import BaseCommands
from orchestrator.engine.checks.check_runs import CheckRuns
from orchestrator.engine.landing.conflict_prediction import ConflictPredictor
from orchestrator.engine.landing.merge_queue import MergeQueue
from orchestrator.engine.landing.repository_guard import RepositoryGuard
from orchestrator.engine.phases.base_selection import BaseSelector
from orchestrator.engine.phases.completion import PhaseHandlers
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.active_attempts import ActiveAttempt, AttemptEnd
from orchestrator.engine.scheduler.attempt_results import AttemptRecorder
from orchestrator.engine.scheduler.attempts import AttemptPreparer, AttemptRunner
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.capacity import Capacity
from orchestrator.engine.scheduler.landing_loop import LandingLoop
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.monitor import Monitor
from orchestrator.engine.scheduler.new_tasks import NewTaskFollower
from orchestrator.engine.scheduler.peers import PeerSync
from orchestrator.engine.scheduler.pull_requests import PullRequestFollower
from orchestrator.engine.scheduler.requests import cancel_task
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import GitError
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.system import process
from orchestrator.system.failpoints import failpoint

#: The statuses of tasks that a session or a landing is changing.
_WORKING: Final = frozenset({TaskStatus.RUNNING, TaskStatus.CHECKING, TaskStatus.LANDING})


class Scheduler:
    """Starts the tasks that the dispatch board allows, within capacity."""

    def __init__(
        self,
        ledger: Ledger,
        context: RunContext,
        pool: SlotPool,
        board: DispatchBoard,
        capacity: Capacity,
        phase_handlers: PhaseHandlers,
        unavailable_adapters: Mapping[str, str],
    ) -> None:
        """Create a scheduler for a run whose interrupted attempts are queued again.

        `board` reflects the run's documents. `unavailable_adapters`: why only this process can't use an adapter.
        """
        self._unavailable_adapters = unavailable_adapters
        self._ledger, self._context, self._board, self._capacity = ledger, context, board, capacity
        clock = self._clock = context.tools.clock
        self.halted: tuple[HaltCause, str] | None = None
        """The cause of an early stop and the reason for it; None otherwise."""
        budgets = Budgets(ledger, clock, context.accounting, partial(self._halt, HaltCause.BUDGET))
        base_selector = BaseSelector(ledger, context)
        checks = CheckRuns(ledger, context, pool)
        base_commands = BaseCommands(ledger, context, checks)
        self._base_checks = BaseChecks(ledger, context, base_commands, base_selector, board.entries, board.blocked)
        self._merge_queue = MergeQueue(ledger, context, base_commands, base_selector, self._give_up, board)
        self._repository_guard = RepositoryGuard(ledger, context, self._merge_queue)
        self._local = LocalWork(ledger, board, self._merge_queue, clock, unavailable_adapters)
        self._landings = LandingLoop(ledger, context, self._local, capacity)
        proposals = self._merge_queue.pull_requests
        self._follower = None if proposals is None else PullRequestFollower(ledger, proposals, self._local, clock)
        recorder = AttemptRecorder(ledger, context, base_commands, phase_handlers)
        self._attempts = AttemptRunner(ledger, context, pool, budgets, base_selector, phase_handlers, recorder)
        self._preparer = AttemptPreparer(self._local, self._attempts)
        self._peers = PeerSync(ledger, context, pool, self._local, budgets, self._halt, lambda: self._is_start_blocked)
        self._only_lands = False
        self._stopping = False
        self._is_host = ledger.writer.became_leader.is_set()
        """Whether this process was started to lead the run, and waits for machines that can run the remaining tasks."""
        self._last_noted_wait: tuple[Mapping[str, float], Mapping[str, int], Sequence[str], Mapping[str, str]]
        self._last_noted_wait = {}, {}, (), {}
        """What the last `run.waiting` event names: cooling adapters, users, held tasks and machines."""

    def stop(self) -> None:
        """Stop sessions and checks, and start no more of them.

        A move of the target still completes.
        """
        self._stopping = True
        self._base_checks.stop()
        self._merge_queue.stop()
        self._local.stop_sessions()

    def _halt(self, cause: HaltCause, reason: str) -> None:
        """Stop sessions, and start no more of them.

        Built work still lands, because landing uses no budget.
        """
        self.halted = self.halted or (cause, reason)
        self._base_checks.stop()
        self._local.stop_sessions()

    def _give_up(self, reason: str) -> None:
        """Stop all work.

        Called if a check or setup command can't run here, so that no task can be built or landed.
        """
        self.halted = self.halted or (HaltCause.COMMANDS, reason)
        self.stop()

    async def run(
        self,
        adapters: Mapping[str, AdapterDocument],
        *,
        only_lands: bool = False,
        attached: AttachedTask | None = None,
    ) -> bool:
        """Run until no work remains; return False if stopped earlier.

        `adapters` are the states of an earlier leader. With `only_lands`, no session starts; with `attached`, only the
        one of a user, whose work may land.
        """
        self._only_lands = only_lands or attached is not None
        await self._local.restore_adapters(adapters)
        statuses = self._ledger.statuses()
        for queued_status in (TaskStatus.LANDING, TaskStatus.QUEUED):
            self._merge_queue.tasks.add(*_own_tasks(self._ledger, statuses, queued_status))
        async with anyio.create_task_group() as services:
            self._start_services(services)
            async with anyio.create_task_group() as group:
                successful = [task for task, status in statuses.items() if status in SUCCESS_STATUSES]
                group.start_soon(self._landings.remove_homes, successful)
                failure = None if self._only_lands else await self._base_checks.failure()
                if failure is not None:
                    self.halted = self.halted or (HaltCause.BASE, failure)
                    self.stop()
                if attached is not None:
                    attempt = await self._preparer.prepare_attached(attached.task, attached.terminal)
                    self._local.active_attempts[attached.task] = attempt
                    group.start_soon(self._attempt, attempt)
                await self._tick(group)
                while not self._idle():
                    await self._pause()
                    await self._tick(group)
            services.cancel_scope.cancel()
        was_stopped = self._stopping or self.halted is not None or attached is not None
        has_work = any(self._board.remaining_adapters(self._ledger.statuses()))
        has_work = has_work or self._context.find_new_tasks is not None
        if (has_work and was_stopped) or self.find_unavailable():
            return False
        self.halted = None
        await self._repository_guard.compare()
        # Other orchestrators, including the leader, may have exited since the last sweep.
        if not self._ledger.writer.became_leader.is_set() and not await self._ledger.writer.try_to_lead():
            return True
        await self._peers.clean_up_abandoned()
        try:
            await self._merge_queue.outcomes.verify_landings()
        except GitError as error:
            await self._ledger.note(RunTargetUnreachable(reason=str(error)))
        if self._ledger.work is not None:
            await self._ledger.work.remove(self._ledger.statuses())
        return True

    def _start_services(self, services: TaskGroup) -> None:
        self._peers.start(services)
        services.start_soon(process.resume_stopped_programs)
        services.start_soon(_monitor_as_leader, self._ledger)
        if self._follower is not None:
            services.start_soon(self._follower.run)
        if self._ledger.work is not None:
            services.start_soon(self._ledger.work.run, self._ledger.tasks.documents)
        if (find := self._context.find_new_tasks) is not None:
            services.start_soon(NewTaskFollower(self._ledger, find, self._local, self._clock).run)
        if self._context.session_service is not None:
            services.start_soon(self._context.session_service.follow_user_changes)
        if self._ledger.run.merge.on_predicted_conflict != "off":
            attempts = self._local.active_attempts
            predictor = ConflictPredictor(
                self._ledger, self._context, lambda: [attempt.session for attempt in attempts.values()]
            )
            services.start_soon(predictor.run)

    async def _tick(self, group: TaskGroup) -> None:
        if self._stopping:
            return
        now = self._clock.monotonic()
        if self._ledger.run.predicted_conflicts and not self._landings.is_landing:
            self._merge_queue.tasks.is_stalled = self._is_stalled()
        self._landings.tick(group, now)
        starts = self._board.choose_tasks(await self._free(now), now)
        tips: dict[bool, str] = {}
        for task in starts:
            prepared = await self._preparer.prepare(task, tips)
            if isinstance(prepared, TaskUpdate):
                await self._finish(task, prepared)
            if self._is_start_blocked:  # changed while the start point was read
                return
            if isinstance(prepared, ActiveAttempt) and task not in self._local.attached:
                self._local.active_attempts[task] = prepared
                group.start_soon(self._attempt, prepared)
        await self._note_waiting()

    def _is_stalled(self) -> bool:
        """Return whether nothing runs, and no session will start without a landing."""
        if self._is_active() or any(status in _WORKING for status in self._ledger.statuses().values()):
            return False
        return self._is_start_blocked or not self._board.forecast.has_work()

    async def _note_waiting(self) -> None:
        """Record once that the run only waits for adapter cooldowns, approvals or held tasks."""
        if self._is_active() or self._landings.is_pending or self._is_start_blocked or self._local.tasks_elsewhere():
            return
        awaited, users = self._board.forecast.awaited(), self._local.awaiting_user()
        held = tuple(task for task in self._merge_queue.tasks.held if self._merge_queue.tasks.is_held(task))
        missing = await self._find_missing()
        waits = awaited, users, held, missing
        if (not awaited and self._board.forecast.has_work()) or not any(waits) or waits == self._last_noted_wait:
            return
        self._last_noted_wait = waits
        ends = [(await self._ledger.adapters.read(name)).cooldown_until for name in awaited]
        until, adapters = min(filter(None, ends), default=None), sorted(awaited, key=awaited.__getitem__)
        proposed = [task for task in users if self._ledger.task(task).status is TaskStatus.PROPOSED]
        approvals = [task for task in users if task not in proposed]
        await self._ledger.note(
            RunWaiting(
                until=until,
                adapters=adapters,
                approvals=approvals,
                held=held,
                pull_requests=proposed,
                missing=missing,
            )
        )

    def find_unavailable(self) -> dict[str, str]:
        """Return the remaining tasks that this process can't start, with what this machine lacks."""
        disabled, labels = self._board.adapters.disabled, self._board.missing_labels
        lacking = {name: f"the label {label}" for name, label in labels.items()} | {
            name: f"a working {name} ({reason})"
            for name, reason in self._unavailable_adapters.items()
            if disabled.get(name) == reason
        }
        remaining = self._board.remaining_adapters(self._ledger.statuses()) if lacking else ()
        first = {task: next((name for name in names if name in lacking), None) for task, names in remaining}
        return {task: lacking[name] for task, name in first.items() if name is not None}

    async def _find_missing(self) -> dict[str, str]:
        """Return the tasks that no machine of the run can start, with what is missing."""
        missing = self.find_unavailable() if self._is_host else {}
        if missing:
            peers = [one.owner for one in (await self._ledger.orchestrators.peers.all()).values() if one.ended is None]
            me = self._ledger.orchestrators.me.id
            others = [set(peer.labels) for peer in peers if peer.id != me]
            needed = {task: set(self._board.entries[task].labels) for task in missing}
            missing = {task: what for task, what in missing.items() if not any(needed[task] <= one for one in others)}
        return missing

    async def _free(self, now: float) -> int:
        """Return the number of sessions that may start now.

        Zero while the merge queue is full, because more built work would become outdated.
        """
        if self._landings.is_full or self._is_start_blocked or now < self._capacity.paused_until:
            return 0
        return await self._capacity.free(len(self._local.active_attempts))

    @property
    def _is_start_blocked(self) -> bool:
        return self._stopping or self._only_lands or self.halted is not None

    def _is_active(self) -> bool:
        is_followed = self._follower is not None and self._follower.is_busy
        return bool(self._local.active_attempts or self._landings.is_landing or self._peers.is_busy or is_followed)

    def _idle(self) -> bool:
        if self._is_active():
            return False
        if self._stopping:
            return True
        if self._landings.is_pending:
            return False
        # Checked last, because it searches all tasks.
        awaits_user = self._local.awaiting_user() or self._merge_queue.tasks.held or self._local.attached
        follows = self._context.find_new_tasks is not None
        is_open = self._board.forecast.has_work() or self._local.is_waiting_for_peers() or awaits_user or follows
        is_open = is_open or (self._is_host and bool(self.find_unavailable()))
        return self._is_start_blocked or not is_open

    async def _pause(self) -> None:
        times: list[float | None] = []
        if not self._stopping:
            paused_until = self._capacity.paused_until
            starts = None if self._is_start_blocked else self._board.forecast.next_time()
            times.append(paused_until if paused_until > self._clock.monotonic() else starts)
            times += self._landings.next_times()
            times.append(self._capacity.recheck_at)
        await self._local.pause(min((time for time in times if time is not None), default=None))

    async def _attempt(self, attempt: ActiveAttempt) -> None:
        await self._repository_guard.begin(attempt.task)
        end = await self._attempts.perform(attempt)
        await self._repository_guard.end(attempt.task)
        if attempt.task in self._merge_queue.tasks.cancelled:  # perhaps after the end of the attempt was recorded
            await cancel_task(self._ledger, attempt.task)
        # The board is updated last, because then the task may start its next session.
        del self._local.active_attempts[attempt.task]
        self._landings.session_ended()
        if end is None:  # perhaps because another process or run probes its adapter
            self._local.update_adapter(attempt.adapter, await self._ledger.adapters.read(attempt.adapter))
        elif end.adapter is not None:
            self._local.update_adapter(attempt.adapter, end.adapter)
        await self._apply_end(attempt.task, end)
        self._local.wake()

    async def _finish(self, task: str, update: TaskUpdate) -> None:
        """Finish a task that needs no further session."""
        if is_ours := await self._ledger.start(task, update):
            failpoint("phase.finished")
        await self._apply_end(task, AttemptEnd() if is_ours else None)
        self._local.wake()  # dependent tasks may start

    async def _apply_end(self, task: str, end: AttemptEnd | None) -> None:
        """Apply an attempt's end and the current state of its task.

        A request may have changed the task since. `end` is None if another orchestrator owns the task.
        """
        if end is None:
            (self._local.sync_task if self._ledger.is_claimed_elsewhere(task) else self._local.take_over)(task)
            return
        self._local.show(task, end.retry_in)
        match self._ledger.task(task).status:
            case TaskStatus.QUEUED:
                self._merge_queue.add(task)
            case TaskStatus.DONE:
                await self._landings.remove_homes([task])
        await self._capacity.apply_shortage(end.shortage)
        if end.unrunnable is not None:
            self._give_up(end.unrunnable)


def _own_tasks(ledger: Ledger, statuses: Mapping[str, TaskStatus], status: TaskStatus) -> Iterator[str]:
    """Yield the tasks with a status that no other orchestrator has claimed."""
    return (task for task, one in statuses.items() if one is status and not ledger.is_claimed_elsewhere(task))


async def _monitor_as_leader(ledger: Ledger) -> None:
    """Monitor the state store once this orchestrator leads the run."""
    await ledger.writer.became_leader.wait()
    await Monitor(ledger).watch()
