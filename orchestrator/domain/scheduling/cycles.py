"""Find dependency cycles between tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def find_cycles(needs: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return disjoint cycles, at least one per strongly connected component.

    Each task needs the next one, and the last needs the first. Names without an entry are ignored. Takes linear time.
    """
    cycles: list[list[str]] = []
    unvisited = {task: iter(of) for task, of in needs.items()}
    for start in needs:
        path = {start: unvisited.pop(start)} if start in unvisited else {}
        while path:
            _, remaining = next(reversed(path.items()))
            for need in remaining:
                if need in unvisited:
                    path[need] = unvisited.pop(need)
                    break
                if need in path:  # the tasks of a cycle are dropped, so that cycles are disjoint
                    cycle = [path.popitem()[0]]
                    while cycle[-1] != need:
                        cycle.append(path.popitem()[0])
                    cycles.append(cycle[::-1])
                    break
            else:
                path.popitem()
    return cycles
