"""The queue of ready tasks, limited by adapter capacity and path ownership.

Tasks with the same list of adapters share an adapter group, which uses the first available adapter. When an adapter
enters or leaves its cooldown, no task has to move: only the current adapter of its group changes. Accounts of one
adapter also replace each other at their session limit.

After a cooldown, one session at a time probes the adapter, until it is enabled because a session had a response.

Tasks of one group that own the same paths share a bucket: if the first of them can't start because its paths are in
use, none can, so each decision considers only buckets. A bucket that can't start is held by the owner of its paths, and
is skipped until that owner releases them. Buckets without paths are never held.

To prevent starvation, the first held task reserves its paths: later tasks that overlap with it wait too. The
reservation ends when the task starts, or when none of its adapters is available.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from heapq import heappop, heappush

from orchestrator.domain.settings.names import entry_of_adapter
from orchestrator.domain.settings.path_patterns import has_any_overlap

#: From this number on, tasks that become ready together are sorted instead of pushed onto a heap.
_MANY = 64


class ReadyBucket:
    """Ready tasks with the same adapters and the same owned paths."""

    __slots__ = ("adapter_group", "entries", "held_by", "owns", "run")

    def __init__(self, adapter_group: AdapterGroup, owns: tuple[str, ...]) -> None:
        self.adapter_group, self.owns = adapter_group, owns
        self.entries: list[_Entry] = []
        """A heap."""
        self.run: list[_Entry] = []
        """A sorted batch of entries in reverse order, so that popping is fast."""
        self.held_by: str | ReadyBucket | None = None
        """The live task that owns the paths, or the bucket that has reserved them."""


#: A queue entry: the rank (constant despite aging), the file order, the task, and its bucket, which is never
#: compared: all entries of a task have the same one.
_Entry = tuple[float, float, str, ReadyBucket]


class _Adapter:
    """The session limit and availability of one adapter."""

    __slots__ = ("available_at", "capacity", "disabled", "entry", "is_unproven", "name", "probe", "running")

    def __init__(self, name: str, capacity: float) -> None:
        self.name, self.entry = name, entry_of_adapter(name)
        self.capacity = capacity
        self.running = 0
        self.available_at = 0.0  # the end of its cooldown; 0.0: none
        self.disabled = False
        self.is_unproven = False  # no session has had a response since its cooldown
        self.probe: str | None = None  # the task, perhaps of another process, whose session probes it

    @property
    def is_full(self) -> bool:
        """Whether no further session may start before one ends, or proves that it is available."""
        return self.running >= self.capacity or self.is_probed

    @property
    def is_probed(self) -> bool:
        """Whether a session probes it, so that others wait."""
        return self.is_unproven and self.probe is not None and not self.available_at


class AdapterGroup:
    """A list of adapters by preference, and its ready tasks that are not held."""

    __slots__ = ("adapters", "current", "free", "fronts", "sources")

    def __init__(self, adapters: tuple[_Adapter, ...]) -> None:
        self.adapters = adapters
        self.free = ReadyBucket(self, ())
        """Tasks without paths."""
        self.fronts: list[_Entry] = []
        """The first entries of the buckets with paths."""
        self.sources = ((self.free.entries, 0), (self.free.run, -1), (self.fronts, 0))
        """Heaps, whose first entry is at index 0, and a sorted batch, where it is at index -1."""
        self.choose()

    def choose(self) -> None:
        """Choose the first available adapter, or the one that becomes available first.

        If it is full, another account with free capacity replaces it.
        """
        best = min(self.adapters, key=lambda one: (one.available_at > 0.0, one.is_probed, one.available_at))
        accounts = (one for one in self.adapters if one.entry == best.entry and not one.available_at)
        self.current = next((one for one in accounts if not one.is_full), best) if best.is_full else best

    @property
    def available_at(self) -> float:
        """When the first adapter becomes available; infinity if all are disabled.

        0.0 if an adapter is available.
        """
        return self.current.available_at

    @property
    def is_full(self) -> bool:
        """Whether the current adapter has reached its session limit."""
        return self.current.is_full

    @property
    def next_change(self) -> float:
        """The end of a cooldown that makes a better adapter, or any adapter, available.

        Infinity if there is none.
        """
        if self.current.available_at:
            return self.current.available_at
        better = self.adapters if self.current.is_probed else self.adapters[: self.adapters.index(self.current)]
        return min((adapter.available_at for adapter in better if adapter.available_at), default=math.inf)


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

    def occupy(self, task: str, group: AdapterGroup) -> bool:
        """Count a running session for the current adapter of a group; return whether that adapter is full now."""
        adapter = self._sessions[task] = group.current
        adapter.running += 1
        if adapter.is_unproven:
            adapter.probe = task
        if adapter.is_full:
            self._choose()
        return adapter.is_full

    def free(self, task: str) -> None:
        """Release the session of a task."""
        adapter = self._sessions.pop(task)
        was_full = adapter.is_full
        adapter.running -= 1
        self.end_probe(task)
        if was_full:
            self._choose()

    def running(self) -> int:
        """Return the number of running sessions."""
        return len(self._sessions)

    def is_running(self, task: str) -> bool:
        """Return whether the last start of a task neither ended nor was retried since."""
        return task in self._sessions

    def adapter_of(self, task: str, group: AdapterGroup) -> str:
        """Return the adapter that runs a task of this group, or would run it now."""
        return (self._sessions.get(task) or group.current).name

    def start_cooldown(self, name: str, until: float) -> None:
        """Put an adapter in cooldown until a time, during which tasks use their fallback.

        Afterwards, one session at a time probes it, until it is enabled.
        """
        adapter = self._adapter(name)
        adapter.available_at, adapter.is_unproven = max(adapter.available_at, until), True
        self._choose()
        self.on_unavailable()

    def end_cooldowns(self, now: float) -> None:
        """End expired cooldowns."""
        expired = [adapter for adapter in self._adapters.values() if 0.0 < adapter.available_at <= now]
        for adapter in expired:
            adapter.available_at = 0.0
        if expired:
            self._choose()

    def expect_probe(self, name: str, task: str | None) -> None:
        """Let one session at a time probe an adapter after its cooldown; `task` is one of another process, if any."""
        adapter = self._adapter(name)
        adapter.is_unproven, adapter.available_at = True, 0.0
        adapter.probe = task or (adapter.probe if adapter.probe in self._sessions else None)
        self._choose()

    def end_probe(self, task: str) -> None:
        """Let another session probe the adapter that a task's ended session probed."""
        if ended := [adapter for adapter in self._adapters.values() if adapter.probe == task]:
            for adapter in ended:
                adapter.probe = None
            self._choose()

    def is_probe(self, task: str) -> bool:
        """Return whether the session of a task needs to probe its adapter; another process may have been faster."""
        adapter = self._sessions.get(task)
        return adapter is not None and adapter.is_unproven

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
        adapter.is_unproven, adapter.probe = False, None
        self._choose()

    def _choose(self) -> None:
        for group in self._groups.values():
            group.choose()


class ReadyQueue:
    """Ready tasks, and the live tasks that restrict them."""

    def __init__(self, adapters: AdapterPool) -> None:
        self._adapters, adapters.on_unavailable = adapters, self._release_unavailable
        self._buckets: dict[tuple[tuple[str, ...], tuple[str, ...]], ReadyBucket] = {}
        self._entries: dict[str, _Entry] = {}
        self._owners: dict[str, tuple[str, ...]] = {}
        self._followers: dict[str | ReadyBucket, list[ReadyBucket]] = {}
        self._held: list[_Entry] = []
        self._reserved: ReadyBucket | None = None

    def bucket(self, names: tuple[str, ...], owns: tuple[str, ...]) -> ReadyBucket:
        """Return the bucket of tasks with these adapters and these owned paths."""
        if not owns:
            return self._adapters.group(names).free
        bucket = self._buckets.get((names, owns))
        if bucket is None:
            bucket = self._buckets[names, owns] = ReadyBucket(self._adapters.group(names), owns)
        return bucket

    def add(self, entries: Iterable[_Entry]) -> None:
        """Add ready tasks; they start in order of rank, then file order."""
        known, free = self._entries, dict[ReadyBucket, list[_Entry]]()
        for entry in entries:
            known[entry[2]] = entry
            bucket = entry[3]
            if bucket.owns:
                heappush(bucket.entries, entry)
                if self._first(bucket) is entry:
                    self._unblock(bucket)
            elif bucket in free:
                free[bucket].append(entry)
            else:
                free[bucket] = [entry]
        for bucket, together in free.items():
            if len(together) < _MANY:
                for entry in together:
                    heappush(bucket.entries, entry)
            else:
                bucket.run += together
                bucket.run.sort(reverse=True)

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
        """Release the paths of a task, and recheck the buckets that waited for them."""
        if self._owners and self._owners.pop(task, None) is not None:
            self._release_followers(task)

    def _release_unavailable(self) -> None:
        """Release buckets and the reservation of tasks that no adapter can start now."""
        for bucket in self._buckets.values():
            if bucket.held_by is not None and bucket.adapter_group.available_at:
                self._unblock(bucket)
        if self._reserved is not None and self._reserved.adapter_group.available_at:
            self._give_up_reservation()

    def has_startable_task(self, group: AdapterGroup) -> bool:
        """Return whether a group may have a ready task that is not held."""
        run = group.free.run
        while run:
            if self._bucket_of(run[-1]) is not None:
                return True
            run.pop()
        for entries in (group.free.entries, group.fronts):
            while entries:
                bucket = self._bucket_of(entries[0])
                if bucket is not None and bucket.held_by is None:
                    return True
                heappop(entries)
        return False

    def holders(self) -> Iterator[str]:
        """Yield the live tasks that hold a bucket."""
        for task in self._owners:
            if any(bucket.held_by == task for bucket in self._followers.get(task, ())):
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
            task, bucket = best[2], best[3]
            if known.get(task) is not best or bucket.held_by is not None:
                _pop(source, front)
                continue
            if not bucket.owns:
                _pop(source, front)
            elif (holder := self._holder(bucket)) is not None:
                self._hold(bucket, holder)
                continue
            else:
                task = self._take_owner(bucket)
            del known[task]
            taken.append(task)
            if self._adapters.occupy(task, bucket.adapter_group):
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

    def _holder(self, bucket: ReadyBucket) -> str | ReadyBucket | None:
        for task, owns in self._owners.items():
            if has_any_overlap(bucket.owns, owns):
                return task
        reserved = self._reservation()
        if reserved is None or reserved is bucket or bucket.entries[0] < reserved.entries[0]:
            return None
        return reserved if has_any_overlap(bucket.owns, reserved.owns) else None

    def _take_owner(self, bucket: ReadyBucket) -> str:
        task = heappop(bucket.entries)[2]
        self._owners[task] = bucket.owns
        if bucket is self._reserved:
            self._reserved = None
        if bucket in self._followers:
            self._followers[task] = self._followers.pop(bucket)
            for follower in self._followers[task]:
                follower.held_by = task if follower.held_by is bucket else follower.held_by
        self._unblock(bucket)
        return task

    def _hold(self, bucket: ReadyBucket, holder: str | ReadyBucket) -> None:
        bucket.held_by = holder
        self._followers.setdefault(holder, []).append(bucket)
        heappush(self._held, bucket.entries[0])
        if self._reserved is not None and bucket.entries[0] < self._reserved.entries[0]:
            self._give_up_reservation()

    def _unblock(self, bucket: ReadyBucket) -> None:
        """Requeue a bucket: its first task has changed, or its holder released it."""
        bucket.held_by = None
        if self._reserved is bucket:
            self._give_up_reservation()
        first = self._first(bucket)
        if first is not None:
            heappush(bucket.adapter_group.fronts, first)

    def _release_followers(self, holder: str | ReadyBucket) -> None:
        for bucket in self._followers.pop(holder, ()):
            if bucket.held_by is holder or bucket.held_by == holder:
                bucket.held_by = None
                heappush(bucket.adapter_group.fronts, bucket.entries[0])

    def _reservation(self) -> ReadyBucket | None:
        """Return the bucket with the reservation: the first bucket that was held."""
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
            bucket, self._reserved = self._reserved, None
            self._release_followers(bucket)

    def _first(self, bucket: ReadyBucket) -> _Entry | None:
        entries = bucket.entries
        while entries and self._bucket_of(entries[0]) is None:
            heappop(entries)
        return entries[0] if entries else None

    def _bucket_of(self, entry: _Entry) -> ReadyBucket | None:
        """Return the bucket of an entry; None if the entry is outdated.

        An entry is outdated even if its task was added again.
        """
        return entry[3] if self._entries.get(entry[2]) is entry else None


def _pop(source: list[_Entry], front: int) -> None:
    """Remove the first entry of a heap or a sorted batch."""
    if front:
        source.pop()
    else:
        heappop(source)
