"""The queue of ready tasks, limited by adapter capacity and path ownership.

Tasks with the same list of adapters share an adapter group, which uses the first available adapter. When an adapter
enters or leaves its cooldown, no task has to move: only the current adapter of its group changes.

Tasks of one group that own the same paths share a lane: if the first of them can't start because its paths are in use,
none can, so each decision considers only lanes. A lane that can't start is held by the owner of its paths, and is
skipped until that owner releases them. Lanes without paths are never held.

To prevent starvation, the first held task reserves its paths: later tasks that overlap with it wait too. The
reservation ends when the task starts, or when none of its adapters is available.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from heapq import heappop, heappush

from orchestrator.domain.settings.path_patterns import has_any_overlap

#: From this number on, tasks that become ready together are sorted instead of pushed onto a heap.
_MANY = 64


class ReadyLane:
    """Ready tasks with the same adapters and the same owned paths."""

    __slots__ = ("adapter_group", "entries", "held_by", "owns", "run")

    def __init__(self, adapter_group: AdapterGroup, owns: tuple[str, ...]) -> None:
        self.adapter_group, self.owns = adapter_group, owns
        self.entries: list[_Entry] = []
        """A heap."""
        self.run: list[_Entry] = []
        """A sorted batch of entries in reverse order, so that popping is fast."""
        self.held_by: str | ReadyLane | None = None
        """The live task that owns the paths, or the lane that has reserved them."""


#: A queue entry: the rank (constant despite aging), the file order, the task, and its lane, which is never
#: compared: all entries of a task have the same one.
_Entry = tuple[float, float, str, ReadyLane]


class _Adapter:
    """The session limit and availability of one adapter."""

    __slots__ = ("available_at", "capacity", "disabled", "name", "running")

    def __init__(self, name: str, capacity: float) -> None:
        self.name = name
        self.capacity = capacity
        self.running = 0
        self.available_at = 0.0  # the end of its cooldown; 0.0: none
        self.disabled = False


class AdapterGroup:
    """A list of adapters by preference, and its ready tasks that are not held."""

    __slots__ = ("adapters", "current", "free", "fronts", "sources")

    def __init__(self, adapters: tuple[_Adapter, ...]) -> None:
        self.adapters = adapters
        self.free = ReadyLane(self, ())
        """Tasks without paths."""
        self.fronts: list[_Entry] = []
        """The first entries of the lanes with paths."""
        self.sources = ((self.free.entries, 0), (self.free.run, -1), (self.fronts, 0))
        """Heaps, whose first entry is at index 0, and a sorted batch, where it is at index -1."""
        self.choose()

    def choose(self) -> None:
        """Choose the first available adapter, or the one that becomes available first."""
        self.current = min(self.adapters, key=lambda adapter: adapter.available_at)  # the first of equals

    @property
    def available_at(self) -> float:
        """When the first adapter becomes available; infinity if all are disabled.

        0.0 if an adapter is available.
        """
        return self.current.available_at

    @property
    def is_full(self) -> bool:
        """Whether the current adapter has reached its session limit."""
        return self.current.running >= self.current.capacity

    @property
    def next_change(self) -> float:
        """The end of a cooldown that makes a better adapter, or any adapter, available.

        Infinity if there is none.
        """
        if self.current.available_at:
            return self.current.available_at
        better = self.adapters[: self.adapters.index(self.current)]
        return min((adapter.available_at for adapter in better), default=math.inf)


class AdapterPool:
    """The capacity, running sessions, cooldowns and disabled state of adapters."""

    def __init__(self, capacities: Mapping[str, int]) -> None:
        """Create a pool with session limits by adapter; other adapters have no limit."""
        self._capacities = capacities
        self._adapters: dict[str, _Adapter] = {}
        self._groups: dict[tuple[str, ...], AdapterGroup] = {}
        self._sessions: dict[str, _Adapter] = {}
        self.disabled: dict[str, str] = {}
        """Disabled adapters, each with the reason."""
        self.on_unavailable: Callable[[], None] = lambda: None
        """Called after an adapter has become unavailable."""

    def group(self, names: tuple[str, ...]) -> AdapterGroup:
        """Return the group of these adapters."""
        known = self._groups.get(names)
        if known is None:
            known = self._groups[names] = AdapterGroup(tuple(map(self._adapter, names)))
        return known

    def groups(self) -> Collection[AdapterGroup]:
        """Return all groups."""
        return self._groups.values()

    def _adapter(self, name: str) -> _Adapter:
        known = self._adapters.get(name)
        if known is None:
            known = self._adapters[name] = _Adapter(name, self._capacities.get(name, math.inf))
        return known

    def occupy(self, task: str, group: AdapterGroup) -> None:
        """Count a running session for the current adapter of a group."""
        adapter = self._sessions[task] = group.current
        adapter.running += 1

    def free(self, task: str) -> None:
        """Release the session of a task."""
        self._sessions.pop(task).running -= 1

    def running(self) -> int:
        """Return the number of running sessions."""
        return len(self._sessions)

    def is_running(self, task: str) -> bool:
        """Return whether the last start of a task neither ended nor was revived since."""
        return task in self._sessions

    def adapter_of(self, task: str, group: AdapterGroup) -> str:
        """Return the adapter that runs a task of this group, or would run it now."""
        return (self._sessions.get(task) or group.current).name

    def start_cooldown(self, name: str, until: float) -> None:
        """Put an adapter in cooldown until a time, during which tasks use their fallback."""
        adapter = self._adapter(name)
        adapter.available_at = max(adapter.available_at, until)
        self._choose()
        self.on_unavailable()

    def end_cooldowns(self, now: float) -> None:
        """End expired cooldowns."""
        expired = [adapter for adapter in self._adapters.values() if 0.0 < adapter.available_at <= now]
        for adapter in expired:
            adapter.available_at = 0.0
        if expired:
            self._choose()

    def disable(self, name: str, reason: str) -> None:
        """Disable an adapter for new sessions; tasks use their fallback adapters."""
        self.disabled[name] = reason
        adapter = self._adapter(name)
        adapter.disabled, adapter.available_at = True, math.inf
        self._choose()
        self.on_unavailable()

    def enable(self, name: str) -> None:
        """Enable an adapter that was in cooldown or disabled."""
        self.disabled.pop(name, None)
        adapter = self._adapter(name)
        adapter.disabled, adapter.available_at = False, 0.0
        self._choose()

    def _choose(self) -> None:
        for group in self._groups.values():
            group.choose()


class ReadyQueue:
    """Ready tasks, and the live tasks that restrict them."""

    def __init__(self, adapters: AdapterPool) -> None:
        self._adapters, adapters.on_unavailable = adapters, self._release_unavailable
        self._lanes: dict[tuple[tuple[str, ...], tuple[str, ...]], ReadyLane] = {}
        self._entries: dict[str, _Entry] = {}
        self._owners: dict[str, tuple[str, ...]] = {}
        self._followers: dict[str | ReadyLane, list[ReadyLane]] = {}
        self._held: list[_Entry] = []
        self._reserved: ReadyLane | None = None

    def lane(self, names: tuple[str, ...], owns: tuple[str, ...]) -> ReadyLane:
        """Return the lane of tasks with these adapters and these owned paths."""
        if not owns:
            return self._adapters.group(names).free
        lane = self._lanes.get((names, owns))
        if lane is None:
            lane = self._lanes[names, owns] = ReadyLane(self._adapters.group(names), owns)
        return lane

    def add(self, entries: Iterable[_Entry]) -> None:
        """Add ready tasks; they start in order of rank, then file order."""
        known, free = self._entries, dict[ReadyLane, list[_Entry]]()
        for entry in entries:
            known[entry[2]] = entry
            lane = entry[3]
            if lane.owns:
                heappush(lane.entries, entry)
                if self._first(lane) is entry:
                    self._unblock(lane)
            elif lane in free:
                free[lane].append(entry)
            else:
                free[lane] = [entry]
        for lane, together in free.items():
            if len(together) < _MANY:
                for entry in together:
                    heappush(lane.entries, entry)
            else:
                lane.run += together
                lane.run.sort(reverse=True)

    def discard(self, task: str) -> None:
        """Remove a ready task."""
        entry = self._entries.pop(task, None)
        if entry is not None and entry[3].owns and entry[3].entries[0] is entry:
            self._unblock(entry[3])

    def keep_paths(self, task: str, owns: tuple[str, ...]) -> None:
        """Give a task exclusive ownership of paths until they are freed."""
        if owns:
            self._owners[task] = owns

    def free_paths(self, task: str) -> None:
        """Release the paths of a task, and recheck the lanes that waited for them."""
        if self._owners and self._owners.pop(task, None) is not None:
            self._release_followers(task)

    def _release_unavailable(self) -> None:
        """Release lanes and the reservation of tasks that no adapter can start now."""
        for lane in self._lanes.values():
            if lane.held_by is not None and lane.adapter_group.available_at:
                self._unblock(lane)
        if self._reserved is not None and self._reserved.adapter_group.available_at:
            self._give_up_reservation()

    def has_startable_task(self, group: AdapterGroup) -> bool:
        """Return whether a group may have a ready task that is not held."""
        run = group.free.run
        while run:
            if self._lane_of(run[-1]) is not None:
                return True
            run.pop()
        for entries in (group.free.entries, group.fronts):
            while entries:
                lane = self._lane_of(entries[0])
                if lane is not None and lane.held_by is None:
                    return True
                heappop(entries)
        return False

    def holders(self) -> Iterator[str]:
        """Yield the live tasks that hold a lane."""
        for task in self._owners:
            if any(lane.held_by == task for lane in self._followers.get(task, ())):
                yield task

    def take(self, limit: int, now: float) -> list[str]:
        """Remove and return the tasks that may start now, in order; they become live."""
        known, sources = self._entries, self._open(now)
        taken: list[str] = []
        while len(taken) < limit:
            best, source, front = None, None, 0
            for entries, end in sources:
                if entries:
                    entry = entries[end]
                    if best is None or entry < best:
                        best, source, front = entry, entries, end
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
            self._adapters.occupy(task, lane.adapter_group)
            if lane.adapter_group.is_full:
                sources = self._open(now)
        return taken

    def _open(self, now: float) -> list[tuple[list[_Entry], int]]:
        """Return the sources of the groups whose adapter has free capacity."""
        return [
            source
            for group in self._adapters.groups()
            if not group.is_full and group.current.available_at <= now
            for source in group.sources
        ]

    def _holder(self, lane: ReadyLane) -> str | ReadyLane | None:
        for task, owns in self._owners.items():
            if has_any_overlap(lane.owns, owns):
                return task
        reserved = self._reservation()
        if reserved is None or reserved is lane or lane.entries[0] < reserved.entries[0]:
            return None
        return reserved if has_any_overlap(lane.owns, reserved.owns) else None

    def _take_owner(self, lane: ReadyLane) -> str:
        task = heappop(lane.entries)[2]
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
        heappush(self._held, lane.entries[0])
        if self._reserved is not None and lane.entries[0] < self._reserved.entries[0]:
            self._give_up_reservation()

    def _unblock(self, lane: ReadyLane) -> None:
        """Requeue a lane: its first task has changed, or its holder released it."""
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
                heappush(lane.adapter_group.fronts, lane.entries[0])

    def _reservation(self) -> ReadyLane | None:
        """Return the lane with the reservation: the first lane that was held."""
        while self._reserved is None and self._held:
            entry = self._held[0]
            known = self._entries.get(entry[2])
            if known is entry and entry[3].held_by is not None:
                self._reserved = entry[3]
            else:
                heappop(self._held)
        return self._reserved

    def _give_up_reservation(self) -> None:
        if self._reserved is not None:
            lane, self._reserved = self._reserved, None
            self._release_followers(lane)

    def _first(self, lane: ReadyLane) -> _Entry | None:
        entries = lane.entries
        while entries and self._lane_of(entries[0]) is None:
            heappop(entries)
        return entries[0] if entries else None

    def _lane_of(self, entry: _Entry) -> ReadyLane | None:
        """Return the lane of an entry; None if the entry is outdated.

        An entry is outdated even if its task was added again.
        """
        return entry[3] if self._entries.get(entry[2]) is entry else None


def _pop(source: list[_Entry], front: int) -> None:
    """Remove the first entry of a heap or a sorted batch."""
    if front:
        source.pop()
    else:
        heappop(source)
