"""Plan the order of tasks as waves, and find tasks of a wave that must wait."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from itertools import groupby

from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry
from orchestrator.domain.settings.path_patterns import has_any_overlap, literal_prefix

#: The maximum number of comparisons per wave: tens of thousands of tasks with similar paths would take minutes.
_MOST_COMPARISONS = 50_000


@dataclass(frozen=True, slots=True)
class Wave:
    """Tasks whose needs are all in earlier waves, in start order."""

    tasks: Sequence[str]
    waits_for: Mapping[str, str]
    """Tasks that wait for an earlier task of the wave with overlapping paths, each with that task."""
    is_exact: bool = True
    """False if there were too many tasks with paths to compare: `waits_for` may be incomplete."""


def plan_waves(entries: Mapping[str, DispatchEntry]) -> list[Wave]:
    """Return waves of tasks without cycles; each task is in the earliest possible.

    O(n log n) in tasks and needs, except for tasks that own paths, see `Wave.is_exact`.
    """
    order = {task: index for index, task in enumerate(entries)}
    waves = []
    for tasks in _levels(entries):
        tasks.sort(key=lambda task: (-entries[task].priority, order[task]))
        waves.append(_wave(tasks, entries))
    return waves


def count_concurrent_sessions(
    wave: Wave, entries: Mapping[str, DispatchEntry], capacities: Mapping[str, int], limit: int
) -> int:
    """Return the number of tasks of a wave that start together, up to `limit`."""
    ready = {task: replace(entries[task], needs=()) for task in wave.tasks}
    return len(DispatchBoard(ready, capacities).choose_tasks(limit, 0.0))


def _levels(entries: Mapping[str, DispatchEntry]) -> Iterator[list[str]]:
    sorter = TopologicalSorter({task: entry.needs for task, entry in entries.items()})
    sorter.prepare()
    while sorter.is_active():
        level = list(sorter.get_ready())
        yield level
        sorter.done(*level)


def _wave(tasks: Sequence[str], entries: Mapping[str, DispatchEntry]) -> Wave:
    waits_for: dict[str, str] = {}
    owners = _Owners()
    for task in tasks:
        owns = entries[task].owns
        before = owners.first_that_overlaps(owns)
        if before is not None:
            waits_for[task] = before
        owners.add(task, owns)
    return Wave(tasks, waits_for, owners.comparisons < _MOST_COMPARISONS)


#: An index, owned patterns, and the first task that owns exactly these.
_Owner = tuple[int, tuple[str, ...], str]


class _Owners:
    """An index of owned patterns by literal prefix; each list is ordered by index."""

    def __init__(self) -> None:
        self.comparisons = 0
        self._known: set[tuple[str, ...]] = set()
        self._at: dict[str, list[_Owner]] = defaultdict(list)
        self._below: dict[str, list[_Owner]] = defaultdict(list)

    def add(self, task: str, owns: tuple[str, ...]) -> None:
        """Add a task, unless an earlier one owns exactly the same patterns."""
        if not owns or owns in self._known:
            return
        owner = len(self._known), owns, task
        self._known.add(owns)
        for prefix in map(literal_prefix, owns):
            self._at[prefix].append(owner)
            for shorter in _prefixes(prefix):
                self._below[shorter].append(owner)

    def first_that_overlaps(self, owns: tuple[str, ...]) -> str | None:
        """Return the first task with overlapping paths; None if none within the limit."""
        for _, other, task in self._near(owns):
            if self.comparisons >= _MOST_COMPARISONS:
                return None
            self.comparisons += 1
            if has_any_overlap(other, owns):
                return task
        return None

    def _near(self, owns: tuple[str, ...]) -> Iterator[_Owner]:
        lists = []
        for prefix in map(literal_prefix, owns):
            lists.append(self._below.get(prefix, []))
            lists += [self._at[shorter] for shorter in _prefixes(prefix) if shorter in self._at]
        return (owner for owner, _ in groupby(heapq.merge(*lists)))


def _prefixes(text: str) -> Iterator[str]:
    return (text[:end] for end in range(len(text) + 1))
