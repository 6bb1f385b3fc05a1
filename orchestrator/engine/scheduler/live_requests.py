"""Handle user requests to an active run, as the leader of the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import anyio

from orchestrator.domain.runs.model import AdapterDocument, RequestAction, RunRequest
from orchestrator.domain.runs.statuses import FINAL_STATUSES, RETRYABLE_STATUSES, TaskStatus
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.requests import RequestHandler, cancel_task
from orchestrator.engine.state.ledger import Ledger
from orchestrator.system.clock import Clock

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
