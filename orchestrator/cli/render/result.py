"""The result of a run as text: task states, reasons and next commands. Pure."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from orchestrator.cli.render.next_steps import (
    format_saved,
    needs_retry,
    own_branch,
    run_step,
    task_steps,
    waits_for_merge,
)
from orchestrator.cli.render.text import (
    align_columns,
    format_age,
    format_line_counts,
    one_line,
    pluralize,
    printable,
    short_name,
    wrapped,
)
from orchestrator.domain.runs.check_results import CheckRecord
from orchestrator.domain.runs.model import HaltCause
from orchestrator.domain.runs.phases import PhaseStatus
from orchestrator.domain.runs.statuses import ACTIVE_STATUSES, SUCCESS_STATUSES, USER_STATUSES, TaskStatus
from orchestrator.domain.wording import join_names
from orchestrator.engine.reports.report import (
    AdapterReport,
    OrchestratorReport,
    RunReport,
    RunStatus,
    SessionReport,
)
from orchestrator.engine.reports.task_report import TaskReport
from orchestrator.repo.git.change_counts import Changes
from orchestrator.system.clock import format_local_time

#: The maximum characters of a reason: with the log and the cause of a failed setup.
_MAX_REASON = 600
#: The maximum characters of a check.
_MAX_COMMAND = 80
_LABELS: Mapping[str, str] = {status: status.record.label for status in TaskStatus}
_VISIT_LABELS: Mapping[str, str] = {status: status.record.label for status in PhaseStatus}


class ResultRow(NamedTuple):
    """One task as printable text: status, reason and next commands."""

    task: str
    status: str
    message: str
    steps: Sequence[str]


def format_state(status: str, report: RunReport) -> str:
    """Return the label of a status; `interrupted` for an active task of a dead run."""
    if status in ACTIVE_STATUSES and report.status.is_stopped:
        return "interrupted"
    return _LABELS.get(status, status)


def format_visit(status: str) -> str:
    """Return the label of a visit's status; that of an imported phase is unchanged."""
    return _VISIT_LABELS.get(status, status)


def result_rows(
    report: RunReport, changes: Mapping[str, Changes], *, is_newest: bool = True, now: float | None = None
) -> Iterator[ResultRow]:
    """Yield a row for each task in the order of the file, with its `changes`.

    With `now` (seconds since the epoch), includes the age of each session's activity.
    """
    sessions = {one.task: one for one in report.sessions}
    target = printable(report.target)
    labels = {status: format_state(status, report) for status in {task.status for task in report.tasks}}
    for task in report.tasks:
        session = sessions.get(task.id) if task.status == TaskStatus.RUNNING else None
        yield ResultRow(
            printable(task.id),
            labels[task.status],
            _task_details(task, target, changes) if session is None else format_session_status(session, now),
            [printable(str(step)) for step in task_steps(task, report, is_newest=is_newest)],
        )


def format_reason(task: TaskReport) -> str:
    """Return the reason of a task on one line."""
    return one_line(task.reason or "", _MAX_REASON)


def format_flaky_check(check: CheckRecord) -> str:
    """Return both results of a check that failed and then passed, with the names of their logs."""
    failed, passed = Path(check.failed_log or "").name, Path(check.log).name
    return printable(f"`{one_line(check.command, _MAX_COMMAND)}` failed ({failed}), then passed ({passed})")


def format_session_status(session: SessionReport, now: float | None = None) -> str:
    """Return the activity of a session: its status, file, message and their age.

    The status `working` is omitted.
    """
    parts = [] if session.status == "working" else [session.status]
    if session.blocked_on is not None:
        parts.append(f"for {session.blocked_on}" if session.status == "waiting" else f"on {session.blocked_on}")
    if session.progress is not None:
        parts.append(session.progress)
    at = ": ".join(filter(None, [session.file, session.message]))
    ahead = [f"conflicts with {task} in {join_names(paths, 2)}" for task, paths in session.conflicts.items()]
    line = printable(one_line("; ".join(filter(None, [*ahead, " ".join(parts), at]))))
    return line if now is None or not line else f"{line} ({format_age(session.updated, now)})"


def _task_details(task: TaskReport, target: str, changes: Mapping[str, Changes]) -> str:
    parts = []
    if task.landed is not None:
        text = f"{task.landed[:10]} on {target}"
        if (changed := changes.get(task.id)) is not None:
            text += f", {changed.files} {'file' if changed.files == 1 else 'files'} {format_line_counts(changed)}"
        parts.append(text)
    if task.reason is not None:
        parts.append(printable(format_reason(task)))
    if task.denied_tools is not None and task.denied_tools not in (task.reason or ""):
        parts.append(printable(one_line(task.denied_tools)))
    parts += [f"FLAKY: {format_flaky_check(check)}" for check in task.flaky_checks]
    parts.append(printable(format_saved(task)))
    return "; ".join(filter(None, parts))


def run_summary(report: RunReport) -> str:
    """Return a summary of the run on one line."""
    merge = "" if report.merges is None else f", merge of run {report.merges}"
    return f"run {report.run}: {report.status}, {landed_summary(report)}{merge}"


def landed_summary(report: RunReport) -> str:
    """Return the number of successful tasks, their branch, and an import's source.

    A `done` task had nothing to land. A run's own branch exists only after its first landing.
    """
    states = Counter(task.status for task in report.tasks)
    done = f"{states[TaskStatus.DONE]} done, " if states[TaskStatus.DONE] else ""
    exists = report.target != f"council/{report.run}" or own_branch(report)
    target = f" on {report.target}" if report.target and exists else ""
    source = "" if report.imported is None else f" (imported from {report.imported})"
    return printable(f"{done}{states[TaskStatus.LANDED]} of {len(report.tasks)} landed{target}{source}")


def state_counts(report: RunReport) -> list[str]:
    """Return the number of tasks in each unsuccessful state, most frequent first."""
    states = Counter(format_state(task.status, report) for task in report.tasks if task.status not in SUCCESS_STATUSES)
    conflict = TaskStatus.CONFLICT.record.label  # the only label that is a noun with a plural
    return [
        pluralize(count, state) if state == conflict else f"{count} {state}" for state, count in states.most_common()
    ]


def result_lines(rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield rows as plain lines in columns."""
    return chain.from_iterable(lines for _, lines in row_lines(rows))


def row_lines(rows: Sequence[ResultRow]) -> Iterator[tuple[ResultRow, Sequence[str]]]:
    """Yield each row as lines: name and status in columns, reason, next commands."""
    heads = align_columns([(short_name(row.task), row.status, "|") for row in rows], "  ")
    for row, head in zip(rows, heads, strict=True):
        about = wrapped(row.message, head=head.removesuffix("|"), indent="      ")
        yield row, [*about, *(f"    {step}" for step in row.steps)]


def running_task_lines(report: RunReport) -> Iterator[str]:
    """Yield the totals of a run, and its running, checking and landing tasks."""
    yield run_summary(report)
    running = [task for task in report.tasks if task.status in ACTIVE_STATUSES]
    yield from result_lines(list(result_rows(replace(report, tasks=running), {})))


def next_step_hints(report: RunReport) -> Iterator[str]:
    """Yield hints for the whole run: processes, approvals, problems, next command."""
    yield from _active_processes(report)
    for adapter in report.adapters:
        yield adapter_line(adapter, enable_adapter_command(adapter.name, report))
    if report.imported is not None:
        yield f"This is an imported record and can't be resumed: `council state show {report.run}` shows all of it."
    for status in sorted(USER_STATUSES):
        if waiting := [task.id for task in report.tasks if task.status == status]:
            yield f"{status.record.label.capitalize()}: {printable(', '.join(waiting))}."
    yield from background_error_lines(report)
    if report.halted is not None:
        yield "Halted: " + printable(report.halted, keep="\n")
    for damage in report.damage:
        yield f"The state log is damaged: {damage}"
    if report.imported is None and any(task.saved_as for task in report.tasks):
        yield "Saved work: `council salvage list`, `show`, `apply`."
    yield from next_line(report)


def retry_hint(report: RunReport, *, is_newest: bool) -> str:
    """Return the next command for an ended run in which nothing can be resumed."""
    return f"The run has ended. To retry a task: council retry TASK{'' if is_newest else f' --run {report.run}'}"


def next_line(report: RunReport) -> Iterator[str]:
    """Yield the next command for a run, if there is one.

    A run that was halted by anything but a budget has its own remedy.
    """
    if report.merged_by is not None:
        yield f"Merged by run {report.merged_by}."
    if report.halted is not None and report.halt_cause is not HaltCause.BUDGET:
        return
    if step := run_step(report):
        if waits_for_merge(report) and "council merge" in step:
            yield "Landed on the run's own branch."
        yield f"Next: {step}"


def background_error_lines(report: RunReport) -> Iterator[str]:
    """Yield the error of the background process, if it failed."""
    if report.background is not None:
        yield f"The background process ended with an error: {printable(one_line(report.background))}"


def _active_processes(report: RunReport) -> Iterator[str]:
    others = [one for one in report.orchestrators if one.ended is None]
    if report.status is RunStatus.RUNNING and len(others) > 1:
        each = ", ".join(f"{one.pid} on {printable(one.host)}{_at(report, one)}" for one in others)
        yield f"{len(others)} active processes: {each}."


def _at(report: RunReport, process: OrchestratorReport) -> str:
    """Return the tasks whose sessions a process runs, in parentheses; may be empty."""
    tasks = [one.task for one in report.sessions if one.orchestrator == process.id]
    return f" ({printable(', '.join(tasks))})" if tasks else ""


def live_enable_command(adapter: str, run: str) -> str:
    """Return the command that enables an adapter in an active run."""
    return f"council adapters enable {shlex.quote(adapter)} --run {run}"


def enable_adapter_command(adapter: str, report: RunReport) -> str:
    """Return the command that enables an adapter that the run has disabled."""
    if report.status is RunStatus.RUNNING:
        return live_enable_command(adapter, report.run)
    return f"council retry TASK --run {report.run}" if needs_retry(report) else f"council resume {report.run}"


def adapter_line(adapter: AdapterReport, command: str) -> str:
    """Return why an adapter is unavailable, and the command that enables it."""
    if adapter.disabled_reason is not None:
        reason = printable(one_line(adapter.disabled_reason))
        return f"Adapter {adapter.name} is disabled; after a fix, `{command}` enables it. Reason: {reason}"
    return f"Adapter {adapter.name} is paused until {format_local_time(adapter.cooldown_until or 0.0)}."
