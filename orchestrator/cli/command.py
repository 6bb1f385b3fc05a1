"""What the commands share: options, the context that each works with, and how one is performed."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import click

from orchestrator.cli.boundary import Log, boundary
from orchestrator.cli.output import Output
from orchestrator.cli.signals import Interrupt
from orchestrator.council import Council, open_council
from orchestrator.project import Project, find_project

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: one event a line, then one result object."
)
run_argument = click.argument("run", required=False)
run_option = click.option("--run", "run", metavar="RUN", help="Another run than the newest.")


@dataclass(frozen=True, slots=True)
class Context:
    """What every command works with."""

    output: Output
    log: Log
    interrupt: Interrupt


@asynccontextmanager
async def opened(log: Log, project: Project | None = None) -> AsyncIterator[Council]:
    """Open the council of a project, that of the current folder if none is given."""
    project = project or find_project(Path.cwd())
    async with open_council(project) as council:
        log.path = project.log_file
        yield council


def perform(command: Callable[[Context], Awaitable[int]], *, as_json: bool) -> None:
    """Run a command to its end and exit with its code; whatever it raises becomes a message and a code."""
    output, log = Output(as_json), Log()

    async def guarded() -> int:
        context = Context(output, log, Interrupt(output))
        return await context.interrupt.guard(command(context))

    with boundary(output, log):
        code = anyio.run(guarded)
    sys.exit(code)
