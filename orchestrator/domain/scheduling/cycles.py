"""Circles among tasks that need each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Path:
    """The way from where the search began to where it is; `covered[i]` is the last node up to i in a found circle."""

    nodes: list[str] = field(default_factory=list)
    covered: list[int] = field(default_factory=list)
    place: dict[str, int] = field(default_factory=dict)
    open: list[Iterator[str]] = field(default_factory=list)

    def enter(self, node: str, needs: Iterable[str]) -> None:
        self.place[node] = len(self.nodes)
        self.covered.append(self.covered[-1] if self.covered else -1)
        self.nodes.append(node)
        self.open.append(iter(needs))

    def leave(self) -> None:
        del self.place[self.nodes.pop()]
        self.covered.pop()
        self.open.pop()

    def close(self, node: str) -> list[str] | None:
        """Return the circle that leads back to a node, unless a part of it is in one that was found before."""
        begin = self.place[node]
        if self.covered[-1] >= begin:
            return None
        self.covered[begin:] = range(begin, len(self.nodes))
        return self.nodes[begin:]


def find_cycles(needs: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return circles without common tasks, at least one of every knot; each task needs the next, the last the first.

    Names without an entry of their own are passed over. Linear in the number of needs, without recursion.
    """
    circles: list[list[str]] = []
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
            elif node in path.place:
                circle = path.close(node)
                circles += [circle] if circle else []
            elif node in needs and node not in seen:
                seen.add(node)
                path.enter(node, needs[node])
    return circles
