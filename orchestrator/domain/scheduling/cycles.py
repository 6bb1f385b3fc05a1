"""Find dependency cycles between tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Path:
    """The current search path; `covered[i]` is the last node up to i that is in a reported cycle."""

    nodes: list[str] = field(default_factory=list)
    covered: list[int] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)
    open: list[Iterator[str]] = field(default_factory=list)

    def enter(self, node: str, needs: Iterable[str]) -> None:
        self.index[node] = len(self.nodes)
        self.covered.append(self.covered[-1] if self.covered else -1)
        self.nodes.append(node)
        self.open.append(iter(needs))

    def leave(self) -> None:
        del self.index[self.nodes.pop()]
        self.covered.pop()
        self.open.pop()

    def close(self, node: str) -> list[str] | None:
        """Return the cycle back to a node, unless it overlaps with an earlier cycle."""
        start = self.index[node]
        if self.covered[-1] >= start:
            return None
        self.covered[start:] = range(start, len(self.nodes))
        return self.nodes[start:]


def find_cycles(needs: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return disjoint cycles, at least one per strongly connected component.

    Each task needs the next one, and the last needs the first. Names without an entry are ignored. Linear in the number
    of needs, without recursion.
    """
    cycles: list[list[str]] = []
    seen: set[str] = set()
    for start in needs:
        if start in seen:
            continue
        path = _Path()
        seen.add(start)
        path.enter(start, needs[start])
        while path.open:
            node = next(path.open[-1], None)
            if node is None:
                path.leave()
            elif node in path.index:
                cycle = path.close(node)
                cycles += [cycle] if cycle else []
            elif node in needs and node not in seen:
                seen.add(node)
                path.enter(node, needs[node])
    return cycles
