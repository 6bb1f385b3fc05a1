"""Run loop of one orchestrator: choose tasks from the board, start them, apply outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import anyio
from anyio.abc import TaskGroup

from orchestrator.domain.events.runs import AdapterEnabled, RunPaused, RunTargetUnreachable, RunWaiting
from orchestrator.domain.events.tasks import TaskFailed
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.model import AdapterDocument, HaltCause
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.runs.retry import Backoff, retry_delay
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES, LANDING_STATUSES, SUCCESS_STATUSES, TaskStatus, Trigger
from orchestrator.domain.scheduling.claims import ClaimVerdict, should_try
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry, choose_tasks
from orchestrator.engine.landing.base_checks import BaseChecks
from orchestrator.engine.landing.base_selection import BaseSelector
from orchestrator.engine.landing.merge_queue import MergeQueue
from orchestrator.engine.landing.repository_guard import RepositoryGuard
from orchestrator.engine.phases.completion import PhaseHandlers
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.attempts import ActiveAttempt, AttemptEnd, AttemptRunner
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.capacity import Capacity
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.monitor import Monitor
from orchestrator.engine.scheduler.peers import PeerSync
from orchestrator.engine.scheduler.requests import cancel_task
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.run_state import AdapterUpdate
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import ClaimLost, GitError, HandoffCorrupted, RefusedError, VersionConflict
from orchestrator.locking.merge_permit import MergePermitQueue
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.sessions.setup import adapter_homes
from orchestrator.system import process

#: Seconds between pushes while active sessions may still finish and join the next push.
LANDING_BATCH_WINDOW = 0.25
#: Seconds before a deferred landing is retried while sessions are active.
DEFERRED_RETRY_DELAY = 30.0
#: Number of retries, and the seconds before each, when nothing else is left to do: the user may be in the middle of a
#: commit.
MAX_FINAL_LANDINGS, FINAL_LANDING_DELAY = 3, 1.0
#: How long no session starts after a resource shortage.
SHORTAGE_BACKOFF = Backoff(initial=1.0, factor=2.0, max=30.0, jitter=False)


class Scheduler:
    """Starts the tasks that the dispatch board allows, within capacity."""

    def __init__(
        self,
        ledger: Ledger,
        context: RunContext,
        pool: SlotPool,
        board: DispatchBoard,
        capacity: Capacity,
        monitor: Monitor,
        permits: MergePermitQueue,
        phase_handlers: PhaseHandlers,
        *,
        entries: Mapping[str, DispatchEntry],
        unavailable_adapters: Mapping[str, str],
        only_lands: bool = False,
    ) -> None:
        """Create a scheduler for a run whose interrupted attempts are back in the queue.

        `board` reflects the documents of the run, `entries` its tasks. `unavailable_adapters` maps each adapter that
        only this process cannot use to the reason. With `only_lands`, no session starts.
        """
        self._only_lands = only_lands
        self._unavailable_adapters = unavailable_adapters
        self._ledger, self._context, self._board = ledger, context, board
        clock = self._clock = context.tools.clock
        self._capacity, self._monitor = capacity, monitor
        self.halted: tuple[HaltCause, str] | None = None
        """The cause and the reason of an early stop; None otherwise."""
        self._budgets = Budgets(ledger, clock, context.accounting, partial(self._halt, HaltCause.BUDGET))
        self._pool = pool
        self._base_selector = BaseSelector(ledger, context)
        self._base_checks = BaseChecks(ledger, context, pool, self._base_selector, entries)
        self._phase_starter = phase_handlers.starter
        self._attempts = AttemptRunner(
            ledger, context, pool, self._budgets, self._base_selector, self._base_checks, phase_handlers, clock
        )
        self._merge_queue = MergeQueue(ledger, context, pool, permits, self._base_checks, self._give_up)
        self._repository_guard = RepositoryGuard(ledger, context, self._merge_queue)
        self._local = LocalWork(ledger, board, self._merge_queue, clock, unavailable_adapters)
        self._peers = PeerSync(
            ledger, context, pool, self._local, self._budgets, self._halt, lambda: self._is_start_blocked
        )
        self._deferred_until = 0.0
        self._final_tries_left = MAX_FINAL_LANDINGS
        self._landing = False
        self._batch_until = 0.0
        self._shortages = 0
        self._paused_until = 0.0
        self._stopping = False
        self._last_noted_wait: tuple[Mapping[str, float], Mapping[str, int]] = {}, {}
        """The cooling adapters and waiting approvals of the last `run.waiting` event."""

    async def remember(self, documents: Mapping[str, AdapterDocument]) -> None:
        """Restore the adapter cooldowns of an earlier leader.

        Enable the adapters that it disabled.
        """
        enabled = AdapterUpdate(AdapterDocument(), AdapterEnabled())
        for adapter, document in documents.items():
            if document.disabled_reason is not None:
                await self._ledger.adapters.update(
                    adapter, lambda current: None if current.disabled_reason is None else enabled
                )
            elif document.cooldown_until is not None:
                self._local.cool_down(adapter, document.cooldown_until)

    def stop(self) -> None:
        """Start nothing more and stop sessions and checks.

        A move of the target still completes.
        """
        self._stopping = True
        self._base_checks.stop()
        self._merge_queue.stop()
        self._local.stop_sessions()

    def _halt(self, by: HaltCause, reason: str) -> None:
        """Start nothing more and stop sessions.

        Built work still lands, because that costs no budget.
        """
        self.halted = self.halted or (by, reason)
        self._base_checks.stop()
        self._local.stop_sessions()

    def _give_up(self, reason: str) -> None:
        """Stop all work.

        A check or setup command cannot run here, so no task can be built or landed.
        """
        self.halted = self.halted or (HaltCause.COMMANDS, reason)
        self.stop()

    async def run(self) -> bool:
        """Work until nothing is left to do; return False if stopped earlier."""
        statuses = self._ledger.statuses()
        for queued_status in (TaskStatus.LANDING, TaskStatus.QUEUED):
            own_tasks = (
                task
                for task, status in statuses.items()
                if status is queued_status and not self._ledger.is_claimed_elsewhere(task)
            )
            self._merge_queue.waiting.extend(own_tasks)
        async with anyio.create_task_group() as services:
            services.start_soon(self._peers.follow)
            services.start_soon(self._peers.requests.run)
            services.start_soon(self._run_monitor_as_leader)
            if self._context.session_service is not None:
                services.start_soon(self._context.session_service.follow_lock_breaks)
            services.start_soon(self._peers.renew)
            services.start_soon(self._peers.sweep)
            services.start_soon(self._peers.detect_dead_peers)
            services.start_soon(process.resume_stopped_programs)
            async with anyio.create_task_group() as group:
                successful = [task for task, status in statuses.items() if status in SUCCESS_STATUSES]
                group.start_soon(self._remove_homes, successful)
                failure = None if self._only_lands else await self._base_checks.failure()
                if failure is not None:
                    self.halted = self.halted or (HaltCause.BASE, failure)
                    self.stop()
                await self._tick(group)
                while not self._idle():
                    await self._pause()
                    await self._tick(group)
            services.cancel_scope.cancel()
        is_over = self._board.is_over(self._ledger.statuses())
        was_stopped = self._stopping or self.halted is not None
        if not is_over and (was_stopped or self._is_unavailable_work_left()):
            return False
        self.halted = None
        await self._repository_guard.compare()
        # The leader, and any other orchestrator, may have exited since the last sweep.
        if not self._ledger.writer.became_leader.is_set() and not await self._ledger.writer.try_to_lead():
            return True
        await self._peers.clean_up_abandoned()
        try:
            await self._merge_queue.verify()
        except GitError as error:
            await self._ledger.note(RunTargetUnreachable(reason=str(error)))
        return True

    def _is_unavailable_work_left(self) -> bool:
        """Return True if another process could run tasks that this one cannot.

        This process then does not record the end of the run.
        """
        unavailable = {
            name for name, reason in self._unavailable_adapters.items() if self._board.closed.get(name) == reason
        }
        return any(unavailable.intersection(adapters) for adapters in self._board.left(self._ledger.statuses()))

    async def _tick(self, group: TaskGroup) -> None:
        if self._stopping:
            return
        now = self._clock.monotonic()
        if self._merge_queue.deferred and now >= self._deferred_until:
            if not self._local.active_attempts:
                self._final_tries_left -= 1
            self._merge_queue.waiting.extendleft(reversed(self._merge_queue.deferred))
            self._merge_queue.deferred.clear()
        if not self._landing and self._may_land(now):
            self._landing = True
            group.start_soon(self._land, group)
        starts = choose_tasks(self._board, await self._free(now), now)
        tips: dict[bool, str] = {}
        for task in starts:
            attempt = await self._prepare(task, tips)
            if self._is_start_blocked:  # it changed while the start point was read
                return
            if attempt is not None:
                self._local.active_attempts[task] = attempt
                group.start_soon(self._attempt, attempt)
        await self._note_waiting()

    async def _prepare(self, task: str, tips: dict[bool, str]) -> ActiveAttempt | None:
        """Return the next attempt of a task; None if the task may no longer start."""
        spec = await self._ledger.definitions.spec(task)
        if self._budgets.is_halted():
            return None
        if (merged := self._ledger.run.merges) is not None:  # its work is built already
            reason = f"a merge run starts no session: `council merge {merged}` merges again"
            await self._refuse(task, Failed(FailureClass.INVALID, reason))
            return None
        if self._local.has_open_subtasks(task):  # subtasks that another process created
            await self._ledger.tasks.load_new()
            self._local.show(task)
            self._local.wake()
            return None
        obstacle = self._budgets.find_obstacle(task, spec) or await self._check_retry_limit(task)
        if obstacle is not None:
            await self._refuse(task, obstacle)
            return None
        try:
            next_phase = await self._phase_starter.next_phase(task, spec)
            if isinstance(next_phase, TaskUpdate):
                await self._apply_end(task, AttemptEnd() if await self._attempts.finish(task, next_phase) else None)
                self._local.wake()  # dependent tasks may start
                return None
            next_phase = await self._base_selector.select(task, spec, next_phase, tips)
            if not self._board.is_running(task):  # cancelled in the meantime
                return None
            return await self._attempts.prepare(task, spec, next_phase, self._board.adapter_of(task))
        except (
            RefusedError,
            HandoffCorrupted,
        ) as error:  # an invalid template, condition or handoff
            await self._refuse(task, Failed(FailureClass.INVALID, str(error)))
            return None

    async def _check_retry_limit(self, task: str) -> Failed | None:
        """Return why a task has no retries left, counting its own attempts and takeovers."""
        claims, timing = self._ledger.claims, self._ledger.orchestrators.timing
        if claims is None:
            return None
        claim = await claims.read(task)
        if claim is None or should_try(claim, None, timing, ignored=None) is not ClaimVerdict.TRIED_OUT:
            return None
        reason = f"tried {claim.retries + 1} times, some of them by orchestrators that exited before its end"
        return Failed(FailureClass.CRASHED, f"{reason}: find out why they exited, then `council retry {task}`")

    async def _note_waiting(self) -> None:
        """Record once that the run only waits for adapters that cool down, or for people."""
        if self._is_active() or self._has_pending_landings() or self._is_start_blocked or self._local.tasks_elsewhere():
            return
        awaited, approvals = self._board.awaited(), self._awaiting_approval()
        if (
            (not awaited and self._board.has_work())
            or not (awaited or approvals)
            or (awaited, approvals) == self._last_noted_wait
        ):
            return
        self._last_noted_wait = awaited, approvals
        ends = [(await self._ledger.adapters.read(name)).cooldown_until for name in awaited]
        until, adapters = min(filter(None, ends), default=None), sorted(awaited, key=awaited.__getitem__)
        await self._ledger.note(RunWaiting(until=until, adapters=adapters, approvals=list(approvals)))

    async def _refuse(self, task: str, failure: Failed) -> None:
        """Fail a task that may have no further session."""
        failed = TaskFailed(outcome=failure.failure, reason=failure.reason)
        try:
            await self._ledger.change(task, Trigger.FAIL, failed, reason=failure.reason, refused=failure.failure)
        except (ClaimLost, VersionConflict):  # another orchestrator was first
            await self._ledger.tasks.refresh(task)
            self._local.sync_task(task)
        else:
            self._board.ended(task)
        self._local.wake()

    def _may_land(self, now: float) -> bool:
        """Return True if the queue should land now.

        Otherwise it waits briefly for sessions that are about to finish.
        """
        waiting = len(self._merge_queue.waiting)
        is_full = waiting >= self._capacity.sessions or not self._local.active_attempts
        return waiting > 0 and (is_full or now >= self._batch_until)

    async def _free(self, now: float) -> int:
        """Return how many sessions may start now.

        Zero while the queue to land is full: more built work would only become stale.
        """
        is_full = len(self._merge_queue.waiting) >= self._capacity.sessions
        if is_full or now < self._paused_until or self._is_start_blocked:
            return 0
        return await self._capacity.free(len(self._local.active_attempts))

    @property
    def _is_start_blocked(self) -> bool:
        return self._stopping or self._only_lands or self.halted is not None

    def _is_active(self) -> bool:
        return bool(self._local.active_attempts or self._landing or self._peers.is_busy)

    def _has_pending_landings(self) -> bool:
        return bool(self._merge_queue.waiting or (self._merge_queue.deferred and self._final_tries_left > 0))

    def _awaiting_approval(self) -> dict[str, int]:
        """Map each task that waits for approval to the number of its phase visits."""
        statuses = self._ledger.statuses().items()
        return {
            task: len(self._ledger.task(task).phases)
            for task, status in statuses
            if status is TaskStatus.AWAITING_APPROVAL
        }

    def _idle(self) -> bool:
        if self._is_active():
            return False
        if self._stopping:
            return True
        if self._has_pending_landings():
            return False
        # Last, because it searches all tasks.
        is_open = self._board.has_work() or self._is_waiting_for_peers() or self._awaiting_approval()
        return self._is_start_blocked or not is_open

    def _is_waiting_for_peers(self) -> bool:
        """Return True if tasks of other orchestrators may still create work.

        False if theirs and ours all wait for the target.
        """
        statuses = self._ledger.statuses()
        elsewhere = self._local.tasks_elsewhere()
        are_built = all(statuses[task] in LANDING_STATUSES for task in elsewhere)
        return bool(elsewhere) and not (self._merge_queue.deferred and are_built)

    async def _pause(self) -> None:
        times: list[float | None] = []
        if not self._stopping:
            is_paused = self._paused_until > self._clock.monotonic()
            starts = None if self._is_start_blocked else self._board.next_time()
            times.append(self._paused_until if is_paused else starts)
            times.append(self._deferred_until if self._merge_queue.deferred else None)
            times.append(self._batch_until if self._merge_queue.waiting and not self._landing else None)
            times.append(self._capacity.recheck_at)
        await self._local.pause(min((time for time in times if time is not None), default=None))

    async def _attempt(self, attempt: ActiveAttempt) -> None:
        await self._repository_guard.begin(attempt.task)
        end = await self._attempts.perform(attempt)
        await self._repository_guard.end(attempt.task)
        if attempt.task in self._merge_queue.cancelled:  # perhaps after the end of the attempt was recorded
            await cancel_task(self._ledger, attempt.task)
        # The board is updated last: from then on the task may start its next session.
        del self._local.active_attempts[attempt.task]
        if not self._local.active_attempts:  # no session is left to hide the wait for the user behind
            self._deferred_until = min(self._deferred_until, self._clock.monotonic() + FINAL_LANDING_DELAY)
        if end is not None and end.adapter is not None:
            self._local.update_adapter(attempt.adapter, end.adapter)
        await self._apply_end(attempt.task, end)
        self._local.wake()

    async def _apply_end(self, task: str, end: AttemptEnd | None) -> None:
        """Apply the end of an attempt, and the state that its task has now: a request may have changed it since.

        Without an end, another orchestrator owns the task.
        """
        if end is None:
            (self._local.sync_task if self._ledger.is_claimed_elsewhere(task) else self._local.take_over)(task)
            return
        self._shortages = self._shortages if end.shortage is not None else 0
        self._local.show(task, end.retry_in)
        match self._ledger.task(task).status:
            case TaskStatus.QUEUED:
                self._merge_queue.waiting.append(task)
            case TaskStatus.DONE:
                await self._remove_homes([task])
        if end.shortage is not None:
            await self._pause_starts(end.shortage)
        if end.unrunnable is not None:
            self._give_up(end.unrunnable)

    async def _pause_starts(self, reason: str) -> None:
        """Start nothing for a while, because the machine is short of a resource."""
        if self._paused_until > self._clock.monotonic():  # another session reported the same shortage
            return
        self._shortages += 1
        pause = retry_delay(SHORTAGE_BACKOFF, self._shortages)
        self._paused_until = self._clock.monotonic() + pause
        await self._ledger.note(RunPaused(reason=reason, retry_in=pause))

    async def _land(self, group: TaskGroup) -> None:
        for task in await self._merge_queue.land():
            await self._apply_landing(task)
            if self._ledger.task(task).status is TaskStatus.LANDED:
                group.start_soon(self._remove_homes, [task])
        self._batch_until = self._clock.monotonic() + LANDING_BATCH_WINDOW
        self._landing = False
        self._local.wake()

    async def _remove_homes(self, tasks: Sequence[str]) -> None:
        """Delete the adapter homes of tasks that landed or are done: nothing resumes them."""
        await adapter_homes.remove_homes(self._context.tools.logs, tasks, self._context.tools.environ)

    async def _apply_landing(self, task: str) -> None:
        status = self._ledger.task(task).status
        if task in self._merge_queue.cancelled and status in {TaskStatus.QUEUED, TaskStatus.CHECKING}:
            await cancel_task(self._ledger, task)
            status = TaskStatus.CANCELLED
        if status not in CLAIMED_STATUSES:
            self._local.show(task)
            return
        pause = DEFERRED_RETRY_DELAY if self._local.active_attempts else FINAL_LANDING_DELAY
        if not self._merge_queue.deferred or not self._local.active_attempts:
            self._deferred_until = self._clock.monotonic() + pause
        self._merge_queue.deferred.append(task)

    async def _run_monitor_as_leader(self) -> None:
        """Watch the state store once this orchestrator leads the run."""
        await self._ledger.writer.became_leader.wait()
        await self._monitor.watch()
