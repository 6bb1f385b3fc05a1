"""Coordinate with the other orchestrators of a run.

Follow their changes, and take over the tasks of dead orchestrators.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio

from orchestrator.domain.runs.model import HaltCause
from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.engine.landing.reconciliation import Reconciler
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.budgets import Budgets
from orchestrator.engine.scheduler.live_requests import LiveRequestHandler
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.recovery import remove_abandoned, take_over_tasks
from orchestrator.engine.state.change_feed import ExternalChange, follow_changes
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import read_attachment
from orchestrator.errors import StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit
from orchestrator.repo.worktrees.pool import SlotPool

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
        """Let the process in which a user is attached have the worktree slot of its conversation."""
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
