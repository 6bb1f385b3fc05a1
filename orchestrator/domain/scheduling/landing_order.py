"""The order of the merge queue, and the reasons why its tasks wait. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES, LANDING_STATUSES, TaskStatus
from orchestrator.domain.scheduling.conflict_reactions import describe_conflict_hold
from orchestrator.domain.scheduling.dispatch import AGING_SECONDS
from orchestrator.domain.scheduling.stacked_work import describe_stack_wait
from orchestrator.domain.wording import join_names

CheckState = Literal["running", "passed", "failed"]

#: The maximum number of task names in a reason.
_MAX_NAMED = 3


class LandingCandidate(NamedTuple):
    """A built task, with the facts that determine its position in the queue."""

    task: str
    priority: int
    built: float
    """When its work was finished, in wall-clock seconds."""
    bounces: int
    """How often its work was sent back."""

    @classmethod
    def of(cls, task: str, priority: int, document: TaskDocument) -> LandingCandidate:
        """Return the candidate for a built task."""
        attempt = document.building_attempt
        built = attempt.started if attempt.ended is None else attempt.ended
        return cls(task, priority, built, document.bounces)


def order_landings(candidates: Iterable[LandingCandidate], bumped: Sequence[str] = ()) -> list[str]:
    """Return tasks in landing order; ties keep their order.

    `bumped` tasks are first, in this order. Otherwise the task that was built first is first; each level of priority
    moves a task ahead, and each time that its work was sent back moves it behind, as if it had been built
    `AGING_SECONDS` earlier or later.
    """
    places = {task: place for place, task in enumerate(bumped)}

    def rank(one: LandingCandidate) -> tuple[int, float]:
        return places.get(one.task, len(places)), one.built / AGING_SECONDS - one.priority + one.bounces

    return [one.task for one in sorted(candidates, key=rank)]


def describe_hold(reason: str, task: str) -> str:
    """Return why a held task does not land, given the user's reason, which may be empty."""
    return f"held by a user{f': {reason}' if reason else ''}; `council queue release {task}` lets it land"


class WindowEntry(StoredDocument):
    """A merge that is checked, at its turn or ahead of it."""

    tasks: tuple[str, ...]
    """The tasks that it adds to the merge before it: one, or a batch."""
    commit: str
    """The merge."""
    onto: str
    """The commit that it is merged onto: the target, or the merge of the tasks ahead."""
    ahead: tuple[str, ...] = ()
    """The queued tasks that it contains in addition, which are assumed to land first."""
    since: Instant
    """When the check was requested."""
    state: CheckState = "running"


class QueueWindow(StoredDocument):
    """The merges that one process checks, in landing order; recorded for other processes."""

    entries: tuple[WindowEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class QueuedTask:
    """A task in the merge queue."""

    task: str
    position: int
    """From 1."""
    status: str
    """`queued`, `checking` or `landing`."""
    priority: int
    bounces: int
    """How often its work was sent back."""
    since: float
    """When its work was finished (seconds since the epoch)."""
    held: bool
    """Whether a user holds it."""
    waits_for: str | None
    """The task that lands first: a merge conflict with it is predicted, or the work is built on its work."""
    stacked: bool
    """Whether its work is built on unlanded work of `waits_for`."""
    bumped: bool
    """Whether a user moved it to the front."""
    check: WindowEntry | None
    """The merge that is checked for it, and the tasks ahead that this merge contains; null: none at present."""
    reason: str
    """Why it has not landed yet."""


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """The recorded facts of a run's merge queue."""

    run: str
    tasks: Mapping[str, TaskDocument]
    """All tasks, in file order."""
    priorities: Mapping[str, int]
    held: Mapping[str, str]
    """The reasons to hold tasks."""
    conflict_holds: Mapping[str, str]
    """Tasks that wait for a predicted conflict, with the task that lands first."""
    stack_waits: Mapping[str, str]
    """Tasks whose work is built on unlanded work of another one, with that task."""
    bumped: Sequence[str]
    windows: Iterable[QueueWindow]
    """The merges that active processes check."""
    is_live: bool
    """Whether a process is active in the run."""
    has_ended: bool
    """Whether the run has ended."""


def describe_queue(facts: QueueFacts) -> list[QueuedTask]:
    """Return the queued tasks in landing order; held ones are last."""
    built = {task: one for task, one in facts.tasks.items() if one.status in LANDING_STATUSES}
    candidates = [LandingCandidate.of(task, facts.priorities.get(task, 0), one) for task, one in built.items()]
    order = order_landings(candidates, facts.bumped)
    stages = (TaskStatus.LANDING, TaskStatus.CHECKING, TaskStatus.QUEUED)
    order.sort(key=lambda task: (_is_held(task, facts), stages.index(built[task].status)))
    checks = _current_checks(built, facts) if facts.is_live else {}
    known = {one.task: one for one in candidates}
    return [
        QueuedTask(
            task=task,
            position=position,
            status=built[task].status,
            priority=known[task].priority,
            bounces=known[task].bounces,
            since=known[task].built,
            held=task in facts.held,
            waits_for=facts.conflict_holds.get(task) or facts.stack_waits.get(task),
            stacked=task in facts.stack_waits and task not in facts.conflict_holds,
            bumped=task in facts.bumped,
            check=checks.get(task),
            reason=_describe_wait(task, facts, checks.get(task), order[: position - 1]),
        )
        for position, task in enumerate(order, start=1)
    ]


def _is_held(task: str, facts: QueueFacts) -> bool:
    is_held = task in facts.held or task in facts.conflict_holds or task in facts.stack_waits
    return is_held and facts.tasks[task].status is TaskStatus.QUEUED


def _current_checks(built: Mapping[str, TaskDocument], facts: QueueFacts) -> dict[str, WindowEntry]:
    """Return the recorded checks that still count, by task.

    The record of a process may be older than the last landing: tasks ahead that have landed are part of the target, and
    an entry with a task that left the queue otherwise, or was built again, is void.
    """
    checks = {}
    for entry in (entry for window in facts.windows for entry in window.entries):
        ahead = tuple(task for task in entry.ahead if facts.tasks[task].status is not TaskStatus.LANDED)
        parts = (*entry.tasks, *ahead)
        if all(task in built and LandingCandidate.of(task, 0, built[task]).built <= entry.since for task in parts):
            checks.update(dict.fromkeys(entry.tasks, entry.model_copy(update={"ahead": ahead})))
    return checks


def _describe_wait(task: str, facts: QueueFacts, check: WindowEntry | None, before: Collection[str]) -> str:
    document = facts.tasks[task]
    if document.status is TaskStatus.LANDING:
        return "the target is being updated with it" if facts.is_live else "its landing was interrupted"
    if (hold := _describe_hold(task, facts)) is not None:
        return hold
    if not facts.is_live:
        # Only landings are left.
        is_built = all(one.status in FINAL_STATUSES | LANDING_STATUSES for one in facts.tasks.values())
        command = "merge" if facts.has_ended and is_built else "resume"
        idle = f"no process is active in the run: `council {command} {facts.run}` lands it"
        return idle if document.reason is None else f"{document.reason}; {idle}"
    ahead = [one for one in before if not _is_held(one, facts)]
    first = f"{join_names(ahead, _MAX_NAMED)} to land" if ahead else ""
    if check is not None and check.state == "failed":
        return f"a check failed ahead of its turn; it waits for {first or 'its turn'}"
    if check is not None and check.state == "passed":
        return f"its checks passed; it waits for {first or 'its turn'}"
    if check is not None or document.status is TaskStatus.CHECKING:
        return f"its checks are running{f'; it waits for {first}' if first else ''}"
    if document.reason is not None:
        return document.reason
    return f"it waits for {first}" if first else "it is next"


def _describe_hold(task: str, facts: QueueFacts) -> str | None:
    if task in facts.held:
        return describe_hold(facts.held[task], task)
    if task in facts.conflict_holds:
        return describe_conflict_hold(task, facts.conflict_holds[task])
    return describe_stack_wait(task, facts.stack_waits[task], facts.tasks) if task in facts.stack_waits else None
