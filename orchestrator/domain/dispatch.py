"""Which task starts next: dependency counters and two heaps, so that each step costs O(log n).

No clock and no I/O here: the scheduler says what time it is, performs what `decide` returns, and feeds what
came of it back by `landed`, `ended` and `wait`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.domain.model import FINAL, TaskStatus


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a new attempt of this task."""

    task: str


class Board:
    """The tasks of a run as the scheduler's decisions see them, in the order of the file."""

    def __init__(self, needs: Mapping[str, Sequence[str]]) -> None:
        """Take every task's id with the ids that it needs; all of them pending."""
        self._order = {task: index for index, task in enumerate(needs)}
        self._tasks = tuple(needs)
        self._missing = {task: len(set(ids)) for task, ids in needs.items()}
        self._dependents: dict[str, list[str]] = {task: [] for task in needs}
        for task, ids in needs.items():
            for need in dict.fromkeys(ids):
                self._dependents[need].append(task)
        self._ready = [self._order[task] for task, missing in self._missing.items() if not missing]
        self._waiting: list[tuple[float, int]] = []
        self._settled: set[str] = set()
        self.blocked: dict[str, str] = {}
        """Tasks that can't start any more, each with the need that it waited for in vain."""

    @classmethod
    def of(cls, needs: Mapping[str, Sequence[str]], statuses: Mapping[str, TaskStatus]) -> Board:
        """Return the board of a run that is under way."""
        board = cls(needs)
        for task, status in statuses.items():
            if status is TaskStatus.LANDED:
                board.landed(task)
            elif status in FINAL:
                board.ended(task)
            elif status is not TaskStatus.PENDING:
                board._settled.add(task)
        return board

    def landed(self, task: str) -> None:
        """The task is on the target: what needed only this may start."""
        self._settled.add(task)
        for dependent in self._dependents[task]:
            self._missing[dependent] -= 1
            if not self._missing[dependent] and dependent not in self.blocked:
                heapq.heappush(self._ready, self._order[dependent])

    def ended(self, task: str) -> None:
        """The task will never land: what needs it, directly or not, is blocked by the need next to it."""
        self._settled.add(task)
        stack = [task]
        while stack:
            need = stack.pop()
            for dependent in self._dependents[need]:
                if dependent not in self.blocked:
                    self.blocked[dependent] = need
                    stack.append(dependent)

    def wait(self, task: str, until: float) -> None:
        """The task may start again at `until` (the scheduler's monotonic seconds)."""
        self._settled.discard(task)
        heapq.heappush(self._waiting, (until, self._order[task]))

    def next_time(self) -> float | None:
        """When the earliest waiting task becomes ready; None if none waits."""
        return self._waiting[0][0] if self._waiting else None

    def has_work(self) -> bool:
        """Whether a task is ready or waits for its time."""
        self._drop_settled()
        return bool(self._ready or self._waiting)

    def is_over(self, statuses: Mapping[str, TaskStatus]) -> bool:
        """Whether every task is in a final status or blocked for good."""
        return all(status in FINAL or task in self.blocked for task, status in statuses.items())

    def _drop_settled(self) -> None:
        while self._ready and self._tasks[self._ready[0]] in self._settled:
            heapq.heappop(self._ready)

    def take(self, now: float) -> str | None:
        """Remove and return the first task of the file's order that may start now."""
        while self._waiting and self._waiting[0][0] <= now:
            heapq.heappush(self._ready, heapq.heappop(self._waiting)[1])
        self._drop_settled()
        if not self._ready:
            return None
        task = self._tasks[heapq.heappop(self._ready)]
        self._settled.add(task)
        return task


def decide(board: Board, free: int, now: float) -> list[Start]:
    """Return what to start, in order: never more than `free`, never before all needs have landed."""
    actions: list[Start] = []
    while len(actions) < free and (task := board.take(now)) is not None:
        actions.append(Start(task))
    return actions
