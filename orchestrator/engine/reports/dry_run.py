"""Plan a run without starting or recording anything. Pure."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from graphlib import TopologicalSorter
from itertools import groupby

from orchestrator.config.model import RunConfig
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.admission import SessionFit
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry
from orchestrator.domain.settings.path_patterns import has_any_overlap, literal_prefix
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.routing import DEFAULT_PHASES, Workflow, current_adapters
from orchestrator.engine.diagnostics.findings import Finding
from orchestrator.protocols import JsonObject

#: The maximum number of comparisons per wave: tens of thousands of tasks with similar paths would take minutes.
_MOST_COMPARISONS = 50_000
#: An index, owned patterns, and the first task that owns exactly these.
_Owner = tuple[int, tuple[str, ...], str]


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """The plan of one task; durations are in seconds."""

    id: str
    needs: Sequence[str]
    waits_for: str | None
    """A task of the same wave with overlapping paths that would start first."""
    adapter: str
    """The adapter that would start it: the one of its first phase, if specified."""
    phases: Sequence[str]
    """The phases of its workflow, in order; empty without a workflow."""
    program: str
    """The program that the adapter would run."""
    starts_from: str
    """The branch that its worktree would start from."""
    checks: Sequence[str]
    attempts: int
    timeout: float
    idle_timeout: float | None
    priority: int


@dataclass(frozen=True, slots=True)
class PlannedWave:
    """Tasks whose needs are all in earlier waves, in starting order."""

    sessions: int
    """How many of them would run concurrently."""
    tasks: Sequence[PlannedTask]
    is_exact: bool
    """False if too many tasks own paths to compute `waits_for`."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """The plan of a run."""

    repository: str
    base: str
    target: str
    sandbox: str
    sessions: int
    """The largest number of concurrent sessions."""
    limited_by: str | None
    """The reason if the machine allows fewer sessions than the file's `capacity`."""
    waves: Sequence[PlannedWave]
    findings: Sequence[Finding] = ()
    """The problems and warnings of `council doctor`."""

    def to_json(self) -> JsonObject:
        """Return the result object of `council run --dry-run`."""
        return {"status": "planned", **asdict(self)}


def starting_adapters(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Return each task's first adapters by preference, if no phase is skipped."""
    document = TaskDocument()
    return {
        task.id: current_adapters(
            Workflow(config.phases_of(task.workflow) or DEFAULT_PHASES), document, task.adapter, task.fallback
        )
        for task in config.tasks
    }


def build_dry_run(
    config: RunConfig,
    starting: Mapping[str, tuple[str, ...]],
    programs: Mapping[str, str],
    fit: SessionFit,
    *,
    target: str,
    repository: str,
    sandbox: str,
) -> DryRun:
    """Plan a run of `config`.

    `starting` are the adapters that would start its tasks, `programs` the programs that they would run, `fit` is the
    capacity of the machine.
    """
    specs = {task.id: task for task in config.tasks}
    entries = {
        task.id: DispatchEntry(task.needs, starting[task.id][0], task.priority, task.owns, starting[task.id][1:])
        for task in config.tasks
    }
    limits = {name: adapter.capacity for name, adapter in config.adapters.items() if adapter.capacity is not None}

    def plan_task(spec: TaskSpec, waits_for: str | None) -> PlannedTask:
        return PlannedTask(
            id=spec.id,
            needs=spec.needs,
            waits_for=waits_for,
            adapter=starting[spec.id][0],
            phases=[phase.name for phase in config.phases_of(spec.workflow)],
            program=programs[spec.id],
            starts_from=target if spec.builds_on_target else config.base,
            checks=spec.check_commands,
            attempts=spec.attempts,
            timeout=spec.timeout,
            idle_timeout=spec.idle_timeout,
            priority=spec.priority,
        )

    waves = [
        PlannedWave(
            count_concurrent_sessions(wave, entries, limits, fit.sessions),
            [plan_task(specs[task], wave.waits_for.get(task)) for task in wave.tasks],
            wave.is_exact,
        )
        for wave in plan_waves(entries)
    ]
    most = max(wave.sessions for wave in waves)
    return DryRun(repository, config.base, target, sandbox, most, fit.limited_by, waves)


@dataclass(frozen=True, slots=True)
class Wave:
    """Tasks whose needs are all in earlier waves, in start order."""

    tasks: Sequence[str]
    waits_for: Mapping[str, str]
    """Tasks that wait for an earlier task of the wave with overlapping paths, each with that task."""
    is_exact: bool = True
    """False if there were too many tasks with paths to compare: `waits_for` may be incomplete."""


def plan_waves(entries: Mapping[str, DispatchEntry]) -> list[Wave]:
    """Return waves of tasks without cycles; each task is in the earliest possible.

    O(n log n) in tasks and needs, except for tasks that own paths, see `Wave.is_exact`.
    """
    order = {task: index for index, task in enumerate(entries)}
    waves = []
    for tasks in _levels(entries):
        tasks.sort(key=lambda task: (-entries[task].priority, order[task]))
        waves.append(_wave(tasks, entries))
    return waves


def count_concurrent_sessions(
    wave: Wave, entries: Mapping[str, DispatchEntry], capacities: Mapping[str, int], limit: int
) -> int:
    """Return the number of tasks of a wave that start together, up to `limit`."""
    ready = {task: replace(entries[task], needs=()) for task in wave.tasks}
    return len(DispatchBoard(ready, capacities).choose_tasks(limit, 0.0))


def _levels(entries: Mapping[str, DispatchEntry]) -> Iterator[list[str]]:
    sorter = TopologicalSorter({task: entry.needs for task, entry in entries.items()})
    sorter.prepare()
    while sorter.is_active():
        level = list(sorter.get_ready())
        yield level
        sorter.done(*level)


def _wave(tasks: Sequence[str], entries: Mapping[str, DispatchEntry]) -> Wave:
    waits_for: dict[str, str] = {}
    owners = _Owners()
    for task in tasks:
        owns = entries[task].owns
        before = owners.first_that_overlaps(owns)
        if before is not None:
            waits_for[task] = before
        owners.add(task, owns)
    return Wave(tasks, waits_for, owners.comparisons < _MOST_COMPARISONS)


class _Owners:
    """An index of owned patterns by literal prefix; each list is ordered by index."""

    def __init__(self) -> None:
        self.comparisons = 0
        self._known: set[tuple[str, ...]] = set()
        self._at: dict[str, list[_Owner]] = defaultdict(list)
        self._below: dict[str, list[_Owner]] = defaultdict(list)

    def add(self, task: str, owns: tuple[str, ...]) -> None:
        """Add a task, unless an earlier one owns exactly the same patterns."""
        if not owns or owns in self._known:
            return
        owner = len(self._known), owns, task
        self._known.add(owns)
        for prefix in map(literal_prefix, owns):
            self._at[prefix].append(owner)
            for shorter in _prefixes(prefix):
                self._below[shorter].append(owner)

    def first_that_overlaps(self, owns: tuple[str, ...]) -> str | None:
        """Return the first task with overlapping paths; None if none within the limit."""
        for _, other, task in self._near(owns):
            if self.comparisons >= _MOST_COMPARISONS:
                return None
            self.comparisons += 1
            if has_any_overlap(other, owns):
                return task
        return None

    def _near(self, owns: tuple[str, ...]) -> Iterator[_Owner]:
        lists = []
        for prefix in map(literal_prefix, owns):
            lists.append(self._below.get(prefix, []))
            lists += [self._at[shorter] for shorter in _prefixes(prefix) if shorter in self._at]
        return (owner for owner, _ in groupby(heapq.merge(*lists)))


def _prefixes(text: str) -> Iterator[str]:
    return (text[:end] for end in range(len(text) + 1))
