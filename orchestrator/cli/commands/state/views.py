"""The command that writes the readable copies of the state."""

from __future__ import annotations

import os
from pathlib import Path

import click

from orchestrator.cli.core.command import CommandContext, json_option, open_council, run_command, store_option
from orchestrator.cli.render.text import printable
from orchestrator.system.instants import format_local_time


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
