"""The tasks that are ready, best placed first, within the limits of adapters and of paths that only one may change.

Tasks of one adapter that own the same paths share a lane: where the first of them can't start because its paths are
taken, none can, so each decision looks at lanes. A lane that can't start is held by what holds its paths and is not
looked at again before that lets go. Lanes without paths are never held.

So that a held task does not starve, the best placed of them reserves its paths: what overlaps with it and comes behind
it waits, too. The reservation ends when it starts, or when its adapter is parked or closed.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from orchestrator.domain.ownership import any_overlap

#: What tasks start in the order of: a number that aging made constant, the place in the file, the task.
Place = tuple[float, int, str]


class _Lane:
    """Ready tasks that run with the same adapter and own the same paths."""

    __slots__ = ("adapter", "held_by", "owns", "places")

    def __init__(self, adapter: _Adapter, owns: tuple[str, ...]) -> None:
        self.adapter, self.owns = adapter, owns
        self.places: list[Place] = []
        self.held_by: str | _Lane | None = None
        """A live task with the paths, or the lane that has reserved them."""


class _Adapter:
    """One adapter's lanes that are not held, by their first places, and what limits it."""

    __slots__ = ("capacity", "closed", "fronts", "parked", "running")

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.running = 0
        self.parked = 0.0  # until when; 0.0 is not at all
        self.closed = False
        self.fronts: list[Place] = []

    def is_open(self, now: float) -> bool:
        return not self.closed and (self.capacity is None or self.running < self.capacity) and self.parked <= now


class ReadyQueue:
    """Ready tasks, and the live ones that limit which of them may start."""

    def __init__(self, capacities: Mapping[str, int]) -> None:
        """Take how many sessions each adapter may have at once; one that is missing has no limit of its own."""
        self._capacities = capacities
        self._adapters: dict[str, _Adapter] = {}
        self._lanes: dict[tuple[str, tuple[str, ...]], _Lane] = {}
        self._places: dict[str, tuple[Place, _Lane]] = {}
        self._running: dict[str, _Adapter] = {}
        self._owners: dict[str, tuple[str, ...]] = {}
        self._followers: dict[str | _Lane, list[_Lane]] = {}
        self._held: list[Place] = []
        self._reserved: _Lane | None = None

    def adapter(self, name: str) -> _Adapter:
        """Return what is known of an adapter."""
        if name not in self._adapters:
            self._adapters[name] = _Adapter(self._capacities.get(name))
        return self._adapters[name]

    def add(self, place: Place, adapter: str, owns: tuple[str, ...]) -> None:
        """A task may start."""
        lane = self._lanes.get((adapter, owns))
        if lane is None:
            lane = self._lanes[adapter, owns] = _Lane(self.adapter(adapter), owns)
        self._places[place[2]] = place, lane
        heapq.heappush(lane.places, place)
        if self._first(lane) == place:
            self._loosen(lane)

    def discard(self, task: str) -> None:
        """A ready task may not start any more."""
        if task in self._places:
            place, lane = self._places.pop(task)
            if lane.places[0] == place:
                self._loosen(lane)

    def occupy(self, task: str, adapter: str, owns: tuple[str, ...], *, slot: bool) -> None:
        """A task is live: its paths are its own, and with `slot` it counts for its adapter."""
        if owns:
            self._owners[task] = owns
        if slot:
            self._running[task] = self.adapter(adapter)
            self._running[task].running += 1

    def free_slot(self, task: str) -> None:
        """A session is over."""
        adapter = self._running.pop(task, None)
        if adapter is not None:
            adapter.running -= 1

    def free_paths(self, task: str) -> None:
        """A task is not live any more: what waited for its paths is looked at again."""
        if self._owners.pop(task, None) is not None:
            self._let_go(task)

    def park(self, name: str, until: float) -> None:
        """Look at no task of an adapter before a time; they reserve nothing meanwhile."""
        adapter = self.adapter(name)
        adapter.parked = max(adapter.parked, until)
        self._set_aside(adapter)

    def unpark(self, name: str, now: float) -> None:
        """Forget a park that is over."""
        adapter = self.adapter(name)
        if adapter.parked <= now:
            adapter.parked = 0.0

    def close(self, name: str) -> None:
        """Look at no task of an adapter again."""
        self.adapter(name).closed = True
        self._set_aside(self.adapter(name))

    def running(self) -> int:
        """How many sessions there are."""
        return len(self._running)

    def is_movable(self, adapter: _Adapter) -> bool:
        """Whether an adapter has a ready task that is not known to be held."""
        return self._front(adapter) is not None

    def is_held_by_session(self) -> bool:
        """Whether the end of a session may let a held task start."""
        return any(lane.held_by == task for task in self._running for lane in self._followers.get(task, ()))

    def take(self, now: float) -> str | None:
        """Remove and return the best placed task that may start now; it is live from then on."""
        while (lane := self._best(now)) is not None:
            holder = self._holder(lane)
            if holder is None:
                return self._start(lane)
            self._hold(lane, holder)
        return None

    def _best(self, now: float) -> _Lane | None:
        fronts = (self._front(adapter) for adapter in self._adapters.values() if adapter.is_open(now))
        best = min((place for place in fronts if place is not None), default=None)
        return None if best is None else self._places[best[2]][1]

    def _holder(self, lane: _Lane) -> str | _Lane | None:
        if not lane.owns:
            return None
        for task, owns in self._owners.items():
            if any_overlap(lane.owns, owns):
                return task
        reserved = self._reservation()
        if reserved is None or reserved is lane or lane.places[0] < reserved.places[0]:
            return None
        return reserved if any_overlap(lane.owns, reserved.owns) else None

    def _start(self, lane: _Lane) -> str:
        place = heapq.heappop(lane.places)
        task = place[2]
        del self._places[task]
        if lane is self._reserved:
            self._reserved = None
        if lane in self._followers:
            self._followers[task] = self._followers.pop(lane)
            for follower in self._followers[task]:
                follower.held_by = task if follower.held_by is lane else follower.held_by
        if lane.owns:
            self._owners[task] = lane.owns
        self._running[task] = lane.adapter
        lane.adapter.running += 1
        self._loosen(lane)
        return task

    def _hold(self, lane: _Lane, holder: str | _Lane) -> None:
        lane.held_by = holder
        self._followers.setdefault(holder, []).append(lane)
        heapq.heappush(self._held, lane.places[0])
        if self._reserved is not None and lane.places[0] < self._reserved.places[0]:
            self._give_up_reservation()

    def _loosen(self, lane: _Lane) -> None:
        """Look at a lane anew: its first task has changed, or what held it let go."""
        lane.held_by = None
        if lane is self._reserved:
            self._give_up_reservation()
        first = self._first(lane)
        if first is not None:
            heapq.heappush(lane.adapter.fronts, first)

    def _let_go(self, holder: str | _Lane) -> None:
        for lane in self._followers.pop(holder, ()):
            if lane.held_by is holder or lane.held_by == holder:
                lane.held_by = None
                heapq.heappush(lane.adapter.fronts, lane.places[0])

    def _set_aside(self, adapter: _Adapter) -> None:
        for lane in self._lanes.values():
            if lane.adapter is adapter and lane.held_by is not None:
                self._loosen(lane)
        if self._reserved is not None and self._reserved.adapter is adapter:
            self._give_up_reservation()

    def _reservation(self) -> _Lane | None:
        """Return the best placed lane that is held, or was when it reserved its paths."""
        while self._reserved is None and self._held:
            place = self._held[0]
            known = self._places.get(place[2])
            if known is not None and known[0] == place and known[1].held_by is not None:
                self._reserved = known[1]
            else:
                heapq.heappop(self._held)
        return self._reserved

    def _give_up_reservation(self) -> None:
        if self._reserved is not None:
            lane, self._reserved = self._reserved, None
            self._let_go(lane)

    def _first(self, lane: _Lane) -> Place | None:
        while lane.places and not self._is_current(lane.places[0]):
            heapq.heappop(lane.places)
        return lane.places[0] if lane.places else None

    def _front(self, adapter: _Adapter) -> Place | None:
        fronts = adapter.fronts
        while fronts and not (self._is_current(fronts[0]) and self._places[fronts[0][2]][1].held_by is None):
            heapq.heappop(fronts)
        return fronts[0] if fronts else None

    def _is_current(self, place: Place) -> bool:
        known = self._places.get(place[2])
        return known is not None and known[0] == place
