"""The next commands for a task and for a run. Pure.

Commands for a task omit the run if it is the newest (`is_newest`). Commands for a run always name it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from orchestrator.domain.events.tasks import salvage_name
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import HaltCause
from orchestrator.domain.runs.statuses import LANDING_STATUSES, UNSUCCESSFUL_STATUSES, TaskStatus
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.engine.reports.task_report import TaskReport

_NEXT_STEPS: Mapping[str, Sequence[tuple[str, str]]] = {status: status.record.next_steps for status in TaskStatus}
#: Statuses in which a task never has a next command.
_WITHOUT_STEPS = frozenset(status for status, steps in _NEXT_STEPS.items() if not steps) - {TaskStatus.RUNNING}


class Step(NamedTuple):
    """A command and its relation to the previous one: `next`, `then` or `or`."""

    label: str
    command: str

    def __str__(self) -> str:
        """Return the step as a line."""
        return f"{self.label}: {self.command}"


def task_steps(  # noqa: PLR0911  one case for each cause
    task: TaskReport, report: RunReport, *, is_newest: bool = True, is_shown: bool = False
) -> Sequence[Step]:
    """Return the next command for a task, its follow-ups and alternatives.

    Empty if the task needs none, or waits for the run as a whole (`run_step`). With `is_shown`, for `council show`, a
    blocked task gets the command for the task that blocks it.
    """
    if report.imported is not None or task.status in _WITHOUT_STEPS:
        return ()
    if report.merges is not None:
        return _merge_steps(task, report)
    name, run = shlex.quote(task.id), "" if is_newest else f" --run {report.run}"
    kept = None if task.branch is None else salvage_name(task.branch)
    if is_shown and task.blocked_by is not None:
        return [Step("next", f"council retry {shlex.quote(task.blocked_by)}{run}")]
    retry = f"council retry {name}"
    apply = [("or", f"council salvage apply {shlex.quote(kept)}")] if kept is not None else []
    match task.status:
        case TaskStatus.CONFLICT if kept is not None:
            branch = shlex.quote(f"{task.id}-conflict")
            merged = f"fix, commit and merge it into {report.target}, then `council resume {report.run}`"
            return [
                Step("next", f"{apply[0][1]} --branch {branch}{run}"),
                Step("then", merged),
                Step("or", f"{retry}{run}"),
            ]
        case TaskStatus.FAILED if task.failure == FailureClass.SETUP_FAILED:
            if report.file is None:
                return [Step("next", f"{retry}{run}")]
            again = f"correct the setup in {report.file}, then `council run {shlex.quote(report.file)}`"
            return [Step("next", again), Step("or", f"{retry}{run} (if the cause is not in the file)")]
        case TaskStatus.FAILED if report.file is not None and (changes := _setting_steps(task, report.file, run)):
            return [*changes, *(Step("or", f"{one}{run}") for _, one in apply)]
        case TaskStatus.RUNNING if report.status is RunStatus.RUNNING:
            return [Step("next", f"council logs {name} -f{run}")]
    commands = [*status_steps(task, is_shown=is_shown), *(apply if task.status in UNSUCCESSFUL_STATUSES else ())]
    steps = [Step(label, f"{command}{run}") for label, command in commands]
    if task.preserved_worktree is not None and task.status in UNSUCCESSFUL_STATUSES:
        steps.append(
            Step("or", f"copy files from {task.preserved_worktree}: `council salvage list{run}` has its folder")
        )
    return steps


def status_steps(task: TaskReport, *, is_shown: bool = False) -> Sequence[Step]:
    """Return the commands for the status of a task, without its run.

    With `is_shown`, without `council show`.
    """
    steps = [Step(label, command.format(shlex.quote(task.id))) for label, command in _NEXT_STEPS.get(task.status, ())]
    if is_shown and steps and steps[0].command.startswith("council show "):
        return [step._replace(label="next") for step in steps[1:2]] + steps[2:]
    return steps


def _setting_steps(task: TaskReport, file: str, run: str) -> Sequence[Step]:
    """Return the commands after a failure that repeats until a setting in the file changes; else empty.

    A task from a plan or a tracker keeps its settings for the whole run.
    """
    then = Step("then", f"council retry {shlex.quote(task.id)} --reload{run}")
    match task.failure:
        case FailureClass.BUDGET if not task.reloadable:
            return [Step("next", f"raise the budget in {file}"), Step("then", f"council run {shlex.quote(file)}")]
        case FailureClass.BUDGET:
            return [Step("next", f"raise the budget of {task.id} in {file}"), then]
        case FailureClass.OUT_OF_SCOPE if task.reloadable:  # `owns` can't change during a run
            return [Step("next", f"set `on_out_of_scope: extend` for {task.id} in {file}"), then]
    return ()


def _merge_steps(task: TaskReport, report: RunReport) -> Sequence[Step]:
    """Return the commands after a failed merge of a run's own branch.

    A retry would merge the same commits.
    """
    if task.status not in UNSUCCESSFUL_STATUSES:
        return ()
    base, again = shlex.quote(report.target), f"council merge {report.merges}"
    match task.status:
        case TaskStatus.CONFLICT:
            return [
                Step("next", f"git switch council/{report.merges} && git merge {base}"),
                Step("then", "resolve the conflicts, and `git commit --all --no-edit`"),
                Step("then", again),
            ]
        case TaskStatus.FAILED:
            return [Step("next", f"council logs {shlex.quote(task.id)} --run {report.run}"),
                    Step("then", f"fix {base} or council/{report.merges}, and commit the fix"),
                    Step("then", again)]  # fmt: skip
        case _:
            return [Step("next", again)]


def run_step(report: RunReport) -> str:
    """Return the next command for a run; empty if there is none or tasks have one."""
    states = {task.status for task in report.tasks}
    match report.status:
        case _ if report.imported is not None:
            return ""
        case RunStatus.RUNNING:
            return ""
        case RunStatus.HALTED if report.halt_cause is HaltCause.BUDGET:
            return f"council resume {report.run} --budget LIMITS"
        case RunStatus.HALTED | RunStatus.INTERRUPTED:
            return f"council resume {report.run}"
        case RunStatus.INCOMPLETE if report.has_stuck_tasks or states & _TO_TRY:
            return f"council resume {report.run}"
        case RunStatus.INCOMPLETE if states & LANDING_STATUSES:
            return f"council merge {report.run}"
        case _:
            return f"council merge {report.run}" if waits_for_merge(report) else ""


def halt_steps(report: RunReport) -> Sequence[Step]:
    """Return the remedy of a halted run, with its commands.

    Empty after an exhausted budget: `run_step` has the command.
    """
    if report.halted is None or report.halt_cause is HaltCause.BUDGET:
        return ()
    remedy = HaltReason.parse(report.halted).remedy
    alternative = "or "
    return [
        Step("or", line.removeprefix(alternative))
        if line.startswith(alternative)
        else Step("next" if number == 0 else "then", line)
        for number, line in enumerate(remedy)
    ]


#: States of tasks that a resume continues.
_TO_TRY = frozenset({TaskStatus.PENDING, TaskStatus.RUNNING})


def format_saved(task: TaskReport) -> str:
    """Return where a task's unmerged work is, by its names in `council salvage`; empty if it has none."""
    return f"saved as {' and '.join(task.saved_as)}" if task.saved_as else ""


def own_branch(report: RunReport) -> bool:
    """Return True if the run landed work on its own branch."""
    return report.target == f"council/{report.run}" and any(task.landed is not None for task in report.tasks)


def waits_for_merge(report: RunReport) -> bool:
    """Return True if a run has ended and its own branch is not merged."""
    return report.awaits_merge and report.status is not RunStatus.RUNNING


def needs_retry(report: RunReport) -> bool:
    """Return True if a failed run can resume only after a `council retry`."""

    is_finished = report.imported is None and not report.has_unfinished_tasks
    return report.status is RunStatus.INCOMPLETE and is_finished
