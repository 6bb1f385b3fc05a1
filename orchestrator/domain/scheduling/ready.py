"""The tasks that are ready, best placed first, within the limits of adapters and of paths that only one may change.

Tasks that the same adapters may run share a roster, which takes the first of them that is open. So none has to be moved
when an adapter is parked, or is open again: what is looked at is which adapter its roster takes now.

Tasks of one roster that own the same paths share a lane: where the first of them can't start because its paths are
taken, none can, so each decision looks at lanes. A lane that can't start is held by what holds its paths and is not
looked at again before that lets go. Lanes without paths are never held.

So that a held task does not starve, the best placed of them reserves its paths: what overlaps with it and comes behind
it waits, too. The reservation ends when it starts, or when none of its adapters is open any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappop, heappush

from orchestrator.domain.scheduling.path_patterns import has_any_overlap

#: As many tasks that become ready together are sorted instead of being put on a heap one by one.
_MANY = 64


class ReadyLane:
    """Ready tasks that the same adapters may run and that own the same paths."""

    __slots__ = ("adapter_group", "held_by", "owns", "places", "run")

    def __init__(self, adapter_group: AdapterGroup, owns: tuple[str, ...]) -> None:
        self.adapter_group, self.owns = adapter_group, owns
        self.places: list[_Place] = []
        """A heap."""
        self.run: list[_Place] = []
        """Places that came together, the best one last: what is sorted once is taken without a search."""
        self.held_by: str | ReadyLane | None = None
        """A live task with the paths, or the lane that has reserved them."""


#: What tasks start in the order of: a number that aging made constant, the place in the file; the task and its lane,
#: which is the same one in all places of the task, and so never compared.
_Place = tuple[float, float, str, ReadyLane]


class _Adapter:
    """What limits the sessions of one adapter."""

    __slots__ = ("capacity", "closed", "name", "parked", "running")

    def __init__(self, name: str, capacity: float) -> None:
        self.name = name
        self.capacity = capacity
        self.running = 0
        self.parked = 0.0  # until when; 0.0 is not at all
        self.closed = False


class AdapterGroup:
    """Adapters that may run the same tasks, the best first, and those of the tasks that are ready and not held."""

    __slots__ = ("adapters", "current", "free", "fronts", "has_lanes")

    def __init__(self, adapters: tuple[_Adapter, ...]) -> None:
        self.adapters = adapters
        self.free = ReadyLane(self, ())
        """Tasks without paths."""
        self.fronts: list[_Place] = []
        """The first places of the lanes with paths."""
        self.has_lanes = False
        self.choose()

    def choose(self) -> None:
        """Take the first that is open, else the one that will be first."""
        self.current = min(self.adapters, key=lambda one: one.parked)  # the first of equals

    @property
    def parked(self) -> float:
        """Until when none of them is open: 0.0 if one is, infinity if all are closed."""
        return self.current.parked

    @property
    def next_opening(self) -> float:
        """When the end of a park lets it take a better one, or take one at all; infinity: never."""
        if self.current.parked:
            return self.current.parked
        better = self.adapters[: self.adapters.index(self.current)]
        return min((one.parked for one in better), default=math.inf)


class ReadyQueue:
    """Ready tasks, and the live ones that limit which of them may start."""

    def __init__(self, capacities: Mapping[str, int]) -> None:
        """Take how many sessions each adapter may have at once; one that is missing has no limit of its own."""
        self._capacities = capacities
        self._adapters: dict[str, _Adapter] = {}
        self._rosters: dict[tuple[str, ...], AdapterGroup] = {}
        self._sources: list[tuple[AdapterGroup, list[_Place], int]] = []
        """Heaps, the best place of which is the first, and runs, where it is the last (-1)."""
        self._lanes: dict[tuple[tuple[str, ...], tuple[str, ...]], ReadyLane] = {}
        self._places: dict[str, _Place] = {}
        self._sessions: dict[str, _Adapter] = {}
        self._owners: dict[str, tuple[str, ...]] = {}
        self._followers: dict[str | ReadyLane, list[ReadyLane]] = {}
        self._held: list[_Place] = []
        self._reserved: ReadyLane | None = None

    def adapter_group(self, names: tuple[str, ...]) -> AdapterGroup:
        """Return what takes the first of these adapters that is open."""
        known = self._rosters.get(names)
        if known is None:
            known = self._rosters[names] = AdapterGroup(tuple(map(self._adapter, names)))
            self._sources += [(known, known.free.places, 0), (known, known.free.run, -1)]
        return known

    def lane(self, names: tuple[str, ...], owns: tuple[str, ...]) -> ReadyLane:
        """Return where tasks wait that these adapters may run, the best first, and that own these paths."""
        known = self.adapter_group(names)
        if not owns:
            return known.free
        lane = self._lanes.get((names, owns))
        if lane is None:
            lane = self._lanes[names, owns] = ReadyLane(known, owns)
            if not known.has_lanes:
                known.has_lanes = True
                self._sources.append((known, known.fronts, 0))
        return lane

    def _adapter(self, name: str) -> _Adapter:
        known = self._adapters.get(name)
        if known is None:
            known = self._adapters[name] = _Adapter(name, self._capacities.get(name, math.inf))
        return known

    def add(self, places: Iterable[_Place]) -> None:
        """Tasks may start, each before those of a higher rank, and of the same rank before those later in the file."""
        known, free = self._places, dict[ReadyLane, list[_Place]]()
        for place in places:
            known[place[2]] = place
            lane = place[3]
            if lane.owns:
                heappush(lane.places, place)
                if self._first(lane) is place:
                    self._unblock(lane)
            elif lane in free:
                free[lane].append(place)
            else:
                free[lane] = [place]
        for lane, together in free.items():
            if len(together) < _MANY:
                for place in together:
                    heappush(lane.places, place)
            else:
                lane.run += together
                lane.run.sort(reverse=True)

    def discard(self, task: str) -> None:
        """A ready task may not start any more."""
        place = self._places.pop(task, None)
        if place is not None and place[3].owns and place[3].places[0] is place:
            self._unblock(place[3])

    def keep_paths(self, task: str, owns: tuple[str, ...]) -> None:
        """A task has paths to itself until they are freed."""
        if owns:
            self._owners[task] = owns

    def occupy(self, task: str, lane: ReadyLane) -> None:
        """A task has a session, which counts for its adapter."""
        adapter = self._sessions[task] = lane.adapter_group.current
        adapter.running += 1

    def free_slot(self, task: str) -> None:
        """The session of a task is over."""
        self._sessions.pop(task).running -= 1

    def adapter_of(self, task: str, lane: ReadyLane) -> str:
        """Return the adapter that a task of this lane runs with, or would run with now."""
        return (self._sessions.get(task) or lane.adapter_group.current).name

    def free_paths(self, task: str) -> None:
        """A task is not live any more: what waited for its paths is looked at again."""
        if self._owners and self._owners.pop(task, None) is not None:
            self._release_followers(task)

    def park(self, name: str, until: float) -> None:
        """Start no task with an adapter before a time; those that have no other reserve nothing meanwhile."""
        adapter = self._adapter(name)
        adapter.parked = max(adapter.parked, until)
        self._unblock_parked()

    def unpark(self, now: float) -> None:
        """Forget the parks that are over."""
        over = [adapter for adapter in self._adapters.values() if 0.0 < adapter.parked <= now]
        for adapter in over:
            adapter.parked = 0.0
        if over:
            self._choose()

    def close(self, name: str) -> None:
        """Start no task with an adapter again."""
        adapter = self._adapter(name)
        adapter.closed, adapter.parked = True, math.inf
        self._unblock_parked()

    def open(self, name: str) -> None:
        """Start tasks with an adapter again, whether it was parked or closed."""
        adapter = self._adapter(name)
        adapter.closed, adapter.parked = False, 0.0
        self._choose()

    def running(self) -> int:
        """How many sessions there are."""
        return len(self._sessions)

    def has_startable_task(self, roster: AdapterGroup) -> bool:
        """Whether a roster has a ready task that is not known to be held."""
        run = roster.free.run
        while run:
            if self._lane_of(run[-1]) is not None:
                return True
            run.pop()
        for places in (roster.free.places, roster.fronts):
            while places:
                lane = self._lane_of(places[0])
                if lane is not None and lane.held_by is None:
                    return True
                heappop(places)
        return False

    def holders(self) -> Iterator[str]:
        """Yield the live tasks that hold a lane up."""
        for task in self._owners:
            if any(lane.held_by == task for lane in self._followers.get(task, ())):
                yield task

    def take(self, most: int, now: float) -> list[str]:
        """Remove and return the best placed tasks that may start now, in order; they are live from then on."""
        known, sessions, sources = self._places, self._sessions, self._open(now)
        taken: list[str] = []
        while len(taken) < most:
            best, source, front = None, None, 0
            for places, end in sources:
                if places:
                    place = places[end]
                    if best is None or place < best:
                        best, source, front = place, places, end
            if best is None or source is None:
                break
            task, lane = best[2], best[3]
            if known.get(task) is not best or lane.held_by is not None:
                _pop(source, front)
                continue
            if not lane.owns:
                _pop(source, front)
            elif (holder := self._holder(lane)) is not None:
                self._hold(lane, holder)
                continue
            else:
                task = self._take_owner(lane)
            del known[task]
            taken.append(task)
            adapter = sessions[task] = lane.adapter_group.current
            adapter.running += 1
            if adapter.running >= adapter.capacity:
                sources = self._open(now)
        return taken

    def _open(self, now: float) -> list[tuple[list[_Place], int]]:
        """Return the sources of the rosters whose adapter may start something."""
        return [
            (places, end)
            for roster, places, end in self._sources
            if (adapter := roster.current).running < adapter.capacity and adapter.parked <= now
        ]

    def _holder(self, lane: ReadyLane) -> str | ReadyLane | None:
        for task, owns in self._owners.items():
            if has_any_overlap(lane.owns, owns):
                return task
        reserved = self._reservation()
        if reserved is None or reserved is lane or lane.places[0] < reserved.places[0]:
            return None
        return reserved if has_any_overlap(lane.owns, reserved.owns) else None

    def _take_owner(self, lane: ReadyLane) -> str:
        task = heappop(lane.places)[2]
        self._owners[task] = lane.owns
        if lane is self._reserved:
            self._reserved = None
        if lane in self._followers:
            self._followers[task] = self._followers.pop(lane)
            for follower in self._followers[task]:
                follower.held_by = task if follower.held_by is lane else follower.held_by
        self._unblock(lane)
        return task

    def _hold(self, lane: ReadyLane, holder: str | ReadyLane) -> None:
        lane.held_by = holder
        self._followers.setdefault(holder, []).append(lane)
        heappush(self._held, lane.places[0])
        if self._reserved is not None and lane.places[0] < self._reserved.places[0]:
            self._give_up_reservation()

    def _unblock(self, lane: ReadyLane) -> None:
        """Look at a lane anew: its first task has changed, or what held it let go."""
        lane.held_by = None
        if self._reserved is lane:
            self._give_up_reservation()
        first = self._first(lane)
        if first is not None:
            heappush(lane.adapter_group.fronts, first)

    def _release_followers(self, holder: str | ReadyLane) -> None:
        for lane in self._followers.pop(holder, ()):
            if lane.held_by is holder or lane.held_by == holder:
                lane.held_by = None
                heappush(lane.adapter_group.fronts, lane.places[0])

    def _choose(self) -> None:
        for roster in self._rosters.values():
            roster.choose()

    def _unblock_parked(self) -> None:
        """Let nothing hold others up, or be held, that no adapter can start now."""
        self._choose()
        for lane in self._lanes.values():
            if lane.held_by is not None and lane.adapter_group.parked:
                self._unblock(lane)
        if self._reserved is not None and self._reserved.adapter_group.parked:
            self._give_up_reservation()

    def _reservation(self) -> ReadyLane | None:
        """Return the best placed lane that is held, or was when it reserved its paths."""
        while self._reserved is None and self._held:
            place = self._held[0]
            known = self._places.get(place[2])
            if known is place and place[3].held_by is not None:
                self._reserved = place[3]
            else:
                heappop(self._held)
        return self._reserved

    def _give_up_reservation(self) -> None:
        if self._reserved is not None:
            lane, self._reserved = self._reserved, None
            self._release_followers(lane)

    def _first(self, lane: ReadyLane) -> _Place | None:
        places = lane.places
        while places and self._lane_of(places[0]) is None:
            heappop(places)
        return places[0] if places else None

    def _lane_of(self, place: _Place) -> ReadyLane | None:
        """Return the lane that a place is in: none once it is given up, also if its task has been added anew since."""
        return place[3] if self._places.get(place[2]) is place else None


def _pop(source: list[_Place], front: int) -> None:
    """Remove the best place of a heap or a run."""
    if front:
        source.pop()
    else:
        heappop(source)
