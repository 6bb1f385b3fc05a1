"""The command that shows a task in full."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click

from orchestrator.api.council import Council
from orchestrator.cli.core.command import CouncilContext, council_command, run_option
from orchestrator.cli.core.completion import complete_tasks
from orchestrator.cli.render.next_steps import Step, halt_steps, run_step, task_steps
from orchestrator.cli.render.result import format_state
from orchestrator.cli.render.task_details import task_detail_lines
from orchestrator.cli.render.text import printable
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.reports.task_details import TaskDetails
from orchestrator.errors import RefusedError


@click.command()
@click.argument("task", shell_complete=complete_tasks)
@run_option
@council_command(is_short_lived=True)
async def show(context: CouncilContext, task: str, run: str | None) -> None:
    """Show a task in full: phases, sessions, handoffs, cost, landing.

    Includes the inputs of each phase and the omitted values, findings, tokens and time, and the latest activity of a
    running task. Handoffs are shortened; --json prints them in full.

    \b
    Examples:
      council show models
      council show models --run 20260102-030405-ab12 --json
    """
    details = await context.council.tasks.details(task, run)
    if context.output.as_json:
        context.output.json({**details.to_json(), "exit": 0})
        return
    state, steps = await _state_and_steps(context.council, details)
    for line in (*task_detail_lines(details, time.time(), state), *steps):
        context.output.text(f"{line}\n")


async def _state_and_steps(council: Council, details: TaskDetails) -> tuple[str, Sequence[str]]:
    """Return the label of a task's status, and the next commands as lines."""
    try:
        report = await council.runs.status(details.run)
    except RefusedError:  # its repositories are gone
        return details.status.replace("_", " "), ()
    shown = next(one for one in report.tasks if one.id == details.id)
    steps = task_steps(shown, report, is_newest=await council.runs.newest() == details.run, is_shown=True)
    if not steps and shown.status != TaskStatus.LANDED:
        steps = halt_steps(report) or [Step("next", own)] if (own := run_step(report)) else ()
    return format_state(details.status, report), [printable(str(step)) for step in steps]
