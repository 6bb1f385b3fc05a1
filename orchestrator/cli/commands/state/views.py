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
@click.option("--rebuild", is_flag=True, help="Make them anew from nothing.")
@store_option
@json_option
def views(rebuild: bool, as_json: bool) -> None:
    """Bring the readable copies of the state up to date, and say where they are.

    They are files for `cat` and `jq` in .council/views. A run that is at work keeps them up to date; nothing reads them
    back, so that to change or delete them changes nothing.

    \b
    Examples:
      council state views
      council state views --rebuild --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            stand = await council.refresh_views(rebuild=rebuild)
            path = council.project.views
            moment = f", {format_local_time(stand.time)}" if stand.position else ""
            if as_json:
                facts = {"path": str(path), "position": stand.position, "time": stand.time if stand.position else None}
                context.output.json({**facts, "damage": list(council.damage)})
            else:
                context.output.text(f"{_shown(path)}: position {stand.position}{moment}\n")
            return 0

    run_command(command, as_json=as_json)
