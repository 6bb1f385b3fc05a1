"""The projection of a task's record that all commands format. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from orchestrator.domain.events.tasks import salvage_name, salvage_worktree_name
from orchestrator.domain.runs.check_results import CheckOutcome, CheckRecord
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.phases import OPEN_STATUSES
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.wording import join_names
from orchestrator.protocols import JsonObject
from orchestrator.repo.worktrees.hub import work_branch_name
from orchestrator.sessions.output.log_files import log_file_name

FAILURE_CLASSES: Final = frozenset(FailureClass)


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The state of one task."""

    id: str
    """The task's id within the run."""
    status: str
    """Its status; `blocked` means that one of its needs will not land."""
    attempts: int
    """The number of attempts that count towards its limit; reset by each phase and each manual retry."""
    landed: str | None
    """The commit on the target that contains its change."""
    branch: str | None
    """The branch with its unmerged work; for an imported task, the original branch."""
    failure: str | None
    """The failure class of its last attempt."""
    reason: str | None
    """The reason why it has not landed, or a note about its status."""
    paths: tuple[str, ...]
    """The conflicting paths."""
    log: str | None
    """The file with the output of the failed check, or else the standard error of the last attempt."""
    adapter: str | None
    """Its adapter; null for a merge, which runs no session."""
    last_message: str | None
    """The last message of the CLI, or its result."""
    input_tokens: int
    output_tokens: int
    cost: float | None
    """The cost of all attempts in US dollars, as far as reported by their CLIs."""
    phase: str | None = None
    """The current or next phase of its workflow; null: no phase remains, or it has no workflow."""
    denied_tools: str | None = None
    """The denied tools of its newest session with any denials, and how to allow them; null: none."""
    blocked_by: str | None = None
    """The failed task that it needs, directly or indirectly; null: blocked by an adapter, or not blocked."""
    pull_request: int | None = None
    """The number of its pull request."""
    reloadable: bool = True
    """Whether `council retry TASK --reload` can adopt its settings from the file."""
    checks: tuple[CheckRecord, ...] = ()
    """The last results of the checks on its work; `outcome` is `flaky` for one that passed only when repeated."""
    preserved_worktree: str | None = None
    """The preserved worktree of its newest attempt, by its name in `council salvage`; null: none, or it has landed."""

    @property
    def saved_as(self) -> list[str]:
        """The names of its unmerged work in `council salvage`."""
        return [
            *([] if self.branch is None else [salvage_name(self.branch)]),
            *([] if self.preserved_worktree is None else [self.preserved_worktree]),
        ]

    @property
    def flaky_checks(self) -> list[CheckRecord]:
        """The checks that failed, and passed when they were repeated on the same files."""
        return [check for check in self.checks if check.outcome is CheckOutcome.FLAKY]

    def fields(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dict(zip(TaskReport.__slots__, _VALUES(self), strict=True))

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        return {**self.fields(), "checks": [check.model_dump(mode="json") for check in self.checks]}


_VALUES: Final = attrgetter(*TaskReport.__slots__)


def report_task(
    task: str,
    document: TaskDocument,
    adapter: str | None,
    logs: str,
    *,
    obstacle: str | None = None,
    blocked_by: str | None = None,
    interrupted: str | None = None,
    paused: str | None = None,
    is_reloadable: bool = True,
    remark: str | None = None,
) -> TaskReport:
    """Return the report of a task; `adapter` would run its first attempt.

    `adapter` is None if the task runs no session. `logs` is the folder with the logs of its run. `obstacle` is the
    reason that it can't start, and `blocked_by` the failed task that it needs, if any. `interrupted` is the reason of a
    running attempt that no process runs, and `paused` that of a pending task of an interrupted run. `is_reloadable`:
    its settings come from the file. A `remark` replaces the recorded reason.
    """
    status, counted, reason = str(document.status), document.counted_attempts, document.reason
    last = document.phases[-1] if document.phases else None
    phase = last.phase if last is not None and last.status in OPEN_STATUSES else document.phase
    if document.status is TaskStatus.PENDING and obstacle is not None:
        status, reason = "blocked", obstacle
    elif document.status is TaskStatus.PENDING and paused is not None:
        reason = reason or paused
    elif document.status is TaskStatus.RUNNING:
        reason = interrupted  # the recorded reason belongs to an earlier attempt
        # A resume records the interruption, and then no longer counts the attempt either.
        counted -= interrupted is not None
    elif document.status is TaskStatus.AWAITING_APPROVAL:
        reason = f"phase {phase!r} waits for approval"
    attempts, imported = document.attempts, document.imported
    newest = document.attempt if attempts else None
    outcome = document.refused or (None if newest is None else newest.outcome)
    input_tokens, output_tokens, denials = 0, 0, None
    checks: tuple[CheckRecord, ...] = ()
    for attempt in attempts:  # one loop, because a run may have thousands of tasks
        input_tokens += attempt.input_tokens
        output_tokens += attempt.output_tokens
        denials = attempt.denied_tools if attempt.denied_tools.count else denials
        checks = attempt.checks or checks
    return TaskReport(
        id=task,
        status=status,
        attempts=counted,
        landed=document.landed,
        branch=document.branch if imported is None else imported.branch,
        failure=outcome if outcome in FAILURE_CLASSES and document.landed is None else None,
        reason=reason if remark is None else remark,
        paths=document.paths,
        log=None if newest is None else newest.check_log or f"{logs}/{log_file_name(task, newest.number, 'stderr')}",
        adapter=adapter if newest is None or adapter is None else newest.adapter,
        last_message=None if newest is None else newest.last_message,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost=document.cost,
        phase=phase,
        denied_tools=None if denials is None else str(denials),
        blocked_by=blocked_by,
        pull_request=document.pull_request,
        reloadable=is_reloadable,
        checks=checks,
        preserved_worktree=None
        if newest is None or not newest.is_kept or document.landed is not None
        else salvage_worktree_name(task, newest.number),
    )


def describe_failed_need(need: str) -> str:
    """Return the reason why a task is blocked by one that it needs directly."""
    return f"needs {need!r}, which did not land"


def describe_missing_needs(missing: Sequence[str]) -> str:
    """Return the reason why a pending task waits for these needs; empty if there are none."""
    return f"waits for {join_names(list(map(repr, missing)))}" if missing else ""


@dataclass(frozen=True, slots=True)
class RunningSession:
    """The running session of a task, as recorded."""

    run: str
    task: str
    attempt: int
    """The attempt's number."""
    adapter: str
    started: float
    """The time of its start (seconds since the epoch)."""
    branch: str
    """The branch for its work."""
    worktree: str | None
    """The folder of its worktree; null: it does not exist yet."""


def report_session(run: str, task: str, document: TaskDocument, worktree: str | None) -> RunningSession | None:
    """Return the running session of a task, if any, whether or not a process runs it."""
    if document.status is not TaskStatus.RUNNING or document.attempt.ended is not None:
        return None
    attempt = document.attempt
    branch = work_branch_name(run, task, attempt.number)
    return RunningSession(run, task, attempt.number, attempt.adapter, attempt.started, branch, worktree)
