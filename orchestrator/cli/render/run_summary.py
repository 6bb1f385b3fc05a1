"""The summary of a run as text. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.cli.render.events import event_text
from orchestrator.cli.render.next_steps import format_saved
from orchestrator.cli.render.result import format_state, format_visit, landed_summary, run_summary, state_counts
from orchestrator.cli.render.text import (
    align_columns,
    described,
    format_count,
    format_elapsed,
    one_line,
    short_name,
    wrapped,
)
from orchestrator.domain.wording import format_cost
from orchestrator.system.clock import format_local_time

if TYPE_CHECKING:
    from orchestrator.domain.runs.metrics import Metrics
    from orchestrator.domain.runs.model import RunDocument
    from orchestrator.engine.reports.report import RunReport
    from orchestrator.engine.reports.run_summary import RunSummary
    from orchestrator.engine.reports.task_report import TaskReport


def run_summary_lines(summary: RunSummary) -> Iterator[str]:
    """Yield a run's state, options, tasks, active sessions, newest events and metrics."""
    yield run_summary(summary.report)
    yield from align_columns(_options(summary.record.run), "  ")
    yield "tasks"
    yield from described([_task(task, summary) for task in summary.report.tasks], "  ")
    if summary.sessions:
        yield "active sessions"
        yield from align_columns(
            [
                [
                    short_name(one.task),
                    f"session {one.attempt}",
                    one.adapter,
                    f"since {format_local_time(one.started)}",
                    one.worktree or "",
                ]
                for one in summary.sessions
            ],
            "  ",
        )
    yield "newest events"
    rows = [[str(one.position), format_local_time(one.time), event_text(one.event)] for one in summary.events]
    yield from align_columns(rows, "  ")
    yield "metrics"
    yield from wrapped(metrics_line(summary.report, summary.metrics), head="  ", indent="    ")


def _options(run: RunDocument) -> list[list[str]]:
    if run.imported is not None:
        own = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in run.imported.options.items()
        }
        ended = "" if run.ended is None else format_local_time(run.ended)
        was = {"started": format_local_time(run.started), "ended": ended, "status": run.imported.status or ""}
        return [[name, one_line(value)] for name, value in (*was.items(), *own.items()) if value]
    fields = {
        "started": format_local_time(run.started),
        "ended": "" if run.ended is None else format_local_time(run.ended),
        "file": run.config,
        "repository": run.repo,
        "base": run.base,
        "target": run.target,
        "capacity": str(run.capacity),
        "adapters": ", ".join(run.adapters),
        "sinks": ", ".join(run.sinks),
        "trackers": ", ".join(run.trackers),
    }
    return [[name, value] for name, value in fields.items() if value]


def _task(task: TaskReport, summary: RunSummary) -> list[str]:
    attempts = f"{task.attempts} {'attempt' if task.attempts == 1 else 'attempts'}"
    statuses = summary.phase_statuses(task.id)
    phases = ", ".join(f"{phase} {format_visit(status)}" for phase, status in statuses.items())
    minutes = summary.minutes.get(task.id)
    took = "" if minutes is None else format_elapsed(minutes * 60)
    where = [f"landed as {task.landed[:10]}" if task.landed else format_saved(task)]
    if task.pull_request is not None:
        where.append(f"pull request {task.pull_request}")
    why = "" if task.landed or task.reason is None else one_line(task.reason)
    rest = "; ".join(filter(None, [*where, summary.worktrees.get(task.id), why]))
    return [short_name(task.id), format_state(task.status, summary.report), attempts, phases, took, rest]


def metrics_line(report: RunReport, metrics: Metrics) -> str:
    """Return the metrics of a run on one line; omit those that are zero or unknown."""
    parts = [landed_summary(report), *state_counts(report)]
    if metrics.average_time_minutes is not None:
        parts.append(f"average time to land {format_elapsed(metrics.average_time_minutes * 60)}")
    if tokens := metrics.input_tokens + metrics.output_tokens:
        parts.append(f"{format_count(tokens)} tokens")
    if metrics.cost is not None:
        parts.append(format_cost(metrics.cost))
    return ", ".join(parts)
