"""The `council` command: parse, call the council, show what it says. Nothing is decided here."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import click

from orchestrator.cli.boundary import Log, boundary
from orchestrator.cli.output import Output
from orchestrator.cli.signals import Interrupt
from orchestrator.config.load import load_config
from orchestrator.council import Council, open_council, project_of
from orchestrator.plugins import load_adapter_types
from orchestrator.project import Project, find_project

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON: one event a line, then one result object.")
_run_id = click.argument("run", required=False)


@dataclass(frozen=True, slots=True)
class Context:
    """What every command works with."""

    output: Output
    log: Log
    interrupt: Interrupt


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cli-council", prog_name="council")
def main() -> None:
    """Run many AI coding CLIs at once on one git repository.

    Each session works in a worktree of its own; finished work lands on the target branch one merge at a time.

    \b
    council run council.yaml    run the tasks of a file
    council status              how the newest run stands
    council resume              go on with what a crash or Ctrl-C cut off

    Exit codes: 0 all landed, 1 some did not, 2 bad input, 3 our fault (the log's path is printed), 130 interrupted.
    """


@main.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--allow-deferred", is_flag=True, help="Start although the target's checkout is dirty; land on resume.")
@_json
def run_file(file: Path, allow_deferred: bool, as_json: bool) -> None:
    """Run the tasks of FILE and land what they build."""

    async def command(context: Context) -> int:
        config = await anyio.to_thread.run_sync(load_config, file, load_adapter_types())
        project = await project_of(config)
        async with _open(project, context.log) as council:
            run = await council.create_run(config, allow_deferred=allow_deferred)
            return await _execute(council, run, context, after=0)

    _perform(command, as_json=as_json)


@main.command()
@_run_id
@_json
def resume(run: str | None, as_json: bool) -> None:
    """Go on with RUN (the newest if left out) from wherever it was cut off."""

    async def command(context: Context) -> int:
        async with _open(_current_project(), context.log) as council:
            name = run or await council.newest_run()
            return await _execute(council, name, context, after=await council.position())

    _perform(command, as_json=as_json)


@main.command()
@_run_id
@_json
def status(run: str | None, as_json: bool) -> None:
    """Show how RUN (the newest if left out) stands; the exit code says so too."""

    async def command(context: Context) -> int:
        async with _open(_current_project(), context.log) as council:
            report = await council.status(run or await council.newest_run())
            context.output.result(report)
            return report.exit_code

    _perform(command, as_json=as_json)


@main.command()
@_json
def where(as_json: bool) -> None:
    """Say where the state, the log and the repositories of our own are kept."""

    async def command(context: Context) -> int:
        async with _open(_current_project(), context.log) as council:
            places = await council.places()
            context.output.facts(
                {name: None if value is None else str(value) for name, value in asdict(places).items()}
            )
            return 0

    _perform(command, as_json=as_json)


def _current_project() -> Project:
    return find_project(Path.cwd())


@asynccontextmanager
async def _open(project: Project, log: Log) -> AsyncIterator[Council]:
    async with open_council(project) as council:
        log.path = project.log_file
        yield council


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


def _perform(command: Callable[[Context], Awaitable[int]], *, as_json: bool) -> None:
    output, log = Output(as_json), Log()

    async def guarded() -> int:
        context = Context(output, log, Interrupt(output))
        return await context.interrupt.guard(command(context))

    with boundary(output, log):
        code = anyio.run(guarded)
    sys.exit(code)


if __name__ == "__main__":
    main()
