"""Choose the next tasks to start, with dependency counters and heaps of ready and waiting tasks.

There is no clock and no I/O: the scheduler passes the time, starts the tasks that `choose_tasks` returns, and reports
results by `built`, `landed`, `ended`, `wait` and `revive`. Times are monotonic seconds of the scheduler.

Each step costs O(log n) in the number of tasks, plus the adapters and adapter groups, plus, for tasks that own paths,
the live tasks that own paths. `orchestrator.domain.scheduling.ready` handles conflicts between paths.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import NamedTuple

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES, SUCCESS_STATUSES, UNSUCCESSFUL_STATUSES, TaskStatus
from orchestrator.domain.scheduling.ready import AdapterGroup, ReadyLane, ReadyQueue

#: Seconds of waiting that equal one level of priority.
AGING_SECONDS = 600.0

_NO_LIMITS: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class DispatchEntry:
    """The scheduling data of a task; `owns` are patterns of `orchestrator.domain.settings.path_patterns`."""

    needs: tuple[str, ...] = ()
    adapter: str = ""
    priority: int = 0
    """Higher first."""
    owns: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    """Adapters to use, in this order, while the previous one is in cooldown or disabled."""
    workflow: str | None = None
    """The workflow whose phases determine the adapters; `DispatchBoard.wait` sets the current ones."""
    parts: tuple[str, ...] = ()
    """The needs that its own plan created."""
    checks: tuple[str, ...] = ()
    """Commands that must succeed on its merge."""
    allow_failing_base: bool = False
    """Whether it may start even if these fail on the base."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """All adapters that may run it, in order of preference."""
        return (self.adapter, *self.fallback)

    def with_subtasks(self, parts: Sequence[str]) -> DispatchEntry:
        """Return the entry with other tasks that its plan created."""
        if tuple(parts) == self.parts:
            return self
        needs = tuple(need for need in self.needs if need not in self.parts)
        return replace(self, needs=(*needs, *parts), parts=tuple(parts))


def with_subtasks(
    entries: Mapping[str, DispatchEntry], documents: Mapping[str, TaskDocument]
) -> dict[str, DispatchEntry]:
    """Return the entries with the tasks that their plans created, if known, as additional needs."""
    return {
        task: entry.with_subtasks([subtask for subtask in subtasks if subtask in entries])
        if (subtasks := documents[task].subtasks) or entry.parts
        else entry
        for task, entry in entries.items()
    }


class _State(Enum):
    PENDING = auto()
    FRESH = auto()  # ready since the last decision
    READY = auto()
    AWAITING_APPROVAL = auto()
    RUNNING = auto()
    BUILT = auto()
    LANDED = auto()
    OVER = auto()


# Module-level names: each access to an enum member would cost a dictionary lookup.
_PENDING, _FRESH, _READY, _AWAITING_APPROVAL, _RUNNING, _BUILT, _LANDED, _OVER = _State


class _Placement(NamedTuple):
    """What determines when a ready task starts."""

    order: float
    priority: int
    lane: ReadyLane


class DispatchBoard:
    """The scheduling state of all tasks of a run, in file order.

    Of two ready tasks, the one with the higher priority starts first, unless the other one has waited `AGING_SECONDS`
    longer for each level between them; ties go to the first in the file. A task waits from the first decision that
    finds it ready.
    """

    def __init__(self, entries: Mapping[str, DispatchEntry], capacities: Mapping[str, int] = _NO_LIMITS) -> None:
        """Create a board with all tasks pending, and the largest number of concurrent sessions by adapter."""
        self.entries = dict(entries)
        """The entries of all tasks, including those that plans have added."""
        self._state = dict.fromkeys(entries, _PENDING)
        self._missing = {task: len(set(entry.needs)) for task, entry in entries.items()}
        self._dependents: dict[str, list[str]] = {task: [] for task in entries}
        for task, entry in entries.items():
            for need in dict.fromkeys(entry.needs):
                self._dependents[need].append(task)
        self._queue = ReadyQueue(capacities)
        self._placements = {
            task: _Placement(order, entry.priority, self._queue.lane(entry.adapters, entry.owns))
            for order, (task, entry) in enumerate(entries.items())
        }
        self._fresh: list[str] = []
        self._until: dict[str, float] = {}
        self._waiting: dict[AdapterGroup, list[tuple[float, float, str]]] = {
            placement.lane.adapter_group: [] for placement in self._placements.values()
        }
        self.blocked: dict[str, str] = {}
        """Tasks that can no longer start, each with a need that will not land."""
        self.closed: dict[str, str] = {}
        """Disabled adapters, each with the reason."""
        for task in entries:
            self._offer(task)

    @classmethod
    def of(
        cls,
        entries: Mapping[str, DispatchEntry],
        statuses: Mapping[str, TaskStatus],
        capacities: Mapping[str, int] = _NO_LIMITS,
    ) -> DispatchBoard:
        """Return the board of a run in progress. A built task owns its paths until it has landed."""
        board = cls(entries, capacities)
        for task, status in statuses.items():
            if status in SUCCESS_STATUSES:
                board.landed(task)
            elif status is TaskStatus.AWAITING_APPROVAL:
                board.rest(task, keeps_paths=False)
            elif status not in FINAL_STATUSES and status is not TaskStatus.PENDING:
                board._resume(task, running=status is TaskStatus.RUNNING)
        for task, status in statuses.items():
            if status in UNSUCCESSFUL_STATUSES:
                board.ended(task)
        return board

    def add(self, entries: Mapping[str, DispatchEntry], orders: Mapping[str, float]) -> None:
        """Add pending tasks with their file order; they may need each other."""
        self.entries |= entries
        for task, entry in entries.items():
            self._state[task], self._dependents[task] = _PENDING, []
            lane = self._queue.lane(entry.adapters, entry.owns)
            self._placements[task] = _Placement(orders[task], entry.priority, lane)
            self._waiting.setdefault(lane.adapter_group, [])
        for task, entry in entries.items():
            self._link(task, entry.needs)
        for task in entries:
            if task not in self.blocked and not self._is_blocked_by_a_need(task):
                self._offer(task)

    def set_subtasks(self, task: str, parts: Sequence[str]) -> None:
        """Set the tasks that a plan created: the task continues after they have landed.

        Tasks that are no longer among them are no longer needed. The caller then calls `wait`, `rest` or `revive`.
        """
        before = self.entries[task]
        after = self.entries[task] = before.with_subtasks(parts)
        if after is before:
            return
        for need in set(before.needs) - set(after.needs):
            self._dependents[need].remove(task)
        self._link(task, [need for need in after.needs if need not in before.needs])

    def order(self, task: str) -> float:
        """Return the file order of a task."""
        return self._placements[task].order

    def has(self, task: str) -> bool:
        """Whether the board has a task."""
        return task in self.entries

    def built(self, task: str) -> None:
        """Record that a session ended and its work is queued to land: free its slot, but keep its paths."""
        self._free_slot(task)
        self._state[task] = _BUILT

    def landed(self, task: str) -> None:
        """Record that a task has landed, or is done without a landing: tasks that needed only this one may start."""
        self._leave(task, _LANDED)
        for dependent in self._dependents[task]:
            self._missing[dependent] -= 1
            self._offer(dependent)

    def ended(self, task: str) -> None:
        """Record that a task failed or was cancelled: block direct and indirect dependents, each by its own need."""
        self._leave(task, _OVER)
        self.blocked.pop(task, None)
        self._block(task)

    def wait(
        self, task: str, until: float, adapters: tuple[str, ...] | None = None, *, keeps_paths: bool = False
    ) -> None:
        """Let a task start again at `until`, with other adapters if given, in order of preference.

        With `keeps_paths` it owns its paths meanwhile, because it continues its built work. A task that waits for the
        tasks of its plan continues after they have landed, and leaves its paths to them.
        """
        if self._waits_for_parts(task):
            self.rest(task, keeps_paths=False, adapters=adapters)
            self._is_blocked_by_a_need(task)
            return
        self._leave(task, _AWAITING_APPROVAL)
        self._until[task] = until
        self._replace(task, adapters, keeps_paths=keeps_paths)
        placement = self._placements[task]
        heapq.heappush(self._waiting[placement.lane.adapter_group], (until, placement.order, task))

    def place(self, task: str, adapters: tuple[str, ...], *, keeps_paths: bool = False) -> None:
        """Change the adapters of a task that has not started here; for the other arguments see `wait`."""
        state = self._state[task]
        if state is not _PENDING:
            self._leave(task, _PENDING)
        self._replace(task, adapters, keeps_paths=keeps_paths and not self._waits_for_parts(task))
        if state is not _PENDING:
            self._offer(task)

    def rest(self, task: str, *, keeps_paths: bool, adapters: tuple[str, ...] | None = None) -> None:
        """Pause a task until a person decides; `wait` follows, see there for the arguments."""
        self._leave(task, _PENDING)
        self._replace(task, adapters, keeps_paths=keeps_paths)

    def revive(self, task: str) -> None:
        """Retry an ended task: it becomes pending, and so do the tasks that only it blocked."""
        if self._state[task] is not _OVER:
            return
        self._state[task] = _PENDING
        self.blocked[task] = task
        stack = [task]
        while stack:
            current = stack.pop()
            if self.blocked.get(current) is None:
                continue
            need = next((need for need in self.entries[current].needs if self._is_dead(need)), None)
            if need is not None:
                self.blocked[current] = need
                continue
            del self.blocked[current]
            self._offer(current)
            stack.extend(self._dependents[current])

    def sync_task(
        self,
        task: str,
        status: TaskStatus,
        until: float,
        adapters: tuple[str, ...] | None = None,
        *,
        keeps_paths: bool = False,
    ) -> None:
        """Apply the status of a task that another process changed; it may start here again at `until`.

        A task that is active elsewhere takes no slot here, but owns its paths. For the other arguments see `wait`.
        """
        state = self._state[task]
        if state is _OVER and status not in UNSUCCESSFUL_STATUSES:
            self.revive(task)
            state = self._state[task]
        if status in SUCCESS_STATUSES:
            if state is not _LANDED:
                self.landed(task)
        elif status in FINAL_STATUSES:
            if state is not _OVER:
                self.ended(task)
        elif status is TaskStatus.AWAITING_APPROVAL:
            self.rest(task, keeps_paths=keeps_paths)
        elif status is not TaskStatus.PENDING:
            if state is not _BUILT:
                self._leave(task, _BUILT)
                self._queue.keep_paths(task, self.entries[task].owns)
        else:
            self._sync_pending(task, until, adapters, keeps_paths=keeps_paths)

    def _sync_pending(self, task: str, until: float, adapters: tuple[str, ...] | None, *, keeps_paths: bool) -> None:
        has_started = self._state[task] is _RUNNING or self._state[task] is _BUILT
        if not has_started and (self._missing[task] or task in self.blocked):
            if adapters is not None:
                self.place(task, adapters, keeps_paths=keeps_paths)
        elif has_started or adapters is not None:
            self.wait(task, until, adapters, keeps_paths=keeps_paths)

    def entry(self, task: str) -> DispatchEntry:
        """Return the entry of a task."""
        return self.entries[task]

    def adapter_of(self, task: str) -> str:
        """Return the adapter that a task runs with, or would run with now."""
        return self._queue.adapter_of(task, self._placements[task].lane)

    def park(self, adapter: str, until: float) -> None:
        """Put an adapter in cooldown until a time; tasks use their fallback adapters meanwhile."""
        self._queue.park(adapter, until)

    def close(self, adapter: str, reason: str) -> None:
        """Disable an adapter; its running sessions continue, and tasks use their fallback adapters."""
        self.closed[adapter] = reason
        self._queue.close(adapter)

    def open(self, adapter: str) -> None:
        """Enable an adapter that was in cooldown or disabled."""
        self.closed.pop(adapter, None)
        self._queue.open(adapter)

    def next_time(self) -> float | None:
        """Return the earliest end of a wait or cooldown that could let a task start; None if there is none."""
        times: list[float] = []
        for group, waiting in self._waiting.items():
            self._drop_stale(waiting)
            if waiting:
                times.append(max(waiting[0][0], group.parked))
            if self._queue.has_startable_task(group) or (group.parked and self._has_fresh(group)):
                times.append(group.next_opening)
        return min((time for time in times if time < math.inf), default=None)

    def has_work(self) -> bool:
        """Whether a task may start, now or later, without a landing: it is ready, waits, or is held by a session.

        A task that is held by a task queued to land does not count.
        """
        if any(group.parked < math.inf for group in self._groups_with_work()):
            return True
        return any(self._state[task] is _RUNNING for task in self._queue.holders())

    def awaited(self) -> dict[str, float]:
        """Return the adapters in cooldown that all startable tasks wait for, each with the end of its cooldown.

        Empty if any task waits for something else.
        """
        awaited: dict[str, float] = {}
        for group in self._groups_with_work():
            if not group.parked:
                return {}
            awaited |= {adapter.name: adapter.parked for adapter in group.adapters if not adapter.closed}
        return awaited

    def _groups_with_work(self) -> Iterator[AdapterGroup]:
        """Yield the adapter groups with ready or waiting tasks that are not held."""
        for group, waiting in self._waiting.items():
            self._drop_stale(waiting)
            if waiting or self._has_fresh(group) or self._queue.has_startable_task(group):
                yield group

    def running(self) -> int:
        """Return the number of running sessions."""
        return self._queue.running()

    def is_running(self, task: str) -> bool:
        """Whether the last start of a task is still valid: it has neither ended nor been revived since."""
        return self._state[task] is _RUNNING

    def is_over(self, statuses: Mapping[str, TaskStatus]) -> bool:
        """Whether every task is finished or permanently blocked."""
        return not any(self.left(statuses))

    def left(self, statuses: Mapping[str, TaskStatus]) -> Iterator[Sequence[str]]:
        """Yield the adapters of each task that is neither finished nor permanently blocked."""
        for task, status in statuses.items():
            if status not in FINAL_STATUSES and task not in self.blocked:
                yield self.entries[task].adapters

    def take(self, most: int, now: float) -> list[str]:
        """Mark the first tasks that may start now as running, and return them in order."""
        taken, states = self._queue.take(most, now), self._state
        for task in taken:
            states[task] = _RUNNING
        return taken

    def advance(self, now: float) -> None:
        """Add tasks that became ready, and end expired waits and cooldowns."""
        self._queue.unpark(now)
        if self._fresh:
            self._add([task for task in self._fresh if self._state[task] is _FRESH], now)
            self._fresh.clear()
        if not self._until:
            return
        for waiting in self._waiting.values():
            self._drop_stale(waiting)
            while waiting and waiting[0][0] <= now:
                until, _, task = heapq.heappop(waiting)
                del self._until[task]
                self._add([task], until)
                self._drop_stale(waiting)

    def _add(self, tasks: Iterable[str], since: float) -> None:
        states, places, ranks = self._state, self._placements, dict[int, float]()
        ready: list[tuple[float, float, str, ReadyLane]] = []
        for task in tasks:
            states[task] = _READY
            order, priority, lane = places[task]
            # Sharing one float object makes tuple comparisons of ranks faster.
            rank = ranks.get(priority)
            if rank is None:
                rank = ranks[priority] = since / AGING_SECONDS - priority
            ready.append((rank, order, task, lane))
        self._queue.add(ready)

    def _offer(self, task: str) -> None:
        if self._state[task] is _PENDING and not self._missing[task] and task not in self.blocked:
            self._state[task] = _FRESH
            self._fresh.append(task)

    def _leave(self, task: str, state: _State) -> None:
        before = self._state[task]
        self._queue.free_paths(task)
        if before is _RUNNING or before is _BUILT:
            self._free_slot(task)
        elif before is _READY:
            self._queue.discard(task)
        elif before is _AWAITING_APPROVAL:
            del self._until[task]
        self._state[task] = state

    def _free_slot(self, task: str) -> None:
        if self._state[task] is _RUNNING:
            self._queue.free_slot(task)

    def _resume(self, task: str, *, running: bool) -> None:
        self._state[task] = _RUNNING if running else _BUILT
        self._queue.keep_paths(task, self.entries[task].owns)
        if running:
            self._queue.occupy(task, self._placements[task].lane)

    def _replace(self, task: str, adapters: tuple[str, ...] | None, *, keeps_paths: bool) -> None:
        """Move a task to its lane: a task that keeps its paths need not wait for them."""
        entry, placement = self.entries[task], self._placements[task]
        names = adapters or tuple(adapter.name for adapter in placement.lane.adapter_group.adapters)
        if keeps_paths:
            self._queue.keep_paths(task, entry.owns)
        lane = self._queue.lane(names, () if keeps_paths else entry.owns)
        if lane is not placement.lane:
            self._placements[task] = placement._replace(lane=lane)
            self._waiting.setdefault(lane.adapter_group, [])

    def _block(self, task: str) -> None:
        stack = [task]
        while stack:
            need = stack.pop()
            for dependent in self._dependents[need]:
                if dependent not in self.blocked and self._state[dependent] is _PENDING:
                    self.blocked[dependent] = need
                    stack.append(dependent)

    def _link(self, task: str, needs: Iterable[str]) -> None:
        """Add needs of a task."""
        for need in dict.fromkeys(needs):
            self._dependents[need].append(task)
        every = set(self.entries[task].needs)
        self._missing[task] = sum(self._state[need] is not _LANDED for need in every)

    def _waits_for_parts(self, task: str) -> bool:
        return any(self._state[part] is not _LANDED for part in self.entries[task].parts)

    def _is_blocked_by_a_need(self, task: str) -> bool:
        """Block a pending task and its dependents if one of its needs will not land; return whether it was blocked."""
        need = next((need for need in self.entries[task].needs if self._is_dead(need)), None)
        if need is not None:
            self.blocked[task] = need
            self._block(task)
        return need is not None

    def _is_dead(self, need: str) -> bool:
        return self._state[need] is _OVER or need in self.blocked

    def _has_fresh(self, group: AdapterGroup) -> bool:
        return any(
            self._state[task] is _FRESH and self._placements[task].lane.adapter_group is group for task in self._fresh
        )

    def _drop_stale(self, waiting: list[tuple[float, float, str]]) -> None:
        while waiting and self._until.get(waiting[0][2]) != waiting[0][0]:
            heapq.heappop(waiting)


def choose_tasks(board: DispatchBoard, free: int, now: float) -> list[str]:
    """Return the tasks to start, in order: at most `free`, and only after all of their needs have landed."""
    board.advance(now)
    return board.take(free, now)
