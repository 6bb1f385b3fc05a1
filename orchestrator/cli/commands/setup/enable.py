"""Enable adapters that a run has disabled or put into cooldown."""

from __future__ import annotations

import click

from orchestrator.cli.core.command import (
    CommandContext,
    json_option,
    open_council,
    run_command,
    run_option,
    show_result,
    store_option,
)


@click.command("enable")
@click.argument("names", metavar="[ADAPTER]...", nargs=-1)
@run_option
@store_option
@json_option
def enable(names: tuple[str, ...], run: str | None, as_json: bool) -> None:
    """Enable adapters that a run has disabled or paused.

    For example after you logged in or bought credit. Without ADAPTER, enables all of them. An active run starts their
    tasks at once; otherwise run `council resume`. A key in an environment variable of an active process can't be
    changed: stop that process and resume the run.

    \b
    Examples:
      council adapters enable claude
      council adapters enable --run 20260102-030405-ab12
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            await show_result(context, council, await council.runs.enable_adapters(*names, run=run), code=0)
            return 0

    run_command(command, as_json=as_json)
