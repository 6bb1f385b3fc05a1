"""Coordinate with the other orchestrators of a run.

Follow their changes, take over tasks of dead ones, and handle requests.
"""

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
    record_ignored,
    reject_phase,
    retry_task,
    subtasks_to_cancel,
)
from orchestrator.engine.state.ledger import ExternalChange, Ledger
from orchestrator.errors import StoreUnavailable
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds to wait for a stopped session or a landing to end, and between polls of that.
_STOP_TIMEOUT: Final = 60.0
_POLL_INTERVAL: Final = 0.05
#: Seconds between checks of the liveness locks of this machine.
LIVENESS_INTERVAL: Final = 0.5


class PeerSync:
    """Applies the changes of other orchestrators to this process.

    It runs concurrently with the scheduler.
    """

    def __init__(
        self,
        ledger: Ledger,
        context: RunContext,
        pool: SlotPool,
        local: LocalWork,
        budgets: Budgets,
        clock: Clock,
        halt: Callable[[HaltCause, str], None],
        is_ending: Callable[[], bool],
    ) -> None:
        """Call `halt` with the reason if the run is halted.

        Take over nothing once `is_ending()`.
        """
        self._ledger, self._context, self._pool, self._local = ledger, context, pool, local
        self._budgets, self._clock = budgets, clock
        self._halt, self._is_ending = halt, is_ending
        self._reconciler = Reconciler(ledger, context)
        self._requests: deque[RunRequest] = deque()
        """Requests to handle, in order."""
        self._request_added = anyio.Event()
        self._is_sweeping = False
        self._sweep_due = anyio.Event()
        """Set to run the next sweep now."""

    @property
    def is_busy(self) -> bool:
        """Return True while a sweep or request is processed that may create work."""
        return self._is_sweeping or bool(self._requests)

    async def follow(self) -> None:
        """Apply changes of other orchestrators.

        The leader of the run also queues requests.
        """
        async for change in self._ledger.changes():
            # A partial change would leave the board and the documents inconsistent.
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
            # Read the newest document: this process may have applied a later one.
            self._local.update_adapter(change.adapter, await self._ledger.adapter(change.adapter))
        if change.has_new_tasks:
            self._local.add_planned_tasks()
        if change.task is not None and change.before is not None:
            self._budgets.add_peer_usage(change.before, self._ledger.task(change.task))
            self._local.sync_task(change.task, change.retry_in)
        self._local.wake()

    async def renew(self) -> None:
        """Send heartbeats, independent of all other work."""
        orchestrators = self._ledger.orchestrators
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + orchestrators.timing.heartbeat_interval)
            with suppress(StoreUnavailable):  # mandatory commits report the outage
                await orchestrators.renew()

    async def detect_dead_peers(self) -> None:
        """Sweep as soon as an orchestrator of this machine exits.

        The kernel releases its lock at once.
        """
        orchestrators, locks = self._ledger.orchestrators, self._context.hub.liveness_locks
        known = frozenset[str]()
        with suppress(StoreUnavailable):  # the next sweep finds orchestrators that exited before this
            known = frozenset(name for name, record in (await orchestrators.all()).items() if record.ended is None)
        while True:
            with suppress(OSError, StoreUnavailable):  # no file descriptor left: retry later
                alive = await locks.list_alive(self._ledger.run.id)
                if exited := known - alive:
                    orchestrators.expire_liveness(exited)
                    self._sweep_due.set()
                known = alive
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + LIVENESS_INTERVAL)

    async def sweep(self) -> None:
        """Take over tasks of dead orchestrators and adopt external landings.

        Lead the run if nobody does.
        """
        while True:
            await self._clock.wait(
                self._sweep_due, self._clock.monotonic() + self._ledger.orchestrators.timing.sweep_interval
            )
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
        for task in await self._reconciler.adopt_landings(frozenset(self._local.merge_queue.landing)):
            self._local.sync_task(task)

    async def clean_up_abandoned(self) -> None:
        """Remove unused leftovers of dead orchestrators.

        Session folders go first, then worktree slots.
        """
        await remove_abandoned(self._ledger, self._context)
        await self._pool.discard_abandoned()

    def _enqueue_request(self, request: RunRequest) -> None:
        self._requests.append(request)
        self._request_added.set()

    async def handle_requests(self) -> None:
        """Handle requests one by one, while changes of others are still followed."""
        while True:
            await self._request_added.wait()
            self._request_added = anyio.Event()
            while self._requests:
                with anyio.CancelScope(
                    shield=True
                ):  # a partial change would leave the board and the documents inconsistent
                    await self._handle_request(self._requests[0])
                self._requests.popleft()
                self._local.wake()

    async def _handle_request(self, request: RunRequest) -> None:
        if request not in await self._ledger.requests():  # a new leader sees some requests twice
            return
        if any(task not in self._ledger for task in request.tasks):
            await self._ledger.load_new_tasks()
            self._local.add_planned_tasks()
        for task in request.tasks:
            await self._perform(request, task)
        if request.action is RequestAction.IGNORE:
            await self._wait_until_ended(request.tasks)
        for adapter in request.adapters:
            self._local.update_adapter(adapter, await self._ledger.enable_adapter(adapter))
        await record_ignored(self._ledger, request)
        failpoint("request.applied")
        await self._ledger.complete_request(request)

    async def _perform(self, request: RunRequest, task: str) -> None:
        match request.action:
            case RequestAction.RETRY:
                await self._retry(task, request.phase)
            case RequestAction.APPROVE:
                if await approve_phase(self._ledger, task, request.reason):
                    self._local.continue_task(task)
            case RequestAction.REJECT:
                if await reject_phase(self._ledger, task, request.reason):
                    self._local.continue_task(task)
            case _:
                await self._cancel(task)

    async def _wait_until_ended(self, tasks: Sequence[str]) -> None:
        """Wait until sessions that are being stopped have ended.

        Until then their attempts change the tasks.
        """
        with anyio.move_on_after(_STOP_TIMEOUT):
            for task in tasks:
                while self._is_ending_here(task):  # noqa: ASYNC110  another task of ours
                    await anyio.sleep(_POLL_INTERVAL)

    def _is_ending_here(self, task: str) -> bool:
        return self._ledger.task(task).status not in FINAL_STATUSES and not self._ledger.is_claimed_elsewhere(task)

    async def _retry(self, task: str, phase: str | None) -> None:
        if self._ledger.task(task).status in RETRYABLE_STATUSES:
            for subtask in await subtasks_to_cancel(self._ledger, task, phase):
                await self._cancel(subtask)
            self._local.merge_queue.cancelled.discard(task)
            if await retry_task(self._ledger, task, phase):
                self._local.revive(task)

    async def _cancel(self, task: str) -> None:
        deadline = self._clock.monotonic() + _STOP_TIMEOUT
        while not await self._try_to_cancel(task):
            if self._is_ending() or self._clock.monotonic() >= deadline:
                break
            await anyio.sleep(_POLL_INTERVAL)

    async def _try_to_cancel(self, task: str) -> bool:
        """Return True if a task has ended or ends as soon as it can.

        False while it lands elsewhere.
        """
        local, status = self._local, self._ledger.task(task).status
        is_elsewhere, is_landing = self._ledger.is_claimed_elsewhere(task), status is TaskStatus.LANDING
        if status in FINAL_STATUSES:
            return True
        if is_elsewhere and is_landing:
            return False
        local.merge_queue.cancelled.add(task)
        if task in local.active_attempts and not is_elsewhere:
            local.active_attempts[task].cancel()
        elif (task in local.merge_queue.landing or is_landing) and not is_elsewhere:
            local.merge_queue.cancel(task)  # the outcome is recorded once it is known whether the target moved
        else:
            return await self._end(task)
        return True

    async def _end(self, task: str) -> bool:
        """Cancel a task that this process is not running.

        Return False if its landing has just started elsewhere.
        """
        local = self._local
        local.drop(task)
        if await cancel_task(self._ledger, task):
            return True
        if not self._ledger.is_claimed_elsewhere(task) and self._ledger.task(task).status is TaskStatus.LANDING:
            local.take_over(task)  # the previous owner began it just before it lost the claim
            return True
        local.merge_queue.cancelled.discard(task)
        local.sync_task(task)
        return self._ledger.task(task).status in FINAL_STATUSES
