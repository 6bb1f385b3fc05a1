"""Coordinate with the other orchestrators of a run.

Follow their changes, and take over the tasks of dead orchestrators.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskGroup

from orchestrator.domain.runs.model import AdapterDocument, HaltCause, RequestAction, RunRequest
from orchestrator.domain.runs.statuses import FINAL_STATUSES, RETRYABLE_STATUSES, TaskStatus
from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.engine.landing.reconciliation import Reconciler
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.recovery import remove_abandoned, take_over_tasks
from orchestrator.engine.scheduler.requests import RequestHandler, cancel_task
from orchestrator.engine.state.change_feed import ExternalChange, follow_changes
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import read_attachment
from orchestrator.errors import StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.system.clock import Clock

#: Seconds between checks of the liveness locks of this machine.
LIVENESS_INTERVAL: Final = 0.5
#: Seconds between two checks whether a stopped session has ended.
_STOP_POLL_INTERVAL: Final = 0.05


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
        halt: Callable[[HaltCause, str], None],
        is_ending: Callable[[], bool],
    ) -> None:
        """Create the synchronization; call `halt` with the reason if the run is halted.

        Takes over no tasks once `is_ending()`.
        """
        self._ledger, self._context, self._pool, self._local = ledger, context, pool, local
        self._budgets, self._clock = budgets, context.tools.clock
        self._halt, self._is_ending = halt, is_ending
        self._reconciler = Reconciler(ledger, context)
        self.requests = LiveRequestHandler(ledger, local, self._clock, is_ending)
        self._is_sweeping = False
        self._sweep_due = anyio.Event()
        """Set to start the next sweep immediately."""

    @property
    def is_busy(self) -> bool:
        """Return True while processing a sweep or request that may create work."""
        return self._is_sweeping or self.requests.is_busy

    def start(self, group: TaskGroup) -> None:
        """Start the background work in a task group."""
        for service in (self.follow, self.requests.run, self.renew, self.sweep, self.detect_dead_peers):
            group.start_soon(service)

    async def follow(self) -> None:
        """Apply changes of other orchestrators.

        The leader of the run also queues requests.
        """
        async with anyio.create_task_group() as group:
            async for change in follow_changes(self._ledger):
                # A partial change would leave the board and the documents inconsistent.
                with anyio.CancelScope(shield=True):
                    await self._apply_change(change)
                if change.attachment in self._local.attached:
                    group.start_soon(self._yield_slot, change.attachment)

    async def _apply_change(self, change: ExternalChange) -> None:
        if change.request is not None:
            if self._ledger.writer.became_leader.is_set():
                self.requests.enqueue(change.request)
            return
        if change.halted is not None:
            self._halt(*change.halted)
        if change.adapter is not None:
            # Read the newest document: this process may have applied a later one.
            self._local.update_adapter(change.adapter, await self._ledger.adapters.read(change.adapter))
        if change.attachment is not None:
            await self._apply_attachment(change.attachment)
        if change.has_new_tasks:
            self._local.add_planned_tasks()
        if change.task is not None and change.before is not None:
            self._budgets.add_peer_usage(change.before, self._ledger.task(change.task))
            self._local.sync_task(change.task, change.retry_in)
        self._local.wake()

    async def _apply_attachment(self, task: str) -> None:
        """Stop or continue a task to which a user attaches or was attached in another process, unless that has died."""
        _, attachment = await read_attachment(self._ledger.writer.store, self._ledger.run.id, task)
        if attachment is not None and attachment.orchestrator == self._ledger.orchestrators.me.id:
            return
        peers = self._ledger.orchestrators.peers
        if attachment is not None and await peers.read_liveness(attachment.orchestrator) is OwnerStatus.ALIVE:
            self._local.attach(task)
        elif task in self._local.attached:
            self._local.detach(task)

    async def _yield_slot(self, task: str) -> None:
        """Release the worktree slot of a conversation to the process in which a user is attached."""
        while task in self._local.active_attempts:  # noqa: ASYNC110  it is being stopped
            await anyio.sleep(_STOP_POLL_INTERVAL)
        conversation = self._ledger.task(task).last_conversation
        if conversation is not None and conversation.folder is not None:
            await self._pool.yield_slot(Path(conversation.folder))

    async def renew(self) -> None:
        """Send heartbeats, independent of all other work."""
        orchestrators = self._ledger.orchestrators
        while True:
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + orchestrators.timing.heartbeat_interval)
            with suppress(StoreUnavailable):  # mandatory commits report the outage
                await orchestrators.renew()

    async def detect_dead_peers(self) -> None:
        """Start a sweep as soon as an orchestrator of this machine exits.

        The kernel releases its lock immediately.
        """
        orchestrators, locks = self._ledger.orchestrators, self._context.hub.liveness_locks
        known = frozenset[str]()
        with suppress(StoreUnavailable):  # the next sweep finds orchestrators that exited before this
            known = frozenset(
                name for name, record in (await orchestrators.peers.all()).items() if record.ended is None
            )
        while True:
            with suppress(OSError, StoreUnavailable):  # no file descriptor left: retry later
                alive = await locks.list_alive(self._ledger.run.id)
                if exited := known - alive:
                    orchestrators.peers.expire_liveness(exited)
                    self._sweep_due.set()
                known = alive
            await self._clock.wait(anyio.Event(), self._clock.monotonic() + LIVENESS_INTERVAL)

    async def sweep(self) -> None:
        """Take over tasks of dead orchestrators and adopt external landings.

        Become the leader if the run has none.
        """
        while True:
            await self._clock.wait(
                self._sweep_due, self._clock.monotonic() + self._ledger.orchestrators.timing.stale_check_interval
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
        if await self._ledger.writer.try_to_lead():
            for request in await self.requests.pending():
                self.requests.enqueue(request)
        await self._prune_ownership()
        for task in list(self._local.attached):
            await self._apply_attachment(task)
        for task in await take_over_tasks(self._ledger, self._context):
            self._local.take_over(task)
        await self.clean_up_abandoned()
        for task in await self._reconciler.adopt_landings(frozenset(self._local.merge_queue.landing)):
            self._local.sync_task(task)

    async def _prune_ownership(self) -> None:
        """Delete path ownership under claims that have ended."""
        with suppress(VersionConflict):  # each new path owner prunes as well
            if writes := await self._context.registry.sweep():
                await self._ledger.writer.commit(Commit(writes, durable=False))

    async def clean_up_abandoned(self) -> None:
        """Remove unused leftovers of dead orchestrators.

        Session folders are removed before worktree slots.
        """
        await remove_abandoned(self._ledger, self._context)
        await self._pool.slots.adopt_others()


#: Seconds to wait for the end of a stopped session or a landing, and between polls.
_STOP_TIMEOUT: Final = 60.0
_POLL_INTERVAL: Final = 0.05


class LiveRequestHandler(RequestHandler):
    """Applies requests one at a time, to the ledger and to the work of this process."""

    def __init__(self, ledger: Ledger, local: LocalWork, clock: Clock, is_ending: Callable[[], bool]) -> None:
        """Create the handler; after `is_ending()`, it ignores landings of other processes."""
        super().__init__(ledger)
        self._local, self._clock, self._is_ending = local, clock, is_ending
        self._queue: deque[RunRequest] = deque()
        self._added = anyio.Event()

    @property
    def is_busy(self) -> bool:
        """Return True while handling a request that may create work."""
        return bool(self._queue)

    def enqueue(self, request: RunRequest) -> None:
        """Handle a request after all earlier ones."""
        self._queue.append(request)
        self._added.set()

    async def run(self) -> None:
        """Handle requests until cancelled, while other orchestrators may change tasks."""
        while True:
            await self._added.wait()
            self._added = anyio.Event()
            while self._queue:
                # A partial change would leave the board and the documents inconsistent.
                with anyio.CancelScope(shield=True):
                    await self.apply(self._queue[0])
                self._queue.popleft()
                self._local.wake()

    async def apply(self, request: RunRequest) -> None:
        """Apply a request unless an earlier leader has applied it."""
        if request not in await self.pending():  # a new leader sees some requests twice
            return
        if any(task not in self._ledger.tasks for task in request.tasks):
            await self._ledger.tasks.load_new()
            self._local.add_planned_tasks()
        await super().apply(request)

    async def _apply(self, request: RunRequest, task: str) -> None:
        if request.action is RequestAction.RETRY and self._ledger.task(task).status in RETRYABLE_STATUSES:
            self._local.merge_queue.tasks.cancelled.discard(task)
        await super()._apply(request, task)

    async def _record_ignored(self, request: RunRequest) -> None:
        await self._wait_until_ended(request.tasks)
        await super()._record_ignored(request)

    def _show_task(self, task: str) -> None:
        self._local.resume(task)

    def _show_adapter(self, adapter: str, document: AdapterDocument) -> None:
        self._local.update_adapter(adapter, document)

    async def _wait_until_ended(self, tasks: Sequence[str]) -> None:
        """Wait until sessions that are being stopped have ended.

        Until then, their attempts can still change the tasks.
        """
        with anyio.move_on_after(_STOP_TIMEOUT):
            for task in tasks:
                while self._is_ending_here(task):  # noqa: ASYNC110  another task of ours
                    await anyio.sleep(_POLL_INTERVAL)

    def _is_ending_here(self, task: str) -> bool:
        return self._ledger.task(task).status not in FINAL_STATUSES and not self._ledger.is_claimed_elsewhere(task)

    async def _cancel(self, task: str) -> None:
        deadline = self._clock.monotonic() + _STOP_TIMEOUT
        while not await self._try_to_cancel(task):
            if self._is_ending() or self._clock.monotonic() >= deadline:
                break
            await anyio.sleep(_POLL_INTERVAL)

    async def _try_to_cancel(self, task: str) -> bool:
        """Return True if a task has ended, or will end as soon as possible.

        Return False while another process is landing it.
        """
        local, status = self._local, self._ledger.task(task).status
        is_elsewhere, is_landing = self._ledger.is_claimed_elsewhere(task), status is TaskStatus.LANDING
        if status in FINAL_STATUSES:
            return True
        if is_elsewhere and is_landing:
            return False
        local.merge_queue.tasks.cancelled.add(task)
        if task in local.active_attempts and not is_elsewhere:
            local.active_attempts[task].cancel()
        elif (task in local.merge_queue.landing or is_landing) and not is_elsewhere:
            local.merge_queue.cancel(task)  # the outcome is recorded once it is known whether the target moved
        else:
            return await self._end(task)
        return True

    async def _end(self, task: str) -> bool:
        """Cancel a task that this process is not running.

        Return False if another process has just started to land it.
        """
        local = self._local
        local.drop(task)
        if await cancel_task(self._ledger, task):
            return True
        if not self._ledger.is_claimed_elsewhere(task) and self._ledger.task(task).status is TaskStatus.LANDING:
            local.take_over(task)  # the previous owner started it just before it lost the claim
            return True
        local.merge_queue.tasks.cancelled.discard(task)
        local.sync_task(task)
        return self._ledger.task(task).status in FINAL_STATUSES
