"""Decide when the merge queue lands, and apply the outcomes in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from anyio.abc import TaskGroup

from orchestrator.domain.runs.statuses import CLAIMED_STATUSES, TaskStatus
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.scheduler.capacity import Capacity
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.requests import cancel_task
from orchestrator.engine.state.ledger import Ledger
from orchestrator.sessions.setup import adapter_homes

#: Seconds between pushes while active sessions may still finish and join the next push.
LANDING_BATCH_WINDOW = 0.25
#: Seconds before a deferred landing is retried while sessions are active.
DEFERRED_RETRY_DELAY = 30.0
#: The retries of each task, and the seconds before each, without other work: the user may be in the middle of a commit.
MAX_FINAL_LANDINGS, FINAL_LANDING_DELAY = 3, 1.0
#: The same for pull requests, and for runs that span machines: a server may be down for minutes.
MAX_REMOTE_LANDINGS, REMOTE_LANDING_DELAY = 40, 15.0


class LandingLoop:
    """Lands the built tasks of this process in batches, and retries deferred ones."""

    def __init__(self, ledger: Ledger, context: RunContext, local: LocalWork, capacity: Capacity) -> None:
        self._ledger, self._context, self._local, self._capacity = ledger, context, local, capacity
        self._queue, self._clock = local.merge_queue, context.tools.clock
        self.is_landing = False
        """Whether a landing is in progress."""
        self._deferred_until = 0.0
        self._final_tries = Counter[str]()
        self._batch_until = 0.0
        self._merge = ledger.run.merge
        self._max_final, self._final_delay = MAX_FINAL_LANDINGS, FINAL_LANDING_DELAY
        if ledger.run.pull_requests is not None or ledger.work is not None:
            self._max_final, self._final_delay = MAX_REMOTE_LANDINGS, REMOTE_LANDING_DELAY

    @property
    def is_full(self) -> bool:
        """Whether the queue is full, so that more built work would become outdated."""
        return len(self._queue.tasks.ready) >= self._capacity.sessions + 2 * (self._merge.batch - 1)

    @property
    def is_pending(self) -> bool:
        """Whether tasks will land or be retried."""
        return self._queue.tasks.has_work or any(
            self._final_tries[task] < self._max_final for task in self._queue.tasks.deferred
        )

    def next_times(self) -> list[float | None]:
        """Return the times when the queue may land (monotonic seconds)."""
        waits = self._queue.tasks.has_work and not self.is_landing
        return [self._deferred_until if self._queue.tasks.deferred else None, self._batch_until if waits else None]

    def tick(self, group: TaskGroup, now: float) -> None:
        """Queue deferred tasks again after their delay, and start a landing that is due.

        The queue waits briefly for sessions that are about to finish.
        """
        is_final = not self._local.active_attempts
        # A final retry waits for the others: slow pushes would otherwise keep the queue from getting empty.
        waits = is_final and (self.is_landing or self._queue.tasks.has_work)
        if self._queue.tasks.deferred and now >= self._deferred_until and not waits:
            if is_final:
                self._final_tries.update(self._queue.tasks.deferred)
            self._queue.tasks.add_deferred()
        self._queue.tasks.sort()
        has_work = self._queue.tasks.has_work
        if not has_work:
            self._batch_until = max(self._batch_until, now + (self._merge.wait or 0.0))
        is_batch = len(self._queue.tasks.ready) >= self._merge.batch > 1
        is_due = self.is_full or is_batch or not self._local.active_attempts or now >= self._batch_until
        if has_work and is_due and not self.is_landing:
            self.is_landing = True
            group.start_soon(self._land, group)

    def session_ended(self) -> None:
        """Retry deferred tasks soon if no session is running."""
        if not self._local.active_attempts:
            self._deferred_until = min(self._deferred_until, self._clock.monotonic() + self._final_delay)

    async def _land(self, group: TaskGroup) -> None:
        for task in await self._queue.land(group):
            await self._apply(task)
            if self._ledger.task(task).status is TaskStatus.LANDED:
                group.start_soon(self.remove_homes, [task])
        self._batch_until = self._clock.monotonic() + LANDING_BATCH_WINDOW
        self.is_landing = False
        self._local.wake()

    async def _apply(self, task: str) -> None:
        status = self._ledger.task(task).status
        if task in self._queue.tasks.cancelled and status in {TaskStatus.QUEUED, TaskStatus.CHECKING}:
            await cancel_task(self._ledger, task)
            status = TaskStatus.CANCELLED
        if status not in CLAIMED_STATUSES:
            self._local.show(task)
            return
        if self._queue.tasks.is_held(task):
            self._queue.tasks.add(task)
            return
        pause = DEFERRED_RETRY_DELAY if self._local.active_attempts else self._final_delay
        if not self._queue.tasks.deferred or not self._local.active_attempts:
            self._deferred_until = self._clock.monotonic() + pause
        self._queue.tasks.deferred.append(task)

    async def remove_homes(self, tasks: Sequence[str]) -> None:
        """Delete adapter homes of landed or done tasks, which are never resumed."""
        await adapter_homes.remove_homes(self._context.tools.logs, tasks, self._context.tools.environ)
