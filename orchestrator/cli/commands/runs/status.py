"""Commands that show runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from orchestrator.cli.core.command import CouncilContext, council_command, run_argument
from orchestrator.cli.render.next_steps import Step, halt_steps, run_step
from orchestrator.cli.render.run_summary import metrics_line
from orchestrator.cli.render.text import align_columns, printable, wrapped
from orchestrator.engine.reports.report import RunReport

if TYPE_CHECKING:
    from orchestrator.domain.runs.metrics import Metrics


@click.command()
@run_argument
@council_command(is_short_lived=True)
async def status(context: CouncilContext, run: str | None) -> int:
    """Show the state of a run, also as the exit code.

    RUN defaults to the newest run.

    \b
    Examples:
      council status
      council status 20260102-030405-ab12 --json
    """
    return await context.show_result(await context.council.runs.status(run))


@click.command()
@run_argument
@council_command(is_short_lived=True)
async def conflicts(context: CouncilContext, run: str | None) -> None:
    """List predicted merge conflicts between the running sessions of a run.

    RUN defaults to the newest run.

    \b
    Examples:
      council conflicts
      council conflicts 20260102-030405-ab12 --json
    """
    found = await context.council.sessions.predicted_conflicts(run)
    rows = [(" and ".join(one.tasks), printable(", ".join(one.paths))) for one in found]
    context.answer_with_damage(
        lambda: {"conflicts": [one._asdict() for one in found]},
        align_columns(rows, "  ") if rows else ["no predicted conflicts"],
    )


@click.command()
@click.option(
    "--active", is_flag=True, help="List only active, interrupted and halted runs, and runs with waiting tasks."
)
@council_command(is_short_lived=True)
async def runs(context: CouncilContext, active: bool) -> None:
    """List the runs of this project, oldest first.

    \b
    Examples:
      council runs
      council runs --active
      council runs --json
    """
    council = context.council
    found = [(report, await council.reports.metrics(report.run)) for report in await council.runs.list(active=active)]
    context.answer_with_damage(
        lambda: {"runs": [{**report.to_json(), "metrics": asdict(metrics)} for report, metrics in found]},
        (line for report, metrics in found for line in _run_lines(report, metrics)),
    )
    if not found:
        context.output.notice("no active, interrupted, halted or waiting runs" if active else "no runs")


def _run_lines(report: RunReport, metrics: Metrics) -> Iterator[str]:
    parts = [metrics_line(report, metrics)]
    if report.merges is not None:
        parts.append(f"merge of run {report.merges}")
    if report.merged_by is not None:
        parts.append(f"merged by run {report.merged_by}")
    yield from wrapped(", ".join(parts), head=f"{report.run}  {report.status:<12} ", indent="    ")
    step = run_step(report)
    yield from (f"    {one}" for one in halt_steps(report) or ([Step("next", step)] if step else []))


@click.command()
@council_command(is_short_lived=True)
async def where(context: CouncilContext) -> None:
    """Print the locations of the state, the logs and the repositories.

    \b
    Examples:
      council where
      council where --json
    """
    found = await context.council.state.paths()
    paths = {name: None if path is None else str(path) for name, path in asdict(found).items()}
    width = max(map(len, paths))
    context.output.answer(lambda: paths, (f"{name:<{width}}  {path or '-'}" for name, path in paths.items()))
