"""Commands that look at runs."""

from __future__ import annotations

from dataclasses import asdict

import click

from orchestrator.cli.command import Context, json_option, opened, perform, run_argument, show_result


@click.command()
@run_argument
@json_option
def status(run: str | None, as_json: bool) -> None:
    """Show how a run stands; the exit code says so too.

    Without RUN it is the newest.

    \b
    Examples:
      council status
      council status 20260102-030405-ab12 --json
    """

    async def command(context: Context) -> int:
        async with opened(context.log) as council:
            report = await council.status(run)
            await show_result(context, council, report)
            return report.exit_code

    perform(command, as_json=as_json, brief=True)


@click.command()
@json_option
def runs(as_json: bool) -> None:
    """List the runs of this project, the oldest first.

    \b
    Examples:
      council runs
      council runs --json
    """

    async def command(context: Context) -> int:
        async with opened(context.log) as council:
            found = await council.runs()
            if as_json:
                context.output.json({"runs": [report.to_json() for report in found]})
            for report in [] if as_json else found:
                landed = sum(task.landed is not None for task in report.tasks)
                told = f"{report.status:<12} {landed} of {len(report.tasks)} landed on {report.target}"
                context.output.text(f"{report.run}  {told}\n")
            return 0

    perform(command, as_json=as_json, brief=True)


@click.command()
@json_option
def where(as_json: bool) -> None:
    """Say where everything is kept.

    That is the state, the logs and the repositories of our own.

    \b
    Examples:
      council where
      council where --json
    """

    async def command(context: Context) -> int:
        async with opened(context.log) as council:
            places = await council.places()
            context.output.facts(
                {name: None if value is None else str(value) for name, value in asdict(places).items()}
            )
            return 0

    perform(command, as_json=as_json, brief=True)
