"""Commands of `council state` that check, prune, accept and export the store."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import anyio.to_thread
import click

from orchestrator.api.transfer import adopt_state
from orchestrator.cli.core.command import (
    CommandContext,
    CouncilContext,
    async_command,
    council_command,
    explicit_store_url,
    store_option,
)
from orchestrator.cli.core.options import parse_duration_option, parse_size_option
from orchestrator.cli.render.findings import show_findings
from orchestrator.domain.settings.quantities import format_size_short
from orchestrator.engine.diagnostics.findings import Level
from orchestrator.project import find_project
from orchestrator.repo.source.user_checkouts import refuse_tracked_project_folder
from orchestrator.system.clock import format_local_time


@click.command()
@council_command()
async def health(context: CouncilContext) -> int:
    """Check the health of the state, and suggest fixes.

    Checks its integrity, size and growth, the latency of a read and a commit, the server with its connections and
    replicas, interrupted runs, silent sessions and unresolved conflicts. The exit code is 1 if there is a problem or a
    warning.

    \b
    Examples:
      council state health
      council state health --json
    """
    found = await context.council.state.check_health()
    code = int(any(finding.level is not Level.OK for finding in found.findings))
    latency = {"read": found.read_seconds, "commit": found.commit_seconds}
    server = None if found.server is None else asdict(found.server)
    show_findings(found.findings, code, context.output, latency=latency, server=server)
    return code


@click.command()
@store_option
@async_command()
async def adopt(context: CommandContext) -> None:
    """Accept a state that was not created on this machine.

    `council resume` executes the commands that its runs recorded. Therefore a `.council` from a repository, an archive
    or a backup of another machine is rejected until you accept it.

    \b
    Examples:
      council state adopt
      council state adopt --state /backup/state --json
    """
    url = explicit_store_url()
    if not url:
        project = find_project(Path())
        await refuse_tracked_project_folder(project, os.environ)
        url = await anyio.to_thread.run_sync(project.store)
    await adopt_state(url)
    context.output.answer(lambda: {"state": url}, [f"{url} is accepted"])


@click.command()
@click.option(
    "--older-than",
    metavar="AGE",
    callback=parse_duration_option,
    help="Prune history older than this; default: the value in the file.",
)
@click.option(
    "--max-size",
    metavar="SIZE",
    callback=parse_size_option,
    help="Prune until the log is no larger than this; default: the value in the file.",
)
@council_command()
async def compact(context: CouncilContext, older_than: float | None, max_size: int | None) -> None:
    """Prune old versions of documents.

    Keeps the last 10 versions of each document. The current state is never pruned. An active run prunes automatically,
    as configured by `state` in its file.

    \b
    Examples:
      council state compact
      council state compact --older-than 7d
      council state compact --max-size 100MB --json
    """
    done = await context.council.state.compact(older_than, max_size)
    first = f"; history starts at position {done.first}" if done.first else ""
    context.output.answer(
        lambda: {"before": done.before, "after": done.after, "first": done.first},
        [f"log size: {format_size_short(done.after)} (was {format_size_short(done.before)}){first}"],
    )


@click.command()
@council_command()
async def views(context: CouncilContext) -> None:
    """Write readable copies of the state, for `cat` and `jq`.

    The copies are in .council/views. From then on, each run updates them when it ends. They are never read back:
    changing or deleting them has no effect.

    \b
    Examples:
      council state views
      council state views --json
    """
    views = await context.council.state.export_views()
    path = context.council.project.views
    shown = await anyio.to_thread.run_sync(os.path.relpath, path)
    time = f", {format_local_time(views.time)}" if views.position else ""
    context.answer_with_damage(
        lambda: {"path": str(path), "position": views.position, "time": views.time if views.position else None},
        [f"{shown}: position {views.position}{time}"],
    )
