"""The run's loop: look at the board, decide, perform, and feed what came of it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import assert_never

import anyio
from anyio.abc import TaskGroup

from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.lifecycle import Trigger
from orchestrator.domain.runs.model import (
    CLAIMED_STATUSES,
    LANDING_STATUSES,
    SUCCESS_STATUSES,
    AdapterDocument,
    HaltCause,
    TaskStatus,
)
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.runs.retry import Backoff, retry_delay
from orchestrator.domain.scheduling.claims import ClaimVerdict, should_try
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry, choose_tasks
from orchestrator.engine.landing.base_checks import BaseChecks
from orchestrator.engine.landing.base_selection import BaseSelector
from orchestrator.engine.landing.merge_queue import MergeQueue
from orchestrator.engine.landing.repository_guard import RepositoryGuard
from orchestrator.engine.phases.completion import PhaseHandlers
from orchestrator.engine.phases.start import NoPhaseLeft
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.attempts import (
    ActiveAttempt,
    AdapterCoolingDown,
    AdapterDisabled,
    AttemptOutcome,
    AttemptRunner,
    AwaitingApproval,
    ClaimedElsewhere,
    ReadyToLand,
    ResourceShortage,
    RetryAfter,
    RunHalted,
    TaskDone,
    TaskEnded,
)
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.capacity import Capacity
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.monitor import Monitor
from orchestrator.engine.scheduler.peers import PeerSync
from orchestrator.engine.scheduler.requests import cancel_task
from orchestrator.engine.state.ledger import AdapterUpdate, Ledger
from orchestrator.errors import ClaimLost, GitError, HandoffCorrupted, RefusedError, VersionConflict
from orchestrator.locking.merge_permit import MergePermitQueue
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.sessions.setup import adapter_homes

#: Seconds from one push to the next, while there are sessions that may finish meanwhile and fill it.
LANDING_BATCH_WINDOW = 0.25
#: Seconds after which a landing that could not be made is tried again while sessions are at work.
DEFERRED_RETRY_DELAY = 30.0
#: How often, and after how many seconds each, it is tried again when nothing else is left to do: the user may just
#: be in the middle of a commit.
MAX_FINAL_LANDINGS, FINAL_LANDING_DELAY = 3, 1.0
#: How long nothing starts after the machine had not enough of something.
SHORTAGE_BACKOFF = Backoff(initial=1.0, factor=2.0, max=30.0, jitter=False)


class Scheduler:
    """Runs what the board allows, within capacity, until nothing is left that could be done."""

    def __init__(
        self,
        ledger: Ledger,
        workshop: RunContext,
        pool: SlotPool,
        board: DispatchBoard,
        capacity: Capacity,
        monitor: Monitor,
        permits: MergePermitQueue,
        phasing: PhaseHandlers,
        *,
        entries: Mapping[str, DispatchEntry],
        lacking: Mapping[str, str],
        only_lands: bool = False,
    ) -> None:
        """Take a run whose cut-off attempts have been returned; `board` reflects its documents, `entries` its tasks.

        `lacking` has the adapters that are closed for this process alone, each with the reason. One that `only_lands`
        starts no session.
        """
        self._only_lands = only_lands
        self._unavailable_adapters = lacking
        self._ledger, self._context, self._board = ledger, workshop, board
        clock = self._clock = workshop.tools.clock
        self._capacity, self._monitor = capacity, monitor
        self.halted: tuple[HaltCause, str] | None = None
        """What stopped it before its end, and why."""
        self._budgets = Budgets(ledger, clock, workshop.accounting, partial(self._halt, HaltCause.BUDGET))
        self._pool = pool
        self._base_selector = BaseSelector(ledger, workshop)
        self._base_checks = BaseChecks(ledger, workshop, pool, self._base_selector, entries)
        self._phase_starter = phasing.starter
        self._attempts = AttemptRunner(
            ledger, workshop, pool, self._budgets, self._base_selector, self._base_checks, phasing, clock
        )
        cancelled: set[str] = set()
        self._merge_queue = MergeQueue(
            ledger, workshop, pool, clock, permits, cancelled, self._base_checks, self._give_up
        )
        self._repository_guard = RepositoryGuard(ledger, workshop, self._merge_queue)
        self._local = LocalWork(ledger, board, self._merge_queue, clock, cancelled, lacking)
        self._others = PeerSync(
            ledger, workshop, pool, self._local, self._budgets, clock, self._halt, lambda: self._is_start_blocked
        )
        self._deferred_until = 0.0
        self._last_tries = MAX_FINAL_LANDINGS
        self._landing = False
        self._batch_until = 0.0
        self._shortages = 0
        self._paused_until = 0.0
        self._stopping = False
        self._last_noted_wait: tuple[Mapping[str, float], Mapping[str, int]] = {}, {}
        """The parked adapters and the tasks to be approved that were last told to be all that is waited for."""

    async def remember(self, learned: Mapping[str, AdapterDocument]) -> None:
        """Keep the adapters parked that an earlier owner parked; those that it closed are tried again."""
        opened = AdapterUpdate(AdapterDocument(), "adapter.enabled", {})
        for adapter, one in learned.items():
            if one.closed is not None:
                await self._ledger.update_adapter(adapter, lambda known: None if known.closed is None else opened)
            elif one.parked_until is not None:
                self._local.park(adapter, one.parked_until)

    def stop(self) -> None:
        """Start nothing more and stop sessions and checks; a move of the target is brought to its end."""
        self._stopping = True
        self._base_checks.stop()
        self._merge_queue.stop()
        self._local.stop_sessions()

    def _halt(self, by: HaltCause, reason: str) -> None:
        """Start nothing more and stop sessions; what is built lands, which costs nothing of a budget."""
        self.halted = self.halted or (by, reason)
        self._base_checks.stop()
        self._local.stop_sessions()

    def _give_up(self, reason: str) -> None:
        """Stop all work: a command of checks or setup can't be run here, so that nothing can be built or landed."""
        self.halted = self.halted or (HaltCause.COMMANDS, reason)
        self.stop()

    async def run(self) -> bool:
        """Work until nothing is left that could be done; False if it was stopped before that."""
        statuses = self._ledger.statuses()
        for wanted in (TaskStatus.LANDING, TaskStatus.QUEUED):
            ours = (task for task, status in statuses.items() if status is wanted and task not in self._local.elsewhere)
            self._merge_queue.waiting.extend(ours)
        async with anyio.create_task_group() as listening:
            listening.start_soon(self._others.follow)
            listening.start_soon(self._others.handle_requests)
            listening.start_soon(self._run_monitor_as_leader)
            if self._context.session_service is not None:
                listening.start_soon(self._context.session_service.follow_lock_breaks)
            listening.start_soon(self._others.renew)
            listening.start_soon(self._others.sweep)
            listening.start_soon(self._others.detect_dead_peers)
            async with anyio.create_task_group() as group:
                over = [task for task, status in statuses.items() if status in SUCCESS_STATUSES]
                group.start_soon(self._remove_homes, over)
                failure = None if self._only_lands else await self._base_checks.failure()
                if failure is not None:
                    self.halted = self.halted or (HaltCause.BASE, failure)
                    self.stop()
                await self._tick(group)
                while not self._idle():
                    await self._pause()
                    await self._tick(group)
            listening.cancel_scope.cancel()
        is_over = self._board.is_over(self._ledger.statuses())
        was_stopped = self._stopping or self.halted is not None
        if not is_over and (was_stopped or self._is_unavailable_work_left()):
            return False
        self.halted = None
        await self._repository_guard.look()
        # Whoever coordinated may be gone since it was last looked, and the others as far as this one.
        if not self._ledger.became_leader.is_set() and not await self._ledger.try_to_lead():
            return True
        await self._others.clean_up_abandoned()
        try:
            await self._merge_queue.verify()
        except GitError as error:
            await self._ledger.note("run.target_unreachable", {"reason": str(error)})
        return True

    def _is_unavailable_work_left(self) -> bool:
        """Whether another process could do what this one can't: then the run's end is not this one's to record."""
        lacking = {name for name, why in self._unavailable_adapters.items() if self._board.closed.get(name) == why}
        return any(lacking.intersection(adapters) for adapters in self._board.left(self._ledger.statuses()))

    async def _tick(self, group: TaskGroup) -> None:
        if self._stopping:
            return
        now = self._clock.monotonic()
        if self._local.deferred and now >= self._deferred_until:
            if not self._local.active_attempts:
                self._last_tries -= 1
            self._merge_queue.waiting.extendleft(reversed(self._local.deferred))
            self._local.deferred.clear()
        if not self._landing and self._may_land(now):
            self._landing = True
            group.start_soon(self._land, group)
        starts = choose_tasks(self._board, await self._free(now), now)
        tips: dict[bool, str] = {}
        for task in starts:
            work = await self._prepare(task, tips)
            if self._is_start_blocked:  # while we asked where to start from
                return
            if work is not None:
                self._local.active_attempts[task] = work
                group.start_soon(self._attempt, work)
        await self._note_waiting()

    async def _prepare(self, task: str, tips: dict[bool, str]) -> ActiveAttempt | None:
        """Return the next attempt of a task that is to start; None where it may not any more."""
        spec = await self._ledger.spec(task)
        if self._budgets.is_halted():
            return None
        if (merged := self._ledger.run.merges) is not None:  # its work is built already
            reason = f"a merge run starts no session: `council merge {merged}` merges again"
            await self._refuse(task, Failed(FailureClass.INVALID, reason))
            return None
        if self._local.has_open_parts(task):  # which its plan became elsewhere
            await self._ledger.learn_tasks()
            self._local.wait(task)
            self._local.wake()
            return None
        obstacle = self._budgets.find_obstacle(task, spec) or await self._check_retry_limit(task)
        if obstacle is not None:
            await self._refuse(task, obstacle)
            return None
        try:
            turn = await self._phase_starter.turn(task, spec)
            if isinstance(turn, NoPhaseLeft):
                await self._apply_outcome(task, await self._attempts.rest(task, turn))
                self._local.wake()  # what needs it may start
                return None
            start = await self._base_selector.of(task, spec, turn, tips)
            if not self._board.is_running(task):  # it was cancelled meanwhile
                return None
            return await self._attempts.prepare(task, spec, turn, self._board.adapter_of(task), start)
        except (
            RefusedError,
            HandoffCorrupted,
        ) as error:  # a template, a condition, or what was handed over is at fault
            await self._refuse(task, Failed(FailureClass.INVALID, str(error)))
            return None

    async def _check_retry_limit(self, task: str) -> Failed | None:
        """Return why a task may not be tried again: its own attempts and those that were taken over were too many."""
        claims, timing = self._ledger.claims, self._ledger.orchestrators.timing
        if claims is None:
            return None
        claim = await claims.read(task)
        if claim is None or should_try(claim, None, timing, ignored=None) is not ClaimVerdict.TRIED_OUT:
            return None
        reason = f"it was tried {claim.retries + 1} times, some of them by orchestrators that were gone before its end"
        return Failed(FailureClass.CRASHED, f"{reason}: see to those, then `council retry {task}`")

    async def _note_waiting(self) -> None:
        """Say once that nothing is left to do but to wait for adapters that are parked, and for people."""
        if self._is_active() or self._has_pending_landings() or self._local.elsewhere or self._is_start_blocked:
            return
        awaited, asked = self._board.awaited(), self._awaiting_approval()
        if (
            (not awaited and self._board.has_work())
            or not (awaited or asked)
            or (awaited, asked) == self._last_noted_wait
        ):
            return
        self._last_noted_wait = awaited, asked
        ends = [(await self._ledger.adapter(name)).parked_until for name in awaited]
        facts = {"until": min(filter(None, ends), default=None), "adapters": sorted(awaited, key=awaited.__getitem__)}
        await self._ledger.note("run.waiting", {**facts, "approvals": list(asked)})

    async def _refuse(self, task: str, why: Failed) -> None:
        """End a task that may have no further session."""
        facts = {"outcome": why.failure, "reason": why.reason}
        try:
            await self._ledger.change(task, Trigger.FAIL, facts, reason=why.reason, refused=why.failure)
        except (ClaimLost, VersionConflict):  # another orchestrator was quicker
            await self._ledger.refresh(task)
            self._local.sync_task(task)
        else:
            self._board.ended(task)
        self._local.wake()

    def _may_land(self, now: float) -> bool:
        """Whether to land what waits now, rather than a little later with what sessions are just about to bring."""
        waiting = len(self._merge_queue.waiting)
        is_full = waiting >= self._capacity.sessions or not self._local.active_attempts
        return waiting > 0 and (is_full or now >= self._batch_until)

    async def _free(self, now: float) -> int:
        """How many sessions may start. None while more is built than can be landed: it would only grow stale."""
        is_full = len(self._merge_queue.waiting) >= self._capacity.sessions
        if is_full or now < self._paused_until or self._is_start_blocked:
            return 0
        return await self._capacity.free(len(self._local.active_attempts))

    @property
    def _is_start_blocked(self) -> bool:
        return self._stopping or self._only_lands or self.halted is not None

    def _is_active(self) -> bool:
        return bool(self._local.active_attempts or self._landing or self._others.is_busy)

    def _has_pending_landings(self) -> bool:
        return bool(self._merge_queue.waiting or (self._local.deferred and self._last_tries > 0))

    def _awaiting_approval(self) -> dict[str, int]:
        """Return the tasks that wait for a person, each with the number of the phases that it was at."""
        statuses = self._ledger.statuses().items()
        return {task: len(self._ledger.task(task).phases) for task, status in statuses if status is TaskStatus.WAITING}

    def _idle(self) -> bool:
        if self._is_active():
            return False
        if self._stopping:
            return True
        if self._has_pending_landings():
            return False
        # Asked last: who waits for a person is looked for among all tasks.
        is_open = self._board.has_work() or self._is_waiting_for_peers() or self._awaiting_approval()
        return self._is_start_blocked or not is_open

    def _is_waiting_for_peers(self) -> bool:
        """Whether tasks of others may bring more work: not where theirs and ours all wait for the target."""
        statuses = self._ledger.statuses()
        are_built = all(statuses[task] in LANDING_STATUSES for task in self._local.elsewhere)
        return bool(self._local.elsewhere) and not (self._local.deferred and are_built)

    async def _pause(self) -> None:
        times: list[float | None] = []
        if not self._stopping:
            is_paused = self._paused_until > self._clock.monotonic()
            starts = None if self._is_start_blocked else self._board.next_time()
            times.append(self._paused_until if is_paused else starts)
            times.append(self._deferred_until if self._local.deferred else None)
            times.append(self._batch_until if self._merge_queue.waiting and not self._landing else None)
            times.append(self._capacity.recheck_at)
        await self._local.pause(min((time for time in times if time is not None), default=None))

    async def _attempt(self, work: ActiveAttempt) -> None:
        await self._repository_guard.begin(work.task)
        after = await self._attempts.perform(work)
        await self._repository_guard.end(work.task)
        if work.task in self._local.cancelled:  # perhaps only since the attempt's end was recorded
            await cancel_task(self._ledger, work.task)
        # The board hears of it last: from then on the task may have its next session.
        del self._local.active_attempts[work.task]
        if not self._local.active_attempts:  # nothing else is at work that the wait for the user could be hidden behind
            self._deferred_until = min(self._deferred_until, self._clock.monotonic() + FINAL_LANDING_DELAY)
        await self._apply_outcome(work.task, after)
        self._local.wake()

    async def _apply_outcome(self, task: str, after: AttemptOutcome | ClaimedElsewhere) -> None:
        if isinstance(after, ClaimedElsewhere):
            (self._local.sync_task if self._ledger.is_claimed_elsewhere(task) else self._local.take_over)(task)
            return
        self._shortages = self._shortages if isinstance(after, ResourceShortage) else 0
        match after:
            case ReadyToLand():
                self._board.built(task)
                self._merge_queue.waiting.append(task)
            case TaskDone():
                self._local.show(task, 0.0)
                await self._remove_homes([task])
            case TaskEnded() | AwaitingApproval():
                self._local.show(task, 0.0)
            case RetryAfter(delay):
                self._local.wait(task, delay or 0.0)
            case AdapterCoolingDown(adapter, until):
                self._local.park(adapter, until)
                self._local.wait(task)
            case AdapterDisabled(adapter, reason):
                self._board.close(adapter, reason)
                self._local.wait(task)
            case ResourceShortage(reason):
                self._local.wait(task)
                await self._pause_starts(reason)
            case RunHalted(reason):
                self._local.wait(task)
                self._give_up(reason)
            case _:
                assert_never(after)
        self._apply_late_request(task)

    async def _pause_starts(self, reason: str) -> None:
        """Start nothing for a while: the machine has not enough of something."""
        if self._paused_until > self._clock.monotonic():  # another session has met the same
            return
        self._shortages += 1
        pause = retry_delay(SHORTAGE_BACKOFF, self._shortages)
        self._paused_until = self._clock.monotonic() + pause
        await self._ledger.note("run.paused", {"reason": reason, "retry_in": pause})

    def _apply_late_request(self, task: str) -> None:
        match self._ledger.task(task).status:  # a person may have asked for something since the end was recorded
            case TaskStatus.CANCELLED:
                self._local.drop(task)
            case TaskStatus.PENDING:
                self._board.revive(task)

    async def _land(self, group: TaskGroup) -> None:
        for task in await self._merge_queue.land():
            await self._apply_landing(task)
            if self._ledger.task(task).status is TaskStatus.LANDED:
                group.start_soon(self._remove_homes, [task])
        self._batch_until = self._clock.monotonic() + LANDING_BATCH_WINDOW
        self._landing = False
        self._local.wake()

    async def _remove_homes(self, tasks: Sequence[str]) -> None:
        """Remove the homes of tasks that have landed or are done: nobody goes on with them."""
        await adapter_homes.remove_homes(self._context.tools.logs, tasks, self._context.tools.environ)

    async def _apply_landing(self, task: str) -> None:
        status = self._ledger.task(task).status
        if task in self._local.cancelled and status in {TaskStatus.QUEUED, TaskStatus.CHECKING}:
            await cancel_task(self._ledger, task)
            status = TaskStatus.CANCELLED
        if status not in CLAIMED_STATUSES:
            self._local.show(task, 0.0)
            return
        pause = DEFERRED_RETRY_DELAY if self._local.active_attempts else FINAL_LANDING_DELAY
        if not self._local.deferred or not self._local.active_attempts:
            self._deferred_until = self._clock.monotonic() + pause
        self._local.deferred.append(task)

    async def _run_monitor_as_leader(self) -> None:
        """Look after the state, once this is the run's coordinator."""
        await self._ledger.became_leader.wait()
        await self._monitor.watch()
