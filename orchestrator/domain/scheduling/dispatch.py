"""Choose the next tasks to start, by dependencies and heaps of ready tasks.

There is no clock and no I/O: the scheduler passes the time, starts the tasks that `choose_tasks` returns, and reports
results by `built`, `landed`, `ended`, `wait` and `revive`. Times are monotonic seconds of the scheduler.

Each step costs O(log n) in the number of tasks, plus the adapters and adapter groups, plus, for tasks that own paths,
the live tasks that own paths. `orchestrator.domain.scheduling.ready` handles conflicts between paths.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import NamedTuple

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import (
    CLAIMED_STATUSES,
    FINAL_STATUSES,
    LANDING_STATUSES,
    SUCCESS_STATUSES,
    UNSUCCESSFUL_STATUSES,
    USER_STATUSES,
    TaskStatus,
)
from orchestrator.domain.scheduling.dependencies import DependencyGraph
from orchestrator.domain.scheduling.ready import AdapterGroup, AdapterPool, ReadyLane, ReadyQueue

#: The waiting time in seconds that equals one level of priority.
AGING_SECONDS = 600.0

_NO_LIMITS: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class DispatchEntry:
    """The scheduling data of a task; `owns` are patterns of `settings.path_patterns`."""

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
    """Whether it may start even if its checks fail on the base."""
    plan: str | None = None
    """The handoff with the plan that created it; None: no plan did."""
    tracker: str | None = None
    """The tracker that it comes from."""

    @property
    def is_from_file(self) -> bool:
        """Whether neither a plan nor a tracker created it."""
        return self.plan is None and self.tracker is None

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
    """Return the entries with the known tasks of their plans as additional needs."""
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
    DELAYED = auto()  # may start again at a time
    RUNNING = auto()
    BUILT = auto()
    LANDED = auto()
    OVER = auto()


# Module-level names: each access to an enum member would cost a dictionary lookup.
_PENDING, _FRESH, _READY, _DELAYED, _RUNNING, _BUILT, _LANDED, _OVER = _State


class _Placement(NamedTuple):
    """The properties that determine when a ready task starts."""

    order: float
    priority: int
    lane: ReadyLane


class _WaitingTasks:
    """Tasks that wait until a given time, by adapter group."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._heaps: dict[AdapterGroup, list[tuple[float, float, str]]] = defaultdict(list)

    def add(self, task: str, until: float, placement: _Placement) -> None:
        """Let a task wait until a time."""
        self._until[task] = until
        heapq.heappush(self._heaps[placement.lane.adapter_group], (until, placement.order, task))

    def discard(self, task: str) -> None:
        """Forget a task."""
        del self._until[task]

    def first(self, group: AdapterGroup) -> float | None:
        """Return the earliest time of a group's tasks; None if there are none."""
        heap = self._heaps.get(group, [])
        while heap and self._until.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def take_due(self, now: float) -> Iterator[tuple[str, float]]:
        """Remove and yield the tasks that are due, with their times."""
        for group, heap in self._heaps.items() if self._until else ():
            while (first := self.first(group)) is not None and first <= now:
                until, _, task = heapq.heappop(heap)
                del self._until[task]
                yield task, until


class DispatchBoard:
    """The scheduling state of all tasks of a run, in file order.

    Of two ready tasks, the one with the higher priority starts first, unless the other one has waited `AGING_SECONDS`
    longer for each level between them; ties are resolved by file order. The wait starts at the first decision that
    finds the task ready.
    """

    def __init__(self, entries: Mapping[str, DispatchEntry], capacities: Mapping[str, int] = _NO_LIMITS) -> None:
        """Create a board of pending tasks; `capacities` limits sessions by adapter."""
        self.entries = dict(entries)
        """The entries of all tasks, including those that plans have added."""
        self._state = dict.fromkeys(entries, _PENDING)
        needs = {task: entry.needs for task, entry in entries.items()}
        self._graph = DependencyGraph(needs, lambda task: self._state[task] is _PENDING)
        self.blocked: Mapping[str, str] = self._graph.blocked
        """Tasks that can no longer start, each with a need that will not land."""
        self._adapters = AdapterPool(capacities)
        self._queue = ReadyQueue(self._adapters)
        self._placements = {
            task: _Placement(order, entry.priority, self._queue.lane(entry.adapters, entry.owns))
            for order, (task, entry) in enumerate(entries.items())
        }
        self._fresh: list[str] = []
        self._waiting = _WaitingTasks()
        self.disabled: dict[str, str] = {}
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
        """Return the board of a run in progress; built tasks own paths until they land."""
        board = cls(entries, capacities)
        for task, status in statuses.items():
            if status in SUCCESS_STATUSES:
                board.landed(task)
            elif status in USER_STATUSES:
                board.rest(task, keeps_paths=False)
            elif status in CLAIMED_STATUSES:
                board._resume(task, running=status not in LANDING_STATUSES)
        for task, status in statuses.items():
            if status in UNSUCCESSFUL_STATUSES:
                board.ended(task)
        return board

    def add(self, entries: Mapping[str, DispatchEntry], file_order: Iterable[str]) -> None:
        """Add pending tasks at their positions; they may need each other."""
        orders = self._positions(entries, file_order)
        self.entries |= entries
        for task, entry in entries.items():
            self._state[task] = _PENDING
            lane = self._queue.lane(entry.adapters, entry.owns)
            self._placements[task] = _Placement(orders[task], entry.priority, lane)
        for task, entry in entries.items():
            self._graph.set_needs(task, entry.needs)
        for task in entries:
            if task not in self.blocked and not self._graph.block_if_a_need_will_not_land(task):
                self._offer(task)

    def _positions(self, new: Container[str], file_order: Iterable[str]) -> dict[str, float]:
        """Return fractional positions of new tasks within the gaps of existing ones."""
        positions: dict[str, float] = {}
        group: list[str] = []
        before = -1.0
        for task in (*file_order, None):
            if task is not None and task in new:
                group.append(task)
                continue
            here = before + 1.0 if task is None else self._placements[task].order
            share = (here - before) / (len(group) + 1)
            positions |= {member: before + share * number for number, member in enumerate(group, 1)}
            group, before = [], here
        return positions

    def set_subtasks(self, task: str, parts: Sequence[str]) -> None:
        """Set the subtasks from a task's plan: the task continues after they have landed.

        Previous subtasks are no longer needed. Call `wait`, `rest` or `revive` afterwards.
        """
        self.entries[task] = self.entries[task].with_subtasks(parts)
        self._graph.set_needs(task, self.entries[task].needs)

    def built(self, task: str) -> None:
        """Queue a task to land: release its capacity, but not its paths."""
        self._free_slot(task)
        self._state[task] = _BUILT

    def landed(self, task: str) -> None:
        """Record that a task landed, or is done without landing: dependents may start."""
        self._leave(task, _LANDED)
        for dependent in self._graph.land(task):
            self._offer(dependent)

    def ended(self, task: str) -> None:
        """Record that a task failed or was cancelled: block its dependents.

        Each is blocked by its direct need.
        """
        self._leave(task, _OVER)
        self._graph.end(task)

    def wait(
        self, task: str, until: float, adapters: tuple[str, ...] | None = None, *, keeps_paths: bool = False
    ) -> None:
        """Let a task wait until `until`; `adapters` replaces its adapters by preference.

        With `keeps_paths`, it owns its paths while waiting, because it continues its built work. A task that waits for
        its subtasks continues after they have landed, and leaves its paths to them.
        """
        if self._waits_for_parts(task):
            self.rest(task, keeps_paths=False, adapters=adapters)
            self._graph.block_if_a_need_will_not_land(task)
            return
        self._leave(task, _DELAYED)
        self._replace(task, adapters, keeps_paths=keeps_paths)
        self._waiting.add(task, until, self._placements[task])

    def place(self, task: str, adapters: tuple[str, ...], *, keeps_paths: bool = False) -> None:
        """Change the adapters of a task that has not started here; see `wait`."""
        state = self._state[task]
        if state is not _PENDING:
            self._leave(task, _PENDING)
        self._replace(task, adapters, keeps_paths=keeps_paths and not self._waits_for_parts(task))
        if state is not _PENDING:
            self._offer(task)

    def rest(self, task: str, *, keeps_paths: bool, adapters: tuple[str, ...] | None = None) -> None:
        """Pause a task for a user's decision. See `wait`, which continues it."""
        self._leave(task, _PENDING)
        self._replace(task, adapters, keeps_paths=keeps_paths)

    def revive(self, task: str) -> None:
        """Retry an ended task: it and the tasks that only it blocked become pending."""
        if self._state[task] is _OVER:
            self._state[task] = _PENDING
            for revived in self._graph.revive(task):
                self._offer(revived)

    def sync_task(
        self,
        task: str,
        status: TaskStatus,
        until: float,
        adapters: tuple[str, ...] | None = None,
        *,
        keeps_paths: bool = False,
    ) -> None:
        """Apply a status from another process; the task may start here at `until`.

        A task that is active elsewhere uses no capacity here, but owns its paths. For other arguments see `wait`.
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
        elif status in USER_STATUSES:
            self.rest(task, keeps_paths=keeps_paths)
        elif status in CLAIMED_STATUSES:
            if state is _RUNNING:
                self.built(task)
            elif state is not _BUILT:
                self._leave(task, _BUILT)
                self._queue.keep_paths(task, self.entries[task].owns)
        else:
            self._sync_pending(task, until, adapters, keeps_paths=keeps_paths)

    def _sync_pending(self, task: str, until: float, adapters: tuple[str, ...] | None, *, keeps_paths: bool) -> None:
        has_started = self._state[task] is _RUNNING or self._state[task] is _BUILT
        if not has_started and not self._graph.is_ready(task):
            if adapters is not None:
                self.place(task, adapters, keeps_paths=keeps_paths)
        elif has_started or adapters is not None:
            self.wait(task, until, adapters, keeps_paths=keeps_paths)

    def adapter_of(self, task: str) -> str:
        """Return the adapter that runs a task, or would run it now."""
        return self._adapters.adapter_of(task, self._placements[task].lane.adapter_group)

    def start_cooldown(self, adapter: str, until: float) -> None:
        """Put an adapter in cooldown until a time, during which tasks use their fallback."""
        self._adapters.start_cooldown(adapter, until)
        self._queue.release_unavailable()

    def disable(self, adapter: str, reason: str) -> None:
        """Disable an adapter for new sessions; tasks use their fallback adapters."""
        self.disabled[adapter] = reason
        self._adapters.disable(adapter)
        self._queue.release_unavailable()

    def enable(self, adapter: str) -> None:
        """Enable an adapter that was in cooldown or disabled."""
        self.disabled.pop(adapter, None)
        self._adapters.enable(adapter)

    def next_time(self) -> float | None:
        """Return when the next wait or cooldown ends that delays a task, or None."""
        times: list[float] = []
        for group in self._adapters.groups():
            if (first := self._waiting.first(group)) is not None:
                times.append(max(first, group.available_at))
            if self._queue.has_startable_task(group) or (group.available_at and self._has_fresh(group)):
                times.append(group.next_change)
        return min((time for time in times if time < math.inf), default=None)

    def has_work(self) -> bool:
        """Return whether a task may start, now or later, without a landing.

        It is ready, waiting, or held by a session. A task that is held by a task queued to land does not count.
        """
        if any(group.available_at < math.inf for group in self._groups_with_work()):
            return True
        return any(self._state[task] is _RUNNING for task in self._queue.holders())

    def awaited(self) -> dict[str, float]:
        """Return the adapters in cooldown, with their ends, if all tasks wait for them.

        Empty if any task waits for another reason.
        """
        awaited: dict[str, float] = {}
        for group in self._groups_with_work():
            if not group.available_at:
                return {}
            awaited |= {adapter.name: adapter.available_at for adapter in group.adapters if not adapter.disabled}
        return awaited

    def _groups_with_work(self) -> Iterator[AdapterGroup]:
        """Yield the adapter groups with ready or waiting tasks that are not held."""
        for group in self._adapters.groups():
            if (
                self._waiting.first(group) is not None
                or self._has_fresh(group)
                or self._queue.has_startable_task(group)
            ):
                yield group

    def running(self) -> int:
        """Return the number of running sessions."""
        return self._adapters.running()

    def is_running(self, task: str) -> bool:
        """Return whether the last start of a task neither ended nor was revived since."""
        return self._state[task] is _RUNNING

    def left(self, statuses: Mapping[str, TaskStatus]) -> Iterator[Sequence[str]]:
        """Yield the adapters of each task that is not finished or permanently blocked."""
        for task, status in statuses.items():
            if status not in FINAL_STATUSES and task not in self.blocked:
                yield self.entries[task].adapters

    def choose_tasks(self, limit: int, now: float) -> list[str]:
        """Return the tasks to start, in order, at most `most`; they count as running."""
        self._advance(now)
        taken, states = self._queue.take(limit, now), self._state
        for task in taken:
            states[task] = _RUNNING
        return taken

    def _advance(self, now: float) -> None:
        """Add tasks that became ready, and end expired waits and cooldowns."""
        self._adapters.end_cooldowns(now)
        if self._fresh:
            self._add([task for task in self._fresh if self._state[task] is _FRESH], now)
            self._fresh.clear()
        for task, until in self._waiting.take_due(now):
            self._add([task], until)

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
        if self._state[task] is _PENDING and self._graph.is_ready(task):
            self._state[task] = _FRESH
            self._fresh.append(task)

    def _leave(self, task: str, state: _State) -> None:
        before = self._state[task]
        self._queue.free_paths(task)
        if before is _RUNNING or before is _BUILT:
            self._free_slot(task)
        elif before is _READY:
            self._queue.discard(task)
        elif before is _DELAYED:
            self._waiting.discard(task)
        self._state[task] = state

    def _free_slot(self, task: str) -> None:
        if self._state[task] is _RUNNING:
            self._adapters.free(task)

    def _resume(self, task: str, *, running: bool) -> None:
        self._state[task] = _RUNNING if running else _BUILT
        self._queue.keep_paths(task, self.entries[task].owns)
        if running:
            self._adapters.occupy(task, self._placements[task].lane.adapter_group)

    def _replace(self, task: str, adapters: tuple[str, ...] | None, *, keeps_paths: bool) -> None:
        """Move a task to its lane; a task that keeps its paths does not wait for them."""
        entry, placement = self.entries[task], self._placements[task]
        names = adapters or tuple(adapter.name for adapter in placement.lane.adapter_group.adapters)
        if keeps_paths:
            self._queue.keep_paths(task, entry.owns)
        lane = self._queue.lane(names, () if keeps_paths else entry.owns)
        if lane is not placement.lane:
            self._placements[task] = placement._replace(lane=lane)

    def _waits_for_parts(self, task: str) -> bool:
        return not all(map(self._graph.has_landed, self.entries[task].parts))

    def _has_fresh(self, group: AdapterGroup) -> bool:
        return any(
            self._state[task] is _FRESH and self._placements[task].lane.adapter_group is group for task in self._fresh
        )
