"""Find dependency cycles between tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter


def find_cycles(needs: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return disjoint cycles, at least one per strongly connected component.

    Each task needs the next one, and the last needs the first. Names without an entry are ignored.
    """
    cycles: list[list[str]] = []
    left = {task: [need for need in of if need in needs] for task, of in needs.items()}
    while left:
        sorter = TopologicalSorter(left)
        with suppress(CycleError):  # tasks outside of cycles can still be sorted
            sorter.prepare()
        removed = set[str]()
        while ready := sorter.get_ready():
            sorter.done(*ready)
            removed.update(ready)
        # Each remaining task needs another one of them, so following first needs leads to a cycle.
        first_needs = {
            task: next(need for need in left[task] if need not in removed) for task in left if task not in removed
        }
        while first_needs:
            task, path = next(iter(first_needs)), list[str]()
            while task in first_needs:
                path.append(task)
                task = first_needs.pop(task)
            if task in path:
                cycles.append(path[path.index(task) :])
                removed.update(cycles[-1])
        left = {task: [need for need in of if need not in removed] for task, of in left.items() if task not in removed}
    return cycles
