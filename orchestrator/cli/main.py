"""The `council` command: parse, call the council, show what it says. Nothing is decided here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import anyio
import click

from orchestrator.cli.command import Context, json_option, opened, perform, run_argument
from orchestrator.cli.output import Output
from orchestrator.cli.salvage import salvage
from orchestrator.cli.tasks import cancel, diff, logs, retry
from orchestrator.config.load import load_config
from orchestrator.council import Council, project_of
from orchestrator.plugins import load_adapter_types


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cli-council", prog_name="council")
def main() -> None:
    """Run many AI coding CLIs at once on one git repository.

    Each session works in a worktree of its own; finished work lands on the target branch one merge at a time.

    \b
    council run council.yaml    run the tasks of a file
    council status              how the newest run stands
    council resume              go on with what a crash or Ctrl-C cut off
    council logs TASK -f        what a task's program prints
    council retry TASK          try again what failed

    Exit codes: 0 all landed, 1 some did not, 2 bad input, 3 our fault (the log's path is printed), 130 interrupted.
    """


@main.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--allow-deferred", is_flag=True, help="Start although the target's checkout is dirty; land on resume.")
@json_option
def run_file(file: Path, allow_deferred: bool, as_json: bool) -> None:
    """Run the tasks of FILE and land what they build."""

    async def command(context: Context) -> int:
        config = await anyio.to_thread.run_sync(load_config, file, load_adapter_types())
        project = await project_of(config)
        async with opened(context.log, project) as council:
            run = await council.create_run(config, allow_deferred=allow_deferred)
            return await _execute(council, run, context, after=0)

    perform(command, as_json=as_json)


@main.command()
@run_argument
@json_option
def resume(run: str | None, as_json: bool) -> None:
    """Go on with a run from wherever it was cut off.

    Without RUN it is the newest.
    """

    async def command(context: Context) -> int:
        async with opened(context.log) as council:
            name = run or await council.newest_run()
            return await _execute(council, name, context, after=await council.position())

    perform(command, as_json=as_json)


@main.command()
@run_argument
@json_option
def status(run: str | None, as_json: bool) -> None:
    """Show how a run stands; the exit code says so too.

    Without RUN it is the newest.
    """

    async def command(context: Context) -> int:
        async with opened(context.log) as council:
            report = await council.status(run or await council.newest_run())
            context.output.result(report)
            return report.exit_code

    perform(command, as_json=as_json)


@main.command()
@json_option
def runs(as_json: bool) -> None:
    """List the runs of this project, the oldest first."""

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

    perform(command, as_json=as_json)


@main.command()
@json_option
def where(as_json: bool) -> None:
    """Say where everything is kept.

    That is the state, the logs and the repositories of our own.
    """

    async def command(context: Context) -> int:
        async with opened(context.log) as council:
            places = await council.places()
            context.output.facts(
                {name: None if value is None else str(value) for name, value in asdict(places).items()}
            )
            return 0

    perform(command, as_json=as_json)


async def _execute(council: Council, run: str, context: Context, after: int) -> int:
    """Take a run to its end with its events shown; the first signal then stops it cleanly."""
    progress = _Progress()
    context.interrupt.stop = council.stop
    output = context.output
    async with anyio.create_task_group() as group:
        group.start_soon(progress.show, council, run, output, after)
        report = await council.execute(run)
        await progress.reach(await council.position())
        group.cancel_scope.cancel()
    output.result(report)
    return report.exit_code


class _Progress:
    """Shows a run's events, and knows up to which position of the log it has."""

    def __init__(self) -> None:
        self._shown, self._moved = 0, anyio.Event()

    async def show(self, council: Council, run: str, output: Output, after: int) -> None:
        self._advance(after)
        async for record in council.records(after):
            for event in record.events:
                if event.data.get("run") == run:
                    output.event(record.time, event)
            self._advance(record.position)

    async def reach(self, position: int) -> None:
        while self._shown < position:
            await self._moved.wait()

    def _advance(self, position: int) -> None:
        self._shown = position
        self._moved.set()
        self._moved = anyio.Event()


for _command in (cancel, retry, logs, diff, salvage):
    main.add_command(_command)


if __name__ == "__main__":
    main()
