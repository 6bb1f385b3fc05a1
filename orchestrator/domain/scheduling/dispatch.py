"""Which task starts next: dependency counters, and heaps for what is ready and what waits.

No clock and no I/O here: the scheduler says what time it is, performs what `decide` returns, and feeds what
came of it back by `built`, `landed`, `ended`, `wait` and `revive`. Times are its monotonic seconds.

Each step costs O(log n) in the number of tasks, plus the adapters and the lists of them that tasks name, plus, for
tasks that own paths, a look at the live tasks that do. How tasks with paths wait for each other is in
`orchestrator.domain.scheduling.ready`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import NamedTuple

from orchestrator.domain.runs.model import (
    FINAL_STATUSES,
    RETRYABLE_STATUSES,
    SUCCESS_STATUSES,
    TaskDocument,
    TaskStatus,
)
from orchestrator.domain.scheduling.ready import AdapterGroup, ReadyLane, ReadyQueue

#: Seconds of waiting that are worth one level of priority.
AGING_SECONDS = 600.0

_NO_LIMITS: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class DispatchEntry:
    """What decisions need of a task; `owns` are patterns of `orchestrator.domain.scheduling.path_patterns`."""

    needs: tuple[str, ...] = ()
    adapter: str = ""
    priority: int = 0
    """Higher first."""
    owns: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    """Adapters that stand in, in this order, where the one before is parked or closed."""
    workflow: str | None = None
    """The workflow whose phases say which adapters these are, and `DispatchBoard.wait` which at the time."""
    parts: tuple[str, ...] = ()
    """Of the needs, the tasks that its own plan became."""
    checks: tuple[str, ...] = ()
    """Commands that its merge has to pass."""
    allow_failing_base: bool = False
    """Whether it may start though these fail on the base."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """All that may run it, the best first."""
        return (self.adapter, *self.fallback)

    def with_subtasks(self, parts: Sequence[str]) -> DispatchEntry:
        """Return the same with other tasks that its plan became."""
        if tuple(parts) == self.parts:
            return self
        needs = tuple(need for need in self.needs if need not in self.parts)
        return replace(self, needs=(*needs, *parts), parts=tuple(parts))


def with_subtasks(
    entries: Mapping[str, DispatchEntry], documents: Mapping[str, TaskDocument]
) -> dict[str, DispatchEntry]:
    """Return entries by what their tasks need as these stand: also the tasks that their plans became, if known."""
    return {
        task: entry.with_subtasks([one for one in documents[task].expanded if one in entries])
        for task, entry in entries.items()
    }


class _State(Enum):
    PENDING = auto()
    FRESH = auto()  # ready since the last decision
    READY = auto()
    WAITING = auto()
    RUNNING = auto()
    BUILT = auto()
    LANDED = auto()
    OVER = auto()


# Each look at a member of an enumeration would cost as much as a look into a dictionary.
_PENDING, _FRESH, _READY, _WAITING, _RUNNING, _BUILT, _LANDED, _OVER = _State


class _Place(NamedTuple):
    """What of a task says when it starts once it is ready."""

    order: float
    priority: int
    lane: ReadyLane


class DispatchBoard:
    """The tasks of a run as the scheduler's decisions see them, in the order of the file.

    Of two tasks that are ready the one with the higher priority starts first, unless the other has waited `AGING_SECONDS`
    seconds longer for each level between them; of equals the first of the file. A task waits since the first decision
    that finds it ready.
    """

    def __init__(self, entries: Mapping[str, DispatchEntry], capacities: Mapping[str, int] = _NO_LIMITS) -> None:
        """Take every task by its id, all of them pending, and how many sessions each adapter may have at once."""
        self._entries = dict(entries)
        self._state = dict.fromkeys(entries, _PENDING)
        self._missing = {task: len(set(entry.needs)) for task, entry in entries.items()}
        self._dependents: dict[str, list[str]] = {task: [] for task in entries}
        for task, entry in entries.items():
            for need in dict.fromkeys(entry.needs):
                self._dependents[need].append(task)
        self._queue = ReadyQueue(capacities)
        self._places = {
            task: _Place(order, entry.priority, self._queue.lane(entry.adapters, entry.owns))
            for order, (task, entry) in enumerate(entries.items())
        }
        self._fresh: list[str] = []
        self._until: dict[str, float] = {}
        self._waiting: dict[AdapterGroup, list[tuple[float, float, str]]] = {
            place.lane.adapter_group: [] for place in self._places.values()
        }
        self.blocked: dict[str, str] = {}
        """Tasks that can't start any more, each with a need that will not land."""
        self.closed: dict[str, str] = {}
        """Adapters of which nothing starts any more, each with the reason."""
        for task in entries:
            self._offer(task)

    @classmethod
    def of(
        cls,
        entries: Mapping[str, DispatchEntry],
        statuses: Mapping[str, TaskStatus],
        capacities: Mapping[str, int] = _NO_LIMITS,
    ) -> DispatchBoard:
        """Return the board of a run that is under way. What is built owns its paths until it has landed."""
        board = cls(entries, capacities)
        for task, status in statuses.items():
            if status in SUCCESS_STATUSES:
                board.landed(task)
            elif status is TaskStatus.WAITING:
                board.rest(task, keeps_paths=False)
            elif status not in FINAL_STATUSES and status is not TaskStatus.PENDING:
                board._resume(task, running=status is TaskStatus.RUNNING)
        for task, status in statuses.items():
            if status in RETRYABLE_STATUSES:
                board.ended(task)
        return board

    def add(self, entries: Mapping[str, DispatchEntry], orders: Mapping[str, float]) -> None:
        """Take more tasks, pending, each of which stands at a place of the file; they may need each other."""
        self._entries |= entries
        for task, entry in entries.items():
            self._state[task], self._dependents[task] = _PENDING, []
            lane = self._queue.lane(entry.adapters, entry.owns)
            self._places[task] = _Place(orders[task], entry.priority, lane)
            self._waiting.setdefault(lane.adapter_group, [])
        for task, entry in entries.items():
            self._link(task, entry.needs)
        for task in entries:
            if task not in self.blocked and not self._is_blocked_by_a_need(task):
                self._offer(task)

    def set_subtasks(self, task: str, parts: Sequence[str]) -> None:
        """The plan of a task became these: it goes on only once they have landed. `wait`, `rest` or `revive` follows.

        Where they are fewer than before, the others are nothing to it any more.
        """
        before = self._entries[task]
        after = self._entries[task] = before.with_subtasks(parts)
        if after is before:
            return
        for need in set(before.needs) - set(after.needs):
            self._dependents[need].remove(task)
        self._link(task, [need for need in after.needs if need not in before.needs])

    def order(self, task: str) -> float:
        """Return the place of a task in the file."""
        return self._places[task].order

    def has(self, task: str) -> bool:
        """Whether a task is known here."""
        return task in self._entries

    def built(self, task: str) -> None:
        """The session is over and its work waits to land: its slot is free, its paths stay its own."""
        self._free_slot(task)
        self._state[task] = _BUILT

    def landed(self, task: str) -> None:
        """The task is on the target, or done without that: what needed only this may start."""
        self._leave(task, _LANDED)
        for dependent in self._dependents[task]:
            self._missing[dependent] -= 1
            self._offer(dependent)

    def ended(self, task: str) -> None:
        """The task failed or was cancelled: what needs it, directly or not, is blocked by the need next to it."""
        self._leave(task, _OVER)
        self.blocked.pop(task, None)
        self._block(task)

    def wait(
        self, task: str, until: float, adapters: tuple[str, ...] | None = None, *, keeps_paths: bool = False
    ) -> None:
        """The task may start again at `until`, with other adapters if some are named, the best first.

        With `has_built_work` they stay its own meanwhile, since it goes on with what it has built. What waits for the
        tasks that its plan became goes on when they have landed, and leaves its paths to them.
        """
        if self._waits_for_parts(task):
            self.rest(task, keeps_paths=False, adapters=adapters)
            self._is_blocked_by_a_need(task)
            return
        self._leave(task, _WAITING)
        self._until[task] = until
        self._replace(task, adapters, keeps_paths=keeps_paths)
        place = self._places[task]
        heapq.heappush(self._waiting[place.lane.adapter_group], (until, place.order, task))

    def place(self, task: str, adapters: tuple[str, ...], *, keeps_paths: bool = False) -> None:
        """Have other adapters run a task that nothing of has begun here; for the rest see `wait`."""
        state = self._state[task]
        if state is not _PENDING:
            self._leave(task, _PENDING)
        self._replace(task, adapters, keeps_paths=keeps_paths and not self._waits_for_parts(task))
        if state is not _PENDING:
            self._offer(task)

    def rest(self, task: str, *, keeps_paths: bool, adapters: tuple[str, ...] | None = None) -> None:
        """A person is to say how the task goes on; `wait` is to follow, for the rest see there."""
        self._leave(task, _PENDING)
        self._replace(task, adapters, keeps_paths=keeps_paths)

    def revive(self, task: str) -> None:
        """A task that had ended is to be tried again: it and what only it blocked are pending again."""
        if self._state[task] is not _OVER:
            return
        self._state[task] = _PENDING
        self.blocked[task] = task
        stack = [task]
        while stack:
            one = stack.pop()
            if self.blocked.get(one) is None:
                continue
            need = next((need for need in self._entries[one].needs if self._is_dead(need)), None)
            if need is not None:
                self.blocked[one] = need
                continue
            del self.blocked[one]
            self._offer(one)
            stack.extend(self._dependents[one])

    def sync_task(
        self,
        task: str,
        status: TaskStatus,
        until: float,
        adapters: tuple[str, ...] | None = None,
        *,
        keeps_paths: bool = False,
    ) -> None:
        """Take over where a task is that somebody else has moved; it may start again at `until` where that is here.

        One that is at work elsewhere takes no slot here, and its paths are its own. For the rest see `wait`.
        """
        state = self._state[task]
        if state is _OVER and status not in RETRYABLE_STATUSES:
            self.revive(task)
            state = self._state[task]
        if status in SUCCESS_STATUSES:
            if state is not _LANDED:
                self.landed(task)
        elif status in FINAL_STATUSES:
            if state is not _OVER:
                self.ended(task)
        elif status is TaskStatus.WAITING:
            self.rest(task, keeps_paths=keeps_paths)
        elif status is not TaskStatus.PENDING:
            if state is not _BUILT:
                self._leave(task, _BUILT)
                self._queue.keep_paths(task, self._entries[task].owns)
        elif state is _RUNNING or state is _BUILT or adapters is not None:
            self.wait(task, until, adapters, keeps_paths=keeps_paths)

    def entry(self, task: str) -> DispatchEntry:
        """Return what was told of a task."""
        return self._entries[task]

    def adapter_of(self, task: str) -> str:
        """Return the adapter that a task runs with, if it runs, or would run with now."""
        return self._queue.adapter_of(task, self._places[task].lane)

    def park(self, adapter: str, until: float) -> None:
        """Start nothing with this adapter before that time; what has another to fall back on goes there until then."""
        self._queue.park(adapter, until)

    def close(self, adapter: str, reason: str) -> None:
        """Start nothing with this adapter any more; sessions that run go on, what has a fallback goes there."""
        self.closed[adapter] = reason
        self._queue.close(adapter)

    def open(self, adapter: str) -> None:
        """Start tasks with an adapter again that was parked or closed."""
        self.closed.pop(adapter, None)
        self._queue.open(adapter)

    def next_time(self) -> float | None:
        """Return when the earliest wait or park ends that could let something start; None if none could."""
        times: list[float] = []
        for roster, waiting in self._waiting.items():
            self._drop_stale(waiting)
            if waiting:
                times.append(max(waiting[0][0], roster.parked))
            if self._queue.has_startable_task(roster) or (roster.parked and self._has_fresh(roster)):
                times.append(roster.next_opening)
        return min((time for time in times if time < math.inf), default=None)

    def has_work(self) -> bool:
        """Whether something may start, now or later, without a landing: it is ready, waits, or is held by a session.

        What is held by a task that waits to land is no work by itself: that landing is.
        """
        if any(roster.parked < math.inf for roster in self._rosters_with_work()):
            return True
        return any(self._state[task] is _RUNNING for task in self._queue.holders())

    def awaited(self) -> dict[str, float]:
        """Return the parked adapters that all that could still start waits for, each with the time at which it is open.

        Empty if something waits for anything else.
        """
        found: dict[str, float] = {}
        for roster in self._rosters_with_work():
            if not roster.parked:
                return {}
            found |= {one.name: one.parked for one in roster.adapters if not one.closed}
        return found

    def _rosters_with_work(self) -> Iterator[AdapterGroup]:
        """Yield the adapters of what is ready or waits and is not held."""
        for roster, waiting in self._waiting.items():
            self._drop_stale(waiting)
            if waiting or self._has_fresh(roster) or self._queue.has_startable_task(roster):
                yield roster

    def running(self) -> int:
        """How many sessions there are."""
        return self._queue.running()

    def is_running(self, task: str) -> bool:
        """Whether the start of a task, as last decided, still holds: it has neither ended nor been revived since."""
        return self._state[task] is _RUNNING

    def is_over(self, statuses: Mapping[str, TaskStatus]) -> bool:
        """Whether every task is in a final status or blocked for good."""
        return not any(self.left(statuses))

    def left(self, statuses: Mapping[str, TaskStatus]) -> Iterator[Sequence[str]]:
        """Yield, of each task that is neither in a final status nor blocked for good, the adapters that may run it."""
        for task, status in statuses.items():
            if status not in FINAL_STATUSES and task not in self.blocked:
                yield self._entries[task].adapters

    def take(self, most: int, now: float) -> list[str]:
        """Remove and return the best placed tasks that may start now, in order; they run from then on."""
        taken, states = self._queue.take(most, now), self._state
        for task in taken:
            states[task] = _RUNNING
        return taken

    def advance(self, now: float) -> None:
        """Make ready what became so, and end the waits and parks that are over."""
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
        states, places, ranks = self._state, self._places, dict[int, float]()
        ready: list[tuple[float, float, str, ReadyLane]] = []
        for task in tasks:
            states[task] = _READY
            order, priority, lane = places[task]
            # What is the same object need not be compared when tasks are.
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
        elif before is _WAITING:
            del self._until[task]
        self._state[task] = state

    def _free_slot(self, task: str) -> None:
        if self._state[task] is _RUNNING:
            self._queue.free_slot(task)

    def _resume(self, task: str, *, running: bool) -> None:
        self._state[task] = _RUNNING if running else _BUILT
        self._queue.keep_paths(task, self._entries[task].owns)
        if running:
            self._queue.occupy(task, self._places[task].lane)

    def _replace(self, task: str, adapters: tuple[str, ...] | None, *, keeps_paths: bool) -> None:
        """Have a task wait where it belongs: whoever keeps its paths need not wait for them."""
        entry, place = self._entries[task], self._places[task]
        names = adapters or tuple(one.name for one in place.lane.adapter_group.adapters)
        if keeps_paths:
            self._queue.keep_paths(task, entry.owns)
        lane = self._queue.lane(names, () if keeps_paths else entry.owns)
        if lane is not place.lane:
            self._places[task] = place._replace(lane=lane)
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
        """Have a task wait for more."""
        for need in dict.fromkeys(needs):
            self._dependents[need].append(task)
        every = set(self._entries[task].needs)
        self._missing[task] = sum(self._state[need] is not _LANDED for need in every)

    def _waits_for_parts(self, task: str) -> bool:
        return any(self._state[part] is not _LANDED for part in self._entries[task].parts)

    def _is_blocked_by_a_need(self, task: str) -> bool:
        """Block a pending task, and what needs it, where one of its own needs will not land; whether that is so."""
        need = next((need for need in self._entries[task].needs if self._is_dead(need)), None)
        if need is not None:
            self.blocked[task] = need
            self._block(task)
        return need is not None

    def _is_dead(self, need: str) -> bool:
        return self._state[need] is _OVER or need in self.blocked

    def _has_fresh(self, roster: AdapterGroup) -> bool:
        return any(
            self._state[task] is _FRESH and self._places[task].lane.adapter_group is roster for task in self._fresh
        )

    def _drop_stale(self, waiting: list[tuple[float, float, str]]) -> None:
        while waiting and self._until.get(waiting[0][2]) != waiting[0][0]:
            heapq.heappop(waiting)


def choose_tasks(board: DispatchBoard, free: int, now: float) -> list[str]:
    """Return the tasks to start, in order: never more than `free`, never before all needs have landed."""
    board.advance(now)
    return board.take(free, now)
