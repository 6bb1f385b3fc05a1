"""What a run and its tasks are while they are persisted: the documents behind every decision."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.outcome import ToolDenials
from orchestrator.domain.runs.phases import PhaseRecord
from orchestrator.errors import RefusedError


class TaskStatus(StrEnum):
    """Where a task is. Blocked and leased are derived from other facts, never stored."""

    PENDING = "pending"
    RUNNING = "running"
    QUEUED = "queued"  #: built, in the merge queue
    CHECKING = "checking"  #: merged, the checks run on the merged tree
    LANDING = "landing"  #: the intent to move the target is recorded
    LANDED = "landed"
    WAITING = "waiting"  #: a person is to approve what one of its phases came to
    DONE = "done"  #: its last phase handed over, and there is nothing to land
    NO_CHANGE = "no_change"
    CONFLICT = "conflict"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: States in which the task is over without having landed; a person may have it tried again.
RETRYABLE_STATUSES = frozenset({TaskStatus.NO_CHANGE, TaskStatus.CONFLICT, TaskStatus.FAILED, TaskStatus.CANCELLED})
#: States in which the task's work is built and on its way to the target.
LANDING_STATUSES = frozenset({TaskStatus.QUEUED, TaskStatus.CHECKING, TaskStatus.LANDING})
#: States in which a session, a check or a landing of the task runs now.
ACTIVE_STATUSES = frozenset({TaskStatus.RUNNING, TaskStatus.CHECKING, TaskStatus.LANDING})
#: States in which a task is somebody's: an orchestrator holds the claim on it. Only an attempt leads to them.
CLAIMED_STATUSES = frozenset({TaskStatus.RUNNING, *LANDING_STATUSES})
#: States in which what needs the task may start.
SUCCESS_STATUSES = frozenset({TaskStatus.LANDED, TaskStatus.DONE})
#: States in which the run has nothing left to do for a task.
FINAL_STATUSES = RETRYABLE_STATUSES | SUCCESS_STATUSES

#: The most sessions that a run can have side by side.
MAX_CAPACITY = 1000

#: The outcome of an attempt that was ended from outside, and by no failure of its own.
INTERRUPTED = "interrupted"
#: Outcomes of attempts that are among the failures of their task already, or that count towards no limit.
_NOT_COUNTED = frozenset({*FailureClass, INTERRUPTED})

#: Names of tasks that are told to somebody who named none of them.
_MOST_NAMED = 5


class _Document(BaseModel):
    # Not one program needs all of these, and each takes a millisecond to build.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Attempt(_Document):
    """One try of a task, recorded before anything of it exists. Times are wall-clock seconds."""

    number: int
    """The number of its session; interrupted attempts have one, too."""
    adapter: str
    base: str
    start: str | None = None
    """The commit that its worktree began at where that is not the base: earlier work, merged onto it."""
    started: Instant
    ended: Instant | None = None
    outcome: str | None = None
    """`built`, `interrupted`, `cancelled`, or the failure's class; None while it runs."""
    reason: str | None = None
    branch: str | None = None
    """The branch in the trusted repository that holds what the attempt left, if it left anything."""
    is_kept: bool = False
    """Whether its worktree stays, because it holds what may not or could not be committed."""
    secrets: tuple[str, ...] = ()
    """The names of the variables with secrets that its program was given."""
    check_log: str | None = None
    """The log of the check that did not pass."""
    session: str | None = None
    """The CLI's own id of its conversation."""
    words: str | None = None
    """What the CLI said last, or its result."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    """Of the input, what was read from a cache."""
    model: str | None = None
    """By its name, if the CLI told."""
    cost: float | None = None
    """US dollars: what the CLI told, or else what its tokens cost by the price of the model."""
    is_estimated: bool = False
    """Whether that cost is the latter."""
    folder: str | None = None
    """The folder that the CLI worked in, where alone it knows the conversation again."""
    resumed: bool = False
    """Whether it went on with the conversation of an earlier attempt."""
    phase: str | None = None
    """The phase of the task's workflow that it was made at; None: the task has no workflow."""
    discarded: tuple[str, ...] = ()
    """The first of the paths that it changed though it was to change nothing, which was discarded."""
    denied: ToolDenials = ToolDenials()
    """The tools that its CLI denied it."""


def sum_known_cost(attempts: Iterable[Attempt]) -> float | None:
    """Return what attempts cost in US dollars, as far as the CLIs told; None where none did."""
    costs = [one.cost for one in attempts if one.cost is not None]
    return sum(costs) if costs else None


class LandingIntent(_Document):
    """The landing that is under way: the target is about to move from `old` (None: it does not exist) to `new`."""

    old: str | None
    new: str
    recorded: Instant


class ImportedTask(_Document):
    """What the record of a task said that was imported from an older layout. Times are wall-clock seconds."""

    status: str | None = None
    """Its own word for where the task was."""
    started: Instant | None = None
    completed: Instant | None = None
    branch: str | None = None
    worktree: str | None = None
    phases: dict[str, Any] = {}
    """By name, as they were written; empty where they are too large."""
    metrics: dict[str, Any] = {}
    """The same."""


class TaskDocument(_Document):
    """The state of one task in one run."""

    status: TaskStatus = TaskStatus.PENDING
    attempts: tuple[Attempt, ...] = ()
    failures: int = 0
    """Attempts that ended in failure; those that were cut off by our own end do not count."""
    bounces: int = 0
    """How often what it built could not land, which no phase that is complete begins to count anew."""
    commit: str | None = None
    """What waits to land: the commit of the attempt that was built."""
    intent: LandingIntent | None = None
    intended: tuple[str, ...] = ()
    """The merges that were recorded before the target was moved to them, the newest last: its only landings."""
    landed: str | None = None
    """The commit on the target's first-parent line that brought the task in."""
    branch: str | None = None
    reason: str | None = None
    paths: tuple[str, ...] = ()
    """The paths in conflict."""
    start: str | None = None
    """The commit that the next attempt's worktree begins at, to go on with what an earlier one built."""
    base: str | None = None
    """The commit that what begins there is judged against."""
    feedback: str | None = None
    """What the next attempt is told about the last one, beside its prompt."""
    current: int | None = None
    """The number of the attempt that all this is about, where later ones were made before a checkpoint was restored."""
    refused: FailureClass | None = None
    """Why it may have no further session, where that is not the failure of its last attempt."""
    ignored: str | None = None
    """Why a person does not want it to be tried, until a person does."""
    phase: str | None = None
    """The phase that it is at, or is to enter next; None: none is left, or it has no workflow."""
    phases: tuple[PhaseRecord, ...] = ()
    """The phases that it was at, visit by visit."""
    revived: int = 0
    """How many of those visits were before a person last had it tried again."""
    built: int | None = None
    """The number of the attempt that built `commit`, where others came after it."""
    expanded: tuple[str, ...] = ()
    """The tasks that its plan became: what follows waits until they have landed."""
    pull_request: int | None = None
    """The number of the pull request that is about it."""
    imported: ImportedTask | None = None
    """Where it is of a run that was imported: what else was recorded of it."""
    extra: dict[str, Any] = {}
    """What people and other programs noted of it, such as `progress`, `message` and `files`; council only keeps it."""

    @property
    def inconsistency(self) -> str | None:
        """What of it contradicts the rest, as no run writes it; None if nothing does."""
        count = len(self.attempts)
        if [one.number for one in self.attempts] != list(range(1, count + 1)):
            return "attempts: they are not numbered from 1"
        for name, number in (("current", self.current), ("built", self.built)):
            if number is not None and not 1 <= number <= count:
                return f"{name}: there is no attempt {number}"
        if self.status in CLAIMED_STATUSES and not count:
            return f"status: it is {self.status} without an attempt"
        return None

    @property
    def started(self) -> float | None:
        """When work on it began; None where that is not known, or it has not."""
        if self.attempts:
            return self.attempts[0].started
        return None if self.imported is None else self.imported.started

    @property
    def attempt(self) -> Attempt:
        """The attempt that the status is about: the newest, but for what came of a checkpoint."""
        return self.attempts[-1 if self.current is None else self.current - 1]

    @property
    def counted_attempts(self) -> int:
        """The attempts that count towards the task's limit: those that failed, and one that runs or succeeded.

        The count starts again with each phase and with a retry by a person.
        """
        is_tried = self.status is not TaskStatus.PENDING and bool(self.attempts)
        return self.failures + (is_tried and self.building_attempt.outcome not in _NOT_COUNTED)

    @property
    def building_attempt(self) -> Attempt:
        """The attempt that built what waits to land."""
        return self.attempt if self.built is None else self.attempts[self.built - 1]

    @property
    def cost(self) -> float | None:
        """What all attempts cost in US dollars, as far as the CLIs told; None where none did."""
        return sum_known_cost(self.attempts)

    def with_attempt(self, number: int | None = None, **changes: Any) -> tuple[Attempt, ...]:
        """Return the attempts with one of them changed: that one, unless a number says another."""
        one = self.attempt if number is None else self.attempts[number - 1]
        changed = one.model_copy(update=changes)
        return tuple(changed if one.number == changed.number else one for one in self.attempts)


class ImportedRun(_Document):
    """What the record of a session said that was imported from an older layout as a run."""

    source: str
    """The file that it stood in, from the project's folder."""
    status: str | None = None
    """Its own word for how it stood."""
    options: dict[str, Any] = {}
    """As they were written; empty where they are too large."""
    metrics: dict[str, Any] = {}
    """The same."""


class HaltCause(StrEnum):
    """What stops a run before its end, other than a person."""

    BUDGET = "budget"
    BASE = "base"  #: a check fails on the base
    COMMANDS = "commands"  #: a program of checks or setup is not there


class RunDocument(_Document):
    """One execution of a config; enough to resume it without the file that it came from."""

    id: str
    config: str
    """The path of the file that it was started from."""
    repo: str
    is_url: bool
    base: str
    target: str
    capacity: int
    session_memory: int
    """Bytes that one session is expected to take."""
    adapters: dict[str, dict[str, Any]]
    """By name: what `config.model.restore_adapter` takes."""
    workflows: dict[str, list[dict[str, Any]]] = {}
    """By name: the phases, each what `domain.workflow.routing.Phase` holds."""
    fence: dict[str, Any]
    """What `config.model.SandboxConfig` holds."""
    worktrees: dict[str, Any]
    """What `config.model.WorktreesConfig` holds."""
    retention: dict[str, Any] = {}
    """What `config.model.Retention` holds."""
    mcp_servers: dict[str, dict[str, Any]] = {}
    """By name: what `config.model.McpServerConfig` holds."""
    budget: dict[str, Any] = {}
    """What `config.model.BudgetConfig` holds."""
    coordination: dict[str, Any] = {}
    """What `config.model.CoordinationConfig` holds, as it was when the run was made."""
    prices: dict[str, dict[str, Any]] = {}
    """By model: what `domain.runs.prices.Price` holds, where the file said it."""
    sinks: dict[str, dict[str, Any]] = {}
    """By name: what `config.model.restore_options` takes, and the patterns of the events."""
    trackers: dict[str, dict[str, Any]] = {}
    """By name: what `config.model.restore_options` takes."""
    given: tuple[str, ...] = ()
    """The fields that the command line gave instead of the file."""
    tasks: tuple[str, ...]
    """Task ids in the file's order."""
    start: str
    """The commit that the target (or, where it did not exist, the base) was at: landings are looked for behind it."""
    has_target: bool = False
    """Whether the target existed when the run was created: then no landing creates it."""
    hub: str
    """The folder of the hub and the trusted repository."""
    started: Instant
    ended: Instant | None = None
    halted: str | None = None
    """Why it was stopped before its end: its budget is used up, or its commands can't work."""
    halted_by: HaltCause | None = None
    """What stopped it."""
    allow_failing_base: bool = False
    """Whether sessions start though checks fail on the base."""
    proven_bases: tuple[str, ...] = ()
    """The bases that have passed their checks, by `engine.landing.base_checks`; the newest last."""
    merges: str | None = None
    """The run whose branch it merges; `latest` never means such a run."""
    imported: ImportedRun | None = None
    """Where it was not ours: there is its record and nothing else, so that nobody can work in it."""
    extra: dict[str, Any] = {}
    """What people and other programs noted of it; council only keeps it."""

    @property
    def inconsistency(self) -> str | None:
        """What of it contradicts the rest, as no run writes it; None if nothing does."""
        if self.imported is None and not 1 <= self.capacity <= MAX_CAPACITY:
            return f"capacity: it is {self.capacity}, not between 1 and {MAX_CAPACITY}"
        return None

    def check_not_imported(self) -> None:
        """Refuse a run of which there is only an imported record."""
        if self.imported is not None:
            what = f"run {self.id} was imported from {self.imported.source}, only its record is here"
            raise RefusedError(what, f"`council state show {self.id}` shows it; start a new run for what is left")

    def check_task(self, task: str) -> None:
        """Refuse the name of a task that the run does not have."""
        if task not in self.tasks:
            near = difflib.get_close_matches(task, self.tasks, n=3)
            rest = len(self.tasks) - _MOST_NAMED
            more = f" and {rest} more, see `council status`" if rest > 0 else ""
            named = f"name one of: {', '.join(self.tasks[:_MOST_NAMED])}{more}"
            remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else named
            raise RefusedError(f"run {self.id} has no task {task!r}", remedy)


class AdapterDocument(_Document):
    """What a run has learned about one of its adapters. Times are wall-clock seconds."""

    parked_until: Instant | None = None
    """Nothing of it starts before."""
    parks: int = 0
    """How often in a row it was parked; a session that ends well counts anew."""
    closed: str | None = None
    """Why nothing of it starts until a person has seen to it; `council adapters reopen` and a resume try again."""
    reopened: Instant | None = None
    """When a person reopened it: failures of sessions that started before do not close it again."""


class RequestAction(StrEnum):
    """What a person can ask of a run from another process."""

    CANCEL = "cancel"
    IGNORE = "ignore"
    RETRY = "retry"
    APPROVE = "approve"
    REJECT = "reject"
    REOPEN = "reopen"  #: of adapters, not of tasks


class CheckpointOrigin(StrEnum):
    """Who made a checkpoint."""

    HAND = "hand"
    CLOCK = "clock"  #: a run at work, by the clock; only the newest of these stay
    COUNCIL = "council"  #: a command, before it did what may be regretted


class RunRequest(_Document):
    """What was asked of a run, for whoever is or becomes its owner."""

    id: str
    action: RequestAction
    tasks: tuple[str, ...]
    asked: Instant
    reason: str | None = None
    """Why tasks are to be ignored; or what a person notes who approves or rejects."""
    phase: str | None = None
    """The phase from which on they are to be tried again; None: as they stand."""
    adapters: tuple[str, ...] = ()
    """The adapters to be reopened."""
