"""Events of runs, budgets and adapters, and of the systems that follow a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.domain.events.base import RunEvent, Shown
from orchestrator.domain.wording import join_names

if TYPE_CHECKING:
    from orchestrator.domain.documents.times import Instant

#: Task keys that can't change after the start of a run, with reasons.
FIXED_KEYS: Mapping[str, str] = {
    "needs": "the order of a run's tasks is set when it starts",
    "owns": "the paths that a run's tasks own are set when it starts",
    "workflow": "the phases of a run's tasks are set when it starts",
}
#: The maximum number of tasks in a suggested command.
_MAX_NAMED_TASKS = 8


class RunCreated(RunEvent):
    """The run and its tasks were recorded."""

    type = "run.created"
    sentence = "created run {run} (target: {target})"

    tasks: int
    """The number of tasks."""
    target: str


class RunLeaderElected(RunEvent):
    """A process became the leader of the run."""

    type = "run.leader_elected"
    sentence = "process {pid} leads the run"
    shown = Shown.NEVER

    epoch: int
    pid: int
    sandbox: str = ""
    """The kind of sandbox of the process; absent if the process had joined before."""


class RunJoined(RunEvent):
    """A process joined the run."""

    type = "run.joined"
    sentence = "worker {orchestrator} joined"

    orchestrator: str
    """The name of the process in the run."""
    host: str
    pid: int
    sandbox: str = ""


class RunWorkerLeft(RunEvent):
    """A process left the run, and others continue.

    It was stopped, or cannot run checks or setup.
    """

    type = "run.worker_left"
    sentence = "worker {orchestrator} left the run: {headline}"

    orchestrator: str
    """The name of the process in the run."""
    pid: int
    reason: str

    @property
    def headline(self) -> str:
        """The first line of the reason."""
        return self.reason.partition("\n")[0]


class RunCapacityLimited(RunEvent):
    """The machine has resources for fewer sessions than `capacity`."""

    type = "run.capacity_limited"
    sentence = "at most {sessions} sessions at once: {reason}"

    sessions: int
    reason: str


class RunWaiting(RunEvent):
    """The run can only wait, for the adapters, users or machines that it names; repeated after changes."""

    type = "run.waiting"
    sentence = "waiting for {awaited}, at least until {until}"
    sentence_without = ("until", "waiting for {awaited}")

    until: Instant | None
    """When the first adapter is available again; null if the run waits for no adapter."""
    adapters: Sequence[str]
    approvals: Sequence[str]
    """The tasks that wait for approval."""
    held: Sequence[str] = ()
    """The tasks that land once a user releases them."""
    pull_requests: Sequence[str] = ()
    """The tasks whose pull requests are open."""
    missing: Mapping[str, str] = {}
    """The tasks that no machine of the run can start, each with what is missing."""

    @property
    def awaited(self) -> str:
        """A description of what it waits for."""
        adapters = f"{', '.join(self.adapters)} (cooling down)" if self.adapters else ""
        approvals = f"your approval of {', '.join(self.approvals)}" if self.approvals else ""
        held = f"`council queue release {' '.join(self.held)}`" if self.held else ""
        pull_requests = f"the pull requests of {', '.join(self.pull_requests)}" if self.pull_requests else ""
        missing = f"a machine with {join_names(sorted(set(map(str, self.missing.values()))))}" if self.missing else ""
        return ", and for ".join(filter(None, (adapters, approvals, held, pull_requests, missing)))


class RunPaused(RunEvent):
    """The machine lacks a resource, so no session starts for a while."""

    type = "run.paused"
    sentence = "no new sessions for {retry_in:g} s: {reason}"

    reason: str
    retry_in: float
    """Seconds."""


class RunInterrupted(RunEvent):
    """The run was stopped before it finished."""

    type = "run.interrupted"
    sentence = "interrupted; to continue: `council resume {run}`"


class RunHalted(RunEvent):
    """The run halted before it finished.

    The budget is used up, a check fails or cannot run on the base, or a program of checks or setup is missing.
    """

    type = "run.halted"
    sentence = "halted: {headline}"

    cause: str
    """`budget`, `base` or `commands`."""
    reason: str

    @property
    def headline(self) -> str:
        """The first line of the reason."""
        return self.reason.partition("\n")[0]


class RunFinished(RunEvent):
    """The run finished: no task is left."""

    type = "run.finished"
    sentence = "finished: {status}"
    shown = Shown.NEVER

    status: str
    """`landed` or `incomplete`."""


class RunRemoved(RunEvent):
    """The record of the run was deleted, for example by `council clean --runs`."""

    type = "run.removed"
    sentence = "its record was deleted; checkpoint {checkpoint} can restore it"

    checkpoint: str


class RunTakenOver(RunEvent):
    """A process temporarily took over the run to restore a checkpoint."""

    type = "run.taken_over"
    sentence = "taken over by process {pid} to restore a checkpoint"

    epoch: int
    pid: int


class RunImported(RunEvent):
    """A session in an [earlier format](state.md#state-in-earlier-formats) was added."""

    type = "run.imported"
    sentence = "imported from {source}"

    tasks: int
    """The number of tasks."""
    source: str
    """The file."""


class RunFileChanged(RunEvent):
    """On resume, the file differs from the recorded settings, which still apply."""

    type = "run.file_changed"
    sentence = "{changes}"

    file: str
    tasks: Mapping[str, Sequence[str]]
    """The keys that differ, by task."""
    keys: Sequence[str]
    """The keys of the whole run that differ."""
    stop_first: Sequence[str] = ()
    """The tasks that can adopt the changes only while no process is active in the run."""

    @property
    def changes(self) -> str:
        """A description of the differences, with the command that adopts them."""
        return describe_file_changes(self.file, self.tasks, self.keys, self.run or None, stop_first=self.stop_first)


def describe_file_changes(
    file: str,
    tasks: Mapping[str, Sequence[str]],
    keys: Sequence[str],
    run: str | None = None,
    *,
    stop_first: Sequence[str] = (),
) -> str:
    """Return the settings that only a run's file has, and how to adopt them.

    For None, describe the newest run. `stop_first` are the tasks that can't adopt them while the run is active.
    """
    each = [*(f"{name} ({', '.join(changed)})" for name, changed in tasks.items()), *keys]
    adoptable = [name for name, changed in tasks.items() if FIXED_KEYS.keys().isdisjoint(changed)]
    names = " ".join(adoptable) if len(adoptable) <= _MAX_NAMED_TASKS else "TASK..."
    remedy = "to use them, start a new run"
    if not set(stop_first).isdisjoint(adoptable):
        remedy = f"to adopt them: stop the run, then `council resume{'' if run is None else f' {run}'} --reload`"
    elif adoptable:
        remedy = f"to adopt them: `council retry {names} --reload{'' if run is None else f' --run {run}'}`"
    if adoptable and len(adoptable) < len(tasks):
        fixed = dict.fromkeys(f"`{key}`" for changed in tasks.values() for key in changed if key in FIXED_KEYS)
        remedy += f"; to use changes of {' and '.join(fixed)}, start a new run"
    return f"{file} has changed; the run keeps its recorded settings: {join_names(each)}; {remedy}"


class RunBudgetChanged(RunEvent):
    """The budget of the run got new limits."""

    type = "run.budget_changed"
    sentence = "the run has a new budget"

    limits: Mapping[str, float]
    """`tokens`, `cost` (US dollars), `time` (seconds)."""


class RunTargetUnreachable(RunEvent):
    """The target could not be read at the end of the run."""

    type = "run.target_unreachable"
    sentence = "cannot read the target: {reason}"

    reason: str


class RunHooksSkipped(RunEvent):
    """Hooks of your repository were skipped, because agents can write to them.

    They are in one of its checkouts (`.husky`, `.githooks`, a link in `.git/hooks`). Each process of the run reports
    them once.
    """

    type = "run.hooks_skipped"
    sentence = "landings do not run the hooks in {hooks}: {reason}"

    hooks: Sequence[str]
    reason: str


class BaseChecking(RunEvent):
    """The checks started on the commit that the next merge is based on.

    They run before the next session starts.
    """

    type = "base.checking"
    sentence = "running checks on {branch} ({commit:.10}) before the next session: {checks}"

    commit: str
    branch: str
    """`TARGET with BASE` if the commit merges the two."""
    checks: Sequence[str]


class BasePassed(RunEvent):
    """The checks passed on that commit; this run does not repeat them for it."""

    type = "base.passed"
    sentence = "checks passed on {branch} ({commit:.10})"

    commit: str
    branch: str
    checks: Sequence[str]


class BaseFailureAllowed(RunEvent):
    """Checks may fail on the base from now on, because of `--allow-failing-base`."""

    type = "base.failure_allowed"
    sentence = "from now on, checks may fail on the base"


class _BudgetEvent(RunEvent, is_base=True):
    scope: str
    """`session`, `task` or `run`."""
    owner: str
    """A description of the owner of the budget."""
    limit: str
    """`tokens`, `cost` or `time`."""
    reason: str


class BudgetLow(_BudgetEvent):
    """80% of a budget is used up."""

    type = "budget.low"
    sentence = "budget of {owner} is low: {reason}"


class BudgetExhausted(_BudgetEvent):
    """A session ended and has used up the budget of its task or run."""

    type = "budget.exhausted"
    sentence = "budget of {owner} is exhausted: {reason}"


class BudgetUntracked(RunEvent):
    """A session printed more than the 16 MiB that are tracked.

    The rest is counted after the session ends, if at all.
    """

    type = "budget.untracked"
    sentence = "{owner} printed too much to track its usage; the rest is counted when it ends"

    owner: str


class BudgetPriceUnknown(RunEvent):
    """The cost of a session is unknown, although there is a limit on cost."""

    type = "budget.price_unknown"
    sentence = "the cost of {adapter} is unknown and not counted; add {model} to `prices`"
    sentence_without = ("model", "the cost of {adapter} is unknown and not counted")

    adapter: str
    model: str | None
    """null if the model is unknown too."""


class AdapterEvent(RunEvent, is_base=True, prefix="adapter"):
    """Base of the events of an adapter, which the ledger fills in."""

    context = ("run", "adapter")

    adapter: str = ""


class AdapterCooldown(AdapterEvent):
    """An adapter is paused until a point in time; repeated if the pause is extended."""

    type = "adapter.cooling_down"
    sentence = "adapter {adapter} is paused until {until}: {reason}"

    until: Instant
    reason: str


class AdapterDisabled(AdapterEvent):
    """An adapter is disabled until `council adapters enable` or the next resume."""

    type = "adapter.disabled"
    sentence = "adapter {adapter} is disabled: {reason}; fix that, then `council adapters enable {adapter} --run {run}`"

    reason: str


class AdapterEnabled(AdapterEvent):
    """The adapter is available again."""

    type = "adapter.enabled"
    sentence = "adapter {adapter} is enabled"


class PluginSkipped(RunEvent):
    """A plugin is unusable; the run continues without it."""

    type = "plugin.skipped"
    sentence = "skipped {reason}"

    plugin: str
    reason: str


class SinkFailing(RunEvent):
    """Delivery to a sink failed; it is retried with increasing delays."""

    type = "sink.failing"
    sentence = "sink {sink} failed and will be retried: {reason}"

    sink: str
    reason: str


class SinkRecovered(RunEvent):
    """Delivery to the sink works again."""

    type = "sink.recovered"
    sentence = "sink {sink} recovered"

    sink: str


class SinkSkipped(RunEvent):
    """The log no longer contains some events that the sink has not received.

    Delivery continues after them.
    """

    type = "sink.skipped"
    sentence = "sink {sink} missed the events of positions {after} to {until}, which the log no longer has"
    shown = Shown.NEVER

    sink: str
    after: int
    """The position of the last event that the sink received."""
    until: int
    """The last position that the sink missed."""


class SinkUndelivered(RunEvent):
    """The sink has not received all events at the end of the run.

    `council resume` delivers the rest.
    """

    type = "sink.undelivered"
    sentence = "sink {sink} has not received {undelivered} events; to deliver them: `council resume {run}`"

    sink: str
    undelivered: int
    """The number of missing events."""


class ForgeFailing(RunEvent):
    """The pull requests can't be read; this is retried with increasing delays."""

    type = "forge.failing"
    sentence = "pull requests can't be read, which will be retried: {reason}"

    reason: str


class ForgeRecovered(RunEvent):
    """The pull requests can be read again."""

    type = "forge.recovered"
    sentence = "pull requests can be read again"


class ForgeChanged(RunEvent):
    """A forge has reported a change (`council serve-webhooks`): boards and pull requests are read now."""

    type = "forge.changed"
    sentence = "the forge reported a change"
    shown = Shown.NEVER


class TrackerFailing(RunEvent):
    """The synchronization with a tracker failed; it is retried with increasing delays."""

    type = "tracker.failing"
    sentence = "tracker {tracker} failed and will be retried: {reason}"

    tracker: str
    reason: str


class TrackerRecovered(RunEvent):
    """The synchronization with the tracker works again."""

    type = "tracker.recovered"
    sentence = "tracker {tracker} recovered"

    tracker: str


class TrackerOutdated(RunEvent):
    """The tracker does not show the state of the tasks at the end of the run.

    `council sync` updates it.
    """

    type = "tracker.outdated"
    sentence = "tracker {tracker} does not show the end of the run; to update it: `council sync {run}`"

    tracker: str


class TrackerTasksAdded(RunEvent):
    """The tracker has new tasks, which join the run (`council run --follow`)."""

    type = "tracker.tasks_added"
    sentence = "new tasks of the trackers: {names}"
    shown = Shown.ALWAYS

    tasks: Sequence[str]

    @property
    def names(self) -> str:
        """The tasks as text."""
        return ", ".join(self.tasks)


class TrackerTaskRefused(RunEvent):
    """A new task of a tracker is invalid, and does not join the run."""

    type = "tracker.task_refused"
    sentence = "new task {task} of tracker {tracker} is refused: {reason}"
    shown = Shown.ALWAYS

    tracker: str
    task: str
    reason: str


class TrackerConflict(RunEvent):
    """Another run that is alive claims a task in the tracker, which keeps showing that run.

    The task is cancelled unless it has ended.
    """

    type = "tracker.conflict"
    sentence = "tracker {tracker} shows another run for {task}"

    tracker: str
    task: str


class TrackerRequested(RunEvent):
    """A person requested an action in the tracker."""

    type = "tracker.requested"
    sentence = "requested in tracker {tracker}: {action} {task}"

    tracker: str
    task: str
    action: str
    request: str
    """The name of the request in the tracker."""


class TrackerRequestRefused(RunEvent):
    """A person requested an action in the tracker that the state of the task does not allow."""

    type = "tracker.request_refused"
    sentence = "refused a request in tracker {tracker}, {action} {task}: {reason}"

    tracker: str
    task: str
    action: str
    request: str
    reason: str


class ViewsFailing(RunEvent):
    """The [views](state.md#views) cannot be written at the end of the run."""

    type = "views.failing"
    sentence = "cannot write the readable copies of the state: {reason}"

    reason: str


class RepositoryChanged(RunEvent):
    """Your repository was changed by something other than a landing."""

    type = "repository.changed"
    sentence = "your repository was changed by something other than council while {sessions} ran: {changes}"
    sentence_without = ("sessions", "your repository was changed by something other than council: {changes}")

    changes: Sequence[str]
    """One sentence per change."""
    sessions: Sequence[str]
    """The sessions that were active at the time."""


class RepositoryUnreadable(RunEvent):
    """Your repository could not be read."""

    type = "repository.unreadable"
    sentence = "cannot read your repository: {reason}"
    shown = Shown.NEVER

    reason: str


class RequestSubmitted(RunEvent):
    """Another process requested an action."""

    type = "request.submitted"
    sentence = "requested: {action} {tasks}"
    shown = Shown.NEVER

    request: str
    action: str
    tasks: Sequence[str]


class RequestCompleted(RunEvent):
    """A requested action was performed."""

    type = "request.completed"
    sentence = "request {request} was performed"
    shown = Shown.NEVER

    request: str
