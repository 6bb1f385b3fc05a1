"""Commands of `council state` that check and prune the store."""

from __future__ import annotations

import os
from pathlib import Path

import anyio.to_thread
import click

from orchestrator.api.transfer import adopt_state
from orchestrator.cli.core.command import (
    CommandContext,
    explicit_store_url,
    json_option,
    open_council,
    run_command,
    store_option,
)
from orchestrator.cli.core.options import parse_duration_option, parse_size_option
from orchestrator.cli.render.findings import show_findings
from orchestrator.cli.render.text import printable
from orchestrator.domain.settings.quantities import format_size_short
from orchestrator.engine.diagnostics.findings import Level
from orchestrator.project import find_project
from orchestrator.repo.source.user_checkouts import refuse_tracked_project_folder
from orchestrator.system.instants import format_local_time


@click.command()
@store_option
@json_option
def health(as_json: bool) -> None:
    """Check the health of the state, and suggest fixes.

    Checks its integrity, size and growth, the latency of a commit, interrupted runs, silent sessions and unresolved
    conflicts. The exit code is 1 if there is a problem or a warning.

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
    """Accept a state that was not created on this machine.

    `council resume` executes the commands that its runs recorded. Therefore a `.council` from a repository, an archive
    or a backup of another machine is rejected until you accept it.

    \b
    Examples:
      council state adopt
      council state adopt --state /backup/state --json
    """

    async def command(context: CommandContext) -> int:
        url = explicit_store_url()
        if not url:
            project = find_project(Path())
            await refuse_tracked_project_folder(project, os.environ)
            url = await anyio.to_thread.run_sync(project.store)
        await adopt_state(url)
        if as_json:
            context.output.json({"state": url})
        else:
            context.output.text(f"{url} is accepted\n")
        return 0

    run_command(command, as_json=as_json)


@click.command()
@click.option(
    "--older-than",
    metavar="AGE",
    callback=parse_duration_option,
    help="Prune history older than this; default: as in the file.",
)
@click.option(
    "--max-size",
    metavar="SIZE",
    callback=parse_size_option,
    help="Prune until the log is no larger; default: as in the file.",
)
@store_option
@json_option
def compact(older_than: float | None, max_size: int | None, as_json: bool) -> None:
    """Prune old history: keep only the last 10 versions of each document.

    An active run prunes by itself, according to `state` in its file. The current state is never pruned.

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


def _shown(path: Path) -> str:
    return printable(os.path.relpath(path))


@click.command()
@store_option
@json_option
def views(as_json: bool) -> None:
    """Write readable copies of the state, for `cat` and `jq`.

    They are in .council/views. From then on each run updates them when it ends. They are never read back: changing or
    deleting them has no effect.

    \b
    Examples:
      council state views
      council state views --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            views = await council.state.export_views()
            path = council.project.views
            time = f", {format_local_time(views.time)}" if views.position else ""
            if as_json:
                facts = {"path": str(path), "position": views.position, "time": views.time if views.position else None}
                context.output.json({**facts, "damage": list(council.damage)})
            else:
                context.output.text(f"{_shown(path)}: position {views.position}{time}\n")
            return 0

    run_command(command, as_json=as_json)
