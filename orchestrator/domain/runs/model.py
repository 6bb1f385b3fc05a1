"""The stored documents of runs, tasks and adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict, Field

from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.check_results import CheckRecord
from orchestrator.domain.runs.outcome import ToolDenials
from orchestrator.domain.runs.phases import PhaseRecord
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES, TRANSITIONS, TaskStatus, Trigger
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import ResolvedSettings, Retention, TaskSpec
from orchestrator.domain.wording import join_names, suggest_similar
from orchestrator.errors import InvalidTransition, RefusedError

#: The outcome of an attempt that was stopped from outside.
INTERRUPTED = "interrupted"
#: The outcome of an attempt whose work and conversation continue in the next one, because a user attaches or attached.
PAUSED = "paused"
#: Outcomes that `failures` already counts, or that count towards no limit.
_NOT_COUNTED = frozenset({*FailureClass, INTERRUPTED, PAUSED})

#: The maximum number of task names in a remedy.
_MOST_NAMED = 5


class Attempt(StoredDocument):
    """One attempt at a task, recorded before it starts. Times are wall-clock seconds."""

    number: int
    """The number of its session, from 1; interrupted attempts have numbers as well."""
    adapter: str
    base: str
    start: str | None = None
    """The start commit of its worktree, if not the base: earlier work, merged with the base."""
    stacked_on: dict[str, str] = Field(default_factory=dict)
    """The tasks whose built, unlanded work is part of its base, each with the commit of that work."""
    started: Instant
    ended: Instant | None = None
    seconds: float | None = None
    """Its duration, as measured by its process without jumps of the wall clock; None: it runs, or was interrupted."""
    outcome: str | None = None
    """`built`, `completed`, `interrupted`, `paused`, `cancelled`, or the failure class; None while it runs."""
    reason: str | None = None
    branch: str | None = None
    """The branch in the trusted repository with its changes, if any."""
    is_kept: bool = False
    """Whether its worktree is preserved because some files must not or could not be committed."""
    secrets: tuple[str, ...] = ()
    """The names of the secret environment variables passed to its program."""
    check_log: str | None = None
    """The log of the failed check."""
    checks: tuple[CheckRecord, ...] = ()
    """The last results of the checks on the merge of its work."""
    session: str | None = None
    """The conversation id of the CLI."""
    last_message: str | None = None
    """The last message of the CLI, or its result."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    """The part of the input that was read from a cache."""
    model: str | None = None
    """The name of the model, if reported."""
    cost: float | None = None
    """US dollars: as reported by the CLI, or computed from the price of the model."""
    is_estimated: bool = False
    """Whether the tokens are the CLI's estimate, or the cost was computed from the price of the model."""
    folder: str | None = None
    """The working directory of the CLI; the conversation can be resumed only there."""
    resumed: bool = False
    """Whether it continued the conversation of an earlier attempt."""
    attached: bool = False
    """Whether a user was attached to its conversation."""
    phase: str | None = None
    """Its phase of the workflow; None: the task has no workflow."""
    restart_reason: str = ""
    """The reason why it started from scratch although there was work to fix."""
    discarded: tuple[str, ...] = ()
    """The first paths whose changes were discarded, because it was not allowed to change files."""
    denied_tools: ToolDenials = ToolDenials()
    """Tool calls that its CLI denied."""

    def duration(self, now: float) -> float:
        """Return its duration in seconds, up to `now` if it runs; not negative."""
        if self.seconds is not None:
            return self.seconds
        return max((now if self.ended is None else self.ended) - self.started, 0.0)


def sum_known_cost(attempts: Iterable[Attempt]) -> float | None:
    """Return the known cost of attempts in US dollars; None if no cost is known."""
    costs = [attempt.cost for attempt in attempts if attempt.cost is not None]
    return sum(costs) if costs else None


class PreparedMerge(StoredDocument):
    """A merge commit, ready to move the target from `old` (None: no target) to `new`."""

    old: str | None
    new: str
    recorded: Instant = 0.0
    """When it was recorded as the landing intent of its task; 0 until then."""
    resolved_by: tuple[str, ...] = Field(default=(), exclude=True)
    """The structural merge drivers that merged files that git could not merge; not stored, because each landing merges
    again."""


class RebasedWork(StoredDocument):
    """Built work that was rebased, because the work that it was stacked on had changed."""

    commit: str
    base: str
    """The commit that `commit` is compared with."""
    stacked_on: dict[str, str] = Field(default_factory=dict)
    """As in `Attempt`, for this base."""


class Proposal(StoredDocument):
    """What is known about the pull request of a task."""

    url: str
    pushed: str
    """The newest commit that was pushed to its branch."""
    rounds: int = 0
    """The number of times that the task was continued for it."""
    handled: tuple[str, ...] = ()
    """The failures and review comments that sessions have received."""
    onto: str | None = None
    """The newest commit of the target when it was opened: a commit that this one contains can't have merged it."""


class ImportedTask(StoredDocument):
    """The record of a task from an earlier state format, in wall-clock seconds."""

    status: str | None = None
    """The original name of its status."""
    started: Instant | None = None
    completed: Instant | None = None
    branch: str | None = None
    worktree: str | None = None
    phases: dict[str, Any] = Field(default_factory=dict)
    """The original phases by name; empty if too large."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """The original metrics; empty if too large."""


class TaskDocument(StoredDocument):
    """The state of one task in one run."""

    status: TaskStatus = TaskStatus.PENDING
    attempts: tuple[Attempt, ...] = ()
    failures: int = 0
    """Failed attempts; attempts interrupted by a stop of the orchestrator do not count."""
    bounces: int = 0
    """The number of times that its work could not land; not reset by a completed phase."""
    commit: str | None = None
    """The commit to land."""
    rebased: RebasedWork | None = None
    """The newest rebase of its work; outdated if the commit differs from `commit`."""
    landing_intent: PreparedMerge | None = None
    """The move of the target that is in progress."""
    intended_merges: tuple[str, ...] = ()
    """Merges recorded before the target was moved, newest last; only these can be its landing."""
    landed: str | None = None
    """The commit on the first-parent line of the target that merged the task."""
    branch: str | None = None
    reason: str | None = None
    paths: tuple[str, ...] = ()
    """The conflicting paths."""
    start: str | None = None
    """The commit that the next attempt starts from, to continue earlier work."""
    base: str | None = None
    """The commit that its work is compared with."""
    conflict: str | None = None
    """The commit with the merge conflict that its next, or built, work resolves."""
    feedback: str | None = None
    """Feedback about the last attempt, added to the prompt of the next one."""
    current: int | None = None
    """The number of the current attempt, if a checkpoint was restored after later attempts."""
    refused: FailureClass | None = None
    """The failure that rules out another session, if not that of its last attempt."""
    ignored_reason: str | None = None
    """A user's reason to exclude it, until a user retries it."""
    phase: str | None = None
    """Its current or next phase; None: no phase remains, or it has no workflow."""
    phases: tuple[PhaseRecord, ...] = ()
    """All visits of its phases, in order."""
    visits_before_retry: int = 0
    """The number of visits before the last retry by a user."""
    built_by: int | None = None
    """The number of the attempt that built `commit`, if later attempts followed."""
    subtasks: tuple[str, ...] = ()
    """The tasks that its plan created; it continues after they have landed."""
    pull_request: int | None = None
    """The number of its pull request."""
    proposal: Proposal | None = None
    """The state of its pull request, if it lands by it."""
    imported: ImportedTask | None = None
    """For a task of an imported run: its original record."""
    annotations: dict[str, Any] = Field(default_factory=dict)
    """Data of users and other programs, such as `progress`, `message` and `files`; not used by council."""

    @property
    def inconsistency(self) -> str | None:
        """An inconsistency between fields, which no run produces; None if there is none."""
        count = len(self.attempts)
        if [attempt.number for attempt in self.attempts] != list(range(1, count + 1)):
            return "attempts: not numbered from 1"
        for name, number in (("current", self.current), ("built_by", self.built_by)):
            if number is not None and not 1 <= number <= count:
                return f"{name}: attempt {number} does not exist"
        if self.status in CLAIMED_STATUSES and not count:
            return f"status: {self.status} without an attempt"
        return None

    @property
    def started(self) -> float | None:
        """When its first attempt started; None if unknown, or not started."""
        if self.attempts:
            return self.attempts[0].started
        return None if self.imported is None else self.imported.started

    @property
    def attempt(self) -> Attempt:
        """The current attempt: the newest one, except after a checkpoint was restored."""
        return self.attempts[-1 if self.current is None else self.current - 1]

    @property
    def last_conversation(self) -> Attempt | None:
        """The newest attempt with a conversation that can be continued; None if there is none."""
        attempts = reversed(self.attempts[: None if self.current is None else self.current])
        return next((each for each in attempts if each.session is not None and each.folder is not None), None)

    @property
    def counted_attempts(self) -> int:
        """The number of attempts that count towards the limit.

        These are failed attempts, and a running or successful one. Reset by each phase and each retry by a user.
        """
        is_tried = self.status is not TaskStatus.PENDING and bool(self.attempts)
        return self.failures + (is_tried and self.building_attempt.outcome not in _NOT_COUNTED)

    @property
    def building_attempt(self) -> Attempt:
        """The attempt that built `commit`."""
        return self.attempt if self.built_by is None else self.attempts[self.built_by - 1]

    def base_of(self, commit: str | None, attempt: Attempt) -> str:
        """Return the commit that the work of an attempt is compared with, which was rebased if it is not its own."""
        return attempt.base if self.rebased is None or self.rebased.commit != commit else self.rebased.base

    @property
    def built_base(self) -> str:
        """The commit that `commit` is compared with."""
        return self.base_of(self.commit, self.building_attempt)

    @property
    def stack(self) -> Mapping[str, str]:
        """The tasks that `commit` is stacked on, see `Attempt`; they may have landed since."""
        return self.stack_of(self.built_base) if self.commit is not None and self.attempts else {}

    def stack_of(self, base: str | None) -> Mapping[str, str]:
        """Return the tasks whose work is part of a base of this task, see `Attempt`."""
        if self.rebased is not None and self.rebased.base == base:
            return self.rebased.stacked_on
        return next((one.stacked_on for one in reversed(self.attempts) if one.base == base), {})

    @property
    def cost(self) -> float | None:
        """The known cost of all attempts in US dollars; None if no cost is known."""
        return sum_known_cost(self.attempts)

    def with_attempt(self, number: int | None = None, **changes: Any) -> tuple[Attempt, ...]:
        """Return the attempts, with changes to attempt `number` or the current one."""
        attempt = self.attempt if number is None else self.attempts[number - 1]
        changed = attempt.model_copy(update=changes)
        return tuple(changed if each.number == changed.number else each for each in self.attempts)


def apply_trigger(subject: str, task: TaskDocument, trigger: Trigger, **changes: Any) -> TaskDocument:
    """Return the task after `trigger`; raise InvalidTransition if impossible.

    `changes` are changes to other fields.
    """
    status = TRANSITIONS.get((task.status, trigger))
    if status is None:
        raise InvalidTransition(subject, task.status, trigger)
    return task.model_copy(update={"status": status, **changes})


class Attachment(StoredDocument):
    """A task to whose conversation a user attaches, or is attached: only the process `orchestrator` may run it."""

    orchestrator: str
    since: Instant
    """When it was recorded, in wall-clock seconds."""


class ImportedRun(StoredDocument):
    """The record of a run from a session in an earlier state format."""

    source: str
    """The path of the source file, relative to the project folder."""
    status: str | None = None
    """The original name of its status."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The original options; empty if too large."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """The original metrics; empty if too large."""


class HaltCause(StrEnum):
    """The cause of a halt that no user requested."""

    BUDGET = "budget"
    BASE = "base"  #: a check fails on the base
    COMMANDS = "commands"  #: a program of checks or setup is missing


class RunDocument(ResolvedSettings):
    """One execution of a config, with all data to resume it without its config file."""

    model_config = ConfigDict(strict=False)

    id: str
    config: str
    """The path of its config file."""
    config_digest: str | None = None
    """The digest of the config file when the run was created; None: unknown, or tasks were reloaded since."""
    target: str
    """The branch that tasks land on."""
    state: Retention = Field(default_factory=Retention)
    """How much history its store retains."""
    tasks: tuple[str, ...]
    """Task ids in file order."""
    start: str
    """The commit of the target (or of the base, without a target); only later commits can be landings."""
    has_target: bool = False
    """Whether the target existed when the run was created; if so, no landing creates it."""
    hub: str | None
    """The folder of the hub and the trusted repository; None if the run spans machines, which have one each."""
    started: Instant
    ended: Instant | None = None
    halted: str | None = None
    """The reason for the halt, such as an exhausted budget or commands that can't run."""
    halt_cause: HaltCause | None = None
    """The cause of the halt."""
    allow_failing_base: bool = False
    """Whether sessions start even if checks fail on the base."""
    held: dict[str, str] = Field(default_factory=dict)
    """Tasks that a user holds, which do not land until they are released, each with the reason, which may be empty."""
    bumped: tuple[str, ...] = ()
    """Tasks that a user moved to the front of the merge queue, the first one first."""
    predicted_conflicts: tuple[tuple[str, str], ...] = ()
    """Pairs of tasks with predicted merge conflicts, each sorted; recorded only to `hold` or `rebase` them."""
    released: tuple[str, ...] = ()
    """Tasks that a user released, which land regardless of predicted conflicts."""
    follow: TaskSpec | None = None
    """The defaults of new tasks of trackers, which join the run until it is stopped; None: it takes no new ones."""
    merges: str | None = None
    """The run whose branch it merges; `latest` never refers to such a run."""
    imported: ImportedRun | None = None
    """For an imported run: its original record. Such a run can't be resumed."""
    annotations: dict[str, Any] = Field(default_factory=dict)
    """Data of users and other programs; not used by council."""

    def is_held(self, task: str) -> bool:
        """Return whether `council queue release` has an effect on a task."""
        is_predicted = any(task in pair for pair in self.predicted_conflicts)
        return task in self.held or (is_predicted and self.merge.on_predicted_conflict == "hold")

    def check_not_imported(self) -> None:
        """Raise RefusedError for an imported run."""
        if self.imported is not None:
            message = f"run {self.id} was imported from {self.imported.source} and can't be continued"
            raise RefusedError(message, f"show it with `council state show {self.id}`, or start a new run")

    def check_task(self, task: str) -> None:
        """Raise RefusedError if the run has no task of this name."""
        if task not in self.tasks:
            listed = f", see `council status --run {self.id}`" if len(self.tasks) > _MOST_NAMED else ""
            remedy = f"use one of: {join_names(self.tasks, _MOST_NAMED)}{listed}"
            raise RefusedError(f"run {self.id} has no task {task!r}", suggest_similar(task, self.tasks, 3) or remedy)


#: The maximum difference between the clocks of two machines, in seconds.
_MAX_CLOCK_SKEW = 60.0


class AdapterDocument(StoredDocument):
    """The state of an adapter in a run. Times are wall-clock seconds."""

    cooldown_until: Instant | None = None
    """The end of its cooldown: no session starts before."""
    cooldown_since: Instant | None = None
    """When its cooldown was recorded."""
    cooldowns: int = 0
    """Its consecutive cooldowns; reset by a session that has a response."""
    probe: str | None = None
    """The task whose session probes it after a cooldown; others wait for its response, or its end."""
    disabled_reason: str | None = None
    """The reason for disabling it, until `council adapters enable` or a resume."""
    enabled_at: Instant | None = None
    """When a user enabled it; failures of sessions that started earlier do not disable it again."""

    def is_cooling_down(self, now: float) -> bool:
        """Return True before the end of its cooldown; False if the clock was set back."""
        if self.cooldown_until is None or now >= self.cooldown_until:
            return False
        return self.cooldown_since is None or now > self.cooldown_since - _MAX_CLOCK_SKEW


class SharedCooldown(StoredDocument):
    """The cooldown of an adapter for all runs of the store that define it equally. Times are wall-clock seconds."""

    until: Instant
    """Its end: no session starts before."""
    since: Instant | None
    """When it was recorded."""
    cooldowns: int
    """The consecutive cooldowns."""
    reason: str
    """The message of the program."""
    run: str
    """The run that recorded it, or that probes the account."""
    probe: str | None = None
    """The task of that run whose session probes the account after the end; sessions of other runs wait for it."""


class RequestAction(StrEnum):
    """The kinds of requests to a run from another process."""

    CANCEL = "cancel"
    IGNORE = "ignore"
    RETRY = "retry"
    APPROVE = "approve"
    REJECT = "reject"
    HOLD = "hold"  #: the task does not land until it is released
    RELEASE = "release"
    BUMP = "bump"  #: to the front of the merge queue
    ENABLE = "enable"  #: for adapters, not for tasks


class RunRequest(StoredDocument):
    """A request to a run, for its current or next leader."""

    id: str
    action: RequestAction
    tasks: tuple[str, ...]
    asked: Instant
    reason: str | None = None
    """The reason to ignore or hold tasks, or the comment on an approval or rejection."""
    phase: str | None = None
    """The phase from which to retry the tasks; None: their current phase."""
    adapters: tuple[str, ...] = ()
    """The adapters to enable."""
