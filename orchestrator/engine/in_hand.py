"""What one process has in hand of a run: its sessions, what it lands, and the board that shows where all tasks are.

The scheduler works by it; whatever others do to the run is entered here (`engine.following`).
"""

from __future__ import annotations

import anyio

from orchestrator.clock import Clock
from orchestrator.domain.dispatch import Board
from orchestrator.domain.model import CLAIMED, AdapterDocument, TaskStatus
from orchestrator.engine.attempts import Work
from orchestrator.engine.ledger import Ledger
from orchestrator.engine.merging import MergeQueue

#: Seconds that an orchestrator which gave a task back has to take it again before others do.
_OTHERS_PAUSE = 0.5


class InHand:
    """What this process is at, and what of the run it knows; its times are monotonic seconds."""

    def __init__(self, ledger: Ledger, board: Board, merging: MergeQueue, clock: Clock, cancelled: set[str]) -> None:
        """Take a board that reflects the documents, and the set by which `merging` knows what is `cancelled`."""
        self._ledger, self.board, self.merging, self._clock = ledger, board, merging, clock
        self.cancelled = cancelled
        """Tasks that a person does not want any more."""
        self.works: dict[str, Work] = {}
        """The attempts that are under way here, by task."""
        self.elsewhere = {task for task in ledger.run.tasks if ledger.is_elsewhere(task)}
        """Tasks that other orchestrators have claimed."""
        self.deferred: list[str] = []
        """Tasks that could not be landed now."""
        self._woken = anyio.Event()

    def wake(self) -> None:
        """Have the scheduler look at all this now."""
        self._woken.set()

    async def pause(self, until: float | None) -> None:
        """Wait until something is to be looked at, or until a time."""
        await self._clock.wait(self._woken, until)
        self._woken = anyio.Event()

    def stop_sessions(self) -> None:
        """Stop all sessions; their tasks keep what they did."""
        for work in self.works.values():
            work.session.stop()
        self.wake()

    def park(self, adapter: str, until: float) -> None:
        """Start nothing with an adapter before that time (wall-clock seconds)."""
        self.board.park(adapter, self._clock.monotonic() + until - self._clock.now())

    def learn(self, adapter: str, learned: AdapterDocument) -> None:
        """Do with an adapter what the run has learned about it."""
        if learned.closed is not None:
            self.board.close(adapter, learned.closed)
        elif learned.parked_until is not None:
            self.park(adapter, learned.parked_until)

    def show(self, task: str, retry_in: float) -> None:
        """Have the board show where a task is; one that is to be tried again starts in so many seconds."""
        self.board.mirror(task, self._ledger.task(task).status, self._clock.monotonic() + retry_in)

    def mirror(self, task: str, retry_in: float | None = None) -> None:
        """Take over where a task is that another orchestrator moved, or a person."""
        if task in self.works:
            self.works[task].session.stop()  # when it is over, the board is told where the task is
            return
        self._drop_landing(task)
        is_elsewhere = self._ledger.is_elsewhere(task)
        (self.elsewhere.add if is_elsewhere else self.elsewhere.discard)(task)
        if is_elsewhere or self._ledger.task(task).status not in CLAIMED:
            self.show(task, _OTHERS_PAUSE if retry_in is None else retry_in)

    def take_up(self, task: str) -> None:
        """Go on with a task that was another orchestrator's, from where it is now."""
        self.elsewhere.discard(task)
        self.show(task, 0.0)
        if self._ledger.task(task).status in {TaskStatus.QUEUED, TaskStatus.LANDING}:
            self.merging.waiting.append(task)

    def drop(self, task: str) -> None:
        """Have nothing to do with a task any more that is, or will be, over."""
        self._drop_landing(task)
        self.elsewhere.discard(task)
        self.board.ended(task)

    def _drop_landing(self, task: str) -> None:
        """Land a task no more that is not this orchestrator's."""
        self.merging.cancel(task)
        if task in self.deferred:
            self.deferred.remove(task)
