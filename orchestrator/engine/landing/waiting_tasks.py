"""The built tasks of a merge queue: those that may land, and those that wait, are held, deferred or cancelled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.conflict_reactions import find_conflict_holds
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.scheduling.landing_order import LandingCandidate, order_landings
from orchestrator.engine.landing.stacked_work import StackedWork
from orchestrator.engine.state.ledger import Ledger


class WaitingTasks:
    """The built tasks that have not landed yet."""

    def __init__(self, ledger: Ledger, entries: Mapping[str, DispatchEntry], stacked: StackedWork) -> None:
        """Create an empty collection; `entries` have the priorities of the tasks."""
        self._ledger, self._entries, self._stacked = ledger, entries, stacked
        self._tasks: dict[str, None] = {}
        self.deferred: list[str] = []
        """Tasks that can't land at present."""
        self.cancelled: set[str] = set()
        """Tasks that a user has cancelled; they don't land unless they are already landing."""
        self.is_stalled = False
        """Whether no session will start without a landing, see `find_conflict_holds`."""

    @property
    def ready(self) -> list[str]:
        """The tasks that may land, in landing order."""
        return self.ready_behind(())

    def ready_behind(self, landing: Iterable[str]) -> list[str]:
        """Return the tasks that may land after those that are landing, in landing order.

        Work that is stacked on that of other tasks may land behind these.
        """
        held, ready = set(self.held), dict.fromkeys(landing)
        behind = []
        for task in self._tasks:
            if task not in held and self._stacked.is_ready(task, ready):
                ready[task] = None
                behind.append(task)
        return behind

    @property
    def unsettled(self) -> list[str]:
        """The tasks that `StackedWork.settle` has to change."""
        return [task for task in self._tasks if self._stacked.is_unsettled(task)]

    @property
    def has_work(self) -> bool:
        """Whether a landing can change a task now."""
        return bool(self.ready or self.unsettled)

    @property
    def held(self) -> list[str]:
        """The tasks that a user or a predicted conflict keeps from landing, in landing order."""
        holds = self._conflict_holds()
        return [task for task in self._tasks if task in holds or self.is_held(task)]

    def _conflict_holds(self) -> Mapping[str, str]:
        run, documents = self._ledger.run, self._ledger.tasks.documents()
        tasks = {task for pair in run.predicted_conflicts for task in pair if task in self._entries}
        priorities = {task: self._entries[task].priority for task in tasks}
        return find_conflict_holds(run, documents, priorities, is_stalled=self.is_stalled)

    @property
    def interrupted(self) -> list[str]:
        """The tasks whose move of the target was interrupted."""
        return [task for task in self._tasks if self._status(task) is TaskStatus.LANDING]

    def is_held(self, task: str) -> bool:
        """Return True if a user holds a task; its landing may already be in progress."""
        return task in self._ledger.run.held and self._status(task) is not TaskStatus.LANDING

    async def is_any_held(self, tasks: Iterable[str]) -> bool:
        """Return True if a user holds one of the tasks, according to the store.

        Only the leader of the run records that, so its own copy is current.
        """
        is_leader = self._ledger.writer.became_leader.is_set()
        run = self._ledger.run if is_leader else (await self._ledger.run_state.read())[1]
        return not run.held.keys().isdisjoint(tasks)

    def is_withdrawn(self, task: str) -> bool:
        """Return True if a user has cancelled or holds a task."""
        return task in self.cancelled or self.is_held(task)

    def add(self, *tasks: str) -> None:
        """Add tasks to the end."""
        self._tasks.update(dict.fromkeys(tasks))

    def add_first(self, tasks: Iterable[str]) -> None:
        """Add tasks in front of all others."""
        self._tasks = dict.fromkeys([*tasks, *self._tasks])

    def add_deferred(self) -> None:
        """Add the deferred tasks in front of all others."""
        self.add_first(self.deferred)
        self.deferred = []

    def sort(self) -> None:
        """Sort the tasks into landing order."""
        candidates = [
            LandingCandidate.of(task, self._entries[task].priority, self._ledger.task(task)) for task in self._tasks
        ]
        self._tasks = dict.fromkeys(order_landings(candidates, self._ledger.run.bumped))

    def take(self, tasks: Iterable[str]) -> list[str]:
        """Remove and return those of the tasks that are still here and not held."""
        held = set(self.held)
        taken = [task for task in tasks if task in self._tasks and task not in held]
        for task in taken:
            del self._tasks[task]
        return taken

    def discard(self, task: str) -> bool:
        """Remove a task unless the target may have been moved to its work; return True if it was removed."""
        is_removed = task in self._tasks and self._status(task) is not TaskStatus.LANDING
        if is_removed:
            del self._tasks[task]
        return is_removed

    def _status(self, task: str) -> TaskStatus:
        return self._ledger.task(task).status
