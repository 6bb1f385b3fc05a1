"""Track task dependencies, and tasks that are blocked because a need won't land."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping


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


class DependencyGraph:
    """The needs of tasks, and whether these are built, have landed or have ended.

    No operation depends on the total number of tasks.
    """

    def __init__(self, can_block: Callable[[str], bool]) -> None:
        """Create an empty graph; only tasks with `can_block` can be blocked."""
        self._can_block = can_block
        self._needs: dict[str, tuple[str, ...]] = {}
        self._built_needs: dict[str, Collection[str]] = {}
        self._missing: dict[str, int] = {}
        self._dependents: dict[str, list[str]] = defaultdict(list)
        self._landed, self._ended, self._built = set[str](), set[str](), set[str]()
        self.blocked: dict[str, str] = {}
        """Tasks that can no longer start, each with a need that will not land."""

    def set_needs(self, task: str, needs: Iterable[str], built_needs: Collection[str] = ()) -> None:
        """Set the needs of a task, which may be new; of its `built_needs`, built work suffices."""
        before, after = self._needs.get(task, ()), tuple(dict.fromkeys(needs))
        for need in before:
            if need not in after:
                self._dependents[need].remove(task)
        for need in after:
            if need not in before:
                self._dependents[need].append(task)
        self._needs[task] = after
        if built_needs:
            self._built_needs[task] = built_needs
        else:
            self._built_needs.pop(task, None)
        is_fresh = not (self._landed or self._built)
        self._missing[task] = len(after if is_fresh else [need for need in after if self._is_missing(task, need)])

    def _is_missing(self, task: str, need: str) -> bool:
        return need not in self._landed and not (need in self._built and need in self._built_needs.get(task, ()))

    def is_ready(self, task: str) -> bool:
        """Return whether all needs of a task are met, and it is not blocked."""
        return not self._missing[task] and task not in self.blocked

    def has_missing_needs(self, task: str) -> bool:
        """Return whether a need of a task is not met."""
        return self._missing[task] > 0

    def land(self, task: str) -> Iterable[str]:
        """Record that a task has landed; return its dependents."""
        self._ended.discard(task)
        dependents = self._dependents.get(task, ())
        for dependent in dependents:
            self._missing[dependent] -= self._is_missing(dependent, task)
        self._built.discard(task)
        self._landed.add(task)
        return dependents

    def build(self, task: str) -> Iterable[str]:
        """Record that a task has built work; return the dependents for which that suffices."""
        if task in self._built or task in self._landed:
            return ()
        self._built.add(task)
        dependents = self._dependents_on_built(task)
        for dependent in dependents:
            self._missing[dependent] -= 1
        return dependents

    def unbuild(self, task: str) -> Iterable[str]:
        """Record that a task no longer has built work; return the dependents that lack it."""
        if task not in self._built:
            return ()
        self._built.discard(task)
        dependents = self._dependents_on_built(task)
        for dependent in dependents:
            self._missing[dependent] += 1
        return dependents

    def _dependents_on_built(self, task: str) -> list[str]:
        return [one for one in self._dependents.get(task, ()) if task in self._built_needs.get(one, ())]

    def end(self, task: str) -> None:
        """End a task without landing: block all its dependents, by their direct needs."""
        self._landed.discard(task)
        self._ended.add(task)
        self.blocked.pop(task, None)
        self._block_dependents(task)

    def block_if_a_need_will_not_land(self, task: str) -> bool:
        """Block a task and its dependents if a need will not land; return whether it did."""
        need = self._need_that_will_not_land(task)
        if need is not None:
            self.blocked[task] = need
            self._block_dependents(task)
        return need is not None

    def retry(self, task: str) -> list[str]:
        """Retry an ended task; return all unblocked tasks, including this one."""
        self._ended.discard(task)
        self.blocked[task] = task
        retried, stack = list[str](), [task]
        while stack:
            current = stack.pop()
            if current in self.blocked:
                need = self._need_that_will_not_land(current)
                if need is not None:
                    self.blocked[current] = need
                    continue
                del self.blocked[current]
                retried.append(current)
                stack.extend(self._dependents.get(current, ()))
        return retried

    def _need_that_will_not_land(self, task: str) -> str | None:
        return next((need for need in self._needs[task] if need in self._ended or need in self.blocked), None)

    def _block_dependents(self, task: str) -> None:
        stack = [task]
        while stack:
            need = stack.pop()
            for dependent in self._dependents.get(need, ()):
                if dependent not in self.blocked and dependent not in self._ended and self._can_block(dependent):
                    self.blocked[dependent] = need
                    stack.append(dependent)
