"""Tasks that become ready, and when tasks may start."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

from orchestrator.domain.scheduling.ready import AdapterGroup, AdapterPool, ReadyBucket, ReadyQueue


class Placement(NamedTuple):
    """The properties that determine when a ready task starts."""

    order: float
    priority: int
    bucket: ReadyBucket


class Placements:
    """The placement of each task of a run."""

    def __init__(self, queue: ReadyQueue) -> None:
        self._queue = queue
        self._placements: dict[str, Placement] = {}

    def __getitem__(self, task: str) -> Placement:
        return self._placements[task]

    def add(self, task: str, order: float, priority: int, adapters: tuple[str, ...], owns: tuple[str, ...]) -> None:
        """Add a task."""
        self._placements[task] = Placement(order, priority, self._queue.bucket(adapters, owns))

    def positions(self, new: Container[str], file_order: Iterable[str]) -> dict[str, float]:
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

    def change(self, task: str, owns: tuple[str, ...], adapters: tuple[str, ...] | None, *, keeps_paths: bool) -> None:
        """Move a task to the bucket of its new adapters.

        A task that keeps its paths does not wait for them.
        """
        placement = self._placements[task]
        names = adapters or tuple(adapter.name for adapter in placement.bucket.adapter_group.adapters)
        if keeps_paths:
            self._queue.keep_paths(task, owns)
        bucket = self._queue.bucket(names, () if keeps_paths else owns)
        if bucket is not placement.bucket:
            self._placements[task] = placement._replace(bucket=bucket)


class UpcomingTasks:
    """Tasks that are ready at the next decision or at a given time, by adapter group."""

    def __init__(self) -> None:
        self._fresh: dict[str, AdapterGroup] = {}
        """Tasks that are ready since the last decision."""
        self._until: dict[str, float] = {}
        self._heaps: dict[AdapterGroup, list[tuple[float, float, str]]] = defaultdict(list)

    def offer(self, task: str, placement: Placement) -> None:
        """Add a task that is ready at the next decision."""
        self._fresh[task] = placement.bucket.adapter_group

    def delay(self, task: str, until: float, placement: Placement) -> None:
        """Add a task that is ready at a time."""
        self._until[task] = until
        heapq.heappush(self._heaps[placement.bucket.adapter_group], (until, placement.order, task))

    def discard(self, task: str) -> None:
        """Remove a task."""
        if self._fresh.pop(task, None) is None:
            del self._until[task]

    def has_fresh(self, group: AdapterGroup) -> bool:
        """Return whether a task of a group is ready at the next decision."""
        return group in self._fresh.values()

    def first(self, group: AdapterGroup) -> float | None:
        """Return the earliest time of a group's tasks; None if there are none."""
        heap = self._heaps.get(group, [])
        while heap and self._until.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def take_due(self, now: float) -> Iterator[tuple[Iterable[str], float]]:
        """Remove and yield the tasks that are ready, each group with its time."""
        if self._fresh:
            fresh, self._fresh = self._fresh, {}
            yield fresh, now
        for group, heap in self._heaps.items() if self._until else ():
            while (first := self.first(group)) is not None and first <= now:
                until, _, task = heapq.heappop(heap)
                del self._until[task]
                yield [task], until


class StartForecast:
    """Predicts whether and when tasks may start."""

    def __init__(self, adapters: AdapterPool, queue: ReadyQueue, upcoming: UpcomingTasks) -> None:
        self._adapters, self._queue, self._upcoming = adapters, queue, upcoming

    def next_time(self) -> float | None:
        """Return when the next wait or cooldown ends that delays a task, or None."""
        times: list[float] = []
        for group in self._adapters.groups():
            if (first := self._upcoming.first(group)) is not None:
                times.append(max(first, group.available_at))
            if self._queue.has_startable_task(group) or (group.available_at and self._upcoming.has_fresh(group)):
                times.append(group.next_change)
        return min((time for time in times if time < math.inf), default=None)

    def has_work(self) -> bool:
        """Return whether a task may start, now or later, without a landing.

        It is ready, waiting, or held by a session. A task that is held by a task queued to land does not count.
        """
        if any(group.available_at < math.inf for group in self._groups_with_work()):
            return True
        return any(self._adapters.is_running(task) for task in self._queue.holders())

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
                self._upcoming.first(group) is not None
                or self._upcoming.has_fresh(group)
                or self._queue.has_startable_task(group)
            ):
                yield group
