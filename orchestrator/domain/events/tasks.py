"""Events of tasks."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.domain.events.base import AttemptEvent, Shown, TaskEvent


class TaskStarted(TaskEvent):
    """An attempt was recorded; its session starts next."""

    type = "task.started"
    sentence = "started (session {attempt}, {adapter}): {reason}"
    sentence_without = ("reason", "started (session {attempt}, {adapter})")

    base: str
    """The commit that the session starts from."""
    adapter: str
    phase: str = ""
    """The phase, if the task has a workflow."""
    reason: str = ""
    """The reason why the session starts from scratch or in a new conversation, or that a user is attached."""


class TaskRetrying(AttemptEvent):
    """An attempt failed, and another follows."""

    type = "task.retrying"
    sentence = "failed, will be retried: {reason}"

    retry_in: float = 0.0
    """Seconds."""
    log: str = ""
    """The log of the checks, if they failed."""
    paths: Sequence[str] = ()
    """The conflicting or out-of-scope paths."""


class TaskPostponed(AttemptEvent):
    """The task's adapter or the machine is unavailable; the attempt does not count."""

    type = "task.postponed"
    sentence = "postponed: {reason}"


class TaskInterrupted(AttemptEvent):
    """`council` ended during an attempt."""

    type = "task.interrupted"
    sentence = "interrupted: {reason}"


class TaskFailed(AttemptEvent):
    """The task failed, and no further attempt follows.

    Or its landed commit was removed from the target's history.
    """

    type = "task.failed"
    sentence = "failed: {reason}"

    log: str = ""
    """The log of the checks, if they failed."""
    paths: Sequence[str] = ()
    """The out-of-scope paths."""


class TaskNoChange(AttemptEvent):
    """The program succeeded and changed nothing."""

    type = "task.no_change"
    sentence = "no changes"


class TaskQueued(AttemptEvent):
    """The work of the task was committed and waits to land."""

    type = "task.queued"
    sentence = "queued to land"


class TaskAdvanced(AttemptEvent):
    """A phase of the task's workflow is complete, and another follows."""

    type = "task.advanced"
    sentence = "next phase: {next}"
    shown = Shown.NEVER

    next: str
    """The next phase."""


class TaskExpanded(AttemptEvent):
    """A phase is complete, and its plan became tasks that must land first."""

    type = "task.expanded"
    sentence = "created {count} tasks from its plan"

    phase: str
    count: int
    tasks: Sequence[str]
    """The names of the new tasks."""


class TaskPhaseRepeated(AttemptEvent):
    """The current phase, or an earlier one, is repeated.

    The handoff was invalid, `until` failed, or a review rejected the work.
    """

    type = "task.phase_repeated"
    sentence = "phase {phase} is repeated: {reason}"
    sentence_without = ("phase", "phase is repeated: {reason}")

    phase: str = ""
    """The phase that is repeated: after a review, the one that fixes the work."""
    verdict: str = ""
    """The verdict of the review."""


class TaskAwaitingApproval(AttemptEvent):
    """The result of a phase waits for approval."""

    type = "task.awaiting_approval"
    sentence = (
        "waiting for your approval: `council approve {task} --run {run}`, "
        "or `council reject {task} --note TEXT --run {run}`"
    )
    shown = Shown.ALWAYS


class TaskMessageSent(TaskEvent):
    """A user sent a message to the agents of the task."""

    type = "task.message_sent"
    sentence = "message: {text}"

    message: str
    """Its id."""
    text: str


class TaskMessageDelivered(TaskEvent):
    """A session received a message of the user."""

    type = "task.message_delivered"
    sentence = "message {message} delivered to session {attempt}"

    message: str
    """Its id."""


class TaskMessageWithdrawn(TaskEvent):
    """A message was withdrawn, because the task was queued to land or ended when it was sent."""

    type = "task.message_withdrawn"
    sentence = "message {message} withdrawn: no session follows"

    message: str
    """Its id."""


class TaskAttached(TaskEvent):
    """A user attaches to the conversation of the task: its session stops, and no other session starts."""

    type = "task.attached"
    sentence = "a user attaches to its conversation"


class TaskDetached(TaskEvent):
    """The user has left the conversation of the task, and the task continues."""

    type = "task.detached"
    sentence = "the user has left its conversation"


class TaskContinued(TaskEvent):
    """The finished work does not land yet: another session receives a message of the user."""

    type = "task.continued"
    sentence = "continues, because of a new message"


class TaskApproved(TaskEvent):
    """A user approved the result of the task's phase."""

    type = "task.approved"
    sentence = "phase {phase} approved: {note}"
    sentence_without = ("note", "phase {phase} approved")

    phase: str
    note: str | None
    """null if there is no note."""


class TaskRejected(TaskEvent):
    """A user rejected the result of the task's phase, which is repeated."""

    type = "task.rejected"
    sentence = "phase {phase} rejected, will be repeated: {note}"
    sentence_without = ("note", "phase {phase} rejected, will be repeated")

    phase: str
    note: str | None
    """null if there is no note."""
    reason: str


class TaskDone(AttemptEvent):
    """The last phase of the task is complete, and there is nothing to land."""

    type = "task.done"
    sentence = "done"


class TaskChecking(TaskEvent):
    """The work of the task is merged, and the checks run."""

    type = "task.checking"
    sentence = "merged, running checks"

    merge: str
    """The commit."""


class TaskCheckFlaky(TaskEvent):
    """A check failed, and passed when it was repeated on the same files."""

    type = "task.check_flaky"
    sentence = "FLAKY check `{command}`: it failed, and passed when it was repeated"

    command: str
    log: str
    """The log of the failure."""
    passed_log: str
    """The log of the repetition."""


class TaskRequeued(TaskEvent):
    """The checks did not finish, or the landing is blocked for now."""

    type = "task.requeued"
    sentence = "queued to land again: {reason}"

    reason: str


class TaskDeferred(TaskEvent):
    """The target cannot be updated now."""

    type = "task.deferred"
    sentence = "cannot land now: {reason}"

    reason: str


class TaskProposed(TaskEvent):
    """The work of the task passed its checks, and its pull request is open."""

    type = "task.proposed"
    sentence = "pull request {pull_request}: {url}"
    shown = Shown.ALWAYS

    pull_request: int
    """Its number."""
    url: str
    commit: str
    """The newest commit of its branch."""


class TaskRebased(TaskEvent):
    """The work of a task that it is built on has changed: its own work was rebased, and is queued again."""

    type = "task.rebased"
    sentence = "rebased, because the work of {need} has changed"

    commit: str
    base: str
    """The commit that it was rebased onto: the target, with the unlanded work of the tasks that it needs."""
    need: str


class TaskWithdrawn(TaskEvent):
    """A task whose work it is built on ended without landing: it waits for that task, and its work is preserved."""

    type = "task.withdrawn"
    sentence = "can't land: {reason}"

    reason: str
    branch: str
    """The branch with its work."""


class TaskLanding(TaskEvent):
    """The target is about to be updated, possibly with the work of other tasks."""

    type = "task.landing"
    sentence = "landing"
    shown = Shown.NEVER

    old: str | None
    """The parent of the task's own merge; null if the target does not exist."""
    new: str
    """The task's own merge."""


class TaskLandingAborted(TaskEvent):
    """The target was not updated; the work is merged again."""

    type = "task.landing_aborted"
    sentence = "landing aborted, will be merged again"
    shown = Shown.NEVER


class TaskConflict(AttemptEvent):
    """The work of the task has merge conflicts."""

    type = "task.conflict"
    sentence = "{reason}"

    paths: Sequence[str]
    """The conflicting paths."""


class TaskLanded(TaskEvent):
    """The work of the task is on the target."""

    type = "task.landed"
    sentence = "landed as {landed:.10}"

    landed: str
    """The commit."""
    reason: str | None = None
    """How the work landed, if not by the run."""


class TaskCancelled(AttemptEvent):
    """A user cancelled the task."""

    type = "task.cancelled"
    sentence = "cancelled"


class TaskIgnored(TaskEvent):
    """A user cancelled the task and excluded it from further attempts."""

    type = "task.ignored"
    sentence = "ignored: {reason}"

    reason: str | None


class TaskRetryRequested(TaskEvent):
    """A user requested a retry."""

    type = "task.retry_requested"
    sentence = "will be retried"


class TaskHeld(TaskEvent):
    """A user holds the task: its work does not land until it is released."""

    type = "task.held"
    sentence = "held: {reason}"
    sentence_without = ("reason", "held")

    reason: str | None
    """null if there is no reason."""


class TaskReleased(TaskEvent):
    """A user released the task, which may land, also before a task with a predicted conflict."""

    type = "task.released"
    sentence = "released, may land"


class TaskBumped(TaskEvent):
    """A user moved the task to the front of the merge queue."""

    type = "task.bumped"
    sentence = "moved to the front of the merge queue"


class TaskReloaded(TaskEvent):
    """`council retry --reload` adopted the task's settings from the file."""

    type = "task.reloaded"
    sentence = "reloaded {keys} from the file"

    keys: Sequence[str]


class TaskSalvaged(TaskEvent):
    """Leftover work that was not on any branch was saved to a branch."""

    type = "task.salvaged"
    sentence = "leftover work was saved as {work}"
    shown = Shown.ALWAYS

    branch: str

    @property
    def work(self) -> str:
        """The name by which `council salvage` knows it."""
        return salvage_name(self.branch)


class TaskWorkNotShared(TaskEvent):
    """Work could not be pushed to the remote, so only the machine that built it can continue or land it for now.

    It is pushed as soon as the remote can be reached ([many machines](machines.md#when-something-fails)).
    """

    type = "task.work_not_shared"
    sentence = "its work is only on this machine for now: {reason}"

    reason: str


class TaskStartDelayed(TaskEvent):
    """The commits that the task starts from can't be read yet; reading them is repeated every few seconds."""

    type = "task.start_delayed"
    sentence = "cannot start yet: {reason}"

    reason: str


class TaskWorktreePreserved(TaskEvent):
    """A worktree could not be removed, or has work that could not be collected.

    It is safe to run git in the worktree: at its root is an internal repository at the start commit of the session, and
    everything else that git would interpret as a repository is disabled by a rename that `reason` describes.
    """

    type = "task.worktree_preserved"
    sentence = "its worktree is preserved in {worktree}: {reason}"
    shown = Shown.ALWAYS

    worktree: str
    reason: str


class TaskChangesDiscarded(TaskEvent):
    """Changes made by a read-only phase were discarded."""

    type = "task.changes_discarded"
    sentence = "discarded changes of a read-only phase: {paths}"
    shown = Shown.ALWAYS

    paths: Sequence[str]


class TaskOwnershipExtended(TaskEvent):
    """The task took ownership of its out-of-scope changes."""

    type = "task.ownership_extended"
    sentence = "took ownership of its out-of-scope changes: {paths}"

    paths: Sequence[str]
    """At most 200."""


class TaskOutOfScopeAllowed(TaskEvent):
    """The task has out-of-scope changes, and may land anyway."""

    type = "task.out_of_scope_allowed"
    sentence = "has out-of-scope changes, which are allowed: {paths}"

    paths: Sequence[str]
    """At most 200."""


class TaskClaimLost(TaskEvent):
    """Another process took over the task; the session's work is on `branch`."""

    type = "task.claim_lost"
    sentence = "taken over by {orchestrator}; the work of its session was saved as {work}"
    sentence_without = ("branch", "taken over by {orchestrator}; its session had no work to save")

    orchestrator: str
    """The name of the other process."""
    branch: str | None
    """null if there is no work."""

    @property
    def work(self) -> str:
        """The name by which `council salvage` knows it."""
        return salvage_name(self.branch or "")


class TaskSessionApiFailed(TaskEvent):
    """A request of the task's session failed because of an internal error."""

    type = "task.session_api_failed"
    sentence = "a request of its session failed: {reason}"

    reason: str


class TaskHostDenied(TaskEvent):
    """The proxy denied a host.

    [`network.allow`](configuration.md#network) does not cover it, or its name has a non-public address. Each host is
    reported once, at most 100 of them, after the session has ended.
    """

    type = "task.host_denied"
    sentence = "its session was denied {host}, which `network.allow` does not cover"

    host: str
    """The host with its port, such as `example.com:443`."""


class TaskToolsDenied(TaskEvent):
    """The CLI denied tools to its model.

    The cause is its permission mode, a rule, or its own sandbox.
    """

    type = "task.tools_denied"
    sentence = "{reason}"

    count: int
    """The number of denied calls."""
    tools: Sequence[str]
    """The first 20, such as `Bash(git diff)`."""
    reason: str
    """Summary, with the setting that allows the tools."""


class TaskAfterRunFailed(TaskEvent):
    """A command of `after_run` failed."""

    type = "task.after_run_failed"
    sentence = "`after_run` failed: {reason}"

    reason: str


def salvage_name(branch: str) -> str:
    """Return the name by which `council salvage` knows an internal branch."""
    return branch.split("/", 2)[-1] if branch.startswith("council/") else branch


def salvage_worktree_name(task: str, attempt: int) -> str:
    """Return the name by which `council salvage` knows the preserved worktree of an attempt."""
    return f"{task}/{attempt}/worktree"
