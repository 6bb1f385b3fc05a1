"""What a process does about the others in a run: it follows what they do, stands in for who is gone, and is asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import anyio

from orchestrator.domain.runs.model import (
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    HaltCause,
    RequestAction,
    RunRequest,
    TaskStatus,
)
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.reconciliation import Reconciler
from orchestrator.engine.scheduler.recovery import remove_abandoned, take_over_tasks
from orchestrator.engine.scheduler.requests import (
    approve_phase,
    cancel_task,
    parts_to_cancel,
    record_ignored,
    reject_phase,
    retry_task,
)
from orchestrator.engine.state.ledger import ExternalChange, Ledger
from orchestrator.errors import StoreUnavailable
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds that a session which was told to stop, or a landing, gets to be over, and between two looks whether it is.
_STOP_TIMEOUT: Final = 60.0
_POLL_INTERVAL: Final = 0.05
#: Seconds between two looks at the locks of this machine's orchestrators.
LIVENESS_INTERVAL: Final = 0.5


class PeerSync:
    """Enters what others do into what this process has in hand, beside the scheduler."""

    def __init__(
        self,
        ledger: Ledger,
        workshop: RunContext,
        pool: SlotPool,
        hand: LocalWork,
        budgets: Budgets,
        clock: Clock,
        halt: Callable[[HaltCause, str], None],
        is_ending: Callable[[], bool],
    ) -> None:
        """Call `halt` with the reason where the run was stopped; take nothing over once it `is_ending`."""
        self._ledger, self._context, self._pool, self._local = ledger, workshop, pool, hand
        self._budgets, self._clock = budgets, clock
        self._halt, self._is_ending = halt, is_ending
        self._reconciler = Reconciler(ledger, workshop)
        self._asked: deque[RunRequest] = deque()
        """What is yet to be done of what was asked for, in its order."""
        self._is_asked = anyio.Event()
        self._is_sweeping = False
        self._sweep_due = anyio.Event()
        """Set to have the next sweep at once."""

    @property
    def is_busy(self) -> bool:
        """Whether something is being done for others, of which more work may come."""
        return self._is_sweeping or bool(self._asked)

    async def follow(self) -> None:
        """Keep up with what other orchestrators do, and hear what is asked of this one."""
        async for change in self._ledger.changes():
            # What is half done would leave the board and the documents apart.
            with anyio.CancelScope(shield=True):
                await self._apply_change(change)

    async def _apply_change(self, change: ExternalChange) -> None:
        if change.request is not None:
            if self._ledger.became_leader.is_set():
                self._enqueue_request(change.request)
            return
        if change.halted is not None:
            self._halt(*change.halted)
        if change.adapter is not None:
            # The newest: this process may have learned more since, and heeded it.
            self._local.update_adapter(change.adapter, await self._ledger.adapter(change.adapter))
        if change.has_new_tasks:
            self._local.add_planned_tasks()
        if change.task is not None and change.before is not None:
            self._budgets.add_peer_usage(change.before, self._ledger.task(change.task))
            self._local.sync_task(change.task, change.retry_in)
        self._local.wake()

    async def renew(self) -> None:
        """Give signs of life, whatever else is going on."""
        others = self._ledger.orchestrators
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + others.timing.heartbeat)
            with suppress(StoreUnavailable):  # whatever must be recorded will say so
                await others.renew()

    async def detect_dead_peers(self) -> None:
        """Sweep as soon as an orchestrator of this machine has ended: the kernel frees its lock at once."""
        others, locks = self._ledger.orchestrators, self._context.hub.liveness_locks
        known = frozenset[str]()
        with suppress(StoreUnavailable):  # then the next sweep finds those that had ended before this look
            known = frozenset(name for name, one in (await others.all()).items() if one.ended is None)
        while True:
            with suppress(OSError, StoreUnavailable):  # no descriptor left: look again later
                living = await locks.list_alive(self._ledger.run.id)
                if ended := known - living:
                    others.expire_liveness(ended)
                    self._sweep_due.set()
                known = living
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + LIVENESS_INTERVAL)

    async def sweep(self) -> None:
        """Take over from orchestrators that are gone, lead the run if nobody does, and see what others landed."""
        while True:
            await self._clock.wait(self._sweep_due, self._clock.monotonic() + self._ledger.orchestrators.timing.sweep)
            self._sweep_due = anyio.Event()
            with suppress(StoreUnavailable), anyio.CancelScope(shield=True):
                if not self._is_ending():
                    self._is_sweeping = True
                    try:
                        await self._sweep()
                    finally:
                        self._is_sweeping = False
                        self._local.wake()

    async def _sweep(self) -> None:
        if await self._ledger.try_to_lead():
            for request in await self._ledger.requests():
                self._enqueue_request(request)
        await self._ledger.prune_ownership(self._context.registry)
        for task in await take_over_tasks(self._ledger, self._context, self._clock):
            self._local.take_over(task)
        await self.clean_up_abandoned()
        for task in await self._reconciler.look(frozenset(self._local.merge_queue.landing)):
            self._local.sync_task(task)

    async def clean_up_abandoned(self) -> None:
        """Remove what orchestrators that are gone left behind and no task is at any more: sessions, then places."""
        await remove_abandoned(self._ledger, self._context)
        await self._pool.clear()

    def _enqueue_request(self, request: RunRequest) -> None:
        self._asked.append(request)
        self._is_asked.set()

    async def handle_requests(self) -> None:
        """Do what is asked of the run, one after the other; what others do is followed meanwhile."""
        while True:
            await self._is_asked.wait()
            self._is_asked = anyio.Event()
            while self._asked:
                with anyio.CancelScope(shield=True):  # what is half done would leave the board and the documents apart
                    await self._handle_request(self._asked[0])
                self._asked.popleft()
                self._local.wake()

    async def _handle_request(self, request: RunRequest) -> None:
        if request not in await self._ledger.requests():  # who has just become the coordinator hears some of them twice
            return
        if any(task not in self._ledger for task in request.tasks):
            await self._ledger.learn_tasks()
            self._local.add_planned_tasks()
        for task in request.tasks:
            await self._perform(request, task)
        if request.action is RequestAction.IGNORE:
            await self._until_over(request.tasks)
        for adapter in request.adapters:
            self._local.update_adapter(adapter, await self._ledger.enable_adapter(adapter))
        await record_ignored(self._ledger, request)
        failpoint("request.applied")
        await self._ledger.answer(request)

    async def _perform(self, request: RunRequest, task: str) -> None:
        match request.action:
            case RequestAction.RETRY:
                await self._revive(task, request.phase)
            case RequestAction.APPROVE:
                if await approve_phase(self._ledger, task, request.reason):
                    self._local.continue_task(task)
            case RequestAction.REJECT:
                if await reject_phase(self._ledger, task, request.reason):
                    self._local.continue_task(task)
            case _:
                await self._cancel(task)

    async def _until_over(self, tasks: Sequence[str]) -> None:
        """Wait for sessions that are being stopped: until they are over, attempts have the documents to themselves."""
        with anyio.move_on_after(_STOP_TIMEOUT):
            for task in tasks:
                while self._is_ending_here(task):
                    await anyio.sleep(_POLL_INTERVAL)

    def _is_ending_here(self, task: str) -> bool:
        return self._ledger.task(task).status not in FINAL_STATUSES and not self._ledger.is_claimed_elsewhere(task)

    async def _revive(self, task: str, phase: str | None) -> None:
        if self._ledger.task(task).status in RETRYABLE_STATUSES:
            for part in await parts_to_cancel(self._ledger, task, phase):
                await self._cancel(part)
            self._local.cancelled.discard(task)
            if await retry_task(self._ledger, task, phase):
                self._local.revive(task)

    async def _cancel(self, task: str) -> None:
        until = self._clock.monotonic() + _STOP_TIMEOUT
        while not await self._try_to_cancel(task):
            if self._is_ending() or self._clock.monotonic() >= until:
                break
            await anyio.sleep(_POLL_INTERVAL)

    async def _try_to_cancel(self, task: str) -> bool:
        """Whether a task that is not wanted is over now or ends as soon as it can; not while it lands elsewhere."""
        hand, status = self._local, self._ledger.task(task).status
        is_elsewhere, is_landing = self._ledger.is_claimed_elsewhere(task), status is TaskStatus.LANDING
        if status in FINAL_STATUSES:
            return True
        if is_elsewhere and is_landing:
            return False
        hand.cancelled.add(task)
        if task in hand.active_attempts and not is_elsewhere:
            hand.active_attempts[task].cancel()
        elif (task in hand.merge_queue.landing or is_landing) and not is_elsewhere:
            hand.merge_queue.cancel(task)  # what comes of it is told when it is known whether the target moved
        else:
            return await self._end(task)
        return True

    async def _end(self, task: str) -> bool:
        """End a task that this process is not at, wherever it is; False where somebody has just begun to land it."""
        hand = self._local
        hand.drop(task)
        if await cancel_task(self._ledger, task):
            return True
        if not self._ledger.is_claimed_elsewhere(task) and self._ledger.task(task).status is TaskStatus.LANDING:
            hand.take_over(task)  # that was begun where it was, just before it was taken from there
            return True
        hand.cancelled.discard(task)
        hand.sync_task(task)
        return self._ledger.task(task).status in FINAL_STATUSES
