"""The command that synchronizes a run with its trackers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from orchestrator.cli.core.command import CouncilContext, council_command, run_argument
from orchestrator.cli.render.text import pluralize, printable

if TYPE_CHECKING:
    from orchestrator.engine.tracker_sync import SyncReport, TrackerStatus


@click.command()
@run_argument
@click.option("--status", is_flag=True, help="Only show what is recorded about the trackers, and write nothing.")
@council_command()
async def sync(context: CouncilContext, run: str | None, *, status: bool) -> None:
    """Show the states of a run's tasks in its trackers, and read the requests there.

    An active run does this by itself: when a task changes, and every `sync_interval`. It performs the requests; if no
    process is active, `council resume` does.

    \b
    Examples:
      council sync
      council sync --status
      council sync 20260102-030405-ab12 --json
    """
    name = await context.council.runs.find(run)
    if status:
        found = await context.council.runs.sync_status(name)
        context.answer_with_damage(
            lambda: {"run": name, "trackers": [asdict(one) for one in found]},
            [printable(line) for one in found for line in _status_lines(one)],
        )
        return
    reports = await context.council.runs.sync(name)
    context.answer_with_damage(
        lambda: {"run": name, "trackers": [asdict(one) for one in reports]},
        [printable(line) for one in reports for line in _lines(one)],
    )
    if any(one.requested for one in reports) and not await context.council.runs.has_live_process(name):
        context.output.notice(f"no process is active in the run: `council resume {name}` performs the requests")


def _status_lines(status: TrackerStatus) -> Iterator[str]:
    requests = pluralize(status.handled, "request")
    yield f"{status.tracker}: {pluralize(status.tasks, 'task')}, {status.ended} ended, {requests} handled"
    if status.failing is not None:
        yield f"  failing: {status.failing}"


def _lines(report: SyncReport) -> Iterator[str]:
    yield f"{report.tracker}: {pluralize(report.shown, 'task')} shown"
    yield from (f"  requested: {request}" for request in report.requested)
    yield from (f"  refused: {refusal}" for refusal in report.refused)
    yield from (f"  not shown: {task}, which another run works on" for task in report.conflicts)
