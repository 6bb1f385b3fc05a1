"""Commands of `council state` that look after the store: how it does, and how much of the past it keeps."""

from __future__ import annotations

import os
from pathlib import Path

import anyio.to_thread
import click

from orchestrator.cli.core.command import (
    CommandContext,
    explicit_store_url,
    json_option,
    open_council,
    run_command,
    store_option,
)
from orchestrator.cli.core.option_parsers import parse_duration_option, parse_size_option
from orchestrator.cli.render.findings import show_findings
from orchestrator.config.source.quantities import format_size_short
from orchestrator.engine.diagnostics.findings import Level
from orchestrator.project import find_project
from orchestrator.repo.source.user_checkouts import refuse_tracked_project_folder


@click.command()
@store_option
@json_option
def health(as_json: bool) -> None:
    """Look how the state does, and say what to mend.

    That is whether all of it can be read, how large it is and how fast it grows, how long a commit takes, runs that
    were cut off, sessions that print nothing, and conflicts that wait. The exit code is 1 if there is a problem or a
    warning.

    \b
    Examples:
      council state health
      council state health --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            findings = await council.state.check_health()
            code = int(any(finding.level is not Level.OK for finding in findings))
            show_findings(findings, code, context.output)
            return code

    run_command(command, as_json=as_json)


@click.command()
@store_option
@json_option
def adopt(as_json: bool) -> None:
    """Accept a state that was not made on this machine.

    Its runs are obeyed from then on: `council resume` executes their commands. That is why a `.council` that came with
    a repository, an archive or a backup from another machine is refused until you accept it.

    \b
    Examples:
      council state adopt
      council state adopt --state /backup/state --json
    """

    async def command(context: CommandContext) -> int:
        from orchestrator.api.transfer import adopt_state  # noqa: PLC0415  seldom needed

        url = explicit_store_url()
        if not url:
            project = find_project(Path())
            await refuse_tracked_project_folder(project, os.environ)
            url = await anyio.to_thread.run_sync(project.store)
        await adopt_state(url)
        if as_json:
            context.output.json({"state": url})
        else:
            context.output.text(f"{url} is used from now on\n")
        return 0

    run_command(command, as_json=as_json)


@click.command()
@click.option(
    "--older-than", metavar="AGE", callback=parse_duration_option, help="Of what is older; else as the file says."
)
@click.option(
    "--max-size", metavar="SIZE", callback=parse_size_option, help="Until the log is no larger; else as the file says."
)
@store_option
@json_option
def compact(older_than: float | None, max_size: int | None, as_json: bool) -> None:
    """Let go of the past: of old commits only the last 10 versions of each document stay.

    A run at work does so by itself, as `state` in its file says. How things stand now never goes.

    \b
    Examples:
      council state compact
      council state compact --older-than 7d
      council state compact --max-size 100MB --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            done = await council.state.compact(older_than, max_size)
            if as_json:
                context.output.json({"before": done.before, "after": done.after, "first": done.first})
            else:
                goes = f", goes back to position {done.first}" if done.first else ""
                context.output.text(
                    f"the log takes {format_size_short(done.after)}, took {format_size_short(done.before)}{goes}\n"
                )
            return 0

    run_command(command, as_json=as_json)
