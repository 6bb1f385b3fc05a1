"""Commands that show runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from orchestrator.cli.core.command import (
    CommandContext,
    json_option,
    open_council,
    print_damage,
    run_argument,
    run_command,
    show_result,
    store_option,
)
from orchestrator.cli.render.next_steps import halt_steps, run_step
from orchestrator.cli.render.overview import metrics_line
from orchestrator.cli.render.text import printable, wrapped
from orchestrator.engine.reports.report import RunReport

if TYPE_CHECKING:
    from orchestrator.domain.runs.metrics import Metrics


@click.command()
@run_argument
@store_option
@json_option
def status(run: str | None, as_json: bool) -> None:
    """Show the state of a run, also as the exit code.

    RUN defaults to the newest run.

    \b
    Examples:
      council status
      council status 20260102-030405-ab12 --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            report = await council.runs.status(run)
            await show_result(context, council, report)
            return report.exit_code

    run_command(command, as_json=as_json, brief=True)


@click.command()
@click.option(
    "--active", is_flag=True, help="List only active, interrupted and halted runs, and runs with waiting tasks."
)
@store_option
@json_option
def runs(active: bool, as_json: bool) -> None:
    """List the runs of this project, oldest first.

    \b
    Examples:
      council runs
      council runs --active
      council runs --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            found = await council.runs.list(active=active)
            told = [(report, await council.reports.metrics(report.run)) for report in found]
            if as_json:
                listed = [{**one.to_json(), "metrics": asdict(metrics)} for one, metrics in told]
                context.output.json({"runs": listed, "damage": list(council.damage)})
            if not as_json:  # it may have hit a run that is not listed then
                print_damage(context, council.damage)
            for report, metrics in [] if as_json else told:
                for line in _run_lines(report, metrics):
                    context.output.text(f"{line}\n")
                for line in _step_lines(report):
                    context.output.text(f"    {line}\n")
            if not found:
                context.output.notice("no active, interrupted, halted or waiting runs" if active else "no runs")
            return 0

    run_command(command, as_json=as_json, brief=True)


def _step_lines(report: RunReport) -> Sequence[str]:
    """Return the lines with the next commands for a run."""
    if steps := halt_steps(report):
        return [printable(str(step)) for step in steps]
    return [f"next: {step}"] if (step := run_step(report)) else []


def _run_lines(report: RunReport, metrics: Metrics) -> Iterator[str]:
    parts = [metrics_line(report, metrics)]
    if report.merges is not None:
        parts.append(f"merge of run {report.merges}")
    if report.merged_by is not None:
        parts.append(f"merged by run {report.merged_by}")
    yield from wrapped(printable(", ".join(parts)), head=f"{report.run}  {report.status:<12} ", indent="    ")


@click.command()
@store_option
@json_option
def where(as_json: bool) -> None:
    """Print the locations of the state, the logs and the repositories.

    \b
    Examples:
      council where
      council where --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            places = await council.paths()
            context.output.facts(
                {name: None if value is None else str(value) for name, value in asdict(places).items()}
            )
            return 0

    run_command(command, as_json=as_json, brief=True)
