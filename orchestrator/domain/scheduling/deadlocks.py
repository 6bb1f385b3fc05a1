"""Detect deadlocks between lock owners, and choose the owner that gives up."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LockWait:
    """An owner's wait: its start, the awaited lock, and the blocking owners."""

    since: float
    resource: str
    blockers: AbstractSet[str]


def merge_waits(*layers: Mapping[str, LockWait]) -> dict[str, LockWait]:
    """Merge the waits of lock layers; the newest start applies to each owner."""
    merged: dict[str, LockWait] = {}
    for layer in layers:
        for owner, wait in layer.items():
            known = merged.get(owner)
            if known is not None:
                newest = max(known, wait, key=lambda each: each.since)
                wait = LockWait(newest.since, newest.resource, known.blockers | wait.blockers)  # noqa: PLW2901  the merged wait replaces it
            merged[owner] = wait
    return merged


def find_cycle(owner: str, waits: Mapping[str, LockWait]) -> tuple[str, ...]:
    """Return the wait cycle of an owner, starting with it; empty if there is none.

    Each owner waits for the next one, and the last waits for the first.
    """
    came_from: dict[str, str] = {}
    pending = [owner]
    while pending:
        waiter = pending.pop()
        for blocker in sorted(waits[waiter].blockers) if waiter in waits else ():
            if blocker == owner:
                path = [waiter]
                while path[-1] != owner:
                    path.append(came_from[path[-1]])
                return tuple(reversed(path))
            if blocker not in came_from:
                came_from[blocker] = waiter
                pending.append(blocker)
    return ()


def choose_victim(cycle: tuple[str, ...], waits: Mapping[str, LockWait]) -> str:
    """Return the owner of a cycle that gives up: the one that started to wait last."""
    return max(cycle, key=lambda owner: (waits[owner].since, owner))


def find_deadlock(owner: str, waits: Mapping[str, LockWait]) -> str | None:
    """Describe the deadlock if the owner must give up; None if it may keep waiting."""
    cycle = find_cycle(owner, waits)
    if not cycle or choose_victim(cycle, waits) != owner:
        return None
    steps = [f"{waiter} waits for {waits[waiter].resource}" for waiter in cycle]
    return f"{', '.join(steps)}, held by {owner}" if len(cycle) > 1 else f"{steps[0]}, which it holds"
