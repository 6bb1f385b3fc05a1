"""Choose the next tasks to start, by dependencies and heaps of ready tasks.

There is no clock and no I/O: the scheduler passes the time, starts the tasks that `choose_tasks` returns, and reports
results by `built`, `landed`, `ended`, `wait` and `retry`. Times are monotonic seconds of the scheduler.

Each step costs O(log n) in the number of tasks, plus the adapters and adapter groups, plus, for tasks that own paths,
the live tasks that own paths. `orchestrator.domain.scheduling.ready` handles conflicts between paths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import (
    CLAIMED_STATUSES,
    FINAL_STATUSES,
    LANDING_STATUSES,
    SUCCESS_STATUSES,
    UNSUCCESSFUL_STATUSES,
    USER_STATUSES,
    TaskStatus,
)
from orchestrator.domain.scheduling.dependencies import DependencyGraph
from orchestrator.domain.scheduling.forecast import Placements, StartForecast, UpcomingTasks
from orchestrator.domain.scheduling.ready import AdapterPool, ReadyBucket, ReadyQueue
from orchestrator.domain.settings.run_settings import CheckField

#: The waiting time in seconds that equals one level of priority.
AGING_SECONDS = 600.0
#: The number of shares into which the processes of a run divide tasks that could start at the same time.
_SHARES = 8
#: More than the number of tasks.
_SHARE_WIDTH = 1e7

_NO_LIMITS: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class DispatchEntry:
    """The scheduling data of a task; `owns` are patterns of `settings.path_patterns`."""

    needs: tuple[str, ...] = ()
    adapter: str = ""
    priority: int = 0
    """Higher first."""
    owns: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    """Adapters to use, in this order, while the previous one is in cooldown or disabled."""
    workflow: str | None = None
    """The workflow whose phases determine the adapters; `DispatchBoard.wait` sets the current ones."""
    parts: tuple[str, ...] = ()
    """The needs that its own plan created."""
    checks: tuple[CheckField, ...] = ()
    """Commands that must succeed on its merge."""
    allow_failing_base: bool = False
    """Whether it may start even if its checks fail on the base."""
    plan: str | None = None
    """The handoff with the plan that created it; None: no plan did."""
    tracker: str | None = None
    """The tracker that it comes from."""
    built_needs: tuple[str, ...] = ()
    """The needs of which built work suffices, before it has landed."""

    labels: tuple[str, ...] = ()
    """The labels that a machine must have to run it."""

    @property
    def is_from_file(self) -> bool:
        """Whether neither a plan nor a tracker created it."""
        return self.plan is None and self.tracker is None

    @property
    def adapters(self) -> tuple[str, ...]:
        """All adapters that may run it, in order of preference."""
        return (self.adapter, *self.fallback)

    def missing_needs(self, tasks: Mapping[str, TaskDocument]) -> list[str]:
        """Return the needs that have neither landed nor, if that suffices, built work."""
        return [
            need
            for need in self.needs
            if tasks[need].status not in SUCCESS_STATUSES
            and not (need in self.built_needs and tasks[need].status in LANDING_STATUSES)
        ]

    def with_subtasks(self, parts: Sequence[str]) -> DispatchEntry:
        """Return the entry with other tasks that its plan created."""
        if tuple(parts) == self.parts:
            return self
        needs = tuple(need for need in self.needs if need not in self.parts)
        return replace(self, needs=(*needs, *parts), parts=tuple(parts))


def with_subtasks(
    entries: Mapping[str, DispatchEntry], documents: Mapping[str, TaskDocument]
) -> dict[str, DispatchEntry]:
    """Return the entries with the known tasks of their plans as additional needs."""
    return {
        task: entry.with_subtasks([subtask for subtask in subtasks if subtask in entries])
        if (subtasks := documents[task].subtasks) or entry.parts
        else entry
        for task, entry in entries.items()
    }


class _State(Enum):
    PENDING = auto()
    UPCOMING = auto()  # ready at the next decision or at a given time
    READY = auto()
    RUNNING = auto()
    BUILT = auto()
    LANDED = auto()
    OVER = auto()


# Module-level names: each access to an enum member would cost a dictionary lookup.
_PENDING, _UPCOMING, _READY, _RUNNING, _BUILT, _LANDED, _OVER = _State


class DispatchBoard:
    """The scheduling state of all tasks of a run, in file order.

    Of two ready tasks, the one with the higher priority starts first, unless the other one has waited `AGING_SECONDS`
    longer for each level between them; ties are resolved by file order. The wait starts at the first decision that
    finds the task ready.

    Additional processes of a run resolve ties in other orders, so that they rarely claim the same tasks: each begins
    with its share of the tasks, and continues with the last tasks of the other shares.
    """

    def __init__(
        self,
        entries: Mapping[str, DispatchEntry],
        capacities: Mapping[str, int] = _NO_LIMITS,
        worker: int = 0,
        labels: Collection[str] = (),
    ) -> None:
        """Create a board of pending tasks; `capacities` limits sessions by adapter.

        `worker` is the number of an additional process of the run, which selects its share. `labels` are those of this
        machine.
        """
        self._worker, self._labels = worker, labels
        self.adapters = AdapterPool(capacities)
        self.missing_labels: dict[str, str] = {}
        """The labels that this machine lacks, by the disabled adapter that stands for each."""
        entries = {task: self._require_labels(entry) for task, entry in entries.items()}
        self.entries = dict(entries)
        """The entries of all tasks, including those that plans have added."""
        self._state = dict.fromkeys(entries, _PENDING)
        self._awaiting_user: set[str] = set()
        """The paused tasks that only a user can continue."""
        self._graph = DependencyGraph(lambda task: self._state[task] is _PENDING)
        for task, entry in entries.items():
            self._graph.set_needs(task, entry.needs, entry.built_needs)
        self.blocked: Mapping[str, str] = self._graph.blocked
        """Tasks that can no longer start, each with a need that will not land."""
        self._queue = ReadyQueue(self.adapters)
        self._placements = Placements(self._queue)
        for order, (task, entry) in enumerate(entries.items()):
            self._placements.add(task, order, entry.priority, entry.adapters, entry.owns)
        self._upcoming = UpcomingTasks()
        self.forecast = StartForecast(self.adapters, self._queue, self._upcoming)
        for task in entries:
            self._offer(task)

    @classmethod
    def of(
        cls,
        entries: Mapping[str, DispatchEntry],
        statuses: Mapping[str, TaskStatus],
        capacities: Mapping[str, int] = _NO_LIMITS,
        worker: int = 0,
        labels: Collection[str] = (),
    ) -> DispatchBoard:
        """Return the board of a run in progress; built tasks own paths until they land."""
        board = cls(entries, capacities, worker, labels)
        for task, status in statuses.items():
            if status in SUCCESS_STATUSES:
                board.landed(task)
            elif status in USER_STATUSES:
                board.pause(task, keeps_paths=False)
                board._awaiting_user.add(task)
            elif status in CLAIMED_STATUSES:
                board._leave(task, _BUILT if status in LANDING_STATUSES else _RUNNING)
                board._set_built(task, is_built=status in LANDING_STATUSES)
                board._queue.keep_paths(task, entries[task].owns)
                if board._state[task] is _RUNNING:
                    board.adapters.occupy(task, board._placements[task].bucket.adapter_group)
        for task, status in statuses.items():
            if status in UNSUCCESSFUL_STATUSES:
                board.ended(task)
        return board

    def _require_labels(self, entry: DispatchEntry) -> DispatchEntry:
        """Return the entry, with a disabled adapter instead of its own if this machine lacks one of its labels."""
        missing = next((label for label in entry.labels if label not in self._labels), None)
        if missing is None:
            return entry
        name = f"label {missing}"  # names of adapters have no spaces
        if name not in self.missing_labels:
            self.missing_labels[name] = missing
            self.adapters.disable(name, f"this machine does not have the label {missing!r}")
        return replace(entry, adapter=name, fallback=(), workflow=None)

    def add(self, entries: Mapping[str, DispatchEntry], file_order: Iterable[str]) -> None:
        """Add pending tasks at their positions; they may need each other."""
        entries = {task: self._require_labels(entry) for task, entry in entries.items()}
        orders = self._placements.positions(entries, file_order)
        self.entries |= entries
        for task, entry in entries.items():
            self._state[task] = _PENDING
            self._placements.add(task, orders[task], entry.priority, entry.adapters, entry.owns)
        for task, entry in entries.items():
            self._graph.set_needs(task, entry.needs, entry.built_needs)
        for task in entries:
            if task not in self.blocked and not self._graph.block_if_a_need_will_not_land(task):
                self._offer(task)

    def set_subtasks(self, task: str, parts: Sequence[str]) -> None:
        """Set the subtasks from a task's plan: the task continues after they have landed.

        Previous subtasks are no longer needed. Call `wait`, `pause` or `retry` afterwards.
        """
        self.entries[task] = self.entries[task].with_subtasks(parts)
        self._graph.set_needs(task, self.entries[task].needs, self.entries[task].built_needs)

    def built(self, task: str) -> None:
        """Queue a task to land: release its capacity, not its paths; dependents on built work may start."""
        if self._state[task] is _RUNNING:
            self.adapters.free(task)
        self._state[task] = _BUILT
        self._set_built(task, is_built=True)

    def landed(self, task: str) -> None:
        """Record that a task landed, or is done without landing: dependents may start."""
        self._leave(task, _LANDED)
        for dependent in self._graph.land(task):
            self._offer(dependent)

    def ended(self, task: str) -> None:
        """Record that a task failed or was cancelled: block its dependents.

        Each is blocked by its direct need.
        """
        self._leave(task, _OVER)
        self._graph.end(task)

    def wait(
        self, task: str, until: float, adapters: tuple[str, ...] | None = None, *, keeps_paths: bool = False
    ) -> None:
        """Let a task wait until `until`; `adapters` replaces its adapters by preference.

        With `keeps_paths`, it owns its paths while waiting, because it continues its built work. A task that waits for
        its subtasks, or for built work of a need, continues after these, and leaves its paths to them.
        """
        if self._graph.has_missing_needs(task):
            self.pause(task, keeps_paths=False, adapters=adapters)
            self._graph.block_if_a_need_will_not_land(task)
            return
        self._leave(task, _UPCOMING)
        self._placements.change(task, self.entries[task].owns, adapters, keeps_paths=keeps_paths)
        self._upcoming.delay(task, until, self._placements[task])

    def set_adapters(self, task: str, adapters: tuple[str, ...], *, keeps_paths: bool = False) -> None:
        """Change the adapters of a task that has not started here; see `wait`."""
        state = self._state[task]
        if state is not _PENDING:
            self._leave(task, _PENDING)
        self._placements.change(
            task, self.entries[task].owns, adapters, keeps_paths=keeps_paths and not self._graph.has_missing_needs(task)
        )
        if state is not _PENDING:
            self._offer(task)

    def pause(self, task: str, *, keeps_paths: bool, adapters: tuple[str, ...] | None = None) -> None:
        """Pause a task for a user's decision. See `wait`, which continues it."""
        self._leave(task, _PENDING)
        self._placements.change(task, self.entries[task].owns, adapters, keeps_paths=keeps_paths)

    def retry(self, task: str) -> None:
        """Retry an ended task: it and the tasks that only it blocked become pending."""
        if self._state[task] is _OVER:
            self._state[task] = _PENDING
            for retried in self._graph.retry(task):
                self._offer(retried)

    def sync_task(
        self,
        task: str,
        status: TaskStatus,
        until: float,
        adapters: tuple[str, ...] | None = None,
        *,
        keeps_paths: bool = False,
    ) -> None:
        """Apply a status from another process; the task may start here at `until`.

        A task that is active elsewhere uses no capacity here, but owns its paths. For other arguments see `wait`.
        """
        state = self._state[task]
        if state is _OVER and status not in UNSUCCESSFUL_STATUSES:
            self.retry(task)
            state = self._state[task]
        if status in SUCCESS_STATUSES:
            if state is not _LANDED:
                self.landed(task)
        elif status in FINAL_STATUSES:
            if state is not _OVER:
                self.ended(task)
        elif status in USER_STATUSES:
            self.pause(task, keeps_paths=keeps_paths)
            self._awaiting_user.add(task)
        elif status in CLAIMED_STATUSES:
            if state is _RUNNING:
                self.built(task)
            elif state is not _BUILT:
                self._leave(task, _BUILT)
                self._queue.keep_paths(task, self.entries[task].owns)
            self._set_built(task, is_built=status in LANDING_STATUSES)
        else:
            self._sync_pending(task, until, adapters, keeps_paths=keeps_paths)

    def _sync_pending(self, task: str, until: float, adapters: tuple[str, ...] | None, *, keeps_paths: bool) -> None:
        has_started = self._state[task] in {_RUNNING, _BUILT} or task in self._awaiting_user
        if not has_started and not self._graph.is_ready(task):
            if adapters is not None:
                self.set_adapters(task, adapters, keeps_paths=keeps_paths)
        elif has_started or adapters is not None:
            self.wait(task, until, adapters, keeps_paths=keeps_paths)

    def adapter_of(self, task: str) -> str:
        """Return the adapter that runs a task, or would run it now."""
        return self.adapters.adapter_of(task, self._placements[task].bucket.adapter_group)

    def remaining_adapters(self, statuses: Mapping[str, TaskStatus]) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield each task that is not finished or permanently blocked, with its adapters."""
        for task, status in statuses.items():
            if status not in FINAL_STATUSES and task not in self.blocked:
                yield task, self.entries[task].adapters

    def choose_tasks(self, limit: int, now: float) -> list[str]:
        """Return the tasks to start, in order, at most `limit`; they count as running."""
        self.adapters.end_cooldowns(now)
        for tasks, since in self._upcoming.take_due(now):
            self._add(tasks, since)
        taken, states = self._queue.take(limit, now), self._state
        for task in taken:
            states[task] = _RUNNING
        return taken

    def _add(self, tasks: Iterable[str], since: float) -> None:
        states, places, ranks = self._state, self._placements, dict[int, float]()
        ready: list[tuple[float, float, str, ReadyBucket]] = []
        for task in tasks:
            states[task] = _READY
            order, priority, bucket = places[task]
            if self._worker:
                share = (int(order) - self._worker) % _SHARES
                order = share * _SHARE_WIDTH + (-order if share else order)
            # Sharing one float object makes tuple comparisons of ranks faster.
            rank = ranks.get(priority)
            if rank is None:
                rank = ranks[priority] = since / AGING_SECONDS - priority
            ready.append((rank, order, task, bucket))
        self._queue.add(ready)

    def _offer(self, task: str) -> None:
        if self._state[task] is _PENDING and self._graph.is_ready(task):
            self._state[task] = _UPCOMING
            self._upcoming.offer(task, self._placements[task])

    def _leave(self, task: str, state: _State) -> None:
        before = self._state[task]
        self._awaiting_user.discard(task)
        self._queue.free_paths(task)
        if before is _RUNNING:
            self.adapters.free(task)
        elif before is _READY:
            self._queue.discard(task)
        elif before is _UPCOMING:
            self._upcoming.discard(task)
        self._state[task] = state
        if state is not _BUILT and state is not _LANDED:
            self._set_built(task, is_built=False)

    def _set_built(self, task: str, *, is_built: bool) -> None:
        """Offer the dependents that start on built work of a task, or let them wait again."""
        for dependent in self._graph.build(task) if is_built else ():
            self._offer(dependent)
        for dependent in () if is_built else self._graph.unbuild(task):
            if self._state[dependent] is _READY or self._state[dependent] is _UPCOMING:
                self._leave(dependent, _PENDING)
