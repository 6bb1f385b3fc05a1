"""Deadlocks: circles of owners that wait for each other, and which of them has to give up. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LockWait:
    """One wait of an owner: since when, for what, and the owners that are in its way."""

    since: float
    what: str
    blockers: AbstractSet[str]


def merge_waits(*layers: Mapping[str, LockWait]) -> dict[str, LockWait]:
    """Return the waits of several layers of locks as one; an owner that waits in several waits since the last."""
    found: dict[str, LockWait] = {}
    for layer in layers:
        for owner, wait in layer.items():
            known = found.get(owner)
            if known is not None:
                newest = max(known, wait, key=lambda one: one.since)
                wait = LockWait(newest.since, newest.what, known.blockers | wait.blockers)
            found[owner] = wait
    return found


def find_cycle(owner: str, waits: Mapping[str, LockWait]) -> tuple[str, ...]:
    """Return the circle that an owner is part of, beginning with it; empty if there is none.

    Each waits for the next one, the last for the first.
    """
    came_from: dict[str, str] = {}
    pending = [owner]
    while pending:
        one = pending.pop()
        for blocker in sorted(waits[one].blockers) if one in waits else ():
            if blocker == owner:
                path = [one]
                while path[-1] != owner:
                    path.append(came_from[path[-1]])
                return tuple(reversed(path))
            if blocker not in came_from:
                came_from[blocker] = one
                pending.append(blocker)
    return ()


def choose_victim(cycle: tuple[str, ...], waits: Mapping[str, LockWait]) -> str:
    """Return who of a circle has to give up: the one that began to wait last."""
    return max(cycle, key=lambda one: (waits[one].since, one))


def find_deadlock(owner: str, waits: Mapping[str, LockWait]) -> str | None:
    """Return the circle because of which an owner has to give up, in words; None if it may go on waiting."""
    cycle = find_cycle(owner, waits)
    if not cycle or choose_victim(cycle, waits) != owner:
        return None
    steps = [f"{one} waits for {waits[one].what}" for one in cycle]
    return f"{', '.join(steps)}, held by {owner}" if len(cycle) > 1 else f"{steps[0]}, which it holds"
