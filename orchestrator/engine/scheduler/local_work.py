"""What one process has in hand of a run: its sessions, what it lands, and the board that shows where all tasks are.

The scheduler works by it; whatever others do to the run is entered here (`engine.scheduler.peers`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import anyio

from orchestrator.domain.runs.model import CLAIMED_STATUSES, SUCCESS_STATUSES, AdapterDocument, TaskStatus
from orchestrator.domain.scheduling.dispatch import DispatchBoard
from orchestrator.domain.workflow.routing import current_adapters, has_built_work
from orchestrator.engine.landing.merge_queue import MergeQueue
from orchestrator.engine.scheduler.attempts import ActiveAttempt
from orchestrator.engine.state.ledger import Ledger
from orchestrator.system.clock import Clock

#: Seconds that an orchestrator which gave a task back has to take it again before others do.
_PEER_RETRY_DELAY = 0.5


class LocalWork:
    """What this process is at, and what of the run it knows; its times are monotonic seconds."""

    def __init__(
        self,
        ledger: Ledger,
        board: DispatchBoard,
        merging: MergeQueue,
        clock: Clock,
        cancelled: set[str],
        lacking: Collection[str],
    ) -> None:
        """Take a board that reflects the documents, and the set by which `merging` knows what is `cancelled`.

        `lacking` has the adapters that this process can't run, whatever the run knows about them.
        """
        self._unavailable_adapters = lacking
        self._ledger, self.board, self.merge_queue, self._clock = ledger, board, merging, clock
        self.cancelled = cancelled
        """Tasks that a person does not want any more."""
        self.active_attempts: dict[str, ActiveAttempt] = {}
        """The attempts that are under way here, by task."""
        self.elsewhere = {task for task in ledger.run.tasks if ledger.is_claimed_elsewhere(task)}
        """Tasks that other orchestrators have claimed."""
        self.deferred: list[str] = []
        """Tasks that could not be landed now."""
        self._woken = anyio.Event()
        for task in ledger.run.tasks:
            if ledger.task(task).status in {TaskStatus.PENDING, TaskStatus.WAITING}:
                self._place(task)

    def _place(self, task: str) -> None:
        """Have a task wait for the adapters of its phase, where it has any of its own."""
        adapters, keeps = self._at_phase(task)
        if adapters is not None:
            self.board.place(task, adapters, keeps_paths=keeps)

    def add_planned_tasks(self) -> None:
        """Have the board know the tasks that plans have become, each at its place of the file."""
        new = [task for task in self._ledger.added if not self.board.has(task)]
        if not new:
            return
        self.board.add({task: self._ledger.added[task] for task in new}, self._file_order(new))
        for task in new:
            if self._ledger.task(task).status is TaskStatus.PENDING:
                self.board.set_subtasks(task, self._ledger.parts(task))
                self._place(task)
            else:
                self.sync_task(task)

    def _file_order(self, new: Sequence[str]) -> dict[str, float]:
        """Return where new tasks stand in the file: those that came together share the room between others."""
        found: dict[str, float] = {}
        together: list[str] = []
        before, is_new = -1.0, set(new)
        for task in (*self._ledger.run.tasks, None):
            if task is not None and task in is_new:
                together.append(task)
                continue
            here = before + 1.0 if task is None else self.board.order(task)
            share = (here - before) / (len(together) + 1)
            found |= {one: before + share * number for number, one in enumerate(together, 1)}
            together, before = [], here
        return found

    def has_open_parts(self, task: str) -> bool:
        """Whether something that the plan of a task became has neither landed nor is done, as far as is recorded."""
        return any(
            one not in self._ledger or self._ledger.task(one).status not in SUCCESS_STATUSES
            for one in self._ledger.task(task).expanded
        )

    def _wait_for_parts(self, task: str) -> None:
        """Have a task wait for what its plan became, where it became anything."""
        self.add_planned_tasks()
        self.board.set_subtasks(task, self._ledger.parts(task))

    def wake(self) -> None:
        """Have the scheduler look at all this now."""
        self._woken.set()

    async def pause(self, until: float | None) -> None:
        """Wait until something is to be looked at, or until a time."""
        await self._clock.wait(self._woken, until)
        self._woken = anyio.Event()

    def stop_sessions(self) -> None:
        """Stop all sessions; their tasks keep what they did."""
        for work in self.active_attempts.values():
            work.stop()
        self.wake()

    def park(self, adapter: str, until: float) -> None:
        """Start nothing with an adapter before that time (wall-clock seconds)."""
        self.board.park(adapter, self._clock.monotonic() + until - self._clock.now())

    def update_adapter(self, adapter: str, learned: AdapterDocument) -> None:
        """Do with an adapter what the run has learned about it."""
        if learned.disabled_reason is not None:
            self.board.close(adapter, learned.disabled_reason)
        elif learned.cooldown_until is not None:
            self.park(adapter, learned.cooldown_until)
        elif adapter not in self._unavailable_adapters:
            self.board.open(adapter)

    def show(self, task: str, retry_in: float) -> None:
        """Have the board show where a task is; one that is to be tried again starts in so many seconds."""
        self._wait_for_parts(task)
        until = self._clock.monotonic() + retry_in
        adapters, keeps = self._at_phase(task)
        self.board.sync_task(task, self._ledger.task(task).status, until, adapters, keeps_paths=keeps)

    def wait(self, task: str, delay: float = 0.0) -> None:
        """Have a task go on in so many seconds, at its phase."""
        self._wait_for_parts(task)
        adapters, keeps = self._at_phase(task)
        self.board.wait(task, self._clock.monotonic() + delay, adapters, keeps_paths=keeps)

    def continue_task(self, task: str) -> None:
        """Have a task go on that a person was asked about; one whose session is not quite over does by itself then."""
        if task not in self.active_attempts:
            self.wait(task)

    def revive(self, task: str) -> None:
        """Have a task tried again that was over; at the end of its session where that is not quite over."""
        if task in self.active_attempts:
            return
        self._wait_for_parts(task)
        self._place(task)
        self.board.revive(task)

    def _at_phase(self, task: str) -> tuple[tuple[str, ...] | None, bool]:
        """Return the adapters of a task's phase (None where it has no workflow), and whether it keeps its paths."""
        entry, document = self.board.entry(task), self._ledger.task(task)
        if entry.workflow is None:
            return None, False
        workflow = self._ledger.workflow(entry.workflow)
        return current_adapters(workflow, document, entry.adapter, entry.fallback), has_built_work(document)

    def sync_task(self, task: str, retry_in: float | None = None) -> None:
        """Take over where a task is that another orchestrator moved, or a person."""
        if task in self.active_attempts:
            self.active_attempts[task].stop()  # when it is over, the board is told where the task is
            return
        self._drop_landing(task)
        is_elsewhere = self._ledger.is_claimed_elsewhere(task)
        (self.elsewhere.add if is_elsewhere else self.elsewhere.discard)(task)
        if is_elsewhere or self._ledger.task(task).status not in CLAIMED_STATUSES:
            self.show(task, _PEER_RETRY_DELAY if retry_in is None else retry_in)

    def take_over(self, task: str) -> None:
        """Go on with a task that was another orchestrator's, from where it is now.

        One that has its session here already, as the scheduler was faster, goes on by itself at the end of that.
        """
        self.elsewhere.discard(task)
        if task in self.active_attempts:
            return
        self.show(task, 0.0)
        if self._ledger.task(task).status in {TaskStatus.QUEUED, TaskStatus.LANDING}:
            self.merge_queue.waiting.append(task)

    def drop(self, task: str) -> None:
        """Have nothing to do with a task any more that is, or will be, over."""
        self._drop_landing(task)
        self.elsewhere.discard(task)
        self.board.ended(task)

    def _drop_landing(self, task: str) -> None:
        """Land a task no more that is not this orchestrator's."""
        self.merge_queue.cancel(task)
        if task in self.deferred:
            self.deferred.remove(task)
